"Set distances on planted cases: identical and shifted sets, collapsed and wild generators, shuffled prompts; brightness, intensities, texture."
import numpy as np
import pytest
from scipy.stats import wasserstein_distance as reference

from fluogen.metrics.generation import (
    MAX_DIMENSIONS, average_over_labels, compare_kernel_distances, diversity, frechet_distance, histogram_distance, kernel_distance,
    mean_log_spectrum, measure_brightness, precision_recall, prompt_fidelity, share_interval, spectrum_distance, wasserstein_distance)
from fluogen.metrics.restoration import MetricError

DICE = np.random.default_rng(2)
REAL, OTHER = DICE.standard_normal((2, 300, 6))


def test_identical_sets_are_at_zero():
    assert frechet_distance(REAL, REAL[::-1]) == pytest.approx(0, abs=1e-9)
    assert abs(kernel_distance(REAL, REAL)) < abs(kernel_distance(REAL, OTHER + 1))
    same = precision_recall(REAL, REAL)
    assert same["precision"] == same["recall"] == same["coverage"] == 1 and same["density"] == pytest.approx(1, abs=0.01)


def test_frechet_is_the_closed_form_of_gaussians():
    from scipy.linalg import sqrtm
    mix = DICE.standard_normal((6, 6))
    one, two = REAL @ mix, OTHER * np.arange(1, 7) + 2
    s1, s2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    expected = np.square(one.mean(0) - two.mean(0)).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_a_single_feature_needs_no_matrix():
    assert frechet_distance([[0.0], [2.0]], [[5.0], [7.0]]) == pytest.approx(25)


def test_kernel_distance_is_the_double_sum():
    one, two = REAL[:7], OTHER[:5]
    k = lambda x, y: (x @ y / 6 + 1) ** 3
    mean = lambda a, b, skip: np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (skip and i == j)])
    expected = mean(one, one, True) + mean(two, two, True) - 2 * mean(one, two, False)
    assert kernel_distance(one, two) == pytest.approx(expected)


def test_kernel_distance_has_no_bias():
    values = [kernel_distance(*DICE.standard_normal((2, 20, 4))) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    assert np.mean([frechet_distance(*DICE.standard_normal((2, 20, 4))) for _ in range(50)]) > 0.3    # unlike this one


KINDS = np.repeat(np.arange(8), 3)


def draw_kinds(shift=0.0):
    return 2 * np.eye(8)[KINDS] + 0.3 * DICE.standard_normal((24, 8)) + shift


def test_a_set_of_so_many_of_each_kind_has_no_bias_either():
    "Without the labels, few pictures of each kind look nearer to the real ones than they are."
    pairs = [(draw_kinds(), draw_kinds()) for _ in range(100)]
    told = [kernel_distance(a, b, KINDS, KINDS) for a, b in pairs]
    plain = [kernel_distance(a, b) for a, b in pairs]
    assert abs(np.mean(told)) < 3 * np.std(told) / 10 and np.mean(plain) < -10 * np.std(plain) / 10
    real, near, far = draw_kinds(), draw_kinds(0.3), draw_kinds(0.6)
    ratio = compare_kernel_distances(real, near, far, (KINDS,) * 3, n_boot=20)
    assert ratio.first == pytest.approx(kernel_distance(real, near, KINDS, KINDS)) and ratio.ratio < 1


def test_labels_leave_pairs_of_different_kinds_alone():
    one, two = draw_kinds(), draw_kinds(0.5)
    k = lambda x, y: (x @ y / 8 + 1) ** 3
    within = lambda rows: np.mean([np.mean([k(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows)
                                            if KINDS[i] == a and KINDS[j] == b and i != j]) for a in range(8) for b in range(8)])
    expected = within(one) + within(two) - 2 * np.mean([k(x, y) for x in one for y in two])
    assert kernel_distance(one, two, KINDS, KINDS) == pytest.approx(expected)


def test_a_label_needs_two_pictures():
    with pytest.raises(MetricError, match="real_labels: .*two images of a label.*1 of er"):
        kernel_distance(REAL[:5], OTHER, ["er", "rods", "rods", "nuclei", "nuclei"])
    with pytest.raises(MetricError, match="one label per image"):
        kernel_distance(REAL, OTHER, labels=["er"])


def test_distances_grow_with_the_fault():
    steps = [0.1, 0.3, 0.9]
    for distance in (frechet_distance, kernel_distance):
        assert np.all(np.diff([distance(REAL, OTHER + step) for step in steps]) > 0)


def test_a_ratio_knows_when_it_cannot_tell():
    better = compare_kernel_distances(REAL, OTHER + 0.3, OTHER + 0.6, n_boot=200)
    assert better.ratio == pytest.approx(kernel_distance(REAL, OTHER + 0.3) / kernel_distance(REAL, OTHER + 0.6)) and better.high < 1
    same = compare_kernel_distances(REAL, OTHER[:150] + 0.4, OTHER[150:] + 0.4, n_boot=200)
    assert same.low < 1 < same.high
    nothing = compare_kernel_distances(REAL, OTHER[:150], OTHER[150:], n_boot=200)
    assert nothing.high > 5                                                 # two perfect generators: no ratio to speak of


def test_intervals_cover():
    hits = 0
    for _ in range(60):
        low, high = share_interval(int(DICE.binomial(80, 0.3)), 80)
        hits += low <= 0.3 <= high
    assert hits >= 54 and share_interval(0, 10)[0] == 0 and share_interval(10, 10)[1] == 1


@pytest.mark.parametrize("made, low, high", [(0.02 * OTHER, "recall", "precision"), (5 * OTHER, "precision", "recall")])
def test_quality_and_variety_fail_apart(made, low, high):
    found = precision_recall(REAL, made)
    assert found[low] < 0.35 < 0.8 < found[high]


def test_one_outlier_does_not_buy_density():
    real = np.concatenate([REAL, np.full((1, 6), 30.0)])
    made = OTHER + 15                                                       # between the cloud and the outlier: in one wide ball
    found = precision_recall(real, made)
    assert found["precision"] > 0.9 and found["density"] < 0.5 and found["coverage"] < 0.05


def test_shuffled_prompts_are_chance_and_the_right_ones_are_not():
    asked = np.repeat(["er", "rods", "nuclei", "ccps"], 100)
    assert prompt_fidelity(asked, asked)["share"] == 1
    found = prompt_fidelity(asked, DICE.permutation(asked))
    assert found["ci95"][0] <= 0.25 <= found["ci95"][1]
    wrong = np.where(asked == "rods", "cocci", asked)
    found = prompt_fidelity(asked, wrong)
    assert found["by_structure"]["rods"] == 0 and found["confused"][0] == ("rods", "cocci", 1.0) and found["share"] == 0.75


def test_diversity_is_zero_for_a_generator_that_repeats_itself():
    found = diversity(np.concatenate([REAL, np.repeat(REAL[:1], 10, 0)]), ["a"] * 300 + ["b"] * 10)
    assert found["b"] == pytest.approx(0, abs=1e-6) and found["a"] == pytest.approx(12**0.5, rel=0.1)
    with pytest.raises(MetricError, match="lonely: diversity needs two"):
        diversity(REAL[:3], ["a", "a", "lonely"])


@pytest.mark.parametrize("wrong, words", [(np.zeros((5, MAX_DIMENSIONS + 1)), "at most 32"), (np.zeros(5), "set of features"),
                                          (np.full((5, 6), np.nan), "finite"), (np.zeros((5, 4)), "different encoders")])
def test_wrong_features_give_one_line(wrong, words):
    with pytest.raises(MetricError, match=words):
        kernel_distance(REAL, wrong)
    with pytest.raises(MetricError, match="one name per image"):
        prompt_fidelity(["a", "b"], ["a"])


# ---- brightness, intensities and texture: zero for the same set, a known number for a planted difference

PIXELS_RNG = np.random.default_rng(0)
IMAGES = PIXELS_RNG.random((12, 48, 48)) * 0.6


def test_identical_sets_are_at_zero_whatever_their_order():
    mixed = IMAGES[PIXELS_RNG.permutation(12)]
    assert histogram_distance(IMAGES, mixed) == 0
    assert spectrum_distance(IMAGES, mixed) == pytest.approx(0, abs=1e-12)
    assert wasserstein_distance(IMAGES, mixed) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n, m", [(50, 50), (50, 71), (1, 9)])
def test_wasserstein_agrees_with_scipy(n, m):
    one, two = PIXELS_RNG.normal(size=n), PIXELS_RNG.normal(0.4, 2, m)
    assert wasserstein_distance(one, two) == pytest.approx(reference(one, two), rel=1e-9)
    assert wasserstein_distance(one, two) == pytest.approx(wasserstein_distance(two, one), rel=1e-9)


def test_a_brighter_set_is_as_far_as_it_is_brighter():
    assert histogram_distance(IMAGES, IMAGES + 0.2) == pytest.approx(0.2, abs=0.004)
    shifted = {key: wasserstein_distance(a, b) for (key, a), b in zip(measure_brightness(IMAGES).items(), measure_brightness(IMAGES + 0.2).values())}
    assert shifted == pytest.approx(dict.fromkeys(("mean", "dark", "bright"), 0.2), abs=1e-6)


def test_deciles_are_those_of_each_image():
    ramp = np.arange(100.0).reshape(1, 10, 10)
    assert {key: value.item() for key, value in measure_brightness(ramp).items()} == {"mean": 49.5, "dark": 4.5, "bright": 94.5}


def test_a_factor_in_power_is_its_logarithm_and_blur_is_seen_where_it_is():
    noise = PIXELS_RNG.standard_normal((20, 48, 48))
    assert spectrum_distance(noise, 10 * noise) == pytest.approx(2, abs=1e-3)
    blurred = (noise + np.roll(noise, 1, 2)) / 2
    change = mean_log_spectrum(blurred) - mean_log_spectrum(noise)
    assert abs(change[0]) < 0.1 and change[-1] < -0.3


def test_kinds_are_not_averaged_away():
    both, labels = np.concatenate([IMAGES, IMAGES + 0.3]), np.repeat(["a", "b"], 12)
    swapped = np.concatenate([IMAGES + 0.3, IMAGES])
    assert histogram_distance(both, swapped) == pytest.approx(0, abs=1e-9)
    assert average_over_labels(histogram_distance, both, labels, swapped, labels) == pytest.approx(0.3, abs=0.004)
    with pytest.raises(MetricError, match="labels differ.*found b"):
        average_over_labels(histogram_distance, both, labels, IMAGES, labels[:12])


@pytest.mark.parametrize("wrong", [np.zeros((4, 4)), np.zeros((0, 8, 8)), np.full((2, 8, 8), np.inf), np.zeros((2, 3, 8, 8))])
def test_what_is_no_set_of_images_is_refused(wrong):
    with pytest.raises(MetricError, match="images"):
        measure_brightness(wrong)


def test_spectrum_refuses_what_it_cannot_bin():
    for shape in ((2, 48, 64), (2, 32, 32)):
        with pytest.raises(MetricError, match="not square, or too small"):
            mean_log_spectrum(np.zeros(shape))
    with pytest.raises(MetricError, match="finite values"):
        wasserstein_distance([], [1.0])
