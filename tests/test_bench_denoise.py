"The comparison of denoisers: draws that do not leak, folds that leave scenes out, records that add up, curves that cross."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fluogen.tasks.finetune import expect_gain

from fluogen.core import FluogenError, make_rng
from fluogen.io.image import write_image
from fluogen.simulation.camera import expose
from fluogen.simulation.pairs import simulate_clean
from fluogen.experiments import denoising, sample_size as bench_pairs
from fluogen.training.fit import BENCH_CONFIG, TUNE_CONFIG
from fluogen.experiments.harness import load_learner, run_benchmark
from fluogen.experiments.records import compare_scores, score_row, score_table
from fluogen.recipes.denoising import psnr_light
from fluogen.preprocessing.anscombe import input_light
from fluogen.experiments.denoising import (
    DENOISE_BENCH, few_shot_noisy_pairs, list_folds, real_noisy_fields, real_pairs, real_rows, restore_denoise_fields, scale_by_truth,
    score_denoise_fields, split_by_prompt)

SHORT = replace(BENCH_CONFIG, steps=2, batch=2, crop_px=32, validate_every=2, precision="fp32")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "A manifest of four scenes, two frames each, of 8 bit; the last scene's frames are one frame twice."
    folder, lines = tmp_path_factory.mktemp("scenes"), []
    clean = simulate_clean("mitochondria", 4, 64, seed=5)
    for scene in range(4):
        write_image(folder / f"clean{scene}.tif", (100 + 120 * (clean.target[scene, 0].numpy() + 0.1)).clip(0, 255).astype(np.uint8))
        for frame in range(2):
            seen = expose(clean.take([scene]), 60, make_rng(scene, 0 if scene == 3 else frame))
            write_image(folder / f"noisy{scene}{frame}.tif", seen.counts[0, 0].numpy().clip(0, 255).astype(np.uint8))
            lines.append({"image": f"clean{scene}.tif", "conditioning_image": f"noisy{scene}{frame}.tif", "text": "", "group": f"scene{scene}",
                          "dataset": "Toy scenes", "noise_level": "raw"})
    lines.append(dict(lines[0], conditioning_image="noisy10.tif", noise_level="avg4"))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{folder / 'manifest.jsonl'}#toy"


def test_repeated_frames_and_averages_are_left_out(scenes):
    assert len(real_rows(scenes)) == 7 and len(list_folds(scenes)) == 4
    with pytest.raises(FluogenError, match="too few fields of view"):
        real_rows(scenes.replace("#toy", "#other"))


def test_no_scene_is_on_two_sides(scenes):
    for fold in range(4):
        training, held = real_pairs(scenes, fold, 30, side=32)
        judged = set(real_noisy_fields(scenes, fold).batch.groups)
        assert judged == list_folds(scenes)[fold]
        assert not judged & set(training.groups) and not judged & set(held.groups) and not set(training.groups) & set(held.groups)


def test_eight_bit_pairs_are_scored_on_their_counts(scenes):
    fields, rows = real_noisy_fields(scenes, 1), [r for r in real_rows(scenes) if r["group"] == "scene1"]
    found = score_denoise_fields(input_light(fields.batch.condition)[:, 0].numpy(), fields)
    for score, row in zip(found, rows):
        expected = 10 * np.log10(255**2 / np.mean((row["noisy"].astype(float) - row["clean"])**2))
        assert abs(score["psnr"] - expected) < 0.02


def test_stretched_pairs_are_aligned_before_scoring():
    fields = scale_by_truth(few_shot_noisy_pairs(1, 5, 48), affine=True)
    truth = fields.batch.target[:, 0].numpy()
    assert min(s["psnr"] for s in score_denoise_fields(3 * truth + 7, fields)) > 60
    plain = replace(fields, affine=False)
    np.testing.assert_allclose([s["psnr"] for s in score_denoise_fields(0.9 * truth, plain)],
                               psnr_light(torch.from_numpy(0.9 * truth)[:, None], plain.batch.target).numpy(), atol=0.01)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
def test_something_is_always_set_aside(n):
    made = few_shot_noisy_pairs(0, n, 16)
    training, held = split_by_prompt(made)
    assert held and training and sorted(training + held) == list(range(n)) and (n < 10 or abs(len(held) - n / 5) <= 1)


def test_the_recipe_runs_ends_and_is_not_repeated(tmp_path, monkeypatch):
    small = lambda n_per_row=1: {f"{k} photons": scale_by_truth(few_shot_noisy_pairs(k, 10, 48)) for k in (9, 20)}
    monkeypatch.setattr(denoising, "simulated_noisy_fields", small)
    options = dict(seeds=(0,), methods=("noise2void",), seconds=0.01, config=SHORT, n_pairs=5)
    out = run_benchmark(DENOISE_BENCH, tmp_path / "out", tmp_path / "work", **options)
    record = json.loads((out / "scores.json").read_text())
    assert {r["way"] for r in record["rows"]} == {"noisy", "nlm", "noise2void"} and record["fits"][0]["steps"] == 2
    stamp = (tmp_path / "work" / "scores" / "noise2void-0" / "scores.json").stat().st_mtime_ns
    run_benchmark(DENOISE_BENCH, tmp_path / "out", tmp_path / "work", **options)
    assert (tmp_path / "work" / "scores" / "noise2void-0" / "scores.json").stat().st_mtime_ns == stamp
    shipped = load_learner(str(tmp_path / "out" / "bench-denoise-noise2void"), DENOISE_BENCH)
    fields = small()["9 photons"]
    again = [s["psnr"] for s in score_denoise_fields(restore_denoise_fields(shipped, fields), fields)]
    kept = next(r for r in record["rows"] if r["way"] == "noise2void")["scores"]["psnr"]
    np.testing.assert_allclose(again, kept, atol=1e-3)
    assert compare_scores(record, ("nlm", "ever"), ("noisy", "ever")).mean > 1
    assert score_table(record, "psnr", "nlm").values.shape == (1, 10)         # a scene's score: its mean over exposures


def test_folds_are_read_side_by_side():
    record = {"dataset": "fmd", "fields": {"fold 0": ["a", "a"], "fold 1": ["b"]}, "groups": {"fold 0": ["s", "s"], "fold 1": ["t"]},
              "rows": [score_row("fold 0", "direct", 0, "ever", [{"psnr": 1.0}, {"psnr": 2.0}]), score_row("fold 1", "direct", 1, "ever", [{"psnr": 4.0}]),
                       score_row("fold 0", "noisy", 0, "ever", [{"psnr": 0.0}, {"psnr": 0.5}]), score_row("fold 1", "noisy", 1, "ever", [{"psnr": 1.0}])]}
    table = score_table(record, "psnr", "direct")
    assert table.values.tolist() == [[1.0, 2.0, 4.0]] and len(set(table.groups)) == 2
    assert abs(compare_scores(record, ("direct", "ever"), ("noisy", "ever")).mean - (1 + 1.5 + 3) / 3) < 1e-9


def test_laboratories_are_nested_and_disjoint_from_what_judges():
    two, eleven = bench_pairs.setting_pairs(3, 2), bench_pairs.setting_pairs(3, 11)
    assert torch.equal(two.condition, eleven.condition[:2]) and len({s.optics for s in eleven.setups}) == 1
    fields = bench_pairs.setting_pairs(3, 2, "fields")
    assert all(not torch.equal(a, b) for a in two.counts for b in fields.counts)
    assert bench_pairs.describe_setting(0) != bench_pairs.describe_setting(5)


def test_the_curve_is_read():
    rows = [{"method": m, "seed": s, "pairs": n, "ever": [base + slope * np.log2(n)], "in time": [0.0]} for s in (0, 1) for n in (2, 8, 32)
            for m, base, slope in (("fluogen", 24, 0.5), ("care", 21, 1.5))]
    assert abs(bench_pairs.find_crossing({"rows": rows}) - 8) < 1e-6
    assert "32 pairs of 128 x 128 in place of 8 gained +1.0 dB" in expect_gain(bench_pairs.gain_table({"rows": rows}), 7)
    assert "ends at 32 pairs of 128 x 128; you have 400" in expect_gain(bench_pairs.gain_table({"rows": rows}), 400)
    assert "your 5 make 80 of that size" in expect_gain(bench_pairs.gain_table({"rows": rows}), 80, 5)
    assert bench_pairs.find_crossing({"rows": rows}, "care", "fluogen") is None


def test_a_curve_holds_only_what_every_laboratory_was_fitted_at():
    from fluogen.figures import fig5b_how_many as fig5b
    rows = [{"method": m, "seed": s, "pairs": n, "ever": [20.0 + s + n]} for m, n, s in (("fluogen", 2, 0), ("fluogen", 2, 1), ("fluogen", 5, 0), ("norms", 2, 0))]
    assert {m: list(c) for m, c in fig5b.curves({"rows": rows}).items()} == {"fluogen": [2]}
    assert fig5b.best_tuning({"rows": rows}) is None and fig5b.curves({"rows": []}) == {}


def test_the_minutes_of_a_tuning_are_those_of_the_slowest_fit():
    from fluogen.figures import fig5b_how_many as fig5b
    from fluogen.report.claims import judge_claims
    fits = [{"method": "fluogen", "pairs": 30, "seconds a step": pace} for pace in (0.1, 0.3)] + [
        {"method": "care", "pairs": 30, "seconds a step": 9.0}, {"method": "fluogen", "pairs": 2, "seconds a step": 9.0}]
    claim = fig5b.measure_fig5b({"rows": [], "fits": fits})["tuning_minutes"]
    assert abs(claim["measured"] - 0.3 * TUNE_CONFIG.steps / 60) < 1e-9 and "slowest of 2 fits" in claim["why"]
    assert judge_claims(fig5b.FIG5B_CLAIMS, fig5b.measure_fig5b(None), fig5b.UNMEASURED)[-1].measured is None


def made_up_record(real: bool, rival: float = 27.0) -> dict:
    "Three draws, or folds of one scene each, of four fields; the direct way is at 29 dB, CARE at 28, UNet-RCAN at `rival`."
    level = {"noisy": 20.0, "nlm": 25.0, "care": 28.0, "unet-rcan": rival, "scratch": 27.5, "noise2void": 24.0,
             "prior": 28.5, "untuned": 29.0, "direct": 29.0}
    kinds = {f"fold {k}": ["x"] * 4 for k in range(3)} if real else {"5 photons": ["a", "a", "b", "b"], "20 photons": ["a", "a", "b", "b"]}
    rows = [{"kind": kind, "way": way, "which": "ever", "seed": k if real else seed,
             "scores": {m: list((base + np.random.default_rng([k, seed, len(way)]).normal(0, 0.1, 4)) / scale) for m, scale in (("psnr", 1), ("ms_ssim", 100))}}
            for k, kind in enumerate(kinds) for seed in ((k,) if real else (0, 1, 2)) for way, base in level.items()]
    return {"dataset": "fmd" if real else "simulated", "seeds": [0, 1, 2], "fields": kinds, "groups": {}, "rows": rows}


def test_claims_of_figure_5_follow_the_records(monkeypatch):
    from fluogen.report.claims import judge_claims
    from fluogen.figures import fig5_denoise as fig5
    from fluogen.uncertainty.consistency import Detection
    there = {("bench-denoise", "scores"): made_up_record(False), ("bench-denoise", "fmd"): made_up_record(True, 30.0),
             ("bench-denoise", "w2s"): made_up_record(True, 29.02)}
    monkeypatch.setattr(fig5, "find_record", lambda bench, name="scores": there.get((bench, name)))
    judged = lambda *measured: judge_claims(fig5.FIG5_CLAIMS, fig5.measure_fig5(*measured), "measured on simulated fields")
    claims = {claim.id: claim for claim in judged(np.array([0.03, 0.04, np.nan]), Detection(0.95, 0.5, 40, 0.02))}
    assert claims["gain_psnr"].holds and abs(claims["gain_psnr"].measured - 1) < 0.2 and "care" in claims["gain_psnr"].why
    assert claims["gain_ms_ssim"].holds and claims["prior_worth"].holds and claims["thirty_pairs"].holds is False
    assert claims["fmd_over_input"].holds and claims["fmd_over_input"].measured > 8
    assert claims["fmd_not_below"].holds is False and "unet-rcan" in claims["fmd_not_below"].why        # a decibel below: the upper end as well
    assert claims["w2s_not_below"].holds and 0 < claims["w2s_not_below"].measured < 0.5                 # hardly below: the interval reaches over 0
    assert claims["noise_estimate"].holds and "2 of them" in claims["noise_estimate"].why
    assert claims["guard_added"].holds and claims["guard_removed"].holds is False
    there.clear()
    nothing = judged(None, None)
    assert not [c for c in nothing if c.measured is not None] and all("fluogen benchmark" in c.why or "measured on" in c.why for c in nothing)
