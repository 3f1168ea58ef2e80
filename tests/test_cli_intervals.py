"fluogen calibrate and fluogen restore --interval: one line for a mistake, no map without a calibration."
import inspect
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from test_intervals import draw_pair, write_pairs
from toys import save_interval_toy, save_toy

from fluogen.cli.main import main
from fluogen.io.image import read_image, write_image
from fluogen.models.zoo import load_weights
from fluogen.recipes import interval_heads as heads
from fluogen.tasks.intervals import tuned_on, unseen_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_interval_toy(tmp_path_factory.mktemp("weights") / "toy"))


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    "A calibration file on 24 pairs, made by the command."
    folder = tmp_path_factory.mktemp("pairs")
    out = folder / "mine.json"
    assert main(["calibrate", str(write_pairs(folder, range(24))), "--model", model, "--alpha", "0.2", "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_calibrate_says_what_may_be_relied_on(run, model, tmp_path):
    code, out, err = run("calibrate", write_pairs(tmp_path, range(24)), "--model", model, "--alpha", "0.2", "--device", "cpu", "--out", tmp_path / "c.json")
    assert code == 0 and out == f"{tmp_path / 'c.json'}\n" and json.loads((tmp_path / "c.json").read_text())["n"] == 24
    assert re.match(r"with probability 90%, at most 20% of the pixels lie outside their interval; λ = .*, n = 24; mean width 0\.\d+ of the range", err[0])
    assert err[-1] == f"to use it: fluogen restore IN OUT --interval --calibration {tmp_path / 'c.json'} --model {model}"


@pytest.mark.parametrize(("n", "options", "says"), [
    (12, [], "too few groups (cells or fields of view) for any coverage guarantee (found 12, expected at least 22 for alpha 0.1 and delta 0.1). Bring 10"),
    (12, ["--alpha", "0.01"], "at least 230"), (3, ["--alpha", "1.5"], "0 < level < 1"), (3, ["--delta", "0"], "0 < level < 1"),
    (24, ["--family", "spread"], "no such interval method for one-step restoration (found spread, expected quantile or residual)"),
    (24, ["--samples", "4"], "not samples"), (24, ["--prompt", "zebra"], "unknown prompt")])
def test_what_cannot_be_calibrated_is_one_line(run, model, tmp_path, n, options, says):
    code, out, err = run("calibrate", write_pairs(tmp_path, range(n)), "--model", model, "--device", "cpu", "--out", tmp_path / "c.json", *options)
    assert code == 2 and out == "" and len(err) == 1 and err[0].startswith("fluogen: ") and says in err[0]
    assert not (tmp_path / "c.json").exists()


def test_weights_without_heads_are_refused(run, tmp_path):
    plain = save_toy(tmp_path / "plain")
    code, out, err = run("calibrate", write_pairs(tmp_path, range(24)), "--model", plain, "--device", "cpu")
    assert code == 2 and len(err) == 1 and "these weights have no heads" in err[0] and "fluogen train heads --models" in err[0]


def test_maps_beside_the_result(run, model, calibration, tmp_path):
    write_image(tmp_path / "a.tif", draw_pair(100)[0], pixel_um={"Y": 0.06, "X": 0.06})
    go = ("restore", tmp_path / "a.tif", tmp_path / "out.tif", "--model", model, "--device", "cpu", "--interval", "--calibration", calibration)
    code, out, err = run(*go)
    assert code == 0 and out == f"{tmp_path / 'out.tif'}\n"
    assert err[1].startswith("interval: with probability 90%, at most 20% of the pixels lie outside their interval")
    restored, low, high = (read_image(tmp_path / f"out{name}.tif") for name in ("", ".lower", ".upper"))
    assert (low.array <= restored.array + 0.01).all() and (restored.array <= high.array + 0.01).all()
    assert low.pixel_um == restored.pixel_um == {"Y": 0.03, "X": 0.03}
    assert "a.tif: kept, it was there already" in run(*go)[2]


def test_an_input_out_of_range_is_flagged(run, model, calibration, tmp_path):
    write_image(tmp_path / "a.tif", draw_pair(100, gain=40)[0])
    code, out, err = run("restore", tmp_path / "a.tif", tmp_path / "out.tif", "--model", model, "--device", "cpu", "--calibration", calibration)
    notes = [line for line in err if line.startswith("note: ")]
    assert code == 0 and len(notes) == 1 and "flagged OOD: input outside the calibration range" in notes[0]
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.lower.not-covered.tif", "out.tif", "out.upper.not-covered.tif"]


def test_pixels_that_are_no_numbers_name_their_file(run, model, calibration, tmp_path):
    image = draw_pair(0)[0].astype(np.float32)
    image[3, 4] = np.nan
    write_image(tmp_path / "nan.tif", image)
    code, out, err = run("restore", tmp_path / "nan.tif", tmp_path / "out.tif", "--model", model, "--device", "cpu", "--calibration", calibration)
    assert code == 2 and "nan.tif: intensities that are no numbers (found 1 of" in err[-1] and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("shape", [(15, 40), (1, 50), (3, 3)])
def test_a_small_image_is_refused_in_words_about_its_size(run, model, calibration, tmp_path, shape):
    write_image(tmp_path / "small.tif", draw_pair(0, size=64)[0][:shape[0], :shape[1]])
    go = ("restore", tmp_path / "small.tif", tmp_path / "out.tif", "--model", model, "--device", "cpu")
    code, out, err = run(*go, "--calibration", calibration)
    wrong = [line for line in err if line.startswith("fluogen: ")]
    assert code == 2 and len(wrong) == 1 and not list(tmp_path.glob("out*"))
    assert wrong[0].startswith(f"fluogen: {tmp_path / 'small.tif'}: an image too small for intervals (found {shape[0]} x {shape[1]} pixels, expected at least 16 x 16)")
    assert run(*go)[0] == 0 and read_image(tmp_path / "out.tif").array.shape == (2 * shape[0], 2 * shape[1])      # without: any size


def test_small_pairs_are_left_out_by_name(run, model, tmp_path):
    manifest = write_pairs(tmp_path, range(24))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for key, name, side in (("image", "t.tif", 20), ("conditioning_image", "c.tif", 10)):
        write_image(tmp_path / name, np.arange(side * side, dtype=np.uint16).reshape(side, side))
        rows[0][key] = name
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("calibrate", manifest, "--model", model, "--alpha", "0.2", "--device", "cpu", "--out", tmp_path / "c.json")
    left = [line for line in err if line.startswith("left out: ")]
    assert code == 0 and len(left) == 1 and "c.tif: an image too small for intervals (found 10 x 10 pixels" in left[0]


def test_pairs_that_are_all_left_out_end_in_one_line_that_says_why(run, model, tmp_path):
    manifest = write_pairs(tmp_path, range(24))
    rows = [json.loads(line) | {"conditioning_image": f"hr{i}.tif"} for i, line in enumerate(manifest.read_text().splitlines())]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("calibrate", manifest, "--model", model, "--alpha", "0.2", "--device", "cpu", "--out", tmp_path / "c.json")
    assert code == 2 and sum(line.startswith("left out: ") for line in err) == 5                  # not one for each of 24
    assert err[-1].startswith(f"fluogen: {manifest}: too few groups are left (found 0 of 24, expected at least 11). 24 pairs were left out, the first as ")
    assert "hr0.tif: the target is not twice the input" in err[-1]


def test_tuned_weights_are_calibrated_on_what_they_did_not_learn_from(model, tmp_path):
    said, weights = [], load_weights(model)
    manifest = write_pairs(tmp_path, range(6))
    assert len(unseen_pairs(manifest, weights, said.append)) == 6 and said == []
    tuned = replace(weights, config=weights.config | {"facts": {"tuned_on": ["mine.jsonl"]}})
    assert len(unseen_pairs(manifest, tuned, said.append)) == 6
    assert said == [f"note: {tuned.name} was fine-tuned on mine.jsonl; for cells in its training set the coverage guarantee does not hold"]
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(row | ({"split": "test"} if i < 2 else {})) + "\n" for i, row in enumerate(rows)))
    assert [r.group for r in unseen_pairs(manifest, tuned, said.append)] == ["cell0", "cell1"] and "only the 2 pairs of the split test" in said[-1]
    manifest.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "group"}) + "\n" for row in rows))
    assert len(unseen_pairs(manifest, weights, said.append)) == 6 and "no groups are stated" in said[-1]


def test_the_fact_and_not_the_card_tells_what_weights_were_tuned_on(model):
    weights, card = load_weights(model), {"recipe": "fluogen finetune mine.jsonl --task sr --name x"}
    for config, expected in (({}, None), ({"card": card}, None), ({"facts": {"tuned_on": ["hers.jsonl"]}}, "hers.jsonl"),
                             ({"card": card, "facts": {"tuned_on": ["his", "hers"]}}, "his, hers"), ({"card": card, "facts": {"tuned_on": []}}, None)):
        assert tuned_on(replace(weights, config=weights.config | {"card": {}} | config)) == expected


@pytest.mark.parametrize(("options", "says"), [
    ([], "no calibration, so no interval. Make one on your own pairs: fluogen calibrate MANIFEST"),
    (["--prompt", "ER of COS-7"], "calibrated for another prompt"), (["--calibration", "absent.json"], "absent.json: no calibration")])
def test_no_interval_without_its_calibration(run, model, calibration, tmp_path, options, says):
    write_image(tmp_path / "a.tif", draw_pair(100)[0])
    given = ["--calibration", calibration] if "--prompt" in options else []
    code, out, err = run("restore", tmp_path / "a.tif", tmp_path / "out.tif", "--model", model, "--device", "cpu", "--interval", *given, *options)
    wrong = [line for line in err if line.startswith("fluogen: ")]
    assert code == 2 and out == "" and len(wrong) == 1 and says in wrong[0] and not list(tmp_path.glob("out*"))


def test_calibrate_hands_task_and_camera_on(run, model, monkeypatch, tmp_path):
    from fluogen.tasks import intervals as certified, restore as settings
    asked = []
    monkeypatch.setattr(settings, "load_for_task", lambda task, *more, load=settings.load_for_task: asked.append(task) or load("sr", *more))
    monkeypatch.setattr(certified, "calibrate_source", lambda source, weights, settings, *more, calibrate=certified.calibrate_source, **rest:
                        asked.append(settings.camera) or calibrate(source, weights, replace(settings, camera=None), *more, **rest))
    code, out, err = run("calibrate", write_pairs(tmp_path, range(24)), "--model", model, "--alpha", "0.2", "--device", "cpu", "--out",
                         tmp_path / "c.json", "--task", "denoise", "--camera", "2.2,100,1.6")
    assert code == 0 and asked == ["denoise", (2.2, 100.0, 1.6)]
    assert err[-1] == f"to use it: fluogen restore IN OUT --interval --calibration {tmp_path / 'c.json'} --task denoise --camera 2.2,100.0,1.6 --model {model}"


def test_another_model_is_refused(run, calibration, tmp_path):
    other = save_interval_toy(tmp_path / "toy", seed=7)
    write_image(tmp_path / "a.tif", draw_pair(100)[0])
    code, out, err = run("restore", tmp_path / "a.tif", tmp_path / "out.tif", "--model", other, "--device", "cpu", "--calibration", calibration)
    assert code == 2 and "calibrated for another weights" in err[-1] and not (tmp_path / "out.tif").exists()


def test_help_says_what_lies_beside_what(run):
    code, out, err = run("restore", "--help")
    said = " ".join(out.split())
    assert "NAME.lower.tif and NAME.upper.tif" in said and "not-covered" in said and "Fiji" in said
    code, out, err = run("calibrate", "--help")
    assert code == 0 and out.startswith("usage: fluogen calibrate") and "--alpha" in out and "only groups count" in " ".join(out.split())


def test_train_heads_hands_its_options_on(run, monkeypatch, tmp_path):
    calls, models = [], inspect.signature(heads.train_heads).parameters["models"].default
    monkeypatch.setattr(heads, "train_heads", lambda out, work, models=models, **more:
                        calls.append((out, work, more | {"models": models})) or [out / "x-heads"])
    code, out, err = run("train", "heads", "--out", tmp_path, "--work", tmp_path / "w", "--minutes", "3", "--models", "a", "b", "--device", "cpu")
    assert code == 0 and out == f"{tmp_path / 'x-heads'}\n" and "--interval" in err[0]
    assert calls[0][:2] == (tmp_path, tmp_path / "w" / "heads") and calls[0][2]["models"] == ["a", "b"] and calls[0][2]["minutes"] == 3
    run("train", "heads", "--out", tmp_path)
    assert calls[1][2]["models"] == heads.MODELS and np.isclose(calls[1][2]["minutes"], 40)
