"Diagnostics of certified intervals and the guard: SciPy and brute force as oracles, planted faults that must be found."
import re

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from fluogen.core import FluogenError, make_rng
from fluogen.uncertainty.calibration import calibrate_stream
from fluogen.uncertainty.calibration import LEVELS, load_calibration, save_calibration
from fluogen.uncertainty.diagnostics import diagnose, pair_table, rank_correlation
from fluogen.uncertainty.calibration import EDGES, CalibrationError, bin_values
from fluogen.uncertainty.ood import FEATURES, InputRange, describe_image, is_in_distribution, watch

SYSTEM = dict(weights="nano-sr@0123", sampler="ddim", steps=10, normalisation="percentile:0.1,99.9", task="sr")


def draw_image(seed, size=24, worse=1.0, corner=1.0):
    "(lower, mean, upper, target); errors `worse` times what the network thinks, `corner` times in one corner."
    rng = make_rng(seed, "diagnostics", worse)
    target = 0.2 + 0.6 * rng.random((size, size))
    doubt = 0.01 + 0.05 * rng.random((size, size))
    error = worse * doubt * rng.standard_normal((size, size))
    error[:6, :6] *= corner
    return [a.astype(np.float32) for a in (target + error - doubt, target + error, target + error + doubt, target)]


@pytest.fixture(scope="module")
def calibration():
    return calibrate_stream((draw_image(k) for k in range(100)), 0.1, 0.1)


@pytest.fixture(scope="module")
def fresh():
    return [draw_image(1000 + k) for k in range(80)]


@pytest.fixture(scope="module")
def diagnosis(calibration, fresh):
    return diagnose(calibration, fresh)


def missed_and_width(calibration, image):
    low, high = calibration.interval(*image[:3])
    return (image[3] < low) | (image[3] > high), high - low


# ---- against brute force

def test_risk_and_width(calibration, fresh, diagnosis):
    missed, width = zip(*(missed_and_width(calibration, image) for image in fresh))
    assert diagnosis.risk.mean == pytest.approx(np.mean(missed)) and diagnosis.width == pytest.approx(np.mean(width), rel=1e-5)
    assert diagnosis.risk.low < np.mean(missed) < diagnosis.risk.high <= 0.1 and diagnosis.images == 80
    assert np.allclose(diagnosis.miscoverage, np.mean(missed, 0)) and diagnosis.miscoverage.shape == (24, 24)
    assert list(diagnosis.groups.values()) == pytest.approx([m.mean() for m in missed])


def test_spearman_over_all_pixels(calibration, fresh, diagnosis):
    error = np.concatenate([np.abs(y - m).ravel() for _, m, _, y in fresh])
    width = np.concatenate([missed_and_width(calibration, image)[1].ravel() for image in fresh])
    assert diagnosis.spearman == pytest.approx(spearmanr(error, width)[0], abs=3e-3) and diagnosis.spearman > 0.3


def test_strata(calibration, fresh, diagnosis):
    missed, width = (np.concatenate([part.ravel() for part in parts])
                     for parts in zip(*(missed_and_width(calibration, image) for image in fresh)))
    assert len(diagnosis.strata) == 4 and sum(row[2] for row in diagnosis.strata) == pytest.approx(1)
    for low, high, share, risk in diagnosis.strata:
        inside = (width > low) & (width <= high)
        assert abs(share - 0.25) < 0.02 and inside.mean() == pytest.approx(share, abs=1e-9)
        assert missed[inside].mean() == pytest.approx(risk, abs=1e-9)
    assert [row[1] for row in diagnosis.strata[:-1]] == [row[0] for row in diagnosis.strata[1:]]


def test_coverage_and_its_error(calibration, diagnosis):
    assert diagnosis.ece == pytest.approx(np.abs(np.array(diagnosis.coverage) - LEVELS).mean()) and diagnosis.ece < 0.02
    same = diagnose(calibration, (draw_image(5000 + k, worse=1.5) for k in range(30)))
    assert same.ece > 0.08 and all(np.array(same.coverage) <= np.array(diagnosis.coverage) + 0.01)


@pytest.mark.parametrize("kind", ["related", "ties", "reversed"])
def test_rank_correlation(kind):
    rng = make_rng(0, kind)
    a = np.exp(rng.standard_normal(5000)) * 0.05
    b = {"related": a * rng.random(5000), "ties": np.full(5000, 0.25), "reversed": 1e-3 / a}[kind]
    found = rank_correlation(pair_table(a, b))
    assert np.isnan(found) if kind == "ties" else found == pytest.approx(spearmanr(a, b)[0], abs=5e-3)
    counts = rng.integers(0, 5, (4, 6))
    pairs = np.array([(i, j) for i in range(4) for j in range(6) for _ in range(counts[i, j])])
    assert rank_correlation(counts) == pytest.approx(spearmanr(*pairs.T)[0], abs=1e-12)


def test_bins_are_the_first_edge_at_or_above():
    values = np.r_[0, EDGES[:50], EDGES[1000] * 1.001, EDGES[-1], 1e9].astype(np.float32)
    assert np.array_equal(bin_values(values), np.searchsorted(EDGES, values))


# ---- planted faults

def test_a_bad_corner_shows(calibration):
    found = diagnose(calibration, (draw_image(2000 + k, corner=3.0) for k in range(40))).miscoverage
    assert found[:6, :6].mean() > 3 * found[6:, 6:].mean()


def test_a_bad_structure_shows(calibration):
    labels = ["good", "bad"] * 20
    found = diagnose(calibration, (draw_image(3000 + k, worse=1 + k % 2) for k in range(40)), labels=labels)
    assert list(found.labels) == ["good", "bad"] and found.labels["bad"].low > 0.1 > found.labels["good"].high
    assert "worst: bad" in str(found)


def test_groups(calibration, fresh):
    found = diagnose(calibration, fresh, groups=[k // 4 for k in range(80)])
    assert len(found.groups) == 20 and found.risk.n_fields == 20
    single = diagnose(calibration, fresh[:2], groups=["a", "a"])
    assert np.isnan(single.risk.low) and 0 < single.risk.mean < 1


def test_images_of_several_sizes(calibration):
    sizes = [24, 24, 30, 24]
    found = diagnose(calibration, (draw_image(4000 + k, size) for k, size in enumerate(sizes)))
    assert found.miscoverage is None and found.images == 4


# ---- refusals

def refused(calibration, images, **how):
    with pytest.raises(CalibrationError) as caught:
        diagnose(calibration, images, **how)
    assert isinstance(caught.value, FluogenError) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused(calibration, fresh):
    assert "a calibration image among the test images" in refused(calibration, [*fresh[:3], draw_image(7)])
    assert "a calibration image among the test images" in refused(calibrate_stream((draw_image(k) for k in range(60)), 0.1, 0.1, groups=[f"g{k}" for k in range(60)]),
                                      fresh[:2], groups=["g80", "g7"])
    assert "same image" in refused(calibration, [fresh[0], fresh[0]]) and "found 0" in refused(calibration, [])
    assert "one label" in refused(calibration, fresh, labels=["a"]) and "one label" in refused(calibration, [fresh[0][:3]])
    lower, mean, upper, target = fresh[0]
    assert "crossed" in refused(calibration, [(upper, mean, lower, target)])
    assert "target has pixels" in refused(calibration, [(lower, mean, upper, target * np.nan)])
    assert "one shape" in refused(calibration, [(lower, mean, upper, target[:5])])


# ---- the guard (S8)

def measure(seed, blur=1.0, gain=1.0, discs=False, size=64):
    "Lines or discs through a PSF that varies by 10 %, photons by two, a camera with offset and read noise."
    rng = make_rng(seed, "guard", blur, gain, discs)
    rows, columns = np.indices((size, size))
    scene = np.zeros((size, size))
    for _ in range(8):
        y, x, angle = *rng.uniform(0, size, 2), rng.uniform(0, np.pi)
        away = np.hypot(rows - y, columns - x) - 6 if discs else (rows - y) * np.cos(angle) + (columns - x) * np.sin(angle)
        scene += rng.uniform(0.5, 1) * ((away < 0) if discs else (np.abs(away) < 0.7))
    seen = gaussian_filter(scene, 1.5 * blur * rng.uniform(0.9, 1.1))
    return 100 + gain * (rng.poisson(5 + 100 * rng.uniform(0.7, 1.4) * seen) + 1.5 * rng.standard_normal(seen.shape))


@pytest.fixture(scope="module")
def known():
    return [describe_image(measure(k)) for k in range(100)]


def test_false_alarms_are_rare_and_p_is_valid(known):
    verdicts = [InputRange(known).judge(measure(1000 + k)) for k in range(200)]
    assert np.mean([not v.inside for v in verdicts]) <= 0.06
    p = np.sort([v.p for v in verdicts])
    assert ((np.arange(200) + 0.5) / 200 - p).max() < 0.1         # never smaller than uniform, up to chance


@pytest.mark.parametrize("how", [dict(blur=1.5), dict(gain=2), dict(discs=True)], ids=str)
def test_drift_is_noticed(known, how):
    verdicts = [InputRange(known).judge(measure(2000 + k, **how)) for k in range(40)]
    assert np.mean([not v.inside for v in verdicts]) >= 0.8
    turned = next(v for v in verdicts if not v.inside)
    assert "flagged OOD: input outside the calibration range" in str(turned) and turned.feature in FEATURES
    assert turned.distance > 1 and turned.p <= 0.06


@pytest.mark.parametrize("size", [48, 96])
def test_the_blur_is_the_width_of_the_point_spread_function(size):
    for blur in (0.8, 1.0, 1.5):                                  # a Gaussian of 1.5 px times blur, and 10 % of scatter
        found = [describe_image(measure(k, blur, size=size))[FEATURES.index("blur")] for k in range(40)]
        assert np.sqrt(np.median(found)) == pytest.approx(1.5 * blur, rel=0.2)


def test_one_image_of_many_structures_shows_its_blur():
    "Without the blur as a chance of its own (each structure a loner in ten features) hardly one in ten is found."
    from fluogen.figures.fig9_uncertainty import draw_drifts
    calibration = load_calibration_of("nano-sr-direct")
    known, drifts = InputRange(calibration.inputs), draw_drifts(44)
    verdicts = {kind: [known.judge(image) for image in drifts[kind]] for kind in ("as calibrated", "blur x 1.5")}
    shares = {kind: np.mean([not v.inside for v in some]) for kind, some in verdicts.items()}
    assert shares["as calibrated"] <= 0.15 and shares["blur x 1.5"] >= 0.5
    assert sum(v.blurred for v in verdicts["blur x 1.5"] if not v.inside) >= 20
    said = str(next(v for v in verdicts["blur x 1.5"] if v.blurred and not v.inside))
    assert re.search(r"outside the calibration range \(1\.\d times as blurred as usual; p = 0\.0\d", said)


def load_calibration_of(model):
    from fluogen.models.zoo import load_weights
    from fluogen.tasks.intervals import load_interval_restorer
    from fluogen.tasks.restore import RestoreSettings
    return load_interval_restorer(load_weights(model), RestoreSettings(), model=model).calibration


def test_drift_of_simulated_microscopes():
    "The package's own simulator: other scenes of the same kind, another structure, gain x 2, a filtered image."
    from fluogen.simulation.pairs import simulate_pairs
    counts = [simulate_pairs("microtubules", 60, 96, seed=seed, optics="train").condition[:, 0].numpy() for seed in (0, 1)]
    scale = 800 * np.exp(0.05 * make_rng(0).standard_normal((2, 60, 1, 1)))
    first, second = (100 + s * c for s, c in zip(scale, counts))
    known = InputRange([describe_image(image) for image in first])
    assert np.mean([known.judge(image).inside for image in second]) >= 0.85
    other = 100 + 800 * simulate_pairs("nuclei", 20, 96, seed=2, optics="train").condition[:, 0].numpy()
    assert np.mean([known.judge(image).inside for image in other]) <= 0.1
    assert np.mean([known.judge(2 * image).inside for image in second]) <= 0.1
    assert np.mean([known.judge(gaussian_filter(image, 1.0)).inside for image in second]) <= 0.1


def test_the_range_travels_with_the_certificate(calibration, tmp_path):
    watched = watch(calibration, (measure(k) for k in range(100))).bind(**SYSTEM)
    save_calibration(watched, tmp_path / "c.json")
    again = load_calibration(tmp_path / "c.json", **SYSTEM)
    assert again == watched and is_in_distribution(again, measure(5000)) == is_in_distribution(watched, measure(5000))
    assert not is_in_distribution(again, measure(5000, gain=3)).inside
    with pytest.raises(CalibrationError, match="watch"):
        is_in_distribution(calibration, measure(0))
    with pytest.raises(CalibrationError, match="missing"):
        watch(calibration, [measure(0)])


@pytest.mark.parametrize("image", [np.zeros((3, 20, 20)), np.zeros((8, 20)), np.full((20, 20), np.nan), np.zeros(5)])
def test_the_guard_refuses(image):
    with pytest.raises(CalibrationError, match="not an image that can be compared|too small for intervals"):
        describe_image(image)


def test_odd_images_have_a_finite_description(known):
    hot = np.full((32, 32), 100.0)
    hot[3, 3] = 6e4
    for image in (np.zeros((32, 32)), np.full((32, 48), 7.0), hot, -np.ones((20, 20))):
        assert np.isfinite(describe_image(image)).all() and not InputRange(known).judge(image).inside
