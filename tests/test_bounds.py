"Bounds on a risk: closed forms, SciPy and brute force as oracles; the promise itself, counted."
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, binomtest

from fluogen.core import FluogenError, make_rng
from fluogen.uncertainty.bounds import (BOUNDS, BoundError, betting, binomial, certifies, check_losses, draw_order,
                                        hoeffding_bentkus, log_capital, min_images, p_hoeffding_bentkus)

FULL = os.environ.get("FLUOGEN_BATTERY") == "full"
TRIALS = 2000 if FULL else 400
LIMIT = {delta: int(binom.ppf(1 - 1e-4, TRIALS, delta)) for delta in (0.05, 0.1)}    # 138 and 252 of 2,000
SIZES = (22, 30, 50, 100, 500)
LEVELS = [(alpha, delta) for alpha in (0.05, 0.1, 0.2) for delta in (0.05, 0.1)]
risks = st.floats(0, 1)


# ---- values

@pytest.mark.parametrize("alpha, delta, n", [(0.1, 0.1, 22), (0.05, 0.1, 45), (0.1, 0.05, 29), (0.01, 0.1, 230), (0.5, 0.25, 2)])
def test_fewest_images(alpha, delta, n):
    assert min_images(alpha, delta) == n
    assert hoeffding_bentkus(0.0, n, delta) <= alpha * (1 + 1e-9)
    assert n == 1 or hoeffding_bentkus(0.0, n - 1, delta) > alpha


@pytest.mark.parametrize("n", [1, 22, 50, 100, 1000])
@pytest.mark.parametrize("delta", [0.1, 0.01, 1e-12, 1e-100])
def test_no_loss_is_the_best_news(n, delta):
    assert hoeffding_bentkus(0.0, n, delta) == pytest.approx(1 - delta ** (1 / n), abs=1e-9)
    assert hoeffding_bentkus(1e-6, n, delta) <= hoeffding_bentkus(2e-6, n, delta) <= 1


def test_the_number_of_the_specification():
    assert abs(hoeffding_bentkus(0.0, 100, 0.1) - 0.0228) < 1e-4


def naive(risk, n, delta):
    "The definition, by a scan over R and a root finder; ceiling, 0 ln 0 = 0."
    def h(a, b):
        return (a * np.log(a / b) if a > 0 else 0) + ((1 - a) * np.log((1 - a) / (1 - b)) if a < 1 else 0)

    def tail(limit):
        count = np.ceil(round(n * risk, 9))
        return min(np.exp(-n * h(min(risk, limit), limit)), np.e * binom.cdf(count, n, limit)) - delta
    return brentq(tail, risk, 1 - 1e-12) if tail(1 - 1e-12) < 0 else 1.0


@pytest.mark.parametrize("n, delta", [(20, 0.1), (50, 0.1), (100, 0.05), (500, 0.01)])
def test_hoeffding_bentkus_is_its_definition(n, delta):
    means = np.array([0.005, 0.02, 0.055, 0.095, 0.2, 0.5, 0.9])
    found = hoeffding_bentkus(means, n, delta)
    assert found == pytest.approx([naive(risk, n, delta) for risk in means], abs=1e-6)
    assert [hoeffding_bentkus(risk, n, delta) for risk in means] == pytest.approx(found, abs=1e-12)


def test_ceiling_not_floor():
    "The two values of the specification where the public code is too small."
    assert hoeffding_bentkus(0.055, 50, 0.1) == pytest.approx(0.1515, abs=2e-4)
    assert hoeffding_bentkus(0.095, 20, 0.1) == pytest.approx(0.292, abs=1e-3)


def test_a_mean_of_whole_losses_is_not_rounded_up_twice():
    for lost in range(1, 50):
        mean = np.mean(np.r_[np.ones(lost), np.zeros(90 - lost)])
        assert p_hoeffding_bentkus(mean, 90, 0.9) <= np.e * binom.cdf(lost, 90, 0.9) * (1 + 1e-9)


def test_risk_one():
    assert hoeffding_bentkus(1.0, 50, 0.1) == 1 and betting(np.ones(50), 0.1) == 1 and binomial(np.ones(50), 0.1) == 1


def test_binomial_is_clopper_pearson():
    for lost, n in ((0, 22), (3, 40), (40, 40)):
        losses = make_rng(0, lost).permutation(np.repeat([1, 0], [lost, n - lost]))
        high = binomtest(lost, n, alternative="less").proportion_ci(0.95).high
        assert binomial(losses, 0.05) == pytest.approx(high, abs=1e-9)
    assert binomial(np.zeros((3, 22)), 0.1).shape == (3,)


# ---- betting

def test_capital_is_the_product_of_the_definition():
    losses, delta, limit = make_rng(0).random(40) * 0.3, 0.1, 0.2
    capital, seen = 1.0, []
    for i, loss in enumerate(losses):
        mean = [(0.5 + losses[:j + 1].sum()) / (j + 2) for j in range(i)]
        spread = (0.25 + sum((losses[j] - mean[j]) ** 2 for j in range(i))) / (i + 1)
        capital *= 1 + min(np.sqrt(2 * np.log(1 / delta) / (40 * spread)), 0.99 / (1 - limit)) * (limit - loss)
        seen.append(capital)
    assert np.exp(log_capital(losses, limit, delta)) == pytest.approx(seen, rel=1e-9)


def test_the_limit_is_where_the_claim_is_refuted():
    losses = make_rng(0).random((5, 60)) * 0.2
    limits = betting(losses, 0.1)
    ordered = losses[:, draw_order(60)]
    assert (log_capital(ordered, limits, 0.1).max(-1) >= np.log(10)).all()
    assert (log_capital(ordered, limits - 1e-6, 0.1).max(-1) < np.log(10)).all()
    assert [betting(row, 0.1) for row in losses] == pytest.approx(limits)


def test_the_order_is_recorded_and_counts():
    losses = np.sort(make_rng(0).random(50))
    assert betting(losses, 0.1) == betting(losses, 0.1, order=draw_order(50)) == betting(losses, 0.1, seed=0)
    assert betting(losses, 0.1) != betting(losses, 0.1, seed=1)
    assert betting(losses[draw_order(50)], 0.1, order=np.arange(50)) == betting(losses, 0.1)


def test_stakes_do_not_look_ahead():
    losses = make_rng(0).random(50)
    other = losses.copy()
    other[30:] = 0.9
    assert np.array_equal(log_capital(losses, 0.3, 0.1)[:30], log_capital(other, 0.3, 0.1)[:30])


def test_usable_risk_at_a_hundred_images():
    "Issue 5: 0.070 at alpha = delta = 0.1 where the spread is 0.3 of the mean; Hoeffding-Bentkus stops near 0.043."
    rng = make_rng(0, "usable")
    for mean, bound, expected in ((0.0725, "betting", True), (0.070, "betting", True), (0.045, "hoeffding_bentkus", False)):
        shape = mean * (1 - mean) / (0.3 * mean) ** 2 - 1
        losses = rng.beta(mean * shape, (1 - mean) * shape, (1000, 100))
        share = certifies(losses, 0.1, 0.1, bound).mean()
        assert share > 0.9 if expected else share < 0.1, (mean, bound, share)


# ---- order and shape (S5)

@settings(max_examples=1000 if FULL else 150, deadline=None)
@given(risks, risks, st.integers(1, 800), st.integers(1, 800), st.sampled_from([0.01, 0.05, 0.1, 0.3]))
def test_monotone(a, b, n, m, delta):
    (a, b), (n, m) = sorted((a, b)), sorted((n, m))
    low, high = hoeffding_bentkus(np.array([a, b]), n, delta)
    assert a <= low <= high + 1e-12 and high <= 1
    assert hoeffding_bentkus(a, n, delta / 2) >= low - 1e-12
    whole = np.ceil(a * n) / n                                 # the ceiling makes other means jump with n
    assert hoeffding_bentkus(whole, n, delta) >= hoeffding_bentkus(whole, n * 2, delta) - 1e-9


@settings(max_examples=200 if FULL else 40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.sampled_from([0.05, 0.1]))
def test_betting_is_a_limit(losses, delta):
    limit = betting(losses, delta)
    assert np.mean(losses) <= limit <= 1
    assert betting(losses, delta / 2) >= limit - 1e-9 or len(losses) > 1      # stakes depend on delta
    claims = np.linspace(0.01, 0.99, 30)
    capital = log_capital(np.array(losses), claims, delta).max(-1)
    assert (np.diff(capital) >= -1e-9).all(), "a higher claim is easier to refute"


def test_shapes():
    losses = make_rng(0).random((4, 3, 40)) * 0.1
    for bound in ("betting", "hoeffding_bentkus", "expectation"):
        assert certifies(losses, 0.1, 0.1, bound).shape == (4, 3)
    assert betting(losses, 0.1).shape == (4, 3) and isinstance(betting(losses[0, 0], 0.1), float)
    assert isinstance(hoeffding_bentkus(0.1, 40, 0.1), float)


# ---- wrong inputs

@pytest.mark.parametrize("call", [
    lambda: hoeffding_bentkus(np.nan, 50, 0.1), lambda: hoeffding_bentkus(-0.1, 50, 0.1), lambda: hoeffding_bentkus(1.1, 50, 0.1),
    lambda: hoeffding_bentkus(0.1, 0, 0.1), lambda: hoeffding_bentkus(0.1, 2.5, 0.1), lambda: hoeffding_bentkus(0.1, 50, 0),
    lambda: hoeffding_bentkus(0.1, 50, 1), lambda: betting([], 0.1), lambda: betting(0.1, 0.1), lambda: betting([0.1, np.nan], 0.1),
    lambda: betting([0.1, 1.5], 0.1), lambda: betting([0.1, -1e-9], 0.1), lambda: betting([0.1], 2), lambda: min_images(0, 0.1),
    lambda: betting([0.1, 0.2], 0.1, order=[0, 0]), lambda: betting([0.1, 0.2], 0.1, order=[0]), lambda: min_images(0.1, np.nan),
    lambda: binomial([0.5], 0.1), lambda: certifies([0.1], 0.1, 0.1, "hoeffding"), lambda: certifies([0.1], 0.1, None),
])
def test_wrong_input_is_one_line(call):
    with pytest.raises(BoundError) as caught:
        call()
    assert isinstance(caught.value, FluogenError) and "\n" not in str(caught.value)


def test_inputs_are_left_alone():
    losses = make_rng(0).random(30)
    kept = losses.copy()
    betting(losses, 0.1), certifies(losses, 0.1, 0.1), hoeffding_bentkus(losses, 30, 0.1), check_losses(losses)
    assert np.array_equal(losses, kept)


# ---- the promise (S1), at a true risk of exactly alpha: every certificate is a violation

def draw_losses(law, rng, alpha, shape):
    "Losses of mean alpha by five laws."
    if law == "all or nothing":
        return (rng.random(shape) < alpha).astype(float)
    if law == "alike":
        return rng.beta(50 * alpha, 50 * (1 - alpha), shape)
    if law == "heavy tail":                              # most lose little, a few nearly all
        few = rng.random(shape) < alpha / 2
        return np.where(few, rng.uniform(0.9, 1, shape), rng.uniform(0, 2, shape) * 0.525 * alpha / (1 - alpha / 2))
    if law == "on a grid":                               # tenths; mean alpha
        return rng.binomial(10, alpha, shape) / 10
    pixels, shared = 64, rng.standard_normal((*shape, 1))
    from scipy.stats import norm
    edge = norm.isf(alpha)
    return np.mean(np.sqrt(0.5) * shared + np.sqrt(0.5) * rng.standard_normal((*shape, pixels)) > edge, -1)


LAWS = ("all or nothing", "alike", "heavy tail", "on a grid", "correlated pixels")


@pytest.mark.battery
@pytest.mark.parametrize("law", LAWS)
def test_validity(law):
    worst, cells = {0.05: 0, 0.1: 0}, 0
    for n in SIZES if FULL else SIZES[:4]:
        for alpha in (0.05, 0.1, 0.2):
            rng = make_rng(5, law, n, alpha)
            parts = [draw_losses(law, rng, alpha, (100, n)) for _ in range(TRIALS // 100)]
            losses = np.concatenate(parts)
            assert abs(losses.mean() - alpha) < 6 * losses.mean(1).std() / np.sqrt(TRIALS) + 1e-9, "the law has mean alpha"
            for delta in (0.05, 0.1):
                for bound in ("betting", "hoeffding_bentkus", "binomial")[:3 if law == LAWS[0] else 2]:
                    wrong = int(certifies(losses, alpha, delta, bound).sum())
                    assert wrong <= LIMIT[delta], (law, n, alpha, delta, bound, wrong)
                    assert n >= min_images(alpha, delta) or wrong == 0, "nobody can certify with so few"
                    worst[delta], cells = max(worst[delta], wrong), cells + 1
    print(f"\n{law}: {cells} cells x {TRIALS}, most violations {worst}, limits {LIMIT}")


def test_the_battery_would_notice_a_bad_bound():
    "The mean itself as a bound is wrong half of the time; a floor in place of the ceiling has no proof."
    losses = draw_losses("alike", make_rng(0), 0.1, (TRIALS, 50))
    assert (losses.mean(-1) <= 0.1).sum() > LIMIT[0.1]
    assert set(BOUNDS) == {"betting", "hoeffding_bentkus", "binomial", "expectation"}
