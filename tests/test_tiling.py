"Tiles: every pixel once, nothing changed that the network does not change, no seams."
import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import make_weights

from fluogen.data.pairs import simulate_pairs
from fluogen.tasks.restore import restore_unit
from fluogen.tasks.settings import RestoreSettings, load_for_task
from fluogen.tasks.tiling import TilingError, fade, pad_reflect, run_tiled, tile_starts

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


def test_fading():
    assert torch.equal(fade([0], 6, 3), torch.ones(1, 6).double())  # nobody else is there
    assert torch.allclose(fade([0, 4], 8, 3)[0, 4:], torch.tensor([0.8, 0.6, 0.4, 0.2]).double())
    assert torch.equal(fade([0, 3, 6], 4, 0)[1], torch.tensor([0.5, 1, 1, 0.5]).double())
    for side, ramp in ((1, 0), (8, 0), (8, 3), (9, 20)):
        weight = fade([0, side // 2], side, ramp)
        assert weight.shape == (2, side) and weight.min() > 0 and weight.max() <= 1


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
