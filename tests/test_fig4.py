"What figure 4 computes: fields from a manifest, the table, the claims, and the thirty pairs behind them."
import json

import numpy as np
import pytest
import torch

from fluogen.core import FluogenError
from fluogen.data.io import write_image
from fluogen.report.claims import judge
from fluogen.tasks import bench30, fig4, scoring


def write_pairs(folder, rows):
    "A manifest of pairs: (prompt, shape of the input, factor of the target)."
    rng, lines = np.random.default_rng(0), []
    for i, (text, shape, factor) in enumerate(rows):
        for kind, size in (("lr", shape), ("hr", tuple(factor * n for n in shape))):
            write_image(folder / f"{kind}{i}.tif", rng.integers(0, 4000, size).astype(np.uint16), pixel_um={"Y": 0.05, "X": 0.05})
        lines.append({"image": f"hr{i}.tif", "conditioning_image": f"lr{i}.tif", "text": text})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_real_pairs_are_read_and_what_does_not_fit_is_named(tmp_path):
    path = write_pairs(tmp_path, [("F-actin of COS-7", (64, 80), 2), ("ER of COS-7", (64, 64), 4), ("Nuclei of PC-3", (64, 64), 2),
                                  ("Microtubules of COS-7", (70, 64), 2)])
    fields, notes = fig4.open_fields(path, per_structure=2)
    assert fields.structures == ["factin", "microtubules"]
    assert fields.target.shape == (2, 1, 128, 128) and fields.condition.shape == (2, 1, 64, 64)
    assert any("not twice the input" in note for note in notes) and any("rows without" in note and "ccps" in note for note in notes)
    assert fields.pixel_um == [0.05, 0.05]
    assert 0 <= fields.condition.min() and fields.target.max() <= 1


def test_a_data_set_without_a_usable_pair_is_refused_in_one_line(tmp_path):
    with pytest.raises(FluogenError, match="no pair that figure 4 can use") as caught:
        fig4.open_fields(write_pairs(tmp_path, [("ER of COS-7", (64, 64), 3)]), 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(FluogenError):
        fig4.open_fields("no-such-data-set", 1)


def made_up_record():
    "Two draws, four fields, every way that the claims ask for; the direct adaptation is 1 dB ahead."
    fields = ["factin", "factin", "er", "er"]
    level = {"bicubic": 22.0, "richardson_lucy": 24.0, "care": 26.0, "dfcan": 25.0, "rcan": 25.5, "scratch": 25.8, "direct": 27.0}
    level |= {f"control, {way}": 26.2 for way in scoring.CONTROL_WAYS} | {"control-frozen, 4 passes, mean of 4": 23.0}
    rows = []
    for kind in scoring.KINDS:
        for way, base in level.items():
            for seed in (None,) if way in ("bicubic", "richardson_lucy") else (0, 1):
                noise = np.random.default_rng([seed or 0, len(way)]).normal(0, 0.05, 4)
                scores = {"psnr": list(base + np.arange(4) + noise), "ms_ssim": list(0.9 + base / 1000 + noise / 100),
                          "resolution_um": list(3 / base + noise / 1000), "cutoff_per_um": [8.0] * 4}
                rows.append({"kind": kind, "way": way, "which": "ever", "seed": seed, "scores": scores})
    return {"seeds": [0, 1], "fields": {kind: fields for kind in scoring.KINDS}, "rows": rows, "n_per_structure": 2}


def test_claims_follow_the_record():
    record = made_up_record()
    seconds = {"one sample": 0.4, "FluoGen direct": 0.05}
    claims = {c["id"]: judge(**c) for c in fig4.figure_claims(record, seconds)}
    assert claims["gain_psnr"].holds and abs(claims["gain_psnr"].measured - 1.0) < 0.1
    assert claims["control_gain"].holds is False and claims["over_bicubic"].holds and claims["every_structure"].holds
    assert claims["direct_speed"].measured == pytest.approx(0.4 / 4 * 10 / 0.05)
    assert "Did not hold" in fig4.tell(record, list(claims.values()), True)


def test_nothing_is_claimed_without_a_record():
    claims = [judge(**c) for c in fig4.figure_claims(None, {}, full=False)]
    assert len(claims) == len(fig4.CLAIMS) and all(c.holds is None and c.why for c in claims)


def test_the_best_baseline_is_credited_with_its_better_stopping_rule():
    record = made_up_record()
    record["rows"] += [dict(r, which="in time", scores={k: [v + 0.5 for v in vs] for k, vs in r["scores"].items()})
                       for r in record["rows"] if r["way"] == "care"]
    assert scoring.best_baseline(record) == ("care", "in time")


def test_table_and_rows():
    fields = bench30.draw_fields("held-out", 2, size_px=64)
    scores = {"a": [{"psnr": float(i), "ssim": 0.5} for i in range(8)], "b": [{"psnr": 1.0, "ssim": 0.9} for _ in range(8)]}
    rows = fig4.summarise(scores, fields)
    overall = next(r for r in rows if (r["group"], r["method"], r["metric"]) == ("all", "a", "psnr"))
    assert overall["value"] == 3.5 and overall["n"] == 8 and overall["ci95"][0] < 3.5 < overall["ci95"][1]
    text = fig4.format_table(rows, {"a": 0.1, "b": 0.2})
    assert "3.500*" in text and "0.900*" in text


def test_thirty_pairs_are_split_without_sharing_a_scene():
    train, held = bench30.draw_thirty(seed=3)
    assert (len(train), len(held)) == (24, 6) and not set(train.groups) & set(held.groups)
    assert len({g.split("-")[0] for g in held.groups}) == 4
    again, _ = bench30.draw_thirty(seed=3)
    assert torch.equal(train.target, again.target)
    other, _ = bench30.draw_thirty(seed=4)
    assert not torch.equal(train.target, other.target)


def test_the_test_fields_come_from_other_optics():
    thirty, fields = bench30.simulate_thirty(0), bench30.draw_fields("held-out", 2, size_px=64)
    inside = lambda value, bands: any(low <= value <= high for low, high in bands)
    from fluogen.data.microscopes import HELD_OUT, TRAIN
    assert all(inside(s.photons, TRAIN.photons) and not inside(s.photons, HELD_OUT.photons) for s in thirty.setups)
    assert all(inside(s.photons, HELD_OUT.photons) and not inside(s.photons, TRAIN.photons) for s in fields.setups)


def test_the_shipped_record_is_whole():
    record = scoring.read_record()
    assert len(record["seeds"]) >= 3
    for kind in scoring.KINDS:
        for method in (*bench30.LEARNED, "direct"):
            table = scoring.table_of(record, kind, "psnr", method)
            assert table.shape == (len(record["seeds"]), len(record["fields"][kind])) and np.isfinite(table).all()
    assert record["base"].startswith("fluogen-nano@")
