"What figure 4 computes: fields from a manifest, the table, the claims, and the thirty pairs behind them."
import json

import numpy as np
import pytest
import torch

from fluogen.experiments.harness import describe_stopping

from fluogen.core import FluogenError
from fluogen.io.image import write_image
from fluogen.report.claims import judge_claims, summarize_claims
from fluogen.report.tables import METRICS, summarize_scores
from fluogen.figures import fig4_sr as fig4
from fluogen.experiments import super_resolution as sr
from fluogen.experiments.records import RecordError, best_baseline, compare_scores, join_folds, read_record, score_table


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
    fields, notes = fig4.open_fig4_fields(path, per_structure=2)
    assert fields.structures == ["factin", "microtubules"]
    assert fields.target.shape == (2, 1, 128, 128) and fields.condition.shape == (2, 1, 64, 64)
    assert any("not twice the input" in note for note in notes) and any("rows without" in note and "ccps" in note for note in notes)
    assert fields.pixel_um == [0.05, 0.05]
    assert 0 <= fields.condition.min() and fields.target.max() <= 1


def test_a_data_set_without_a_usable_pair_is_refused_in_one_line(tmp_path):
    with pytest.raises(FluogenError, match="no pair that figure 4 can use") as caught:
        fig4.open_fig4_fields(write_pairs(tmp_path, [("ER of COS-7", (64, 64), 3)]), 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(FluogenError):
        fig4.open_fig4_fields("no-such-data-set", 1)


def made_up_record():
    "Two draws, four fields, every way that the claims ask for; the direct adaptation is 1 dB ahead."
    fields = ["factin", "factin", "er", "er"]
    level = {"bicubic": 22.0, "richardson_lucy": 24.0, "care": 26.0, "dfcan": 25.0, "rcan": 25.5, "scratch": 25.8, "direct": 27.0}
    level |= {f"control, {way}": 26.2 for way in sr.CONTROL_VARIANTS} | {"control-frozen, 4 passes, mean of 4": 23.0}
    rows = []
    for kind in sr.FIELD_KINDS:
        for way, base in level.items():
            for seed in (None,) if way in ("bicubic", "richardson_lucy") else (0, 1):
                noise = np.random.default_rng([seed or 0, len(way)]).normal(0, 0.05, 4)
                scores = {"psnr": list(base + np.arange(4) + noise), "ms_ssim": list(0.9 + base / 1000 + noise / 100),
                          "resolution_um": list(3 / base + noise / 1000), "cutoff_per_um": [8.0] * 4,
                          "invented": list(0.3 / base + noise / 1000), "missed": [0.1] * 4}
                rows.append({"kind": kind, "way": way, "which": "ever", "seed": seed, "scores": scores})
    return {"seeds": [0, 1], "fields": {kind: fields for kind in sr.FIELD_KINDS}, "rows": rows, "n_per_structure": 2}


def test_claims_follow_the_record():
    record = made_up_record()
    seconds = {"One sample": 0.4, "FluoGen direct": 0.05}
    claims = {c.id: c for c in judge_claims(fig4.FIG4_CLAIMS, fig4.measure_fig4(record, seconds))}
    assert claims["gain_psnr"].holds and abs(claims["gain_psnr"].measured - 1.0) < 0.1
    assert claims["control_gain"].holds is False and claims["over_bicubic"].holds and claims["every_structure"].holds
    assert claims["direct_speed"].measured == pytest.approx(0.4 / 4 * 10 / 0.05)
    assert claims["few_pairs"].holds is None and "many" in claims["few_pairs"].why     # nobody measured it
    assert "Did not hold" in summarize_claims(claims.values()) and "out of range" in fig4.describe_elsewhere(record)
    assert "4 passes took 0.40 s a field" in claims["few_passes"].why


def test_what_learned_nothing_stands_beside_every_draw():
    record = made_up_record()
    record["rows"] += [dict(r, way=way) for r in record["rows"] if (r["way"], r["seed"]) == ("care", 0) for way in ("untuned", "many")]
    record["fits"] = [{"method": "untuned", "seed": 0, "steps": 0}]
    draws = {way: compare_scores(record, ("direct", "ever"), (way, "ever"), "psnr").n_seeds for way in ("untuned", "many", "scratch", "bicubic")}
    assert draws == {"untuned": 2, "many": 1, "scratch": 2, "bicubic": 2}


def test_nothing_is_claimed_without_a_record():
    claims = judge_claims(fig4.FIG4_CLAIMS, {}, "needs simulated fields")
    assert len(claims) == len(fig4.FIG4_CLAIMS) and all(c.holds is None and c.why for c in claims)


def test_the_best_baseline_is_credited_with_its_better_stopping_rule():
    record = made_up_record()
    record["rows"] += [dict(r, which="in time", scores={k: [v + 0.5 for v in vs] for k, vs in r["scores"].items()})
                       for r in record["rows"] if r["way"] == "care"]
    assert best_baseline(record, sr.SR_LEARNED) == ("care", "in time")


def test_where_less_is_better_the_best_baseline_has_the_least():
    record, mean = made_up_record(), lambda metric, way: score_table(record, metric, *way).mean()
    for metric in ("invented", "resolution_um"):
        best = best_baseline(record, sr.SR_LEARNED, metric)
        assert all(mean(metric, best) <= mean(metric, (way, "ever")) for way in ("care", "rcan", "scratch"))
    with pytest.raises(RecordError, match="no learned baseline"):
        best_baseline(record, sr.SR_LEARNED, "nrmse")


def test_table_and_rows():
    fields = sr.draw_fields("held-out", 2, size_px=64)
    scores = {"a": [{"psnr": float(i), "ssim": 0.5} for i in range(8)], "b": [{"psnr": 1.0, "ssim": 0.9} for _ in range(8)]}
    rows = summarize_scores(scores, fields.structures, each=True)
    overall = next(r for r in rows if (r["group"], r["method"], r["metric"]) == ("all", "a", "psnr"))
    assert overall["value"] == 3.5 and overall["n"] == 8 and overall["ci95"][0] < 3.5 < overall["ci95"][1]
    text = fig4.format_fig4_table(rows, {"a": 0.1, "b": 0.2})
    assert "3.500*" in text and "0.900*" in text


@pytest.mark.parametrize("prompt, row", [("F-actin of COS-7", "factin"), ("ER, COS-7", "er"), ("Microtubules of HeLa", "microtubules"),
                                         ("CCPs of COS-7", "ccps"), ("liver of mouse", None), ("alpha-actinin", None)])
def test_a_prompt_names_its_row_by_whole_words(prompt, row):
    assert fig4.guess_structure(prompt) == row


def test_claims_say_how_their_fits_ended():
    fit = lambda steps, best: {"steps": steps, "best step": best, "config": {"steps": 2000, "patience": 8, "validate_every": 40}}
    assert describe_stopping([fit(2000, 1960), fit(2000, 1600), fit(900, 580)], "care") == (
        "; 1 of 3 fits of care were ended by their last step, not by patience")
    assert describe_stopping([fit(320, 0), {"steps": 0}], "direct") == "; 1 of 1 fits of direct were best before the first step"
    assert describe_stopping([], "care") == ""


def test_thirty_pairs_are_split_without_sharing_a_scene():
    train, held = sr.draw_sr_pairs("direct", 3)
    assert (len(train), len(held)) == (24, 6) and not set(train.groups) & set(held.groups)
    assert len({g.split("-")[0] for g in held.groups}) == 4
    again, _ = sr.draw_sr_pairs("direct", 3)
    assert torch.equal(train.target, again.target)
    other, _ = sr.draw_sr_pairs("direct", 4)
    assert not torch.equal(train.target, other.target)


def test_the_test_fields_come_from_other_optics():
    made, fields = sr.few_shot_pairs(0), sr.draw_fields("held-out", 2, size_px=64)
    inside = lambda value, bands: any(low <= value <= high for low, high in bands)
    from fluogen.simulation.microscopes import HELD_OUT, TRAIN
    assert all(inside(s.photons, TRAIN.photons) and not inside(s.photons, HELD_OUT.photons) for s in made.setups)
    assert all(inside(s.photons, HELD_OUT.photons) and not inside(s.photons, TRAIN.photons) for s in fields.setups)


def test_the_shipped_record_is_whole():
    record = read_record("bench30", "sr")
    assert len(record["seeds"]) >= 3
    for kind in sr.FIELD_KINDS:
        for method in (*sr.SR_LEARNED, "direct"):
            table = score_table(record, "psnr", method, test_sets=kind).values
            assert table.shape == (len(record["seeds"]), len(record["fields"][kind])) and np.isfinite(table).all()
    from fluogen.models.zoo import list_weights, load_weights
    named = {base.split("@")[0]: base for base in record["bases"]}
    assert {"fluogen-nano", "nano-sr", "nano-sr-direct"} <= set(named)
    shipped = [name for name in named if name in list_weights()]
    assert all(load_weights(name).id == named[name] for name in shipped), "weights changed since they were scored"



@pytest.fixture(scope="module")
def clean_cells(tmp_path_factory):
    "A manifest of clean images: eight cells of each of two structures, two images a cell, and three rows that do not belong."
    folder, lines, rng = tmp_path_factory.mktemp("clean"), [], np.random.default_rng(0)
    rows = [(name, 16, 256, f"{name}{i // 2}") for name in ("ER", "mitochondria") for i in range(16)]
    rows += [("ER", 8, 256, "stretched"), ("ER", 16, 200, "small"), ("ER exit sites", 16, 256, "other")]
    for i, (text, bits, size, group) in enumerate(rows):
        write_image(folder / f"{i}.tif", (200 + rng.gamma(1, 500, (size, size))).astype(np.uint16), pixel_um={"Y": 0.03, "X": 0.03})
        lines.append({"image": f"{i}.tif", "text": text, "group": group, "bits": bits})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_real_cell_is_in_one_set_only(clean_cells):
    judges = [sr.draw_fields("held-out", 25, dataset=clean_cells, half=half) for half in (0, 1)]
    first, second = (set(fields.groups) for fields in judges)
    assert judges[0].target.shape[-2:] == (240, 240) and all(set(f.structures) == {"er", "mitochondria"} for f in judges)
    assert not first & second and len(first | second) == 16 and not {"er/stretched", "er/small", "er/other"} & (first | second)
    for seed in range(4):
        made = sr.few_shot_pairs(seed, 12, clean_cells)
        train, held = sr.draw_sr_pairs("direct", seed, 12, clean_cells)
        assert made.target.shape[-2:] == (128, 128) and len(train) + len(held) == len(made) and len(held)
        assert set(made.groups) <= (second, first)[seed % 2] and not set(train.groups) & set(held.groups)
    assert not torch.equal(sr.few_shot_pairs(1, 12, clean_cells).target, sr.few_shot_pairs(3, 12, clean_cells).target)


@pytest.mark.parametrize("kind", sr.FIELD_KINDS)
def test_every_kind_of_field_has_every_score(kind):
    fields = sr.draw_fields(kind, 1, size_px=192)
    rows = sr.score_sr_fields(fields.target[:, 0].numpy() * 0.9, fields)
    assert all(set(row) == set(METRICS) and all(np.isfinite(list(row.values()))) for row in rows)
    stretched = sr.score_sr_fields(fields.target[:, 0].numpy() * 0.9 + 0.05, fields, full=False, affine=True)
    assert min(row["psnr"] for row in stretched) > 90


def test_two_draws_of_real_cells_are_one_table_of_all_cells():
    def row(way, half, seed, values):
        return {"kind": f"half {half}", "way": way, "which": "ever", "seed": seed, "scores": {"psnr": values}}
    rows = [row("direct", seed % 2, seed, [seed, seed + 0.5]) for seed in range(4)] + [row("care", seed % 2, seed, [0, 0]) for seed in range(3)]
    rows += [row("bicubic", half, None, [half, half]) for half in (0, 1)]
    record = join_folds({"seeds": [0, 1, 2, 3], "rows": rows, "fields": {"half 1": ["er", "er"], "half 0": ["er", "mitochondria"]},
                                  "groups": {"half 0": ["a", "b"], "half 1": ["c", "d"]}})
    assert record["groups"]["held-out"] == ["a", "b", "c", "d"] and record["fields"]["held-out"][1] == "mitochondria"
    assert score_table(record, "psnr", "direct").values.tolist() == [[0, 0.5, 1, 1.5], [2, 2.5, 3, 3.5]]
    assert score_table(record, "psnr", "bicubic").values.tolist() == [[0, 0, 1, 1]]
    assert score_table(record, "psnr", "care").values.shape == (1, 4)         # draw 2 has no partner


def test_too_few_cells_are_refused(tmp_path):
    lines = []
    for i in range(3):
        write_image(tmp_path / f"{i}.tif", np.full((256, 256), 300 + i, np.uint16), pixel_um={"Y": 0.03, "X": 0.03})
        lines.append(json.dumps({"image": f"{i}.tif", "text": "ER", "group": f"cell{i}", "bits": 16}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    with pytest.raises(FluogenError, match="too few cells") as caught:
        sr.draw_fields("held-out", 4, dataset=str(tmp_path / "manifest.jsonl"))
    assert "\n" not in str(caught.value)


def test_unequal_pretraining_is_said_where_it_is_known():
    said = fig4.tell_pretraining({"pretraining": {"direct": 2000, "simulated": 1000}}, "direct", "simulated")
    assert "direct was pretrained for 2,000 steps, simulated for 1,000" in said and said.endswith("in favour of direct")
    for known in ({}, {"direct": 5}, {"direct": 5, "simulated": 5}):
        assert fig4.tell_pretraining({"pretraining": known}, "direct", "simulated") == ""
