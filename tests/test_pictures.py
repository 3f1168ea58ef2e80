"Brightness, intensities and texture of sets: zero for the same set, a known number for a planted difference."
import numpy as np
import pytest
from scipy.stats import wasserstein_distance as reference

from fluogen.metrics.generation import (
    average_over_labels, histogram_distance, mean_log_spectrum, measure_brightness, spectrum_distance,
    wasserstein_distance)
from fluogen.metrics.restoration import MetricError

DICE = np.random.default_rng(0)
SET = DICE.random((12, 48, 48)) * 0.6


def test_identical_sets_are_at_zero_whatever_their_order():
    mixed = SET[DICE.permutation(12)]
    assert histogram_distance(SET, mixed) == 0
    assert spectrum_distance(SET, mixed) == pytest.approx(0, abs=1e-12)
    assert wasserstein_distance(SET, mixed) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n, m", [(50, 50), (50, 71), (1, 9)])
def test_wasserstein_agrees_with_scipy(n, m):
    one, two = DICE.normal(size=n), DICE.normal(0.4, 2, m)
    assert wasserstein_distance(one, two) == pytest.approx(reference(one, two), rel=1e-9)
    assert wasserstein_distance(one, two) == pytest.approx(wasserstein_distance(two, one), rel=1e-9)


def test_a_brighter_set_is_as_far_as_it_is_brighter():
    assert histogram_distance(SET, SET + 0.2) == pytest.approx(0.2, abs=0.004)
    shifted = {key: wasserstein_distance(a, b) for (key, a), b in zip(measure_brightness(SET).items(), measure_brightness(SET + 0.2).values())}
    assert shifted == pytest.approx(dict.fromkeys(("mean", "dark", "bright"), 0.2), abs=1e-6)


def test_deciles_are_those_of_each_picture():
    ramp = np.arange(100.0).reshape(1, 10, 10)
    assert {key: value.item() for key, value in measure_brightness(ramp).items()} == {"mean": 49.5, "dark": 4.5, "bright": 94.5}


def test_a_factor_in_power_is_its_logarithm_and_blur_is_seen_where_it_is():
    noise = DICE.standard_normal((20, 48, 48))
    assert spectrum_distance(noise, 10 * noise) == pytest.approx(2, abs=1e-3)
    blurred = (noise + np.roll(noise, 1, 2)) / 2
    change = mean_log_spectrum(blurred) - mean_log_spectrum(noise)
    assert abs(change[0]) < 0.1 and change[-1] < -0.3


def test_kinds_are_not_averaged_away():
    both, labels = np.concatenate([SET, SET + 0.3]), np.repeat(["a", "b"], 12)
    swapped = np.concatenate([SET + 0.3, SET])
    assert histogram_distance(both, swapped) == pytest.approx(0, abs=1e-9)
    assert average_over_labels(histogram_distance, both, labels, swapped, labels) == pytest.approx(0.3, abs=0.004)
    with pytest.raises(MetricError, match="labels differ.*found b"):
        average_over_labels(histogram_distance, both, labels, SET, labels[:12])


@pytest.mark.parametrize("wrong", [np.zeros((4, 4)), np.zeros((0, 8, 8)), np.full((2, 8, 8), np.inf), np.zeros((2, 3, 8, 8))])
def test_what_is_no_set_of_pictures_is_refused(wrong):
    with pytest.raises(MetricError, match="images"):
        measure_brightness(wrong)


def test_spectrum_refuses_what_it_cannot_bin():
    for shape in ((2, 48, 64), (2, 32, 32)):
        with pytest.raises(MetricError, match="not square, or too small"):
            mean_log_spectrum(np.zeros(shape))
    with pytest.raises(MetricError, match="finite values"):
        wasserstein_distance([], [1.0])
