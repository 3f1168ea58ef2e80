"""Optics and camera: closed forms, conservation laws, statistics, refusals."""
import math

import pytest
import torch

from fluogen.simulation.camera import Camera, detect
from fluogen.simulation.optics import (
    Optics, OpticsError, bin_to_camera, otf, sim_otf, sim_raw_frames, sim_target, widefield, widefield_and_target)

BIOSR = Optics(na=1.41, wavelength_nm=525)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def make_point(size=129):
    image = torch.zeros(1, 1, size, size)
    image[..., size // 2, size // 2] = 1
    return image


def measure_fwhm_px(image):
    row = image[image.shape[0] // 2].double()
    above = (row >= row.max() / 2).nonzero()
    def cross(inner, outer):
        return inner + (outer - inner) * float((row[inner] - row.max() / 2) / (row[inner] - row[outer]))
    first, last = int(above[0]), int(above[-1])
    return cross(last, last + 1) - cross(first, first - 1)


def overlap_of_discs(rho, samples=2001):
    "Autocorrelation of a unit disc at a shift of 2 rho, by brute force."
    axis = torch.linspace(-1, 1, samples, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    both = ((x - rho) ** 2 + y**2 <= 1) & ((x + rho) ** 2 + y**2 <= 1)
    return both.sum().item() / (x**2 + y**2 <= 1).sum().item()


@pytest.mark.parametrize("rho", [0.1, 0.35, 0.6, 0.9])
def test_otf_is_the_overlap_of_two_pupils(rho):
    size = 512
    step = 1 / (size * BIOSR.fine_pixel_um) / BIOSR.cutoff_per_um
    k = round(rho / step)
    transfer = otf(BIOSR, (size, size))[0, 0]
    assert transfer[0, k].item() == pytest.approx(overlap_of_discs(k * step), abs=2e-3)
    assert transfer[k, 0].item() == pytest.approx(transfer[0, k].item(), abs=1e-6)


@pytest.mark.parametrize("optics", [BIOSR, Optics(0.75, 660, pixel_um=0.1, haze_fraction=0.4)])
def test_nothing_passes_beyond_the_cutoff(optics):
    size = 192
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)) / optics.fine_pixel_um
    for transfer, limit in ((otf(optics, (size, size)), 1), (sim_otf(optics, (size, size)), 2)):
        assert transfer[0, 0, 0, 0].item() == 1
        assert (transfer[0, 0][frequency > limit * optics.cutoff_per_um * 1.0001] == 0).all()
        assert (transfer[0, 0][frequency < limit * optics.cutoff_per_um * 0.98] > 0).all()


@pytest.mark.parametrize("optics", [BIOSR, Optics(1.3, 610, 0.05), Optics(0.8, 500, 0.1)])
def test_point_has_the_width_of_the_textbook(optics):
    wide, target = widefield_and_target(make_point(), optics)
    assert measure_fwhm_px(wide[0, 0]) * optics.fine_pixel_um == pytest.approx(optics.fwhm_um, rel=0.03)
    assert 0.5 < measure_fwhm_px(target[0, 0]) / measure_fwhm_px(wide[0, 0]) < 0.56


def test_light_is_conserved_inside_and_dark_stays_dark():
    point = make_point(255)
    for optics in (BIOSR, Optics(haze_fraction=0.3)):
        wide, target = widefield_and_target(point, optics)
        assert 0.95 < wide.sum().item() <= 1.001 and 0.98 < target.sum().item() <= 1.001
        assert wide.min() >= 0 and target.min() >= 0
    flat = torch.full((1, 1, 64, 64), 3.0)
    assert torch.allclose(widefield(flat, BIOSR), flat, atol=1e-4)
    assert (widefield(torch.zeros(1, 1, 64, 64), BIOSR) == 0).all()


def test_target_does_not_ring():
    row = sim_target(make_point(), BIOSR)[0, 0, 64, 64:]
    assert (row[20:] < 0.004 * row[0]).all()
    assert row[6:].max() < 0.02 * row[0]


def test_light_that_leaves_does_not_come_back_on_the_other_side():
    image = torch.zeros(1, 1, 64, 64)
    image[..., 32, 1] = 1
    for optics in (BIOSR, Optics(haze_fraction=0.3)):
        blurred = widefield(image, optics)[0, 0, 32]
        assert blurred[-4:].max() < 0.003 * blurred.max() and blurred[40] >= 0.9 * blurred[-1]


def test_batch_of_optics_equals_one_by_one_and_odd_shapes_pass():
    density = torch.rand(3, 1, 37, 50, generator=dice())
    optics = [BIOSR, Optics(na=1.3, wavelength_nm=600, haze_fraction=0.2), Optics(na=1.2)]
    together = widefield(density, optics)
    assert together.shape == density.shape
    single = torch.cat([widefield(density[i:i + 1], one) for i, one in enumerate(optics)])
    assert torch.allclose(together[:, :, 12:-12, 12:-12], single[:, :, 12:-12, 12:-12], atol=2e-3)
    with pytest.raises(OpticsError, match="one entry"):
        widefield(density, optics[:2])


@pytest.mark.parametrize("size", [8, 13, 26, 64, 129])
def test_any_size_keeps_its_shape(size):
    density = torch.rand(1, 1, size, size, generator=dice())
    assert widefield(density, Optics(haze_fraction=0.5, haze_sigma_um=3)).shape == density.shape


def test_binning_sums():
    image = torch.rand(2, 3, 16, 24, generator=dice())
    binned = bin_to_camera(image)
    assert binned.shape == (2, 3, 8, 12)
    assert torch.allclose(binned[:, :, 0, 0], image[:, :, :2, :2].sum((2, 3)))
    assert binned.sum().item() == pytest.approx(image.sum().item(), rel=1e-5)
    with pytest.raises(OpticsError, match="even"):
        bin_to_camera(image[..., :15])


def test_raw_frames_average_to_widefield_and_carry_stripes():
    density = torch.rand(2, 1, 96, 96, generator=dice())
    frames = sim_raw_frames(density, BIOSR, dice(1))
    plain = bin_to_camera(widefield(density, BIOSR))
    assert frames.shape == (2, 9, 48, 48) and frames.min() >= 0
    for angle in range(3):
        assert torch.allclose(frames[:, 3 * angle:3 * angle + 3].mean(1, keepdim=True), plain, atol=1e-4)
    flat = sim_raw_frames(torch.ones(1, 1, 128, 128), BIOSR, dice(1), 0.5, 1.0)[0, 0] / 4
    peak = torch.fft.rfft2(flat[8:-8, 8:-8] - flat[8:-8, 8:-8].mean()).abs()
    y, x = divmod(int(peak.argmax()), peak.shape[1])
    y = y - 48 if y > 24 else y
    found = math.hypot(y, x) / (48 * BIOSR.pixel_um)
    assert found == pytest.approx(0.5 * BIOSR.cutoff_per_um, rel=0.06)
    contrast = (flat.max() - flat.min()) / (flat.max() + flat.min())
    stripe = round(0.5 * BIOSR.cutoff_per_um * BIOSR.fine_pixel_um * 512)
    expected = otf(BIOSR, (512, 512))[0, 0, 0, stripe].item()
    assert contrast.item() == pytest.approx(expected, rel=0.06)       # the pixel area blurs too
    unlit = sim_raw_frames(density, BIOSR, dice(), modulation=0.0)
    assert torch.allclose(unlit, plain.expand(-1, 9, -1, -1), atol=1e-5)


def test_poisson_read_noise_offset_and_gain():
    camera = Camera(offset_counts=100, gain=2, read_noise=0)
    light = torch.tensor([5.0, 40.0, 400.0]).view(3, 1, 1, 1).expand(3, 1, 160, 160)
    electrons = (detect(light, camera, dice()).double() - 100) / 2
    for mean, variance, expected in zip(electrons.mean((1, 2, 3)), electrons.var((1, 2, 3)), (5, 40, 400)):
        assert mean.item() == pytest.approx(expected, rel=0.02)
        assert variance.item() == pytest.approx(expected, rel=0.05)
    camera = Camera(offset_counts=50, gain=4, read_noise=3)
    dark = detect(torch.zeros(1, 1, 160, 160), camera, dice()).double()
    assert dark.mean().item() == pytest.approx(50, abs=0.2)
    assert dark.std().item() == pytest.approx(12, rel=0.03)


def test_counts_are_integers_within_well_and_bits():
    bright = torch.full((1, 1, 16, 16), 1e6)
    counts = detect(bright, Camera(bits=12), dice())
    assert counts.dtype == torch.int32 and (counts == 4095).all()
    assert (detect(bright, Camera(full_well=1000, read_noise=0, offset_counts=0), dice()) == 2000).all()
    assert detect(torch.zeros(1, 1, 64, 64), Camera(offset_counts=0, read_noise=5), dice()).min() == 0
    assert torch.equal(detect(bright / 1e4, Camera(), dice(5)), detect(bright / 1e4, Camera(), dice(5)))
    cameras = [Camera(offset_counts=10, read_noise=0), Camera(read_noise=0)]
    mixed = detect(torch.zeros(2, 1, 8, 8), cameras, dice())
    assert (mixed[0] == 10).all() and (mixed[1] == 100).all()
    for wrong in (float("nan"), -1.0):
        with pytest.raises(OpticsError, match="finite and not negative"):
            detect(torch.full((1, 1, 8, 8), wrong), Camera(), dice())


@pytest.mark.parametrize("options", [dict(na=1.515), dict(na=-1), dict(na=float("nan")), dict(na="1.4"),
                                     dict(pixel_um=0), dict(wavelength_nm=0.5), dict(pixel_um=0.5),
                                     dict(haze_fraction=1.0),
                                     dict(refractive_index=0.9), dict(haze_sigma_um=0)])
def test_impossible_optics_are_refused_in_one_line(options):
    with pytest.raises(OpticsError) as error:
        Optics(**options)
    assert "\n" not in str(error.value) and "found" in str(error.value)


@pytest.mark.parametrize("options", [dict(bits=0), dict(gain=0), dict(read_noise=-1), 
                                     dict(offset_counts=70000), dict(full_well=0)])
def test_impossible_cameras_are_refused(options):
    with pytest.raises(OpticsError):
        Camera(**options)


def test_target_on_too_coarse_a_grid_is_refused():
    coarse = Optics(na=1.41, wavelength_nm=525, pixel_um=0.12)
    widefield(make_point(33), coarse)
    with pytest.raises(OpticsError, match="doubled"):
        sim_target(make_point(33), coarse)
