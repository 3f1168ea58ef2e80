"""Restoration metrics: each number against an independent computation, and what must be refused."""
import re

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from fluogen.metrics import restoration as R
from fluogen.metrics.bootstrap import paired_interval
from fluogen.metrics.resolution import (correlate_rings, fourier_ring_correlation, fourier_ring_resolution,
                                        split_checkerboard)
from fluogen.metrics.restoration import MetricError
from fluogen.metrics.hallucination import locate_errors, structure_errors


def gaussian_window():
    x = np.arange(-5, 6)
    g = np.exp(-x**2 / (2 * 1.5**2))
    return np.outer(g, g) / g.sum() ** 2


def moments(t, y):
    "Windowed means, variances and covariance, by writing out every 11 x 11 window."
    window = gaussian_window()
    mean = lambda image: np.einsum("yxab,ab->yx", sliding_window_view(image, (11, 11)), window)
    mt, my = mean(t), mean(y)
    return mt, my, mean(t * t) - mt**2, mean(y * y) - my**2, mean(t * y) - mt * my


def brute_ssim(t, y, peak):
    mt, my, vt, vy, c = moments(t, y)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    contrast = (2 * c + c2) / (vt + vy + c2)
    return (2 * mt * my + c1) / (mt**2 + my**2 + c1) * contrast, contrast


def brute_ms_ssim(t, y, peak):
    score, powers = 1.0, (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for scale, power in enumerate(powers):
        contrast = brute_ssim(t, y, peak)[1].mean()
        if scale == 4:
            full = [np.pad(image, 5, mode="reflect") for image in (t, y)]
            contrast = brute_ssim(*full, peak)[0].mean()
        score *= max(contrast, 0) ** power
        t, y = (image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2] for image in (t, y))
        t, y = (image.reshape(len(image) // 2, 2, image.shape[1] // 2, 2).mean((1, 3)) for image in (t, y))
    return score


def draw_pair(k, shape):
    "Pairs of many kinds: noise, gain, offset, constant, equal, negative, counts, sparse."
    rng = np.random.default_rng(k)
    target = rng.random(shape) ** rng.integers(1, 6)
    noise = 0.1 * rng.standard_normal(shape)
    image = [target + noise, 3 * target - 1, 1 - target, np.full(shape, 0.3), target,
             rng.random(shape), (target > 0.9).astype(float), np.roll(target, 1, 0)][k % 8]
    scale = (1.0, 255.0, 65535.0)[k % 3]
    if k % 11 == 0:
        target = np.full(shape, 0.5)
    return target * scale, image * scale, scale


@pytest.mark.parametrize("block", range(4))
def test_200_pairs_against_references(block):
    from skimage.metrics import peak_signal_noise_ratio
    for k in range(50 * block, 50 * block + 50):
        t, y, peak = draw_pair(k, (24 + k % 5, 31))
        with np.errstate(divide="ignore"):
            expected = peak_signal_noise_ratio(t, y, data_range=peak)
        assert R.psnr(t, y, peak) == pytest.approx(expected, abs=1e-6)
        assert R.ssim(t, y, peak) == pytest.approx(brute_ssim(t, y, peak)[0].mean(), abs=1e-6)
        design = np.stack([y.ravel() / peak, np.ones(y.size)], 1)
        gain, offset = np.linalg.lstsq(design, t.ravel() / peak, rcond=None)[0]
        left = t / peak - (gain * y / peak + offset) if gain > 1e-9 else (t - t.mean()) / peak
        assert R.nrmse(t, y, peak) == pytest.approx(np.sqrt((left**2).mean()), abs=1e-6)


def test_ms_ssim_against_brute_force():
    for k in range(8):
        t, y, peak = draw_pair(k, (176 + k % 2, 181))
        assert R.ms_ssim(t, y, peak) == pytest.approx(brute_ms_ssim(t, y, peak), abs=1e-6)


def test_stacks_are_scored_image_by_image():
    rng = np.random.default_rng(0)
    t = rng.random((2, 3, 32, 40))
    y = t + 0.1 * rng.standard_normal(t.shape)
    for metric in (R.psnr, R.ssim, R.nrmse):
        scores = metric(t, y, 1)
        assert scores.shape == (2, 3) and isinstance(metric(t[0, 0], y[0, 0], 1), float)
        assert scores[1, 2] == pytest.approx(metric(t[1, 2], y[1, 2], 1), abs=1e-12)
    assert "ms_ssim" not in R.score_restoration(t, y, 1)


def test_integers_do_not_wrap():
    t, y = np.zeros((16, 16), np.uint8), np.full((16, 16), 255, np.uint8)
    assert R.psnr(t, y, 255) == pytest.approx(0) == R.psnr(y, t, 255)


METRICS = (R.psnr, R.ssim, R.ms_ssim, R.nrmse)


@pytest.mark.parametrize("metric", METRICS)
def test_wrong_input_is_one_line(metric):
    good = np.random.default_rng(0).random((180, 180))
    hole, shape = good.copy(), good[:-1]
    hole[3, 4] = np.nan
    for t, y, peak in ((good, hole, 1), (hole, good, 1), (good, shape, 1), (good, good[None], 1),
                       (good, good, 0), (good, good, np.nan), (good, good, None), (good, good + 0j, 1),
                       (good[0], good[0], 1)):
        with pytest.raises(MetricError) as error:
            metric(t, y, peak)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError):
        metric(good, good)                                          # no default range, on purpose
    with pytest.raises(MetricError, match="NaN or infinite"):
        metric(good, np.where(good > 0.99, np.inf, good), 1)


def test_small_images_are_refused_not_approximated():
    small = np.zeros((175, 300))
    with pytest.raises(MetricError, match="176"):
        R.ms_ssim(small, small, 1)
    with pytest.raises(MetricError, match="11 x 11"):
        R.ssim(small[:10], small[:10], 1)


# ---- Fourier rings

def low_pass(field, cutoff, pixel_um):
    q = np.hypot(np.fft.fftfreq(field.shape[0])[:, None], np.fft.fftfreq(field.shape[1])) / pixel_um
    out = np.fft.ifft2(np.fft.fft2(field) * (q < cutoff)).real
    return out / out.std()


@pytest.mark.parametrize("shape", [(256, 256), (300, 257)])
@pytest.mark.parametrize("cutoff", [4.0, 6.0])
def test_known_cutoff_by_every_road(shape, cutoff):
    rng, pixel = np.random.default_rng(1), 0.03
    full = rng.standard_normal(shape)
    scene = low_pass(full, cutoff, pixel)
    one, two = (scene + 0.5 * rng.standard_normal(shape) for _ in range(2))
    counts = rng.poisson(np.clip(100 + 30 * scene, 0, None))
    found = [fourier_ring_resolution(one, two, pixel_um=pixel),
             fourier_ring_resolution(one, pixel_um=pixel, split="checkerboard"),
             fourier_ring_resolution(counts, pixel_um=pixel, split="binomial"),
             fourier_ring_resolution(10 + 3 * scene, pixel_um=pixel, split="binomial", counts_per_unit=30),
             fourier_ring_correlation(one, full, pixel_um=pixel).resolution_um]
    np.testing.assert_allclose(found, 1 / cutoff, rtol=0.1)


def test_checkerboard_undoes_the_half_pixel_shift():
    rng = np.random.default_rng(4)
    scene = low_pass(rng.standard_normal((256, 300)), 0.2, 1)       # below a quarter: no aliasing
    for pair in split_checkerboard(scene):
        frequency, aligned = correlate_rings(*pair)
        assert aligned[5:45].min() > 0.99 > 0.8 > correlate_rings(*pair[:2])[1][5:45].min()


def test_rings_scale_with_the_pixel_and_stack():
    rng = np.random.default_rng(2)
    scene = low_pass(rng.standard_normal((128, 128)), 6, 0.03)
    pair = np.stack([scene + 0.5 * rng.standard_normal((128, 128)) for _ in range(2)])
    fine, coarse = (fourier_ring_resolution(pair, pair[::-1], pixel_um=p) for p in (0.03, 0.06))
    np.testing.assert_allclose(coarse, 2 * fine)
    assert fine.shape == (2,) and fine[0] == pytest.approx(fine[1])
    shown = fourier_ring_correlation(pair, np.stack([scene, scene]), pixel_um=0.03)
    assert shown.correlation.shape == (2, 65) and shown.frequency_per_um[-1] == pytest.approx(0.5 / 0.03)


def test_correlation_of_mean_and_sample_follows_theory():
    "A Wiener mean correlates with the truth at sqrt(W), a posterior sample at W."
    rng = np.random.default_rng(3)
    truth, error, guess = rng.standard_normal((3, 256, 256))
    W = 0.4
    mean = W * truth + np.sqrt(W * (1 - W)) * error
    sample = mean + np.sqrt(1 - W) * guess
    for image, power in ((mean, 0.5), (sample, 1)):
        curve = fourier_ring_correlation(image, truth, pixel_um=0.1).correlation[20:]
        assert curve.mean() == pytest.approx(W**power, abs=0.02)


def test_degenerate_rings():
    flat, noise = np.ones((64, 64)), np.random.default_rng(0).standard_normal((64, 64))
    for split in ("checkerboard", "binomial"):
        assert fourier_ring_resolution(0 * flat, pixel_um=0.1, split=split) == np.inf
    assert fourier_ring_resolution(flat, noise, pixel_um=0.1) == np.inf
    assert fourier_ring_resolution(noise, noise, pixel_um=0.1) == pytest.approx(0.2)
    for wrong in (dict(), dict(split="halves"), dict(image_b=noise, split="binomial"), dict(split="binomial"),
                  dict(split="checkerboard", pixel_um=0), dict(split="checkerboard", threshold=1.5)):
        with pytest.raises(MetricError):
            fourier_ring_resolution(noise, **{"pixel_um": 0.1, **wrong})
    with pytest.raises(MetricError, match="16 x 16"):
        fourier_ring_resolution(noise[:8, :8], noise[:8, :8], pixel_um=0.1)


# ---- invented and missed

SIZE = dict(pixel_um=0.03, element_um=0.1)


def draw_spots(places, shape=(220, 200)):
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    return sum((np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / (2 * 1.41**2)) for y, x in places), np.zeros(shape))


@pytest.mark.parametrize("planted, removed", [(0, 0), (7, 0), (0, 9), (4, 11)])
def test_planted_spots_are_counted(planted, removed):
    rng = np.random.default_rng(planted + removed)
    places = [15 + 20 * place + rng.uniform(-3, 3, 2) for place in np.indices((10, 9)).reshape(2, -1).T]
    rng.shuffle(places)
    truth, image = draw_spots(places[:40]), draw_spots(places[removed : 40 + planted])
    found = structure_errors(truth, 0.5 * image + 0.1, 1, **SIZE)
    assert (found.n_invented, found.n_missed) == (planted, removed)
    assert (found.n_truth, found.n_image) == (40, 40 + planted - removed)
    assert found.invented == pytest.approx(planted / found.n_image)
    assert found.missed == pytest.approx(removed / 40)
    where = locate_errors(truth, image, 1, **SIZE)
    added, taken = places[40 : 40 + planted], places[:removed]
    for spots, points in ((added, where["invented"]), (taken, where["missed"])):
        assert all(min(np.hypot(*(np.array(spot) - point)) for spot in spots) < 1.5 for point in points)


def test_planted_line_counts_by_its_length():
    x = np.arange(200)
    line = lambda row: np.exp(-((np.arange(220)[:, None] - row - 0.1 * x) ** 2) / (2 * 1.41**2))
    truth, image = line(30) + line(80), line(30) + line(80) + line(140)
    found = structure_errors(truth, image, 1, **SIZE)
    assert found.n_missed == 0 and found.invented == pytest.approx(1 / 3, abs=0.02)
    assert found.n_invented == pytest.approx(0.75 * 200 / (0.1 / 0.03), rel=0.2)    # Renyi's parking constant
    shifted = [structure_errors(truth, np.roll(truth, d, 0), 1, **SIZE) for d in (0, 2, 3, 5)]
    assert [s.invented > 0.5 for s in shifted] == [False, False, False, True]      # tolerance: 3.3 px


def test_structures_ignore_gain_and_offset_and_stack():
    rng = np.random.default_rng(5)
    truth = draw_spots(rng.uniform(10, 190, (60, 2)))
    image = draw_spots(rng.uniform(10, 190, (60, 2)))
    plain = structure_errors(truth, image, 1, **SIZE)
    assert plain == structure_errors(truth, 0.7 * image + 0.2, 1, **SIZE)
    assert abs(plain.invented - plain.chance) < 0.15                # unrelated: no better than dice
    both = structure_errors(np.stack([truth, truth]), np.stack([image, truth]), 1, **SIZE)
    assert both.invented.tolist() == [plain.invented, 0] and both.missed.tolist() == [plain.missed, 0]


def test_structures_degenerate():
    empty, spots = np.zeros((220, 200)), draw_spots([(50, 50), (100, 100)])
    cases = ((empty, empty), (empty + 0.4, empty), (spots, empty), (empty, spots))
    found = [structure_errors(t, y, 1, **SIZE) for t, y in cases]
    rates = [(s.invented, s.missed, s.n_image, s.n_truth) for s in found]
    assert rates == [(0, 0, 0, 0), (0, 0, 0, 0), (0, 1, 0, 2), (1, 0, 2, 0)]
    noise = 0.005 * np.random.default_rng(0).standard_normal(empty.shape)
    assert structure_errors(empty, noise, 1, **SIZE).n_image == 0                   # the floor
    with pytest.raises(MetricError, match="NaN"):
        structure_errors(empty, empty + np.nan, 1, **SIZE)
    with pytest.raises(MetricError, match="does not fit"):
        structure_errors(empty, empty, 1, pixel_um=0.1, element_um=0.1)


# ---- intervals

@pytest.mark.parametrize("seeds, fields, shape", [
    (0.02, 0.4, (3, 16)), (0.1, 0.4, (3, 16)), (0.3, 0.1, (3, 16)), (0.2, 0.2, (5, 12))])
def test_coverage_within_binomial_limits(seeds, fields, shape):
    held, n = 0, 300
    for k in range(n):
        rng = np.random.default_rng(k)
        table = (0.5 + seeds * rng.standard_normal((shape[0], 1)) + fields * rng.standard_normal(shape[1])
                 + 0.05 * rng.standard_normal(shape))
        found = paired_interval(table, n_boot=300, seed=k)
        held += found.low <= 0.5 <= found.high
    assert 0.95 * n - 3.5 * np.sqrt(n * 0.0475) <= held <= 0.95 * n + 3.5 * np.sqrt(n * 0.0475)


def test_groups_widen_and_strata_narrow():
    rng = np.random.default_rng(0)
    cell = np.repeat(np.arange(8), 6)
    table = np.repeat(rng.standard_normal(8), 6) + 0.1 * rng.standard_normal((3, 48))
    wide = lambda i: i.high - i.low
    assert wide(paired_interval(table, groups=cell)) > 2 * wide(paired_interval(table))
    assert wide(paired_interval(table, strata=cell)) < 0.3 * wide(paired_interval(table))
    assert paired_interval(table, seed=1) == paired_interval(table, seed=1) != paired_interval(table, seed=2)


def test_interval_matches_student_for_one_seed():
    from scipy.stats import t
    x = np.random.default_rng(1).standard_normal(12)
    found, half = paired_interval(x, n_boot=20_000), t.ppf(0.975, 11) * x.std(ddof=1) / np.sqrt(12)
    assert (found.mean, found.n_seeds) == (pytest.approx(x.mean()), 1)
    np.testing.assert_allclose((found.high - found.low) / 2, half, rtol=0.1)


def test_three_seeds_pay_students_price():
    from scipy.stats import t
    found = paired_interval(np.array([[-1.0], [0.0], [1.0]]) + np.zeros(16), n_boot=20_000)
    np.testing.assert_allclose([-found.low, found.high], t.ppf(0.975, 2) / np.sqrt(3), rtol=0.02)


def test_interval_refusals():
    for wrong in ([0.5], [[0.5], [0.4]], [0.5, np.inf], np.zeros((2, 2, 2)), []):
        with pytest.raises(MetricError):
            paired_interval(wrong)
    for labels in (dict(groups=[0, 0, 0]), dict(groups=[0, 1]), dict(strata=[0, 0, 1])):
        with pytest.raises(MetricError):
            paired_interval([0.1, 0.2, 0.3], **labels)


def test_conventions_name_every_score():
    t = np.random.default_rng(0).random((180, 180))
    assert set(R.score_restoration(t, t, 1)) == set(R.RESTORATION_CONVENTIONS)
    assert all(not re.search(r"\n", text) for text in R.RESTORATION_CONVENTIONS.values())
