"Tiles: every pixel once, nothing changed that the network does not change, no seams; in any number of dimensions."
import itertools
import math
import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import make_weights

from fluogen.simulation.pairs import simulate_pairs
from fluogen.tasks.restore import restore_unit
from fluogen.tasks.restore import RestoreSettings, load_for_task
from fluogen.tasks.tiling import TilingError, fade, fade_window, pad_reflect, plan_tiles, run_tiled, tile_starts

def draw_case(rng):
    tile = rng.randrange(1, 80)
    return (rng.randrange(1, 150), rng.randrange(1, 150), tile, rng.randrange(0, tile),
            rng.choice([1, 1, 2, 4, 8]), rng.choice([1, 2]))


COUNT = 1000 if os.environ.get("FLUOGEN_BATTERY") == "full" else 100
CASES = [draw_case(random.Random(seed)) for seed in range(COUNT)]


@pytest.mark.battery
def test_identity_is_exact_whatever_the_sizes():
    generator = torch.Generator().manual_seed(0)
    for H, W, tile, overlap, multiple, scale in CASES:
        image = torch.rand(1, 1, H, W, generator=generator)
        grow = lambda part: F.interpolate(part, scale_factor=scale) if scale > 1 else part
        out = run_tiled(lambda part, window: grow(part), image, tile, overlap, scale, multiple)
        assert out.shape == (1, 1, scale * H, scale * W)
        assert (out - grow(image)).abs().max() <= 1e-6, (H, W, tile, overlap, multiple, scale)


@pytest.mark.battery
def test_weights_sum_to_one_everywhere():
    "With the answer 1 everywhere, the blend is the sum of the weights over their sum, pixel by pixel."
    for H, W, tile, overlap, multiple, scale in CASES:
        one = lambda part, window: torch.ones(1, 1, *(scale * n for n in window[2:]))
        out = run_tiled(one, torch.zeros(1, 1, H, W), tile, overlap, scale, multiple)
        assert (out - 1).abs().max() <= 1e-6


@pytest.mark.battery
def test_what_the_network_is_given():
    "Sizes it takes, all alike, on its grid, inside the padded picture; each tile once."
    for H, W, tile, overlap, multiple, _ in CASES:
        windows = []

        def network(part, window):
            windows.append(window)
            assert part.shape[-2:] == window[2:]
            return part

        image = torch.rand(1, 2, H, W)
        run_tiled(network, image, tile, overlap, 1, multiple, callback=lambda *news: windows.append(news))
        told, windows = windows[1::2], windows[::2]
        assert told == [(i + 1, len(windows)) for i in range(len(windows))]
        assert len(set(windows)) == len(windows) and len({w[2:] for w in windows}) == 1
        assert all(n % multiple == 0 for window in windows for n in window)
        assert max(top + h for top, _, h, _ in windows) == -(-H // multiple) * multiple
        assert max(left + w for _, left, _, w in windows) == -(-W // multiple) * multiple


def draw_stack(rng):
    "Shape of 1, 2 or 3 axes, then tile, overlap, scale and multiple of each axis."
    axes = rng.randrange(1, 4)
    tile = tuple(rng.randrange(1, (60, 40, 14)[axes - 1]) for _ in range(axes))
    return (tuple(rng.randrange(1, (300, 90, 26)[axes - 1]) for _ in range(axes)), tile,
            tuple(rng.randrange(0, n) for n in tile), tuple(rng.choice([1, 1, 2]) for _ in range(axes)),
            tuple(rng.choice([1, 1, 2, 4]) for _ in range(axes)))


STACKS = [draw_stack(random.Random(seed)) for seed in range(600 if COUNT == 1000 else 60)]


def refine(image, scale):
    "Every pixel repeated `scale` times along each axis."
    for axis, times in enumerate(scale, start=2):
        image = image.repeat_interleave(times, axis)
    return image


def test_cases_are_lines_images_and_stacks():
    assert {len(sizes) for sizes, *_ in STACKS} == {1, 2, 3}
    assert sum(any(n % 2 for n in sizes) for sizes, *_ in STACKS) > len(STACKS) / 2
    assert any(len(set(scale)) > 1 for *_, scale, _ in STACKS)


@pytest.mark.battery
def test_identity_and_constant_in_one_two_and_three_dimensions():
    "The second channel is constant: what comes out is the sum of the weights, 1 everywhere."
    generator = torch.Generator().manual_seed(2)
    for sizes, tile, overlap, scale, multiple in STACKS:
        image = torch.rand(1, 2, *sizes, generator=generator)
        image[:, 1] = 1
        out = run_tiled(lambda part, window: refine(part, scale), image, tile, overlap, scale, multiple)
        assert out.shape == (1, 2, *(n * s for n, s in zip(sizes, scale))) and out.dtype == torch.float32
        assert (out - refine(image, scale)).abs().max() <= 1e-6, (sizes, tile, overlap, scale, multiple)


@pytest.mark.battery
def test_a_ramp_that_depends_on_the_position_is_put_back_in_its_place():
    "The network returns only where its window says it is: a tile blended one pixel off would show."
    for sizes, tile, overlap, scale, multiple in STACKS:
        step = [7 ** axis for axis in range(len(sizes))]

        def place(starts, sides):
            grids = [torch.arange(n * s, (n + side) * s).double() / s for n, side, s in zip(starts, sides, scale)]
            return sum(k * g for k, g in zip(step, torch.meshgrid(*grids, indexing="ij")))[None, None]

        def network(part, window):
            assert part.shape[2:] == window[len(sizes):]
            return place(window[:len(sizes)], window[len(sizes):])

        out = run_tiled(network, torch.zeros(1, 1, *sizes), tile, overlap, scale, multiple)
        want = place([0] * len(sizes), sizes)
        assert (out - want).abs().max() <= 1e-6 * max(1, float(want.max())), (sizes, tile, overlap, scale, multiple)


@pytest.mark.battery
def test_weights_are_positive_and_sum_to_one_in_any_number_of_dimensions():
    for n, (sizes, tile, overlap, _, multiple) in enumerate(STACKS):
        sides, starts = plan_tiles(sizes, tile, overlap, multiple)
        ramps = [fade(first, side, o, (None, 0, o // 2)[n % 3]) for first, side, o in zip(starts, sides, overlap)]
        total = torch.zeros(*(first[-1] + side for first, side in zip(starts, sides)), dtype=torch.float64)
        for corner in itertools.product(*(enumerate(first) for first in starts)):
            window = fade_window([ramp[i] for ramp, (i, _) in zip(ramps, corner)])
            assert window.shape == sides and window.min() > 0
            total[tuple(slice(n, n + side) for (_, n), side in zip(corner, sides))] += window
        assert (total - 1).abs().max() <= 1e-12


def test_each_tile_of_a_stack_is_computed_once():
    "Tiles are counted, their sizes and places are those of the plan, progress is reported after each."
    sizes, tile, overlap, multiple = (21, 70, 53), (8, 32, 24), (2, 8, 8), (1, 8, 4)
    windows, told = [], []
    image = torch.rand(2, 1, *sizes)
    run_tiled(lambda part, window: windows.append(window) or part, image, tile, overlap, 1, multiple,
              callback=lambda *news: told.append(news))
    sides, starts = plan_tiles(sizes, tile, overlap, multiple)
    assert windows == [(*corner, *sides) for corner in itertools.product(*starts)]
    assert len(windows) == math.prod(map(len, starts)) == 4 * 3 * 3
    assert told == [(i + 1, len(windows)) for i in range(len(windows))]
    assert all(n % m == 0 for window in windows for n, m in zip(window, multiple * 2))
    assert [first[-1] + side for first, side in zip(starts, sides)] == [21, 72, 56]


@pytest.mark.parametrize("sizes", [(37,), (37, 22), (8, 37, 22)])
def test_one_tile_is_the_whole_image_to_the_bit(sizes):
    image, calls = torch.rand(1, 1, *sizes, generator=torch.Generator().manual_seed(3)), []

    def network(part, window):
        calls.append(window)
        return part * 3 - part.mean() + window[0]

    out = run_tiled(network, image, 64, 16, multiple=1)
    assert torch.equal(out, image * 3 - image.mean()) and calls == [(0,) * len(sizes) + sizes]


def test_a_stack_in_tiles_that_hold_whole_planes_is_its_planes():
    "A network that looks within a plane gives the same from z-stack tiles as plane by plane."
    stack = torch.rand(1, 1, 9, 50, 44, generator=torch.Generator().manual_seed(4))
    in_plane = lambda part, window: F.conv3d(part, torch.ones(1, 1, 1, 7, 7) / 49, padding=(0, 3, 3))
    out = run_tiled(in_plane, stack, (4, 24, 24), (1, 8, 8), multiple=(1, 4, 4))
    planes = torch.stack([run_tiled(blur, plane, 24, 8, multiple=4) for plane in stack[0, 0, :, None, None]])
    assert (out[0, 0] - planes[:, 0, 0]).abs().max() <= 1e-6


def two_dimensional(network, image, tile_px, overlap_px, scale, multiple):
    "The blend written out for (B,C,H,W) alone, as fluogen 0.1.0 had it: the reference for restored images."
    H, W = image.shape[-2:]
    up = lambda n: -(-n // multiple) * multiple
    side_y, side_x = (min(up(tile_px), up(n)) for n in (H, W))
    padded = pad_reflect(image, up(H), up(W))
    tops = tile_starts(up(H), side_y, min(overlap_px, side_y - 1), multiple)
    lefts = tile_starts(up(W), side_x, min(overlap_px, side_x - 1), multiple)
    rows, columns = (fade([n * scale for n in starts], side * scale, overlap_px * scale)
                     for starts, side in ((tops, side_y), (lefts, side_x)))
    total = 0
    for (i, top), (j, left) in itertools.product(enumerate(tops), enumerate(lefts)):
        out = network(padded[..., top:top + side_y, left:left + side_x], (top, left, side_y, side_x))
        here = torch.zeros(*out.shape[:2], up(H) * scale, up(W) * scale, dtype=torch.float64)
        here[..., top * scale:(top + side_y) * scale, left * scale:(left + side_x) * scale] = \
            out * (rows[i][:, None] * columns[j])
        total = total + here
    return total[..., :H * scale, :W * scale].float()


@pytest.mark.battery
def test_images_are_blended_as_before_to_the_bit():
    generator = torch.Generator().manual_seed(5)
    for H, W, tile, overlap, multiple, scale in CASES[:40]:
        image = torch.rand(1, 2, H, W, generator=generator)
        network = lambda part, window: refine(part - part.mean() + 0.1 * window[0] - 0.3 * window[1], (scale, scale))
        given = network, image, tile, overlap, scale, multiple
        assert torch.equal(run_tiled(*given), two_dimensional(*given)), given[2:]


IDENTITY = lambda part, window: part


@pytest.mark.parametrize("sizes, given, message", [
    ((40, 40), dict(tile_px=16, overlap_px=16), r"overlap must be smaller than the tile \(found 16, expected 0\.\.15"),
    ((9, 40, 40), dict(tile_px=(4, 16, 16), overlap_px=4), r"smaller than the tile \(found 4, expected 0\.\.3"),
    ((5, 5), dict(tile_px=64, overlap_px=64), "smaller than the tile"),     # also where one tile would do
    ((9, 40, 40), dict(tile_px=(16, 16)), r"tile_px: .*\(found 2 numbers, expected 3\)"),
    ((40, 40), dict(tile_px=16, overlap_px=(1, 4, 4)), "overlap_px: .*found 3 numbers, expected 2"),
    ((9, 40, 40), dict(scale=(2, 2)), "scale: .*found 2 numbers, expected 3"),
    ((40,), dict(multiple=(8, 8)), "multiple: .*found 2 numbers, expected 1"),
    ((40, 40), dict(tile_px=16, overlap_px=8, halo_px=(1,)), "halo_px: .*found 1 numbers, expected 2"),
    ((40, 40), dict(tile_px=16, overlap_px=8, halo_px=5), r"two halos must fit .*\(8, 8\)"),
    ((40, 40), dict(tile_px=16, overlap_px=15, halo_px=7), r"two halos must fit .*\(8, 8\)"),   # multiples of 8
    ((40, 40), dict(tile_px=16.0), "tile_px: not a whole number"), ((40, 40), dict(tile_px=0), "tile_px: not a whole"),
    ((40, 40), dict(overlap_px=-1), "overlap_px: not a whole number"), ((40, 40), dict(scale=0), "scale: not a whole"),
    ((), {}, "nothing to cut into tiles"), ((0, 40), {}, "nothing to cut into tiles"),
    ((40, 40), dict(scale=2), r"returned another size \(found \(40, 40\), expected \(80, 80\)"),
])
def test_wrong_input_is_refused_in_one_line(sizes, given, message):
    with pytest.raises(TilingError, match=message) as refused:
        run_tiled(IDENTITY, torch.rand(1, 1, *sizes), **{"overlap_px": 0, **given})
    assert "\n" not in str(refused.value)


def test_a_result_that_would_broadcast_is_refused():
    with pytest.raises(TilingError, match="returned another size"):
        run_tiled(lambda part, window: part.mean((2, 3), keepdim=True), torch.rand(1, 1, 40, 40), 16, 4)


def test_starts():
    rng = random.Random(1)
    for _ in range(2000):
        multiple = rng.choice([1, 2, 4, 8])
        tile = multiple * rng.randrange(1, 40)
        overlap, length = rng.randrange(0, tile), multiple * rng.randrange(1, 200)
        starts = tile_starts(length, tile, overlap, multiple)
        least = min(overlap, tile - multiple)
        assert starts[0] == 0 and starts[-1] + tile >= length
        assert len(starts) == 1 or starts[-1] + tile == length
        assert all(a < b <= a + tile - least for a, b in zip(starts, starts[1:]))
        assert not any(start % multiple for start in starts)
        assert len(starts) <= max(1, -(-length // multiple))
    for overlap in (8, 9, -1):
        with pytest.raises(TilingError, match="smaller than the tile"):
            tile_starts(100, 8, overlap)


def test_padding_is_numpys_reflection():
    rng = np.random.default_rng(0)
    for _ in range(60):
        h, w = rng.integers(1, 12, 2)
        down, right = rng.integers(0, 40, 2)
        image = rng.random((1, 2, h, w))
        want = np.pad(image, ((0, 0), (0, 0), (0, down), (0, right)), mode="reflect")
        assert np.array_equal(pad_reflect(torch.from_numpy(image), h + down, w + right).numpy(), want)
    image = torch.rand(1, 1, 5, 5)
    assert pad_reflect(image, 3, 5) is image
    stack = torch.rand(1, 1, 3, 5, 4)
    want = np.pad(stack.numpy(), ((0, 0), (0, 0), (0, 9), (0, 0), (0, 3)), mode="reflect")
    assert np.array_equal(pad_reflect(stack, 12, 2, 7).numpy(), want)
    assert np.array_equal(pad_reflect(stack, 7).numpy(), want[:, :, :3])


def test_fading():
    assert torch.equal(fade([0], 6, 3), torch.ones(1, 6).double())  # nobody else is there
    assert torch.allclose(fade([0, 4], 8, 3)[0, 4:], torch.tensor([0.8, 0.6, 0.4, 0.2]).double())
    assert torch.equal(fade([0, 3, 6], 4, 0)[1], torch.tensor([0.5, 1, 1, 0.5]).double())
    for side, ramp in ((1, 0), (8, 0), (8, 3), (9, 20)):
        weight = fade([0, side // 2], side, ramp)
        assert weight.shape == (2, side) and weight.min() > 0 and weight.max() <= 1
    first, second = fade([0, 1], 12, 5, halo=2)                     # 13 slices: only the image's ends know both sides
    assert first[:3].tolist() == [1, 1 / 1.001, 1 / 1.001] and second[-1] == 1 and second[:2].max() < 1e-3


# ---- networks that look around

def blur(part, window=None):
    "Looks three pixels far; at a tile's edge it sees zeros, as a convolution does."
    return F.conv2d(part, torch.ones(1, 1, 7, 7) / 49, padding=3)


@pytest.mark.parametrize("shift", [(4, 0), (8, 12), (20, 16)])
def test_a_shifted_image_gives_a_shifted_result(shift):
    "A network that sees 3 pixels far, fading over 24: only the faded share of its edge error may move."
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 1, 160, 180, generator=generator)
    moved = image.roll(shift, (2, 3))
    inside = (..., slice(40, 130), slice(40, 140))
    here, there = (run_tiled(blur, picture, 64, 24, 1, 4) for picture in (image, moved))
    assert (here.roll(shift, (2, 3)) - there)[inside].abs().max() < 0.05
    assert (run_tiled(blur, image, 64, 24, 1, 4) - blur(image))[inside].abs().max() < 0.05


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_halo_of_the_receptive_field_makes_tiles_agree_with_the_whole(axes):
    "A mean over 5 pixels per axis sees 2 pixels far; in the halo a thousandth of the edge error may stay, per axis."
    sizes, tile = ((90,), (45, 50), (13, 30, 26))[axes - 1], (24, 20, 9)[axes - 1]
    image = torch.rand(1, 1, *sizes, generator=torch.Generator().manual_seed(6))
    convolve, kernel = (F.conv1d, F.conv2d, F.conv3d)[axes - 1], torch.full((1, 1, *[5] * axes), 5.0**-axes)
    network = lambda part, window=None: convolve(part, kernel, padding=2)
    error = [float((run_tiled(network, image, tile, 4, multiple=1, halo_px=halo) - network(image)).abs().max())
             for halo in (0, 2)]
    assert error[1] <= 1e-3 * axes < error[0]
    other = run_tiled(network, image, tile + 3, 5, multiple=1, halo_px=2)       # another tiling, the same result
    assert (other - network(image)).abs().max() <= 1e-3 * axes


def test_a_halo_counts_input_pixels_along_each_axis():
    image = torch.rand(1, 1, 30, 34, generator=torch.Generator().manual_seed(7))
    fine = lambda part, window=None: refine(F.conv2d(part, torch.ones(1, 1, 1, 5) / 5, padding=(0, 2)), (1, 2))
    error = [float((run_tiled(fine, image, 14, 4, (1, 2), 1, halo_px=halo) - fine(image)).abs().max())
             for halo in ((2, 0), (0, 2))]
    assert error[1] <= 1e-3 < error[0]


@pytest.fixture(scope="module")
def field():
    return simulate_pairs(("microtubules",), 1, size_px=512, seed=5, split="test")


def seam_ratio(difference, tile, overlap, multiple, scale):
    "Root mean square where tiles overlap, over that where only one tile is."
    side = difference.shape[-1] // scale
    count = torch.zeros(scale * side)
    for start in tile_starts(side, tile, overlap, multiple):
        count[scale * start:scale * (start + tile)] += 1
    seam = (count[:, None] > 1) | (count > 1)
    square = difference.square()
    return float((square[seam].mean() / square[~seam].mean()).sqrt())


def test_seams_of_a_network_with_group_norm(field):
    "512² in tiles against 512² whole: at seams at most 1.05 times the error elsewhere, of both kinds."
    weights = load_for_task("sr")                                               # as shipped, with attention
    with torch.inference_mode():
        whole, tiled, hard = (restore_unit(field.condition[0], weights,
                                           RestoreSettings(tile_px=t, overlap_px=o))
                              for t, o in ((256, 32), (96, 32), (96, 0)))
    assert whole.shape == tiled.shape == (512, 512)
    assert seam_ratio(tiled - whole, 96, 32, 4, 2) <= 1.05
    truth = field.target[0, 0]
    against = [seam_ratio(out - truth, 96, 32, 4, 2) for out in (tiled, whole)]
    assert against[0] <= 1.05 * against[1]                      # the scene itself differs from place to place
    error = [float((out - truth).square().mean().log10()) * 10 for out in (tiled, whole)]
    assert error[0] <= error[1] + 0.2                           # dB
    start = 2 * tile_starts(256, 96, 0, 4)[1]
    steps = [float((out - whole)[:, start - 1:start + 1].diff(dim=1).abs().mean()) for out in (hard, tiled)]
    assert steps[0] > 3 * steps[1]                              # what blending is for


@pytest.mark.parametrize("seed", range(2))
def test_seams_of_random_networks_on_noise(seed):
    "Statistics are alike everywhere here, and only the edges of tiles could differ."
    noise = torch.rand(1, 128, 128, generator=torch.Generator().manual_seed(9))
    weights = make_weights("direct", seed=seed)
    whole, tiled = (restore_unit(noise, weights, RestoreSettings(tile_px=tile, overlap_px=16))
                    for tile in (128, 48))
    assert seam_ratio(tiled - whole, 48, 16, 2, 2) <= 1.05
