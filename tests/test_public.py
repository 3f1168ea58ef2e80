"The public code's search, written anew from its description, and ours beside it (S9, P9): where it answers wrongly we answer, or refuse."
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom

from fluogen.core import make_rng
from fluogen.uncertainty.bounds import hoeffding_bentkus
from fluogen.uncertainty.calibration import calibrate_stream
from fluogen.uncertainty.calibration import CalibrationError, scale_sets

FACTORS = np.linspace(0, 10, 20)        # as shipped


def public_bound(mean, n, delta):
    "Hoeffding-Bentkus with 0 ln 0 as NaN, a floor, a clamp, and 1 where the root finder fails."
    def entropy(a, b):
        return a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))

    def tail(limit):
        bentkus = np.log(max(binom.cdf(np.floor(n * mean), n, limit), 1e-10)) + 1
        return min(-n * entropy(np.minimum(limit, mean), limit), bentkus) - np.log(delta)
    with np.errstate(all="ignore"):
        if tail(1 - 1e-10) > 0:
            return 1.0
        try:
            return brentq(tail, mean, 1 - 1e-10)
        except ValueError:
            return 1.0


def public_search(images, alpha=0.1, delta=0.1):
    "From the widest factor down until the next one fails; the widest plus a step if none ever does."
    step = FACTORS[1] - FACTORS[0]
    for factor in FACTORS[::-1]:
        losses = []
        for lower, mean, upper, target in images:
            low, high = scale_sets(lower, mean, upper, max(factor - step, 0.0))
            losses.append(np.mean((target < low) | (target > high)))
        risk = np.float64(np.mean(losses))
        if risk >= alpha or public_bound(risk, len(images), delta) > alpha:
            return factor
    return FACTORS[-1] + step


def mean_width(images, factor):
    return float(np.mean([np.subtract(*scale_sets(*image[:3], factor, (0, 1))[::-1]) for image in images]))


def draw_images(n, error=1.0, doubt=0.1):
    "Targets in the middle of the range, errors of a limited size: some factor covers every pixel."
    made = []
    for number in range(n):
        rng = make_rng(number, "public")
        mean = rng.uniform(0.4, 0.6, (24, 24))
        made.append((mean - doubt, mean, mean + doubt, np.clip(mean + error * doubt * rng.standard_normal(mean.shape).clip(-3, 3), 0, 1)))
    return made


def test_no_missed_pixel_is_no_reason_for_the_widest_interval():
    "P9: the public search stops at its first, widest factor; ours is at most a quarter as wide, and certified."
    images = draw_images(100, error=0.5)
    theirs, ours = public_search(images), calibrate_stream(images, 0.1, 0.1)
    widths = [mean_width(images, factor) for factor in (theirs, ours.factor)]
    print(f"\nthe public search: factor {theirs:.1f}, width {widths[0]:.2f}; ours: {ours.factor:.2f}, {widths[1]:.2f}, missed {ours.risk:.3f}")
    assert theirs == FACTORS[-1] and widths[0] > 0.95 and widths[1] <= 0.25 * widths[0] and 0.07 <= ours.risk <= 0.1


@pytest.mark.parametrize("n", [22, 50, 100, 1000])
def test_the_bound_of_no_loss(n):
    assert public_bound(np.float64(0), n, 0.1) == 1.0 and hoeffding_bentkus(0.0, n, 0.1) == pytest.approx(1 - 0.1 ** (1 / n))


def test_what_cannot_be_certified_is_refused_not_answered():
    lost = [(mean - 0.001, mean, mean + 0.001, mean + 0.3) for _, mean, _, _ in draw_images(40)]
    few = draw_images(10)
    for images, says in ((lost, "wider than the whole range"), (few, "too few independent images")):
        assert np.isfinite(public_search(images))                           # a number, no complaint
        with pytest.raises(CalibrationError, match=says):
            calibrate_stream(images, 0.1, 0.1)


def test_the_floor_has_no_proof():
    for mean, n in ((0.055, 50), (0.0475, 40)):
        assert public_bound(np.float64(mean), n, 0.1) < hoeffding_bentkus(mean, n, 0.1)
