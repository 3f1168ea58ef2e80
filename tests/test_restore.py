"Restoring: any image, the same picture everywhere, one line for what cannot be restored."
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from toys import NoNoise, make_weights, save_toy

from fluogen.core import FluogenError
from fluogen.io.image import Image, read_image, write_image
from fluogen.diffusion.direct import upsample
from fluogen.models.zoo import ZooError, load_weights
from fluogen.tasks import restore, tiling
from fluogen.tasks.restore_files import convert, list_images, restore_file, restore_files
from fluogen.tasks.tiling import MemoryLimitError
from fluogen.tasks.restore import list_planes, match_flux, restore_image, restore_unit
from fluogen.tasks.restore import RestoreError, RestoreSettings, check_weights, load_for_task

SMALL = {"tile_px": 32, "overlap_px": 8}
MEAN, SAMPLES = RestoreSettings(**SMALL), RestoreSettings(samples=2, steps=2, **SMALL)


def make_image(*shape, axes="YX", dtype=np.uint16, seed=0, **more):
    "Blobs on a background, as counts."
    generator = torch.Generator().manual_seed(seed)
    small = [max(1, n // 4) for n in shape[-2:]]
    coarse = torch.rand(1, int(np.prod(shape[:-2])), *small, generator=generator) ** 4
    fine = torch.nn.functional.interpolate(coarse, size=shape[-2:], mode="bilinear")[0]
    counts = 100 + 900 * fine + 20 * torch.rand(fine.shape, generator=generator)
    return Image(counts.numpy().reshape(shape).astype(dtype), axes, **more)


@pytest.fixture(scope="module")
def direct():
    return make_weights("direct")


@pytest.fixture(scope="module")
def control():
    return make_weights("control")


@pytest.fixture(scope="module")
def bicubic():
    return make_weights("bicubic")


BOTH = pytest.mark.parametrize(("kind", "settings"), [("direct", MEAN), ("control", SAMPLES)],
                               ids=["mean", "samples"])


# ---- the same picture everywhere

@BOTH
def test_the_same_twice_and_alone_as_in_a_film_under_any_name(kind, settings, request):
    weights, film = request.getfixturevalue(kind), make_image(3, 34, 41, axes="TYX")
    whole = restore_image(film, weights, settings).array
    for t in range(3):
        named = Image(film.array[t], "YX", path=Path(f"other {t}.tif"))
        alone = restore_image(named, weights, settings).array
        assert np.array_equal(alone, whole[t])
    swapped = restore_image(Image(film.array[::-1], "TYX"), weights, settings).array
    assert np.array_equal(swapped[::-1], whole)
    turned = Image(np.asfortranarray(film.array.astype(">u2").astype("u2")), "TYX")
    again = restore_image(turned, weights, settings)
    assert np.array_equal(again.array, whole) and np.isfinite(whole).all()


def test_seed_and_prompt_decide_and_the_global_generator_does_not(control):
    image = make_image(20, 22)
    torch.manual_seed(1)
    one = restore_image(image, control, SAMPLES).array
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert np.array_equal(restore_image(image, control, SAMPLES).array, one)
    assert torch.equal(torch.get_rng_state(), state)
    for change in ({"seed": 1}, {"prompt": "ER of COS-7"}, {"samples": 1}, {"steps": 3},
                   {"sampler": "ddpm"}):
        other = RestoreSettings(**{"samples": 2, "steps": 2, **SMALL, **change})
        assert not np.array_equal(restore_image(image, control, other).array, one), change


def test_the_mean_of_samples_is_their_mean(control):
    unit = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    chains = restore.PlanePasses(unit, control, SAMPLES, tiling.TileSide(32))
    assert chains.calls == 4
    both = restore_unit(unit, control, SAMPLES, "key")
    single = RestoreSettings(samples=1, steps=2, **SMALL)
    one = restore_unit(unit, control, single, "key")
    assert both.shape == (40, 40) and not torch.equal(one, both)
    assert 0 <= both.min() and both.max() <= 1


class Pointwise(NoNoise):
    "A network that answers pixel by pixel: tiles cannot matter to it, noise can."
    def forward(self, x, t, states=None, residuals=None, **cached):
        return torch.sin(3 * x) + (residuals if residuals is not None else 0)


class PointwiseControl(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def encode_condition(self, condition, size=None):
        return upsample(condition, 2)

    def forward(self, x, t, states=None, condition_embedding=None, **cached):
        return condition_embedding * 0.3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_noise_belongs_to_the_picture_and_not_to_its_tiles(control, sampler):
    weights = make_weights("control")
    weights.modules |= {"backbone": Pointwise(), "control": PointwiseControl(control.control.config)}
    unit = torch.rand(1, 1, generator=torch.Generator().manual_seed(0)).expand(1, 50, 70).contiguous()
    chain = dict(samples=1, steps=3, sampler=sampler)
    pictures = [restore_unit(unit, weights, RestoreSettings(**chain, tile_px=t, overlap_px=o))
                for t, o in ((128, 0), (32, 0), (48, 16))]
    assert pictures[0].std() > 0.01                                             # noise is there
    for other in pictures[1:]:
        assert (other - pictures[0]).abs().max() < 1e-5


# ---- sizes, types, light

@BOTH
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (31, 33), (97, 40)])
def test_odd_sizes(kind, settings, size, request):
    image = make_image(*size)
    weights = request.getfixturevalue(kind)
    if size == (1, 1):                                                          # one pixel is constant
        with pytest.raises(RestoreError, match="a constant image"):
            restore_image(image, weights, settings)
        return
    out = restore_image(image, weights, settings)
    assert out.array.shape == (2 * size[0], 2 * size[1]) and np.isfinite(out.array).all()


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "i4", "f4", "f8"])
def test_number_types_give_counts_with_the_light_of_the_input(bicubic, dtype):
    array = make_image(40, 50).array.astype(np.float64)
    array = (array / (8 if dtype == "u1" else 1) - (500 if dtype[0] in "if" else 0)).astype(dtype)
    out = restore_image(Image(array, "YX"), bicubic, MEAN).array
    assert out.dtype == np.float32
    assert out.mean(dtype=np.float64) == pytest.approx(array.mean(dtype=np.float64), abs=0.01)
    camera = out.reshape(40, 2, 50, 2).mean((1, 3))
    assert np.corrcoef(camera.ravel(), array.ravel())[0, 1] > 0.95


def test_gain_and_offset_of_the_camera_pass_through(direct):
    image = make_image(40, 40, dtype=np.float64)
    plain = restore_image(image, direct, MEAN).array
    scaled = restore_image(Image(3 * image.array + 70, "YX"), direct, MEAN).array
    assert np.allclose(scaled, 3 * plain + 70, rtol=1e-3)


def test_unit_intensity(direct):
    out = restore_image(make_image(40, 40), direct, RestoreSettings(intensity="unit", **SMALL)).array
    assert 0 <= out.min() and out.max() <= 1


def test_flux_of_pictures_without_light():
    counts = np.full((4, 4), 7.0)
    assert np.allclose(match_flux(np.zeros((8, 8)), counts, 7.0), 7)            # nothing restored
    assert np.allclose(match_flux(np.ones((8, 8)), counts, 9.0), 9)             # nothing above background
    assert match_flux(np.random.default_rng(0).random((8, 8)), counts, 2.0).mean() == pytest.approx(7)


# ---- axes

@pytest.mark.parametrize(("axes", "shape", "settings"), [
    ("TYX", (2, 12, 14), {}), ("CYX", (3, 12, 14), {}), ("TCYX", (2, 3, 12, 14), {}),
    ("ZYX", (1, 12, 14), {}),
    ("ZYX", (3, 12, 14), {"planewise": True}), ("TZYX", (2, 2, 12, 14), {"planewise": True})])
def test_axes_and_pixel_sizes(bicubic, axes, shape, settings):
    depth = {"Z": 0.3} if "Z" in axes else {}
    image = make_image(*shape, axes=axes, pixel_um={"Y": 0.06, "X": 0.08} | depth)
    out = restore_image(image, bicubic, RestoreSettings(**SMALL, **settings))
    assert out.axes == axes and out.array.shape == (*shape[:-2], 24, 28)
    assert out.pixel_um == {"Y": 0.03, "X": 0.04} | depth
    assert restore_image(Image(image.array, axes), bicubic,
                         RestoreSettings(**SMALL, **settings)).pixel_um is None


def test_planes_are_found_wherever_y_and_x_lie():
    array = np.arange(2 * 3 * 4 * 5).reshape(4, 2, 5, 3)
    planes, axes = list_planes(Image(array, "YTXC"), RestoreSettings())
    assert axes == "TCYX" and planes.shape == (2, 3, 4, 5) and planes[1, 2, 3, 4] == array[3, 1, 4, 2]
    colour, axes = list_planes(Image(array, "YTXS"), RestoreSettings(channel=2))
    assert axes == "TYX" and colour[1, 3, 4] == array[3, 1, 4, 2]


def test_a_blank_plane_of_a_film_stays_blank(direct):
    film = make_image(2, 20, 20, axes="TYX", path=Path("film.tif"))
    film.array[1] = 7
    with pytest.warns(UserWarning, match="film.tif: a constant plane"):
        out = restore_image(film, direct, MEAN).array
    assert (out[1] == 7).all() and out[0].std() > 0


def test_one_hot_pixel_and_saturation_are_said_with_the_file(direct):
    hot, full = np.full((40, 40), 100, np.uint16), make_image(40, 40).array
    hot[3, 4] = 900
    full[:10] = 65535
    for array, says in ((hot, "sparse"), (full, "saturated")):
        with pytest.warns(UserWarning, match=f"cell.tif: {says}"):
            out = restore_image(Image(array, "YX", path=Path("cell.tif")), direct, MEAN)
        assert np.isfinite(out.array).all()


# ---- wrong input

@pytest.mark.parametrize(("image", "settings", "says"), [
    (make_image(12, 14, 3, axes="YXS"), {}, "a colour image .* channel=0..2"),
    (make_image(12, 14, 3, axes="YXS"), {"channel": 3}, "no such colour"),
    (make_image(12, 14), {"channel": 0}, "no such colour .* no colour image"),
    (make_image(4, 12, 14, axes="ZYX"), {}, "a z-stack, not a plane .found 4 planes.. Pass planewise"),
    (Image(np.full((9, 9), 5), "YX"), {}, "a constant image, nothing to restore .found all 5"),
    (Image(np.where(np.eye(9) > 0, np.nan, 1.0), "YX"), {}, "9 of 81 NaN"),
    (Image(np.where(np.eye(9) > 0, np.inf, 1.0), "YX"), {}, "9 of 81 NaN or infinite"),
    (make_image(9, 9, dtype=np.complex64), {}, "real numbers"),
    (make_image(12, 14), {"prompt": "zebra stripes"},
     "unknown prompt .found zebra, stripes.. Nearest known: "),
    (make_image(12, 14), {"prompt": "Factin of COS-7"}, "found factin.. Nearest known: F-actin of COS-7"),
    (make_image(12, 14), {"prompt": "?!"}, "unknown prompt"),
    (make_image(12, 14), {"samples": 1}, "a mean, not samples")])
def test_what_cannot_be_restored_is_one_line(direct, image, settings, says):
    with warnings.catch_warnings(), pytest.raises(FluogenError, match=says) as caught:
        warnings.simplefilter("ignore")
        restore_image(image, direct, RestoreSettings(**settings))
    assert "\n" not in str(caught.value)


def test_a_plain_plane_and_the_name_of_weights_will_do(direct, tmp_path):
    image, toy = make_image(20, 22), str(save_toy(tmp_path / "toy"))
    assert np.array_equal(restore_image(image.array, toy, MEAN).array, restore_image(image, load_weights(toy), MEAN).array)
    with pytest.raises(RestoreError, match='without names of its axes.*Image.array, "TYX".'):
        restore_image(np.zeros((3, 20, 22)), direct, MEAN)


def test_a_mask_is_no_image(direct):
    with pytest.raises(RestoreError, match="a mask of two values"):
        restore_image(Image(make_image(20, 22).array > 400, "YX"), direct, MEAN)


def test_a_camera_that_cannot_be_and_a_small_field_are_said():
    from fluogen.tasks.restore import show_plane
    from fluogen.preprocessing.noise import NoiseError
    rng = np.random.default_rng(0)
    plane = rng.poisson(rng.uniform(100, 300, (4, 4)).repeat(24, 0).repeat(24, 1)).astype(np.uint16)
    with pytest.raises(NoiseError, match="offset lies above the image"):
        show_plane(plane, "stabilise", RestoreSettings(camera=(1, 5000, 3)))
    with pytest.warns(UserWarning, match="96 x 96 px may be a tenth off"):
        show_plane(plane, "stabilise", RestoreSettings())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        show_plane(np.tile(plane, (3, 3)), "stabilise", RestoreSettings())
        show_plane(plane, "stabilise", RestoreSettings(camera=(1, 0, 3)))


@pytest.mark.parametrize("change", [{"samples": -1}, {"steps": 0}, {"sampler": "euler"}, {"tile_px": 31},
                                    {"overlap_px": 256}, {"overlap_px": -1}, {"intensity": "max"}])
def test_settings_out_of_range(change):
    with pytest.raises(RestoreError, match=f"{next(iter(change))}: setting out of range"):
        RestoreSettings(**change)


def test_weights_for_something_else(control, direct):
    with pytest.raises(RestoreError, match="samples, not a mean"):
        check_weights(control, MEAN)
    for weights in (make_weights("direct"), make_weights("direct")):
        del weights.config["scale"]
        with pytest.raises(RestoreError, match="these weights restore nothing"):
            check_weights(weights, MEAN)
    nine = make_weights("control")
    nine.modules["control"] = PointwiseControl(type(control.control.config).tiny(condition_channels=9))
    with pytest.raises(RestoreError, match="several raw frames"):
        check_weights(nine, SAMPLES)


def test_weights_that_are_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("fluogen.models.zoo.weight_folders", lambda: [tmp_path])
    with pytest.raises(ZooError,
                       match="nano-sr: the weights of this task are not installed. Make them with: fluogen"):
        load_for_task("sr", samples=4)
    with pytest.raises(ZooError, match="mine: no such weights"):
        load_for_task("sr", model="mine")
    with pytest.raises(RestoreError, match="no such task .found sharpen, expected sr, denoise, mask2image"):
        load_for_task("sharpen")
    save_toy(tmp_path / "nano-sr-direct")
    assert load_for_task("sr").name == "nano-sr-direct"


# ---- memory

@pytest.mark.parametrize("first", range(1, 11))
def test_out_of_memory_at_any_moment_halves_the_tile(first, monkeypatch):
    "The allocator fails at the n-th network pass, and for tiles of more than 64 camera pixels from then on."
    weights, image = make_weights("direct"), make_image(3, 150, 140, axes="TYX", seed=first)
    settings, forward, calls = RestoreSettings(tile_px=128, overlap_px=16), type(weights.backbone).forward, []

    def fail(self, x, *args, **more):
        calls.append(x.shape[-1])
        if len(calls) >= first and x.shape[-1] > 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, x, *args, **more)

    plain = restore_image(image, weights, settings).array
    monkeypatch.setattr(type(weights.backbone), "forward", fail)
    with pytest.warns(UserWarning, match="out of memory: continuing with tiles of 64 pixels") as caught:
        out = restore_image(image, weights, settings)
    assert len([w for w in caught if "memory" in str(w.message)]) == 1          # later planes remember
    assert out.metadata["fluogen"]["tile_px_used"] == 64 and out.metadata["fluogen"]["tile_px"] == 128
    change = np.sqrt(np.mean((out.array - plain) ** 2)) / plain.std()
    assert change < 0.05


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   MemoryError("Unable to allocate"),
                                   RuntimeError("MPS backend out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")])
def test_when_nothing_fits(error, monkeypatch):
    weights, tried = make_weights("control"), []

    def fail(self, x, *args, **more):
        tried.append(x.shape[-1])
        raise error

    monkeypatch.setattr(type(weights.backbone), "forward", fail)
    with warnings.catch_warnings(), pytest.raises(MemoryLimitError, match="even with the smallest tile"):
        warnings.simplefilter("ignore")
        restore_image(make_image(300, 300), weights, RestoreSettings(samples=1, steps=1))
    assert tried == [512, 256, 128, 64]  # log2(256 / 32) tries, and the first


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    weights = make_weights("direct")
    monkeypatch.setattr(type(weights.backbone), "forward", lambda *a, **k: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        restore_image(make_image(40, 40), weights, MEAN)


def test_refused_before_anything_is_allocated(direct, monkeypatch):
    huge = Image(np.broadcast_to(np.arange(9, dtype=np.uint8), (500, 4096, 9)), "TYX", path=Path("film.tif"))
    monkeypatch.setattr(restore.np, "empty", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(MemoryLimitError,
                       match=r"film.tif: not enough memory \(found .* GiB needed, expected at most 0.1 GiB"):
        restore_image(huge, direct, MEAN, memory_gb=0.1)
    monkeypatch.setattr(tiling, "free_bytes", lambda: 10 * 2**20)
    with pytest.raises(MemoryLimitError):
        restore_image(huge, direct, MEAN)


def test_conditions_are_computed_once_a_picture_while_they_fit(control, monkeypatch):
    image, settings, count = make_image(60, 60), RestoreSettings(samples=2, steps=3, **SMALL), []
    encode = type(control.control).encode_condition
    monkeypatch.setattr(type(control.control), "encode_condition",
                        lambda *a: (count.append(1), encode(*a))[1])
    one = restore_image(image, control, settings).array
    assert len(count) == 9                                                      # 3 x 3 tiles
    monkeypatch.setattr(restore, "KEEP_BYTES", 0)
    assert np.array_equal(restore_image(image, control, settings).array, one) and len(count) == 9 + 9 * 6


def test_progress_comes_to_its_end(control):
    told = []
    restore_image(make_image(2, 60, 40, axes="CYX"), control, SAMPLES,
                  callback=lambda *news: told.append(news))
    assert told[-1] == (len(told), len(told)) and [n for n, _ in told] == list(range(1, len(told) + 1))
    assert len(told) == 2 * 4 * 3 * 2                                           # planes, passes, tiles


PEAK = """
import resource, sys, numpy as np
sys.path.insert(0, {here!r})
import toys
from fluogen.io.image import Image
from fluogen.tasks.restore import restore_image
image = Image(np.random.default_rng(0).poisson(300, (1536, 2048)).astype(np.uint16), "YX")
light = toys.BackboneConfig.tiny(attention_levels=(), mid_attention=False, stem="unshuffle2")
weights = toys.make_weights("direct", config=light)
out = restore_image(image, weights, memory_gb=3)
assert out.array.shape == (3072, 4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_a_large_image_stays_below_three_gigabytes():
    code = PEAK.format(here=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3


# ---- files

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return load_weights(str(save_toy(tmp_path_factory.mktemp("weights") / "toy")))


@pytest.mark.parametrize(("name", "dtype"), [("a.tif", "float32"), ("a.ome.tif", "uint16"),
                                             ("a.tiff", "same"),
                                             ("a.png", "uint16"), ("a.png", "uint8"), ("a.mrc", "float32"),
                                             ("a.ome.zarr", "float32")])
@pytest.mark.filterwarnings("ignore:.*(clipped|saturated)")
def test_what_a_file_says_about_itself_survives(toy, tmp_path, name, dtype):
    image = make_image(20, 23)
    image.array[:] //= 8 if dtype == "uint8" else 1                         # counts that eight bits hold
    source = write_image(tmp_path / "raw.tif", image, pixel_um={"Y": 0.0626, "X": 0.0626})
    settings = RestoreSettings(prompt="ER of COS-7", seed=11, **SMALL)
    target = tmp_path / "deep" / "down" / name
    assert restore_file(source, target, toy, settings, dtype=dtype) == "restored"
    back = read_image(target)
    assert back.array.shape == (40, 46) and back.axes == "YX"
    assert back.array.dtype == (np.uint16 if dtype == "same" else dtype)
    assert back.pixel_um == pytest.approx({"Y": 0.0313, "X": 0.0313}, rel=1e-4)
    how = back.metadata["fluogen"]
    assert how["computed"] is True and how["weights"] == toy.id
    assert (how["seed"], how["prompt"]) == (11, "ER of COS-7")
    assert (how["task"], how["norm"], how["samples"]) == ("sr", "percentile:0.1,99.9", 0)
    assert restore_file(source, target, toy, settings, dtype=dtype) == "kept"
    with pytest.warns(UserWarning, match="was computed, not measured"):
        restore_file(target, tmp_path / "twice.tif", toy, settings)


def test_other_channels_names_are_kept(toy, tmp_path):
    image = make_image(2, 12, 14, axes="CYX", metadata={"channels": ["actin", "DNA"]})
    source = write_image(tmp_path / "raw.ome.tif", image)
    restore_file(source, tmp_path / "out.ome.tif", toy, MEAN)
    assert read_image(tmp_path / "out.ome.tif").metadata["channels"] == ["actin", "DNA"]


def test_integers_are_rounded_clipped_a_little_and_that_is_said(toy, tmp_path):
    bright = make_image(20, 20)
    bright.array[:] = np.clip(bright.array.astype(float) * 60, 0, 65535)
    source = write_image(tmp_path / "raw.tif", bright)
    with pytest.raises(RestoreError, match="raw.tif: the result does not fit uint8 .*--intensity unit"):
        restore_file(source, tmp_path / "out.tif", toy, MEAN, dtype="uint8")
    assert not (tmp_path / "out.tif").exists()
    restore_file(source, tmp_path / "float.tif", toy, MEAN)
    restore_file(source, tmp_path / "same.tif", toy, MEAN, dtype="same")
    restore_file(source, tmp_path / "full.tif", toy, RestoreSettings(intensity="unit", **SMALL),
                 dtype="uint16")
    exact, out = read_image(tmp_path / "float.tif").array, read_image(tmp_path / "same.tif").array
    assert np.array_equal(out, np.clip(np.rint(exact), 0, 65535))
    assert read_image(tmp_path / "full.tif").array.max() > 30_000
    few = Image(np.append(np.full(399, -3.4), 300.0).reshape(20, 20).astype(np.float32), "YX", path="few.tif")
    with pytest.warns(UserWarning, match="few.tif: 400 of 400 pixels clipped to uint8"):
        assert convert(few, np.dtype("uint8")).array.max() == 255


def test_kept_only_if_nothing_changed(toy, tmp_path):
    source, target = write_image(tmp_path / "raw.tif", make_image(20, 20)), tmp_path / "out.tif"
    go = lambda settings=MEAN, weights=toy, **more: restore_file(source, target, weights, settings, **more)
    assert [go(), go()] == ["restored", "kept"]
    for change in ({"seed": 1}, {"prompt": "ER of COS-7"}, {"intensity": "unit"}, {"tile_px": 64}):
        other = RestoreSettings(**SMALL | change)
        assert [go(other), go(other)] == ["restored", "kept"], change
    assert [go(dtype="uint16"), go(dtype="uint16"), go()] == ["restored", "kept", "restored"]
    assert go(weights=load_weights(str(save_toy(tmp_path / "toy", seed=5)))) == "restored"
    assert [go(), go()] == ["restored", "kept"]
    write_image(source, make_image(20, 20, seed=9))  # other pixels under the same name
    assert go() == "restored"
    whole = target.read_bytes()
    target.write_bytes(whole[:len(whole) // 2])                                 # cut by somebody else
    assert [go(), target.read_bytes() == whole] == ["restored", True]
    target.write_bytes(b"")
    assert go() == "restored"
    write_image(target, make_image(40, 40))             # not ours: perhaps a measurement
    with pytest.raises(RestoreError, match="not restored lies there"):
        go()
    assert read_image(target).array.shape == (40, 40)


@pytest.mark.parametrize(("target", "dtype", "says"), [
    ("out.jpg", "float32", "no known image format"), ("out.png", "float32", "out.png"),
    ("out.xyz", "float32", "format"),
    ("out.tif", "int7", "no such number type")])
def test_a_target_that_cannot_be_is_known_before_the_work(toy, tmp_path, monkeypatch, target, dtype, says):
    source = write_image(tmp_path / "raw.tif", make_image(20, 20))
    monkeypatch.setattr(restore.Restorer, "restore", lambda *a: pytest.fail("computed in vain"))
    with pytest.raises(FluogenError, match=says):
        restore_file(source, tmp_path / "new" / target, toy, MEAN, dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["raw.tif"]


def test_a_full_disk_leaves_nothing(toy, tmp_path, monkeypatch):
    source, target = write_image(tmp_path / "raw.tif", make_image(20, 20)), tmp_path / "out" / "a.tif"
    restore_file(source, target, toy, MEAN)
    before = target.read_bytes()
    from fluogen.io import files
    real, count = files._flush, []

    def full(path):
        count.append(path)
        if len(count) > 2:                                                      # the trial passes
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(FluogenError, match="No space left"):
        restore_file(source, target, toy, RestoreSettings(seed=1, **SMALL))
    assert target.read_bytes() == before and [p.name for p in target.parent.iterdir()] == ["a.tif"]


# ---- folders

def fill(folder):
    folder.mkdir()
    for i, name in enumerate(("b.tif", "a.1.tif", "a.2.ome.tif", "c.png")):
        write_image(folder / name, make_image(14, 15, seed=i))
    (folder / "notes.txt").write_text("no image")
    (folder / "._b.tif").write_bytes(b"left by a Mac")
    return folder


def test_pairs_of_a_folder(tmp_path):
    raw = fill(tmp_path / "raw")
    names = [(s.name, t.name) for s, t in list_images(raw, tmp_path / "out")]
    assert names == [("a.1.tif", "a.1.tif"), ("a.2.ome.tif", "a.2.tif"), ("b.tif", "b.tif"),
                     ("c.png", "c.tif")]
    write_image(raw / "c.tif", make_image(14, 15))
    assert [t.name for _, t in list_images(raw, tmp_path / "out")][-2:] == ["c.png.tif", "c.tif.tif"]
    assert list_images(raw / "b.tif", tmp_path) == [(raw / "b.tif", tmp_path / "b.tif")]
    assert list_images(raw / "b.tif", tmp_path / "new") == [(raw / "b.tif", tmp_path / "new" / "b.tif")]
    assert list_images(raw / "b.tif", tmp_path / "x.png") == [(raw / "b.tif", tmp_path / "x.png")]


def test_pairs_that_cannot_be(tmp_path):
    raw = fill(tmp_path / "raw")
    (tmp_path / "link").symlink_to(raw)
    (tmp_path / "empty").mkdir()
    for source, target, says in ((raw, raw, "overwrite"), (raw / "b.tif", raw / "b.tif", "overwrite"),
                                 (raw / "b.tif", raw, "overwrite"),
                                 (raw / "b.tif", tmp_path / "link", "overwrite"),
                                 (raw, tmp_path / "out.tif", "need a folder"),
                                 (raw, raw / "notes.txt", "need a folder"),
                                 (tmp_path / "empty", tmp_path / "out", "no images in this folder"),
                                 (tmp_path / "missing", tmp_path / "out", "no such file or folder")):
        with pytest.raises(RestoreError, match=says):
            list_images(source, target)


def test_a_folder_goes_on_after_a_bad_file_and_resumes(toy, tmp_path, monkeypatch):
    raw, out = fill(tmp_path / "raw"), tmp_path / "out"
    whole = (raw / "b.tif").read_bytes()
    (raw / "b.tif").write_bytes(whole[:-40])
    go = lambda: {s.name: o if isinstance(o, str) else type(o).__name__
                  for s, _, o in restore_files(list_images(raw, out), toy, MEAN)}
    first = go()
    assert first == {"a.1.tif": "restored", "a.2.ome.tif": "restored", "b.tif": "ImageReadError",
                     "c.png": "restored"}
    stamps = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert set(stamps) == {"a.1.tif", "a.2.tif", "c.tif"}
    (raw / "b.tif").write_bytes(whole)
    (out / "c.tif").unlink()
    (out / ".fluogen-000000-1-00000000-c.tif").write_bytes(b"left by a killed run")
    os.utime(out / ".fluogen-000000-1-00000000-c.tif", (0, 0))
    assert go() == {"a.1.tif": "kept", "a.2.ome.tif": "kept", "b.tif": "restored", "c.png": "restored"}
    assert {p.name for p in out.iterdir()} == {"a.1.tif", "a.2.tif", "b.tif", "c.tif"}
    assert all((out / name).stat().st_mtime_ns == stamps[name] for name in ("a.1.tif", "a.2.tif"))


def test_an_interrupted_folder_keeps_what_was_done(toy, tmp_path):
    raw, out = fill(tmp_path / "raw"), tmp_path / "out"
    for number, _ in enumerate(restore_files(list_images(raw, out), toy, MEAN)):
        if number == 1:
            break                                                               # as Ctrl-C between two files
    outcomes = [outcome for *_, outcome in restore_files(list_images(raw, out), toy, MEAN)]
    assert outcomes == ["kept", "kept", "restored", "restored"]


def test_wrong_weights_stop_a_folder_at_once(control, tmp_path):
    with pytest.raises(RestoreError, match="samples, not a mean"):
        next(restore_files(list_images(fill(tmp_path / "raw"), tmp_path / "out"), control, MEAN))
    assert not (tmp_path / "out").exists()


def test_the_note_is_json(direct):
    out = restore_image(make_image(12, 12), direct, MEAN)
    assert json.loads(json.dumps(out.metadata["fluogen"])) == out.metadata["fluogen"]


@pytest.mark.parametrize("name", ["stack.tif", "notes.tif"])
def test_nothing_of_the_users_is_written_over_even_if_it_cannot_be_read(toy, tmp_path, name):
    source, target = write_image(tmp_path / "raw.tif", make_image(20, 20)), tmp_path / name
    if name == "stack.tif":
        tifffile.imwrite(target, np.zeros((3, 20, 20), np.uint16), photometric="minisblack", metadata=None)     # says no axes
    else:
        target.write_bytes(b"my notes")
    before = target.read_bytes()
    with pytest.raises(RestoreError, match="was not restored lies there"):
        restore_file(source, target, toy, MEAN)
    assert target.read_bytes() == before


def test_an_image_below_the_range_is_refused_a_dipping_background_is_not():
    dark = Image(np.full((20, 20), -40.0, np.float32), "YX", path="dark.tif")
    with pytest.raises(RestoreError, match="dark.tif: .*100% of the pixels below 0"):
        convert(dark, np.dtype("uint16"))
