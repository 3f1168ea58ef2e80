"Simulated structures: the same from the same seed, in micrometres whatever the pixel, never empty, labelled where dye is."

import pytest
import torch
from counts import Operations

from fluogen.core import FluogenError, make_generator
from fluogen.simulation.geometry import draw_outline, draw_polygons, lattice_sites, pull_inside, walk
from fluogen.simulation.organelles import paint_ccps
from fluogen.simulation.raster import Canvas, Stamp, paint_points, smooth_noise, take_ids
from fluogen.simulation.structures import STRUCTURES, StructureError, render, structure_of

PROMPTS = [prompt for spec in STRUCTURES.values() for prompt in spec.prompts]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blur(density, pixel_um, fwhm_um):
    sigma, size = fwhm_um / 2.3548 / pixel_um, density.shape[-1]
    place = torch.arange(size)
    kernel = torch.exp(-((place[:, None] - place) / sigma)**2 / 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    return kernel @ density @ kernel.T


def half_width(profile, step):
    "Full width at half maximum of a peaked profile, by linear interpolation."
    top, peak = profile.max(), int(profile.argmax())
    width = 0.0
    for part in (profile[peak:], profile[:peak + 1].flip(0)):
        below = int((part < top / 2).nonzero()[0])
        width += below - 1 + float((part[below - 1] - top / 2) / (part[below - 1] - part[below]))
    return width * step


def grain_size(density, pixel_um, fwhm_um):
    "Half width at half maximum of the blurred images' mean autocorrelation, um."
    image = blur(density, pixel_um, fwhm_um)
    image = image / image.mean((1, 2), keepdim=True) - 1
    power = torch.fft.rfft2(image, s=[2 * n for n in image.shape[1:]]).abs()**2
    correlation = torch.fft.irfft2(power / power.sum((1, 2), keepdim=True)).mean(0)
    line = (correlation[0, :image.shape[-1]] + correlation[:image.shape[-1], 0]) / 2
    below = int((line < line[0] / 2).nonzero()[0])
    return pixel_um * (below - 1 + float((line[below - 1] - line[0] / 2) / (line[below - 1] - line[below])))


# --- the catalogue

def test_prompts_name_one_structure():
    assert len(PROMPTS) == len(set(PROMPTS)) >= 16
    for name, spec in STRUCTURES.items():
        assert spec.name == name == structure_of(name) and spec.prompts and 0.01 < spec.pixel_um < 2
        assert all(structure_of(prompt) == name for prompt in spec.prompts)
        assert set(spec.options) | set(spec.pixels_um) <= set(spec.prompts)
    assert {"microtubules", "factin", "er", "ccps", "mitochondria", "nuclei", "lysosomes", "membranes", "cocci",
            "rods"} <= set(STRUCTURES)


@pytest.mark.parametrize("wrong, near", [("microtubule", "microtubules"), ("er of cos-7", "ER of COS-7"), ("", "factin")])
def test_unknown_structure_names_the_nearest(wrong, near):
    with pytest.raises(StructureError) as error:
        render(wrong, 1, 32, generator=make_generator(0))
    assert near in str(error.value) and "\n" not in str(error.value) and isinstance(error.value, FluogenError)


@pytest.mark.parametrize("change", [dict(n=0), dict(size_px=4), dict(pixel_um=0.0), dict(pixel_um=float("nan")),
                                    dict(generator=None), dict(n=1.5), dict(size_px="64")])
def test_senseless_sizes_are_refused(change):
    arguments = dict(structure="er", n=1, size_px=32, pixel_um=0.03, generator=make_generator(0)) | change
    with pytest.raises(StructureError):
        render(**arguments)


# --- every structure

@pytest.mark.parametrize("prompt", PROMPTS)
def test_seeded_finite_and_labelled(prompt):
    first, again = (render(prompt, 3, 48, generator=make_generator(5, prompt), instances=True) for _ in range(2))
    assert torch.equal(first.density, again.density) and torch.equal(first.instances, again.instances)
    assert torch.equal(first.density, render(prompt, 3, 48, generator=make_generator(5, prompt)).density), "labels change nothing"
    assert not torch.equal(first.density, render(prompt, 3, 48, generator=make_generator(6, prompt)).density)
    assert not torch.equal(first.density[0], first.density[1])
    assert first.density.shape == first.instances.shape == (3, 48, 48)
    assert first.density.dtype == torch.float32 and first.instances.dtype == torch.int32
    assert first.density.isfinite().all() and (first.density >= 0).all() and (first.instances >= 0).all()
    assert first.prompt == prompt and render(prompt, 1, 16, generator=make_generator(0)).instances is None


@pytest.mark.parametrize("prompt", PROMPTS)
def test_hardly_ever_empty_and_labels_lie_on_dye(prompt):
    phantom = render(prompt, 40, 96, generator=make_generator(1, prompt), instances=True)
    seen = blur(phantom.density, phantom.pixel_um, 4 * phantom.pixel_um)
    contrast = seen.flatten(1).amax(1) / seen.flatten(1).quantile(0.2, dim=1).clamp_min(1e-9)
    labelled = phantom.instances > 0
    assert (contrast > 1.8).float().mean() >= 0.95
    assert labelled.flatten(1).any(1).float().mean() >= 0.95
    assert (phantom.density[labelled] > 0).all()
    if (~labelled).any() and structure_of(prompt) not in ("er", "cytoplasm", "membranes"):   # there, whole polygons
        assert phantom.density[labelled].mean() > 2 * phantom.density[~labelled].mean()


@pytest.mark.parametrize("size_px, scale", [(33, 1.0), (64, 0.4), (64, 4.0), (200, 2.0)])
def test_any_size_and_pixel(size_px, scale):
    for name, spec in STRUCTURES.items():
        phantom = render(name, 1, size_px, spec.pixel_um * scale, make_generator(0), instances=True)
        assert phantom.density.shape == (1, size_px, size_px) and phantom.density.isfinite().all(), name


def test_more_images_than_fit_one_chunk():
    assert render("ccps", 21, 96, generator=make_generator(0)).density.shape == (21, 96, 96)


# --- micrometres

@pytest.mark.parametrize("prompt", ["ER of COS-7", "CCPs of COS-7", "Mitochondria of BPAE", "Lysosomes of HeLa",
                                    "Microtubules of COS-7", "F-actin of COS-7", "S. aureus", "E. coli",
                                    "DNA of U2OS", "Zebrafish embryos"])
def test_structures_keep_their_size_when_the_pixel_is_halved(prompt):
    pixel = STRUCTURES[structure_of(prompt)].pixel_of(prompt)
    coarse = render(prompt, 32, 80, pixel, make_generator(2))
    fine = render(prompt, 16, 160, pixel / 2, make_generator(3))
    sizes = [grain_size(phantom.density, phantom.pixel_um, 3.2 * pixel) for phantom in (coarse, fine)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.25, sizes
    levels = [phantom.density.mean().item() for phantom in (coarse, fine)]
    assert abs(levels[0] / levels[1] - 1) < 0.4, levels


@pytest.mark.parametrize("pixel_um", [0.0157, 0.0313])
def test_a_filament_adds_no_width(pixel_um):
    size = round(4 / pixel_um)
    canvas = Canvas(1, size, pixel_um, make_generator(0))
    line = walk(canvas, torch.full((2, 1, 1), 2.003), torch.full((1, 1), 0.0), 8.0, torch.zeros(1, 1, 2))
    step_um = (line[..., 1] - line[..., 0]).norm().item()
    paint_points(canvas, line, torch.full((1, 1, 1), step_um))
    profile = blur(canvas.density, pixel_um, 0.1)[0, :, size // 2]
    least, most = 0.1, (0.1**2 + (1.18 * pixel_um)**2)**0.5          # bilinear weights add at most half a pixel's sigma
    assert 0.97 * least < half_width(profile, pixel_um) < 1.08 * most
    assert profile.sum().item() * pixel_um == pytest.approx(1.0, rel=0.02)          # linear density 1 per um


@pytest.mark.parametrize("pixel_um", [0.01, 0.02])
def test_pits_have_their_diameter(pixel_um):
    canvas = Canvas(6, round(2.5 / pixel_um), pixel_um, make_generator(0), instances=True)
    paint_ccps(canvas, diameter_um=(0.2, 0.2), density=1.5)
    spans = []
    for labels in canvas.instances:
        for label in labels.unique()[1:]:
            y, x = (labels == label).nonzero().T
            if min(y.min(), x.min()) > 0 and max(y.max(), x.max()) < canvas.size_px - 1 and len(y) >= 12:
                spans.append(float(max(y.max() - y.min(), x.max() - x.min())) * pixel_um)
    assert len(spans) > 10 and torch.tensor(spans).median().item() == pytest.approx(0.2, abs=0.025)


# --- tools

def test_points_keep_mass_and_centre_and_do_not_leak_in_from_outside():
    canvas = Canvas(1, 24, 0.1, make_generator(0))
    paint_points(canvas, torch.tensor([[[1.234]], [[0.777]]]), torch.ones(1, 1))
    mass = canvas.density[0] * 0.01
    y, x = canvas.pixels()
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    assert (mass * y[0]).sum().item() == pytest.approx(1.234, abs=1e-5)
    assert (mass * x[0]).sum().item() == pytest.approx(0.777, abs=1e-5)
    outside = Canvas(1, 24, 0.1, make_generator(0), instances=True)
    places = torch.tensor([[-5.0, 1.0, 9.0, 1.0, -0.051, 2.451], [1.0, -3.0, 1.0, 99.0, 1.0, 1.0]]).view(2, 1, 6)
    paint_points(outside, places, torch.ones(1, 6), take_ids(outside, 6))
    assert outside.density.sum() == 0 and outside.instances.sum() == 0


def test_dark_points_leave_no_label():
    canvas = Canvas(1, 24, 0.1, make_generator(0), instances=True)
    paint_points(canvas, torch.full((2, 1, 2, 1), 1.0) + torch.tensor([0.0, 0.8]).view(1, 1, 2, 1),
                 torch.tensor([1.0, 1e-6]).view(1, 2, 1), take_ids(canvas, 2))
    assert canvas.instances.unique().tolist() == [0, 1]


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_every_tensor_is_made_on_the_generators_device(name):
    "Whatever is made without naming a device lands on `meta` here, and cannot mix with the rest."
    with torch.device("meta"):
        assert render(name, 2, 40, generator=make_generator(0), instances=True).density.device.type == "cpu"


def test_stamps_know_where_they_are():
    canvas = Canvas(1, 40, 0.05, make_generator(0))
    centre = torch.tensor([[[0.913, -0.2]], [[1.271, 1.0]]])
    stamp = Stamp(canvas, centre, 0.3)
    stamp.add(torch.exp(-(stamp.dy**2 + stamp.dx**2) / 0.1**2))
    y, x = canvas.pixels()
    expected = sum(torch.exp(-((y - a)**2 + (x - b)**2) / 0.1**2) for a, b in ((0.913, 1.271), (-0.2, 1.0)))
    assert (canvas.density - expected).abs().max() < 0.01


def test_polygons_against_brute_force():
    canvas = Canvas(1, 60, 0.1, make_generator(9))
    y, x = (line.expand(1, 60, 60) for line in canvas.pixels())
    found = draw_polygons(canvas, y, x, jitter=0.5, extent=16)
    seeds = (torch.rand(1, 2, 256, generator=make_generator(9)) * 0.5 + 0.25)[0]
    seeds = torch.stack([seeds[0] + torch.arange(256) // 16, seeds[1] + torch.arange(256) % 16], 1)
    place = torch.stack([y.flatten(), x.flatten()], 1)
    inner = ((place > 1) & (place < 5)).all(1)
    gap, order = torch.cdist(place, seeds).topk(2, largest=False)
    border = (gap[:, 1]**2 - gap[:, 0]**2) / (2 * (seeds[order[:, 0]] - seeds[order[:, 1]]).norm(dim=1))
    assert torch.equal(found.cell.flatten()[inner].long(), order[inner, 0])
    assert (found.border.flatten() - border).abs()[inner].max() < 1e-3


def test_noise_outline_and_sites():
    assert smooth_noise(Canvas(300, 16, 0.1, make_generator(0)), 0.4, octaves=2).var().item() == pytest.approx(1, abs=0.15)
    depth = draw_outline(Canvas(60, 32, 0.05, make_generator(0))).depth
    assert (depth[:, 16, 16] > 0).all(), "the middle of a field is always cell"
    canvas = Canvas(30, 32, 0.1, make_generator(0))
    sites, one = pull_inside(canvas, lattice_sites(canvas, 2.0, jitter=0.9, margin_um=2.0))
    kept = sites.gather(2, one.expand(2, -1, -1))
    assert (kept > 0).all() and (kept < canvas.field_um).all()


def test_light_enough_to_train_from():
    "Counted: 110 to 810 numbers a pixel and at most 2,945 operations for twelve images; 0.7 to 5 ms an image on one core."
    for name in STRUCTURES:
        with Operations() as done:
            render(name, 12, 128, generator=make_generator(0))
        assert done.numbers / 12 / 128**2 < 2000 and len(done.names) < 10_000, name
