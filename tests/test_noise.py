"Noise: what a camera was told is what is found, and what cannot be known is refused."
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, zoom

from fluogen.core import make_generator, make_rng
from fluogen.simulation.microscopes import TRAIN, draw_setups
from fluogen.preprocessing.noise import (
    NoiseError, NoiseModel, estimate_noise, estimate_noise_frames, estimate_noise_pair, points_of_image)
from fluogen.simulation.camera import Camera, detect
from fluogen.simulation.optics import bin_to_camera, widefield
from fluogen.simulation.structures import STRUCTURES, render
from fluogen.preprocessing.anscombe import anscombe_inverse, anscombe_transform

FMD = Path(__file__).resolve().parents[2] / "shared" / "realdata" / "denoise_pairs" / "fmd"
CAMERA = Camera(offset_counts=100, gain=2.0, read_noise=1.6)
PEAKS = (5, 50, 500, 5000)                  # photoelectrons in the brightest pixel: three decades


@pytest.fixture(scope="module")
def light():
    "Structure -> light (512, 512), brightest pixel 1."
    made = {}
    for name in ("microtubules", "er", "ccps", "nuclei", "lysosomes"):
        setup, = draw_setups(1, STRUCTURES[name].pixel_um, TRAIN, make_rng(3, name))
        density = render(name, 1, 1024, generator=make_generator(1, name)).density[:, None]
        blurred = bin_to_camera(widefield(density, setup.optics))
        made[name] = blurred / blurred.max()
    return made


def expose(light, peak, camera=CAMERA, seed=0, background=0.02):
    "Counts (Y, X) and their noise-free mean before clipping."
    photons = peak * (light + background)
    counts = detect(photons, camera, make_generator(seed, "exposure"))[0, 0].numpy()
    return counts, camera.offset_counts + camera.gain * photons[0, 0].double().numpy()


def worst_error(noise, mean, camera=CAMERA):
    "Largest relative error of the standard deviation over all grey levels of a picture."
    grey = np.linspace(mean.min(), mean.max(), 200)
    true = camera.gain * (grey - camera.offset_counts) + (camera.gain * camera.read_noise) ** 2 + 1 / 12
    return abs(noise.predict_std(grey) / np.sqrt(true) - 1).max()


# ---- the number to hold

@pytest.mark.parametrize("seed", range(3))
def test_a_few_bright_spots_in_the_dark_are_not_taken_for_noise(seed):
    "Hardly wider than a pixel, on half a megapixel: an average over all pixels does not see them."
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:512, :512]
    spots = sum(np.exp(-((y - a)**2 + (x - b)**2) / (2 * 1.5**2)) for a, b in rng.uniform(20, 492, (40, 2)))
    photons = 50 + 450 * spots
    counts = np.round(100 + 2 * (rng.poisson(photons) + rng.normal(0, 1.6, photons.shape)))
    grey = np.linspace(200, 1100, 9)
    true = np.sqrt(2 * grey - 200 + 4 * 1.6**2)
    assert abs(estimate_noise(counts).predict_std(grey) / true - 1).max() < 0.08


@pytest.mark.parametrize("peak", PEAKS)
def test_five_per_cent_at_every_grey_level(light, peak):
    for name, one in light.items():
        counts, mean = expose(one, peak)
        assert worst_error(estimate_noise(counts), mean) < 0.05, name


@pytest.mark.parametrize("camera", [Camera(offset_counts=0, gain=1.0, read_noise=0.0), Camera(400, 0.5, 3.0),
                                    Camera(100, 8.0, 0.8), Camera(100, 1.0, 20.0)])
def test_other_cameras(light, camera):
    counts, mean = expose(light["microtubules"], 300, camera)
    noise = estimate_noise(counts)
    assert worst_error(noise, mean, camera) < 0.05
    low, high = noise.offset_range
    assert low - 1.5 * camera.gain * (1 + camera.read_noise) < camera.offset_counts < high


def test_gain_and_read_noise_come_back(light):
    noise = estimate_noise(expose(light["er"], 500)[0])
    assert noise.gain == pytest.approx(2.0, abs=4 * noise.gain_error) and noise.gain_error < 0.1
    assert noise.read_noise(offset=100) == pytest.approx(1.6, rel=0.3)


def test_scale_and_offset_of_the_counts_do_not_matter(light):
    counts, _ = expose(light["er"], 100)
    one, other = estimate_noise(counts), estimate_noise(counts * 3.0 + 50)
    grey = np.array([105.0, 200.0])
    assert other.gain == pytest.approx(3 * one.gain, rel=1e-3)
    np.testing.assert_allclose(other.predict_std(grey * 3 + 50), 3 * one.predict_std(grey), rtol=1e-3)


def test_structure_does_not_count_as_noise(light):
    "Read noise alone: the brightest structure is as noisy as the background."
    rng = np.random.default_rng(0)
    image = 100 + 5000 * light["nuclei"][0, 0].numpy() + rng.normal(0, 10, (512, 512))
    np.testing.assert_allclose(estimate_noise(image).predict_std([150, 5000]), 10, rtol=0.05)


# ---- what disturbs

def test_saturation(light):
    camera = Camera(offset_counts=100, gain=2.0, read_noise=1.6, bits=9)
    counts, mean = expose(light["microtubules"], 500, camera)
    assert np.mean(counts == 511) > 0.01
    assert worst_error(estimate_noise(counts), np.minimum(mean, 511)) < 0.05


def test_clipping_at_zero(light):
    counts, mean = expose(light["nuclei"], 500)
    noise = estimate_noise(np.maximum(counts - 118, 0))         # mean background now 2 counts, clipped
    grey = np.linspace(20, mean.max() - 118, 50)
    true = np.sqrt(2.0 * (grey + 18) + (2 * 1.6) ** 2)
    assert abs(noise.predict_std(grey) / true - 1).max() < 0.05


def test_hot_pixels_and_a_line(light):
    counts, mean = expose(light["er"], 100)
    rng = np.random.default_rng(0)
    counts = counts.copy()
    counts.ravel()[rng.choice(counts.size, 250, replace=False)] += 3000
    counts[200] += 500
    assert worst_error(estimate_noise(counts), mean) < 0.05


def test_a_photon_counter_hits_zero_honestly(light):
    camera = Camera(offset_counts=0, gain=1.0, read_noise=0.0)
    counts, mean = expose(light["microtubules"], 6, camera)
    assert np.mean(counts == 0) > 0.3
    noise = estimate_noise(counts)
    assert noise.gain == pytest.approx(1, rel=0.05)


# ---- what is refused, in one line

@pytest.mark.parametrize("spoil, says", [
    (lambda c: zoom(c.astype(float), 2, order=1), "share their noise"),
    (lambda c: gaussian_filter(c.astype(float), 0.7), "share their noise"),
    (lambda c: (c[1:] + c[:-1]) / 2, "share their noise"),
    (lambda c: np.where(c > 112, c, 112) * 0 + 5, "constant"),
    (lambda c: np.maximum(c.astype(int) - int(np.percentile(c, 99.5)), 0), "clipped"),
    (lambda c: c[:40], "too small"),
    (lambda c: np.stack([c, c]), "not a plane"),
    (lambda c: c.astype(complex), "not a plane"),
    (lambda c: np.where(c == c.max(), np.nan, c), "NaN"),
])
def test_refusals(light, spoil, says):
    counts, _ = expose(light["er"], 20)
    with pytest.raises(NoiseError, match=says) as caught:
        estimate_noise(spoil(counts))
    assert "\n" not in str(caught.value)


# ---- frames and pairs

def test_frames_and_pairs_agree_with_the_camera(light):
    for peak in PEAKS:
        frames = np.stack([expose(light["microtubules"], peak, seed=seed)[0] for seed in range(4)])
        mean = expose(light["microtubules"], peak)[1]
        assert worst_error(estimate_noise_frames(frames), mean) < 0.05
        assert worst_error(estimate_noise_pair(frames[0], mean), mean) < 0.05


def test_frames_measure_shared_noise(light):
    "Noise that neighbours share is refused in one image, measured in frames."
    rng = np.random.default_rng(0)
    field = 100 + 500 * light["er"][0, 0].numpy()
    frames = field + gaussian_filter(rng.normal(0, 40, (4, 512, 512)), (0, 1, 1))
    true = 40 / (2 * np.pi**0.5)                                # of a Gaussian with sigma 1
    with pytest.raises(NoiseError, match="share"):
        estimate_noise(frames[0])
    np.testing.assert_allclose(estimate_noise_frames(frames).predict_std([110, 500]), true, rtol=0.05)


def test_frames_and_pairs_refuse(light):
    counts, mean = expose(light["er"], 50)
    bleached = np.stack([counts, 0.8 * counts])
    for call, says in ((lambda: estimate_noise_frames(bleached), "brightness"),
                       (lambda: estimate_noise_frames(counts[None]), "one frame"),
                       (lambda: estimate_noise_frames(counts), "not a series"),
                       (lambda: estimate_noise_pair(counts, mean[:-2]), "two sizes"),
                       (lambda: estimate_noise_pair(counts, mean * 2), "one scale"),
                       (lambda: NoiseModel(0.0, 4.0, (0, 1)).read_noise(0), "no photon noise")):
        with pytest.raises(NoiseError, match=says):
            call()


def test_nothing_random_and_nothing_changed(light):
    counts, _ = expose(light["er"], 50)
    before = counts.copy()
    assert estimate_noise(counts) == estimate_noise(counts) and (counts == before).all()
    assert points_of_image(counts).levels == estimate_noise(counts).levels


# ---- stabilising

@pytest.mark.parametrize("read_noise", [0.0, 1.0, 3.0])
def test_stabilised_and_back(read_noise):
    rng, noise = np.random.default_rng(0), NoiseModel(3.0, 9.0 * read_noise**2 - 3.0 * 50, (50, 4000), 1.0)
    for photons in (2, 5, 20, 200, 2000):
        counts = 50 + 3.0 * (rng.poisson(photons, 200_000) + rng.normal(0, read_noise, 200_000))
        stable = anscombe_transform(counts, noise)
        assert stable.std() == pytest.approx(1, abs=0.08)
        low, high = anscombe_transform((50, 9050), noise)                                    # 0 and 3000 photoelectrons as light 0 and 1
        light = anscombe_inverse((stable.mean() - low) / (high - low), 1 / (high - low), low / (high - low))
        assert 3000 * light == pytest.approx(photons, abs=0.05 + 4 * np.sqrt((photons + read_noise**2) / 200_000))


def test_an_estimated_model_stabilises_a_picture(light):
    counts, mean = expose(light["er"], 200)
    noise = estimate_noise(counts)
    residual = anscombe_transform(counts, noise) - anscombe_transform(mean, noise)
    bright = mean > np.percentile(mean, 95)
    assert residual[bright].std() == pytest.approx(1, abs=0.05) and residual[~bright].std() == pytest.approx(1, abs=0.05)
    assert torch.is_tensor(light["er"])


# ---- real frames

@pytest.mark.skipif(not FMD.is_dir(), reason="the FMD frames are not on this machine")
def test_real_frames():
    "One image against four frames of it; widefield noise is shared by neighbours there and has to be refused."
    from fluogen.io.image import read_image
    compared = []
    for first in sorted((FMD / "raw").glob("*_1.png")):
        scene = first.name[:-6]
        frames = np.stack([read_image(FMD / "raw" / f"{scene}_{k}.png").array for k in (1, 2, 3, 4)])
        grey = np.percentile(read_image(FMD / "gt" / f"{scene}.png").array, [50, 99, 99.9])
        truth = estimate_noise_frames(frames).predict_std(grey)
        if scene.startswith("WideField"):
            with pytest.raises(NoiseError, match="share"):
                estimate_noise(frames[0])
        else:
            compared.append(estimate_noise(frames[0]).predict_std(grey) / truth)
    assert len(compared) == 7
    assert 0.85 < np.min(compared) and np.max(compared) < 1.1 and 0.9 < np.median(compared) < 1.02
