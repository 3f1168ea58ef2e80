"Set distances on planted cases: identical sets, shifted ones, collapsed and wild generators, shuffled prompts."
import numpy as np
import pytest

from fluogen.metrics.generation import (MAX_DIMENSIONS, compare_kernel_distances, diversity, frechet_distance, kernel_distance,
                                        precision_recall, prompt_fidelity, share_interval)
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
    with pytest.raises(MetricError, match="real_labels: .*two pictures of a label.*1 of er"):
        kernel_distance(REAL[:5], OTHER, ["er", "rods", "rods", "nuclei", "nuclei"])
    with pytest.raises(MetricError, match="one label a picture"):
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
    with pytest.raises(MetricError, match="one name a picture"):
        prompt_fidelity(["a", "b"], ["a"])
