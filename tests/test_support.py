"The guard without truth: consistent images raise few alarms, planted lies are found, a wrong forward model shows in chi2."
import numpy as np
import pytest

from fluogen.core import make_rng
from fluogen.preprocessing.noise import NoiseModel
from fluogen.uncertainty import consistency as support
from fluogen.uncertainty.consistency import (
    Forward, SupportError, gaussian_psf, judge_support, make_filters, measure_detection, plant_line)

NOISE = NoiseModel(gain=2.0, intercept=2.0**2 * 1.5**2 - 2.0 * 100, levels=(100, 1000))


def record(truth, rng):
    "Counts of an image in counts: photons, read noise, offset."
    return rng.poisson((truth - 100) / 2) * 2 + 100 + 2 * 1.5 * rng.standard_normal(truth.shape)


def scene(rng, size=72, lines=4):
    return 140 + 160 * np.clip(sum(plant_line((size, size), 3.0, 12, rng) for _ in range(lines)), 0, 1.5)


def test_consistent_images_raise_the_stated_number_of_alarms():
    rng, shares = make_rng(1, "consistent"), []
    for i in range(6):
        truth = scene(rng)
        seen = judge_support(record(truth, rng), truth, NOISE, 3.0, seed=i)
        shares.append(seen.share(seen.invented | seen.missed))
        assert 0.9 < seen.chi2 < 1.1 and abs(seen.false_alarms - 0.05) < 0.01
    assert 0.03 < np.mean(shares) < 0.07


def test_lies_of_three_elements_are_found_and_small_ones_are_not():
    rng = make_rng(2, "lies")
    measured = [(record(truth, rng), truth) for truth in (scene(rng) for _ in range(3))]
    clear, faint = (measure_detection(measured, NOISE, 3.0, snr=snr, each=10) for snr in (2.0, 0.1))
    assert clear.added >= 0.9 and clear.removed >= 0.9 and clear.n == 30
    assert faint.added < 0.5 and faint.removed < 0.5


def test_lies_of_a_sharpened_image_are_found_through_its_microscope():
    rng, forward = make_rng(6, "sharpened"), Forward(2, gaussian_psf(5.0), background=100.0)
    truths = [np.kron(scene(rng), np.ones((2, 2))) for _ in range(3)]
    found = measure_detection([(record(forward(truth), rng), truth) for truth in truths], NOISE, 3.0, snr=2.0, each=6, forward=forward)
    assert found.added >= 0.9 and found.removed >= 0.9 and found.n == 18 and found.false_alarms < 0.1


def test_marks_have_the_right_sign():
    rng = make_rng(3, "sign")
    truth, line = scene(rng, lines=1), plant_line((72, 72), 3.0, 4, rng)
    counts = record(truth, rng)
    for sign in (+1, -1):
        seen = judge_support(counts, truth + sign * 60 * line, NOISE, 3.0)
        right, wrong = (seen.invented, seen.missed) if sign > 0 else (seen.missed, seen.invented)
        assert right[line > 0.9].any() and not wrong[line > 0.9].any()


def test_blur_and_sampling_of_the_forward_model():
    rng = make_rng(4, "blur")
    sharp = np.kron(scene(rng), np.ones((2, 2)))
    forward = Forward(2, gaussian_psf(5.0), background=100.0)
    counts = record(forward(sharp), rng)
    right, wrong = (judge_support(counts, sharp, NOISE, 3.0, one) for one in (forward, Forward(2, background=100.0)))
    assert right.chi2 < 1.15 < wrong.chi2
    flat = np.full((40, 40), 137.0)
    np.testing.assert_allclose(forward(flat), 137.0)
    assert all(abs(np.linalg.norm(f) - 1) < 1e-9 for f in make_filters(3.0))


@pytest.mark.parametrize("change, match", [({"restored": np.ones((9, 9))}, "does not fit"), ({"element_px": 50.0}, "out of range"),
                                           ({"false_alarms": 0.0}, "out of range"), ({"restored": np.full((72, 72), np.nan)}, "not finite")])
def test_wrong_input_is_one_line(change, match):
    given = {"counts": np.full((72, 72), 150.0), "restored": np.full((72, 72), 150.0), "noise": NOISE, "element_px": 3.0} | change
    with pytest.raises(SupportError, match=match) as caught:
        judge_support(**given)
    assert "\n" not in str(caught.value)


def test_the_border_is_no_alarm():
    "Zero padding: a filter that reaches over the border sees less, not something that is not there."
    assert abs(support.strongest(np.zeros((40, 40)), make_filters(3.0))).max() < 1e-9
