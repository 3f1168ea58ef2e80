"A copied training image is flagged, turned, mirrored, shifted or darkened; honest images are not."
import numpy as np
import pytest

from fluogen.metrics.memorization import check_copies, find_nearest, shrink_images, apply_symmetry
from fluogen.metrics.restoration import MetricError

DICE = np.random.default_rng(1)
GRID = np.linspace(0, 1, 64, endpoint=False)


def draw_scenes(n, spots=6):
    def one():
        return sum(np.exp(-((GRID[:, None] - y) ** 2 + (GRID - x) ** 2) / 0.004) for y, x in DICE.random((spots, 2)))
    return np.stack([one() for _ in range(n)])


@pytest.fixture(scope="module")
def sets():
    return draw_scenes(150), draw_scenes(150), draw_scenes(40)


DISGUISES = {"same": lambda x: x, "mirrored": lambda x: x[:, :, ::-1], "turned": lambda x: np.rot90(x, 1, (1, 2)),
             "shifted": lambda x: np.roll(x, (10, -16), (1, 2)), "dark": lambda x: 0.2 * x + 0.05,
             "all at once": lambda x: 0.5 * np.roll(x.swapaxes(1, 2), 6, 1) + 0.01 * DICE.standard_normal(x.shape)}


@pytest.mark.parametrize("name", DISGUISES)
def test_every_planted_copy_is_found(sets, name):
    train, held, _ = sets
    check = check_copies(DISGUISES[name](train[:6]), train, held)
    assert check.flagged.all() and list(check.nearest) == [0, 1, 2, 3, 4, 5] and check.excess


def test_a_shift_by_any_number_of_pixels_costs_nothing_even_of_fine_texture(sets):
    train = sets[0].copy()
    train[:5] += DICE.random((5, 64, 64))
    moved = np.stack([np.roll(image, shift, (0, 1)) for image, shift in zip(train[:5], ((1, 0), (0, 1), (3, 5), (-7, 13), (31, 1)))])
    distance, index = find_nearest(moved, train)
    assert list(index) == [0, 1, 2, 3, 4] and distance.max() < 0.005


def test_thin_rings_half_a_sample_off_are_found_among_other_rings(monkeypatch):
    axis, dice = np.arange(128), np.random.default_rng(7)
    def draw():
        radii = [np.hypot(axis[:, None] - y, axis - x) - 12 for y, x in dice.uniform(14, 114, (dice.integers(3, 7), 2))]
        return sum(np.exp(-(r / 1.5) ** 2) for r in radii)
    train = np.stack([draw() for _ in range(200)])
    moved = np.roll(train[:40], (2, 2), (1, 2))                             # half a sample of 4 pixels
    lost = lambda: int((find_nearest(moved, train)[1] != np.arange(40)).sum())
    assert lost() == 0
    monkeypatch.setattr("fluogen.metrics.memorization.LIKELY", 1)
    assert lost() > 0                                                       # what the closer look is for


def test_a_cropped_copy_with_new_content_at_the_border_is_found(sets):
    train, held, _ = sets
    moved = train[:4].copy()
    moved[:, :, :-6] = train[:4, :, 6:]
    moved[:, :, -6:] = draw_scenes(4)[:, :, -6:]
    assert check_copies(moved, train, held).flagged.all()


def test_honest_pictures_are_flagged_no_more_often_than_chance(sets):
    train, held, made = sets
    check = check_copies(made, train, held)
    assert not check.excess and 0.05 <= check.limit < 0.1 and check.share <= check.limit


def test_the_limit_knows_how_uncertain_the_threshold_is():
    from fluogen.metrics.memorization import CopyCheck, rank_of
    limit = lambda n, k: CopyCheck(np.zeros(n, bool), None, None, np.zeros(k), 0.0, 0.01).limit
    assert limit(1000, 100_000) == pytest.approx(0.015, abs=0.001) and limit(1000, 100) > 0.025 and (rank_of(0.01, 100), rank_of(0.01, 250)) == (1, 3)
    over = []
    for _ in range(300):                                                    # honest sets exceed it in no more than one of twenty
        held, made = DICE.random(200), DICE.random(200)
        over.append((made < np.sort(held)[rank_of(0.01, 200) - 1]).mean() > limit(200, 200))
    assert np.mean(over) < 0.09


def test_the_shortcut_never_reports_a_nearer_one_and_misses_no_copy(sets):
    train, _, made = sets
    both = np.concatenate([made[:6], train[3:5]])
    quick, exact = find_nearest(both, train, 5)[0], find_nearest(both, train, len(train))[0]
    assert (quick >= exact - 1e-6).all() and quick[-2:] == pytest.approx([0, 0], abs=1e-5)


def test_kinds_are_judged_on_their_own_scale():
    dense, sparse = draw_scenes(60, 30), draw_scenes(60, 1)                 # single spots all look alike under shifts
    train, held = np.concatenate([dense, sparse]), np.concatenate([draw_scenes(60, 30), draw_scenes(60, 1)])
    labels = np.repeat(["dense", "sparse"], 60)
    made = np.concatenate([dense[:3], draw_scenes(20, 1)])
    check = check_copies(made, train, held, ["dense"] * 3 + ["sparse"] * 20, labels)
    assert check.flagged[:3].all() and check.flagged[3:].mean() < 0.3
    with pytest.raises(MetricError, match="without held-out.*found rods"):
        check_copies(made[:1], train, held, ["rods"], labels)


def test_the_symmetries_are_eight_and_flat_pictures_have_no_copy():
    image = DICE.random((1, 64, 64))
    assert len({apply_symmetry(image, k).tobytes() for k in range(8)}) == 8
    assert find_nearest(np.ones((1, 64, 64)), image)[0] == 1
    assert not shrink_images(np.zeros((1, 32, 32))).any()


def test_wrong_inputs_give_one_line(sets):
    with pytest.raises(MetricError, match="32 pixels or more"):
        shrink_images(np.zeros((1, 33, 31)))
    with pytest.raises(MetricError, match="too few held-out images"):
        check_copies(sets[2], sets[0], sets[1][:50])
