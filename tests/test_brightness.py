"The brightness experiment: three processes from the same start, a record that grows, distances that find a planted bias."
import json

import numpy as np
import pytest
import torch

from fluogen.simulation.pairs import simulate_targets
from fluogen.models.zoo import load_weights
from fluogen.experiments import brightness
from fluogen.experiments.brightness import PROCESSES, BrightnessError, brightness_batch, compare_brightness, sample_data
from fluogen.figures.fig3b_brightness import FIG3B_CLAIMS, STATISTICS, fig3b_rows, mean_shift, measure_fig3b, summarize_fig3b
from fluogen.report.claims import judge_claims
from fluogen.simulation.stream import SceneStream

DICE = np.random.default_rng(0)


def make_record(shifts, seeds=1, n=300):
    draw = lambda shift: {key: DICE.normal(0.2 + shift, 0.05, n).tolist() for key in STATISTICS}
    rows = [{"process": process, "seed": seed, **draw(shift)} for process, shift in shifts.items() for seed in range(seeds)]
    return {"rows": rows, "data": draw(0), "other data": draw(0)}


def test_a_planted_bias_is_measured_with_its_sign():
    record = make_record({"eps": 0.2, "v": -0.1, "v-zero": 0.0})
    compared = {name: compare_brightness(record, name, n_boot=200) for name in STATISTICS}
    mean = compared["mean"]
    assert mean["eps"]["distance"] == pytest.approx(0.2, abs=0.02) and mean["v"]["ratio"] == pytest.approx(0.5, abs=0.1)
    assert mean["v-zero"]["ratio_ci95"][1] < 0.2 and mean["floor"] < 0.02
    assert mean_shift(record)["v"] == pytest.approx(-0.1, abs=0.02)
    assert "-0.1" in summarize_fig3b(record, compared)
    over_v = compare_brightness(record, "mean", "v", n_boot=200)
    assert over_v["v"]["ratio"] == 1 and over_v["v-zero"]["ratio"] < 0.3
    claims = judge_claims(FIG3B_CLAIMS, measure_fig3b(compared, 1, over_v))
    assert [claim.ci95[1] <= (spec.at_most or 1) for spec, claim in zip(FIG3B_CLAIMS, claims, strict=True)] == [True] * 5
    assert len(fig3b_rows(compared, 300)) == 21


def test_no_difference_is_not_claimed():
    found = compare_brightness(make_record(dict.fromkeys(PROCESSES, 0.1), seeds=2), n_boot=200)["v-zero"]
    assert found["ratio_ci95"][0] < 1 < found["ratio_ci95"][1]


def test_a_missing_process_is_named():
    with pytest.raises(BrightnessError, match="found v-zero"):
        compare_brightness(make_record({"eps": 0, "v": 0}))


def test_all_three_see_the_same_batches():
    few = lambda: SceneStream(simulate_targets, 1, n=16)
    one, two = (brightness_batch(2, 1, 4, few()) for _ in range(2))
    assert torch.equal(one["target"], two["target"]) and one["prompts"] == two["prompts"] and one["target"].shape == (4, 1, 64, 64)
    assert not np.array_equal(sample_data(1), sample_data(1, split="test"))


def test_a_small_run_ships_three_networks_and_adds_seeds(monkeypatch, tmp_path):
    monkeypatch.setattr(brightness, "SceneStream", lambda simulate, seed, n, steps: SceneStream(simulate, seed, n=16, steps=steps))
    monkeypatch.setattr(brightness, "SAMPLING", brightness.SAMPLING | {"steps": 2})
    out = lambda *seeds: brightness.run_brightness(tmp_path / "out", tmp_path / "work", seeds, per_prompt=1, steps=1, crops=2)
    record = json.loads((out(0) / "scores.json").read_text())
    assert [row["process"] for row in record["rows"]] == sorted(PROCESSES, key=lambda name: name + "-0")
    starts = [load_weights(str(tmp_path / "out" / f"brightness-{name}")) for name in PROCESSES]
    assert [w.schedule.config for w in starts] == list(PROCESSES.values())
    assert len(json.loads((out(0, 1) / "scores.json").read_text())["rows"]) == 6
    assert (tmp_path / "out" / "brightness-eps" / "card.md").is_file() and all(len(row["mean"]) == 16 for row in record["rows"])
    with pytest.raises(BrightnessError, match="no such process"):
        brightness.train_process("x0", 0, tmp_path, tmp_path)
