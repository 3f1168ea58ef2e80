"""Simulated pairs: shapes, ranges, determinism, held-out scenes and microscopes, refusals."""
import numpy as np
import pytest
import torch

from fluogen.core import FluogenError
from fluogen.simulation.microscopes import HELD_OUT, OUT_OF_RANGE, TRAIN, OpticsRange, Setup
from fluogen.simulation.camera import Camera
from fluogen.simulation.optics import Optics, OpticsError
from fluogen.preprocessing.normalize import find_percentile, scale_percentile
from fluogen.simulation.pairs import GROUP, RANGES, SPLITS, _expose, degrade_images, simulate_pairs, simulate_targets
from fluogen.simulation.structures import STRUCTURES

SR = ["microtubules", "factin", "er", "ccps"]


@pytest.fixture(scope="module")
def batch():
    return simulate_pairs(SR, 8, size_px=64, seed=1, instances=True)


def same(first, second):
    return torch.equal(first.target, second.target) and torch.equal(first.counts, second.counts)


def test_shapes_types_and_ranges(batch):
    assert len(batch) == 8
    assert batch.target.shape == (8, 1, 64, 64) and batch.target.dtype == torch.float32
    assert batch.condition.shape == (8, 1, 32, 32) and batch.condition.dtype == torch.float32
    assert batch.counts.shape == (8, 1, 32, 32) and batch.counts.dtype == torch.int32
    assert batch.density.shape == (8, 1, 64, 64) and batch.instances.shape == (8, 64, 64)
    for image in (batch.target, batch.condition):
        assert torch.isfinite(image).all() and image.min() >= 0 and image.max() == 1
        assert (image.amax((1, 2, 3)) == 1).all()
    assert (batch.condition.amin((1, 2, 3)) == 0).all()
    assert sorted(batch.structures) == sorted(SR * 2) and batch.structures != SR * 2
    assert all(prompt in STRUCTURES[name].prompts for name, prompt in zip(batch.structures, batch.prompts))
    assert batch.pixel_um == [0.0313] * 8
    assert all(setup.optics.pixel_um == pytest.approx(0.0626) for setup in batch.setups)


def test_target_and_condition_show_the_same_scene(batch):
    coarse = torch.nn.functional.avg_pool2d(batch.target, 2)
    for a, b in zip(coarse, batch.condition):
        assert np.corrcoef(a.flatten(), b.flatten())[0, 1] > 0.5
    other = np.corrcoef(coarse[0].flatten(), batch.condition[1].flatten())[0, 1]
    assert other < 0.5


def test_rows_stay_together_when_mixed(batch):
    for i, name in enumerate(batch.structures):
        assert np.corrcoef(batch.density[i].flatten(), batch.target[i].flatten())[0, 1] > 0.4
    alone = simulate_pairs("er", 2, size_px=64, seed=1)
    mixed = batch.target[[i for i, name in enumerate(batch.structures) if name == "er"]]
    assert {round(t.sum().item(), 3) for t in alone.target} == {round(t.sum().item(), 3) for t in mixed}


def test_the_same_arguments_give_the_same_batch():
    options = dict(n=4, size_px=32, seed=5)
    first = simulate_pairs(["er", "ccps"], **options)
    assert same(first, simulate_pairs(["er", "ccps"], **options)) and first.prompts
    assert not same(first, simulate_pairs(["er", "ccps"], **options | dict(seed=6)))
    targets = simulate_targets(["er", "ccps"], **options)
    assert torch.equal(targets.target, first.target) and targets.condition is None
    assert targets.setups == first.setups
    before = torch.random.get_rng_state()
    simulate_pairs("er", 1, size_px=32)
    assert torch.equal(before, torch.random.get_rng_state())


def test_splits_share_no_scene_and_tests_get_held_out_optics():
    batches = {split: simulate_pairs("ccps", 3, size_px=32, seed=0, split=split) for split in SPLITS}
    sums = [round(d.sum().item(), 4) for one in batches.values() for d in one.density]
    assert len(set(sums)) == 9
    forced = simulate_pairs("ccps", 3, size_px=32, seed=0, split="test", optics=TRAIN)
    assert torch.equal(forced.density, batches["test"].density)       # optics do not change the scenes
    for split, one in batches.items():
        bands = HELD_OUT.na if split == "test" else TRAIN.na
        assert all(any(low <= s.optics.na <= high for low, high in bands) for s in one.setups)


@pytest.mark.parametrize("optics", [HELD_OUT, OUT_OF_RANGE, "held-out", "out-of-range"])
def test_reserved_optics_are_refused_in_training(optics):
    with pytest.raises(OpticsError, match="reserved"):
        simulate_pairs("er", 1, size_px=32, split="train", optics=optics)


def test_raw_frames_have_the_light_of_one_widefield_image():
    still = OpticsRange("still", background=((0.0, 0.0),), photons=((1000, 1000),), read_noise=((0, 0),))
    wide = simulate_pairs("er", 4, size_px=64, seed=2, optics=still)
    raw = simulate_pairs("er", 4, size_px=64, seed=2, optics=still, raw_frames=True)
    assert raw.condition.shape == (4, 9, 32, 32) and torch.equal(raw.target, wide.target)
    light = [(one.counts.float() - 100).sum((1, 2, 3)) for one in (wide, raw)]
    assert torch.allclose(light[0], light[1], rtol=0.02)
    assert raw.condition.min() == 0 and raw.condition.max() == 1
    peak = (wide.counts.float() - 100).flatten(1).quantile(0.995, dim=1) / 2
    assert ((peak > 800) & (peak < 1200)).all()


def test_blank_scenes_are_finite():
    setup = Setup(Optics(), Camera(), 100.0, 0.0)
    target, counts = _expose(torch.zeros(2, 1, 48, 48), [setup] * 2, False, torch.Generator().manual_seed(0))
    assert counts.shape == (2, 1, 16, 16) and (target == 0).all() and abs(counts.float().mean() - 100) < 2
    for image in (scale_percentile(target, low=None), scale_percentile(counts), scale_percentile(counts * 0)):
        assert torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize("percent", [0, 0.1, 1, 50, 99.9, 100])
@pytest.mark.parametrize("shape", [(3, 1, 32, 32), (2, 9, 16, 16), (1, 1, 1, 2), (1, 1, 61, 47)])
def test_percentile_is_numpys(percent, shape):
    values = torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(0))
    expected = np.percentile(values.flatten(1).numpy(), percent, axis=1)
    assert np.allclose(find_percentile(values, percent).flatten().numpy(), expected, atol=1e-3)


def test_scaling_is_the_one_users_images_get():
    intensity = pytest.importorskip("fluogen.preprocessing.normalize")
    dice = torch.Generator().manual_seed(0)
    image = torch.randint(90, 900, (1, 1, 64, 64), generator=dice, dtype=torch.int32)
    expected, _ = intensity.scale_to_unit(image[0, 0].numpy(), "percentile:0.1,99.9", clip=True)
    assert np.allclose(scale_percentile(image)[0, 0].numpy(), expected, atol=1e-5)


def test_brightness_scales_the_target_alone():
    plain = simulate_pairs("er", 3, size_px=32, seed=3)
    dim = simulate_pairs("er", 3, size_px=32, seed=3, brightness=(0.3, 0.6))
    ratio = dim.target.amax((1, 2, 3))
    assert ((ratio >= 0.3) & (ratio <= 0.6)).all() and torch.equal(plain.condition, dim.condition)
    assert torch.allclose(plain.target * ratio.view(-1, 1, 1, 1), dim.target, atol=1e-6)


def test_prompts_choose_their_own_pixel_and_more_than_one_group_works():
    many = simulate_targets("Microtubules of COS-7", 2 * GROUP, size_px=16)
    assert len(many) == 2 * GROUP and len({t.numpy().tobytes() for t in many.target}) == 2 * GROUP
    for name, spec in STRUCTURES.items():
        prompt = spec.prompts[-1]
        one = simulate_pairs(prompt, 1, size_px=32)
        assert one.prompts == [prompt] and one.structures == [name]
        assert one.pixel_um == [spec.pixel_of(prompt)]
        blur_px = one.setups[0].optics.fwhm_um / one.pixel_um[0]
        assert 5 < blur_px < 8


@pytest.mark.parametrize("options", [dict(structures="golgi"), dict(structures=[]), dict(split="dev"),
                                     dict(n=0), dict(size_px=33), dict(size_px=8), dict(optics="mine")])
def test_wrong_requests_are_one_line(options):
    with pytest.raises(FluogenError) as error:
        simulate_pairs(**dict(structures="er", n=1, size_px=32) | options)
    assert "\n" not in str(error.value)


def test_named_ranges():
    assert list(RANGES) == ["train", "held-out", "out-of-range"]


def test_a_real_image_under_a_simulated_microscope():
    clean = simulate_pairs("microtubules", 2, size_px=80, seed=3).target * 700      # any scale
    seen = degrade_images(clean, ["Microtubules of COS-7"] * 2, seed=1, groups=["a", "b"])
    assert seen.target.shape == (2, 1, 64, 64) and seen.condition.shape == (2, 1, 32, 32) and seen.groups == ["a", "b"]
    small = torch.nn.functional.avg_pool2d(seen.target, 2)
    for one, other in zip(small, seen.condition):                                   # blurred and noisy, yet the same picture
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.6
    assert torch.allclose(degrade_images(clean * 9, ["Microtubules of COS-7"] * 2, seed=1).condition, seen.condition, atol=0.05)


@pytest.mark.parametrize("truth, match", [(torch.full((1, 1, 80, 80), -1.0), "background"), (torch.full((1, 1, 80, 80), torch.nan), "finite"),
                                          (torch.zeros(1, 2, 80, 80), "not a batch"), (torch.zeros(1, 1, 20, 20), "at least")])
def test_what_no_microscope_can_look_at_is_refused(truth, match):
    with pytest.raises(OpticsError, match=match):
        degrade_images(truth, ["ER of COS-7"])
