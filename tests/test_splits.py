"Splits by group: whole, reproducible, of the right size; and what is held out is gone from the pool."
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluogen.datasets.record import Record
from fluogen.datasets.splits import SplitError, list_groups, reserve, split_by_group


def frames(groups, per=3, text="ER"):
    return [Record(f"g{g}/f{f}.tif", text, group=f"g{g}") for g in range(groups) for f in range(per)]


shares = st.lists(st.integers(1, 20), min_size=1, max_size=4).map(
    lambda parts: {f"s{i}": part / sum(parts) for i, part in enumerate(parts)})


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["ER", "CCPs", "actin"])), min_size=1,
                max_size=80), shares,
       st.integers(0, 2**40), st.booleans())
def test_no_group_stands_in_two_splits(rows, fractions, seed, stratified):
    records = [Record(f"{i}.tif", text, group=f"g{g}") for i, (g, text) in enumerate(rows)]
    groups = len(list_groups(records))
    by = (lambda record: record.text) if stratified else None
    if groups < len(fractions):
        with pytest.raises(SplitError, match="too few groups"):
            split_by_group(records, fractions, seed, by)
        return
    done = split_by_group(records, fractions, seed, by)
    assert [replace(record, split=None) for record in done] == records          # same records, same order
    chosen = {group: {record.split for record in members} for group, members in list_groups(done).items()}
    assert all(len(splits) == 1 for splits in chosen.values())
    counts = Counter(splits.pop() for splits in chosen.values())
    assert set(counts) == set(fractions)
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    again = {record.image: record.split for record in split_by_group(shuffled, fractions, seed, by)}
    assert again == {record.image: record.split for record in done}


@pytest.mark.parametrize("groups", [10, 27, 100, 333])
def test_fractions(groups):
    fractions = {"train": 0.7, "val": 0.1, "test": 0.2}
    done = split_by_group(frames(groups), fractions)
    counts = Counter(members[0].split for members in list_groups(done).values())
    for split, share in fractions.items():
        assert abs(counts[split] - share * groups) <= 1, counts


def test_seeds_differ_and_repeat():
    first, second = (split_by_group(frames(50), seed=seed) for seed in (0, 1))
    assert first == split_by_group(frames(50), seed=0) and first != second


def test_every_stratum_has_its_share():
    records = frames(40, text="ER") + [Record(f"c{i}.tif", "CCPs", group=f"c{i}") for i in range(10)]
    done = split_by_group(records, {"train": 0.8, "test": 0.2}, by=lambda record: record.text)
    tests = Counter(record.text for record in done if record.split == "test" and record.image.endswith(("f0.tif", "tif"))
                    and (record.text == "CCPs" or record.image.endswith("f0.tif")))
    assert tests == {"ER": 8, "CCPs": 2}


def test_a_group_keeps_its_split_when_more_arrive():
    done = split_by_group(frames(20), seed=3)
    more = split_by_group(done + [replace(record, image="new/" + record.image, group="n" + record.group)
                                  for record in frames(20)], seed=9)
    assert more[:60] == done
    counts = Counter(members[0].split for members in list_groups(more).values())
    assert counts == {"train": 32, "val": 4, "test": 4}
    late = split_by_group([replace(done[0], image="late.tif", split=None), *done])
    assert late[0].split == done[0].split                                       # a late frame joins its group
    assert split_by_group(done, seed=9, keep=False) != done


def test_mistakes():
    with pytest.raises(SplitError, match="g0: one group in two splits .found test and train"):
        split_by_group([replace(frames(1)[0], split="train"), replace(frames(1)[1], split="test")])
    for wrong in ({}, {"train": 1.5}, {"train": 1.0, "test": 0.0}, {"train": 0.5, "test": 0.4}):
        with pytest.raises(SplitError, match="add up to 1"):
            split_by_group(frames(9), wrong)


def test_reserve_by_group_and_by_file(tmp_path):
    held = [Record("a.tif", conditioning_image="a_wf.tif", group="cell 1", base=tmp_path),
            Record("b.tif", base=tmp_path)]
    pool = [Record("other.tif", group="cell 1", base=tmp_path), Record("x/../b.tif", base=tmp_path),
            Record("a_wf.tif", base=tmp_path), Record("tiles/b.tif", base=tmp_path),
            Record("c.tif", group="cell 2"),
            Record("b.tif", base=tmp_path / "elsewhere")]
    assert [record.image for record in reserve(pool, held)] == ["tiles/b.tif", "c.tif", "b.tif"]
