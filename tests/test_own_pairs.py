"A laboratory's pairs: read, cut, split by cell, tuned, kept with a card; every wrong input in one line."
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fluogen.cli.main import main
from fluogen.core import FluogenError
from fluogen.io.image import read_image, write_image
from fluogen.simulation.pairs import simulate_pairs
from fluogen.datasets.record import ManifestError, Record
from fluogen.datasets.registry import load_dataset
from fluogen.models.zoo import load_weights
from fluogen.training import fit as fitting
from fluogen.training.fit import TUNE_CONFIG
from fluogen.datasets.pairs import PairBatch
from fluogen.training.fit import WISE_FT_WEIGHTS, choose_wise_ft_weight, fit, interpolate_weights
from fluogen.training.learners import DirectLearner
from fluogen.training.peft import peft_name
from fluogen.datasets.pairs import UnusablePairError, cut_pair, find_camera, read_noise, read_pairs, stated_rule
from fluogen.tasks.finetune import MAX_VALIDATION, FinetuneError, find_alarm, finetune, set_profile, split_pairs
from fluogen.tasks.intervals import measured_unit, read_field, read_fields
from fluogen.tasks.restore import RestoreSettings, fill_camera
from counts import files_opened
from toys import make_weights, save_toy

SHORT = replace(TUNE_CONFIG, steps=4, batch=2, crop_px=32, validate_every=2, precision="fp32")


def write_manifest(folder, rows):
    "rows: (shape of the input, factor, group); gives the manifest's path."
    rng, lines = np.random.default_rng(1), []
    for i, (shape, factor, group) in enumerate(rows):
        big = tuple(factor * n for n in shape)
        write_image(folder / f"hr{i}.tif", rng.integers(100, 4000, big).astype(np.uint16), pixel_um={"Y": 0.03, "X": 0.03})
        write_image(folder / f"lr{i}.tif", rng.integers(100, 4000, shape).astype(np.uint16), pixel_um={"Y": 0.06, "X": 0.06})
        lines.append({"image": f"hr{i}.tif", "conditioning_image": f"lr{i}.tif", "text": "ER of COS-7"} | ({"group": group} if group else {}))
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tiles_cover_a_pair_and_stay_registered():
    condition = torch.arange(70 * 100.0).reshape(1, 70, 100)
    target = condition.repeat_interleave(2, 1).repeat_interleave(2, 2)
    tiles = cut_pair(target, condition, 64)
    assert len(tiles) == 2 * 3
    for big, small in tiles:
        assert big.shape == (1, 64, 64) and small.shape == (1, 32, 32) and torch.equal(big[:, ::2, ::2], small)
    assert len({float(small[0, 0, 0]) for _, small in tiles}) == 6


def test_what_cannot_be_used_is_left_out_and_said(tmp_path):
    pairs, notes = read_pairs(write_manifest(tmp_path, [((64, 64), 2, "a"), ((80, 64), 2, "b"), ((64, 64), 4, "c"), ((64, 64), 1, "d")]))
    assert set(pairs.groups) == {"a", "b"} and pairs.target.shape[-1] == 128 and pairs.scale == 2
    assert len(notes) == 2 and all("not twice the input" in note and "\n" not in note for note in notes)


@pytest.mark.parametrize("rows, match", [([((64, 64), 1, "a")], "no pair that can be used"), ([((14, 14), 2, "a")], "too small")])
def test_nothing_usable_is_refused(tmp_path, rows, match):
    with pytest.raises(UnusablePairError, match=match) as caught:
        read_pairs(write_manifest(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_no_group_on_both_sides():
    def pairs(groups):
        return PairBatch(torch.zeros(len(groups), 1, 32, 32), torch.zeros(len(groups), 1, 16, 16), [""] * len(groups), groups)
    for seed in range(20):
        training, held = split_pairs(pairs([f"cell{i % 7}" for i in range(50)]), seed)
        assert not set(training.groups) & set(held.groups) and len(training) and len(held)
    training, held = split_pairs(pairs(["a"] * 2 + ["b"] * 200))
    assert 1 <= len(held) <= MAX_VALIDATION
    with pytest.raises(UnusablePairError, match="one group only"):
        split_pairs(pairs(["a"] * 5))


def test_alarms():
    assert "gained nothing" in find_alarm(25.0, 25.0, [25.0])
    assert "Overfitting" in find_alarm(25.0, 26.0, [25, 26, 25.2])
    assert find_alarm(25.0, 26.0, [25, 26, 25.9]) == ""


def test_blended_weights_lie_half_way(tmp_path):
    data = simulate_pairs(["er"], 4, size_px=32, seed=1)
    rows = PairBatch(data.target, data.condition, data.prompts)
    ends = {}
    for share in (0.5, 1.0):
        learner = DirectLearner(make_weights())
        start = {k: v.clone() for k, v in learner.modules.state_dict().items()}
        fit(learner, rows.take([0, 1]), rows.take([2, 3]), replace(SHORT, lr=1e-2, wise_ft_weight=share, validate_every=4), tmp_path / str(share))
        ends[share] = {k: v.clone() for k, v in learner.modules.state_dict().items()}
    moved = [k for k in start if not torch.equal(start[k], ends[1.0][k])]
    for name in moved:
        torch.testing.assert_close(ends[0.5][name], (start[name] + ends[1.0][name]) / 2)
    interpolate_weights(learner.modules, start, 0.0)
    assert all(torch.equal(v, start[k]) for k, v in learner.modules.state_dict().items())


def test_the_share_of_tuning_is_the_one_that_validation_likes_best(tmp_path, monkeypatch):
    data = simulate_pairs(["er"], 4, size_px=32, seed=1)
    rows, learner, asked = PairBatch(data.target, data.condition, data.prompts), DirectLearner(make_weights()), []
    start = {k: v.clone() for k, v in learner.modules.state_dict().items()}
    fit(learner, rows.take([0, 1]), rows.take([2, 3]), replace(SHORT, lr=1e-2, validate_every=4), tmp_path / "fit")
    end = {k: v.clone() for k, v in learner.modules.state_dict().items()}
    moved = next(k for k in start if not torch.equal(start[k], end[k]))

    def judge(modules, pairs):                                                      # likes a quarter of the way
        asked.append(float(((modules.state_dict()[moved] - start[moved]).norm() / (end[moved] - start[moved]).norm())))
        return abs(asked[-1] - 0.3)
    monkeypatch.setattr(learner, "validation_loss", judge)
    assert choose_wise_ft_weight(learner, start, rows) == 0.25 and asked == pytest.approx(WISE_FT_WEIGHTS, abs=1e-4)
    assert all(torch.equal(v, end[k]) for k, v in learner.modules.state_dict().items())
    fit(learner, rows.take([0, 1]), rows.take([2, 3]), replace(SHORT, lr=1e-2, validate_every=4, wise_ft_weight=None), tmp_path / "fit")
    assert learner.wise_ft_weight == 0.25


@pytest.mark.parametrize("samples", [False, True])
def test_a_model_is_tuned_kept_and_used(tmp_path, samples):
    save_toy(tmp_path / "toy", "control" if samples else "direct")
    manifest, said = write_manifest(tmp_path, [((32, 32), 2, f"cell{i}") for i in range(5)]), []
    made = finetune(manifest, "mine", base=str(tmp_path / "toy"), samples=samples, work=tmp_path / "work", out=tmp_path, config=SHORT,
                 device="cpu", log=said.append)
    assert any("held out" in line for line in said) and made.n_held == 1 and made.n_train == 4
    weights = load_weights(str(tmp_path / "mine"))
    assert weights.config["task"] == "sr" and ("control" in weights.modules) == samples
    assert "before" in (tmp_path / "mine" / "card.md").read_text()
    write_image(tmp_path / "in.tif", np.random.default_rng(0).integers(0, 900, (32, 32)).astype(np.uint16))
    extra = ["--samples", "1", "--passes", "1"] if samples else []
    assert main(["restore", str(tmp_path / "in.tif"), str(tmp_path / "out.tif"), "--model", str(tmp_path / "mine"), *extra]) == 0


@pytest.mark.parametrize("name", ["", "..", "a/b", "a:b"])
def test_names_that_are_no_names(tmp_path, name):
    with pytest.raises(FluogenError, match="not a name"):
        finetune(tmp_path, name)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    manifest = write_manifest(tmp_path, [((64, 64), 2, "same"), ((64, 64), 2, "same")])
    assert main(["finetune", str(manifest), "--name", "x", "--work", str(tmp_path)]) == 2
    assert "one group only" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("fill", [7.0, np.nan])
def test_constant_and_nan_images_are_left_out_by_name(tmp_path, fill):
    manifest = write_manifest(tmp_path, [((32, 32), 2, "a"), ((32, 32), 2, "b")])
    write_image(tmp_path / "hr1.tif", np.full((64, 64), fill, np.float32))
    pairs, notes = read_pairs(manifest)
    assert set(pairs.groups) == {"a"} and len(notes) == 1 and "hr1.tif" in notes[0]


# ---- going on

VICTIM = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[2]))
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from test_own_pairs import tune_toy


def strike(entry):
    if entry["event"] == "validation" and entry["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)


tune_toy(sys.argv[3], "killed", strike)
"""


def tune_toy(home, name, callback=None):
    "Eight steps with a checkpoint every two and a validation every three."
    home, whole = Path(home), fitting.TrainConfig
    fitting.TrainConfig = partial(whole, checkpoint_every=2)
    try:
        return finetune(home / "manifest.jsonl", name, base=str(home / "toy"), work=home / "work", out=home, device="cpu", callback=callback,
                     config=replace(SHORT, steps=8, validate_every=3, lr=1e-2, ema_decay=0.5), log=lambda line: None, progress=False)
    finally:
        fitting.TrainConfig = whole


def test_a_tuning_killed_with_9_goes_on_to_the_same_weights(tmp_path):
    "Killed after its third step, when the best weights on disk are newer than the last checkpoint."
    save_toy(tmp_path / "toy")
    write_manifest(tmp_path, [((32, 32), 2, f"cell{i}") for i in range(5)])
    killed = subprocess.run([sys.executable, "-c", VICTIM, os.path.abspath(__file__), str(torch.get_num_threads()), str(tmp_path)],
                            stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not (tmp_path / "killed").exists() and (tmp_path / "work" / "killed" / "step-00000002.json").is_file()
    again, whole = tune_toy(tmp_path, "killed"), tune_toy(tmp_path, "whole")
    assert again.steps == whole.steps == 8 and again.after == whole.after != whole.before
    one, other = (tmp_path / name / "weights.safetensors" for name in ("killed", "whole"))
    ours, theirs = (load_weights(str(path.parent)).modules["backbone"].state_dict() for path in (one, other))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_name_is_not_gone_on_with_other_pairs_or_weights(tmp_path):
    save_toy(tmp_path / "toy")
    rows = [((32, 32), 2, f"cell{i}") for i in range(5)]
    write_manifest(tmp_path, rows)
    first = tune_toy(tmp_path, "mine")
    kept = (tmp_path / "mine" / "weights.safetensors").read_bytes()
    assert tune_toy(tmp_path, "mine").after == first.after              # the same call again
    write_manifest(tmp_path, rows[:4])
    with pytest.raises(FinetuneError, match="lies there.*--name") as caught:
        tune_toy(tmp_path, "mine")
    assert "\n" not in str(caught.value)
    write_manifest(tmp_path, rows)
    save_toy(tmp_path / "toy", seed=1)
    with pytest.raises(FinetuneError, match="with other weights lies there"):
        tune_toy(tmp_path, "mine")
    assert (tmp_path / "mine" / "weights.safetensors").read_bytes() == kept


# ---- what a manifest and a command may say

def test_test_rows_are_left_out_and_val_rows_stop_the_training(tmp_path):
    manifest = write_manifest(tmp_path, [((32, 32), 2, f"cell{i}") for i in range(5)])
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line, split in zip(lines, ("train", "val", "test", "train", "test")):
        line["split"] = split
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs, notes = read_pairs(manifest)
    assert set(pairs.groups) == {"cell0", "cell1", "cell3"} and any("2 of the split test left out" in note for note in notes)
    training, held = split_pairs(pairs, stated={"cell1", "cell9"})
    assert set(held.groups) == {"cell1"} and set(training.groups) == {"cell0", "cell3"}


def test_nothing_is_learned_from_the_cells_of_the_split_test(tmp_path):
    manifest = write_manifest(tmp_path, [((32, 32), 2, group) for group in ("a", "b", "c", "a", "d")])
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[3] |= {"split": "test"}
    lines.append({**lines[3], "image": lines[2]["image"], "conditioning_image": lines[2]["conditioning_image"], "group": "z"})
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs, notes = read_pairs(manifest)
    assert set(pairs.groups) == {"b", "d"}                              # a shares a cell with the test, c a file
    assert any("2 more left out" in note for note in notes)


def test_a_renamed_copy_of_a_test_image_is_not_learned_from(tmp_path):
    manifest = write_manifest(tmp_path, [((32, 32), 2, group) for group in "abcd"])
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[3] |= {"split": "test"}
    shutil.copy(tmp_path / "lr3.tif", tmp_path / "lr1.tif")
    lines[1] |= {"text": "F-actin of COS-7"}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs, notes = read_pairs(manifest)
    assert set(pairs.groups) == {"a", "c"} and any("lr1.tif: repeats another input pixel for pixel (found lr3.tif)" in note for note in notes)


def test_a_target_beside_its_input_teaches_nothing(tmp_path):
    manifest = write_manifest(tmp_path, [((64, 64), 2, group) for group in "abc"])
    for i in range(3):
        fine = gaussian_filter(np.random.default_rng(i).normal(0, 1, (128, 128)), 3)
        fine = 500 + 4000 * np.maximum(fine / fine.max(), 0)
        write_image(tmp_path / f"lr{i}.tif", fine.reshape(64, 2, 64, 2).mean((1, 3)).astype(np.uint16))
        write_image(tmp_path / f"hr{i}.tif", np.roll(fine, 6 * (i == 1), 1).astype(np.uint16))
    pairs, notes = read_pairs(manifest)
    assert set(pairs.groups) == {"a", "c"} and "beside the input" in notes[0] and "--align" in notes[0]


def test_the_camera_that_only_pairs_tell_comes_along(tmp_path):
    rng, lines = np.random.default_rng(0), []
    for folder in ("noisy", "clean"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        light = gaussian_filter(rng.normal(0, 1, (96, 96)), 4)
        light = 5 + 60 * np.maximum(light / light.max(), 0)
        noisy = gaussian_filter(100 + 4 * rng.poisson(light), 0.6)          # neighbours share their noise
        for folder, image in (("noisy", noisy), ("clean", 100 + 4 * light)):
            write_image(tmp_path / folder / f"{i}.tif", np.rint(image).astype(np.uint16))
        lines.append({"image": f"clean/{i}.tif", "conditioning_image": f"noisy/{i}.tif", "text": "ER of COS-7", "group": str(i)})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    camera = find_camera([read_noise(*(read_image(path).array for path in (record.conditioning_path, record.path)))
                          for record in load_dataset(manifest)])
    assert camera[0] > 0.5 and camera[2] >= 0
    weights, said = load_weights("nano-denoise"), []
    finetune(manifest, "mine", task="denoise", work=tmp_path / "work", out=tmp_path, config=replace(SHORT, steps=2), device="cpu", log=said.append)
    assert any(f"--camera {camera[0]}" in line for line in said)
    mine = load_weights(str(tmp_path / "mine"))
    assert tuple(mine.config["camera"]) == camera and fill_camera(mine, RestoreSettings()).camera == camera
    assert fill_camera(mine, RestoreSettings(camera=(1, 2, 3))).camera == (1, 2, 3) and fill_camera(weights, RestoreSettings()).camera is None
    noisy, out = str(tmp_path / "noisy/0.tif"), str(tmp_path / "out.tif")
    assert main(["restore", noisy, out, "--model", str(tmp_path / "mine")]) == 0
    assert read_image(out).metadata["fluogen"]["camera"] == list(camera)
    written = Path(out).stat().st_mtime_ns
    assert main(["restore", noisy, out, "--model", str(tmp_path / "mine")]) == 0 and Path(out).stat().st_mtime_ns == written
    assert main(["restore", noisy, str(tmp_path / "other.tif"), "--task", "denoise"]) != 0


def test_weights_that_ship_keep_their_names(tmp_path):
    with pytest.raises(FinetuneError, match="ship with the package"):
        finetune(tmp_path, "nano-sr-direct")


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FluogenError, match="nothing can be written into it"):
        finetune(tmp_path / "none.jsonl", "mine", out=tmp_path / "file")
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "1.tif").write_text("x")
    with pytest.raises(FinetuneError, match="holds no weights lies there"):
        finetune(tmp_path / "none.jsonl", "cells", out=tmp_path)


def test_profiles():
    assert set_profile(SHORT, "laptop") == SHORT
    with pytest.raises(FinetuneError, match="no such profile"):
        set_profile(SHORT, "cluster")
    if not torch.cuda.is_available():
        with pytest.raises(FinetuneError, match="needs an NVIDIA GPU.*Leave --profile out"):
            set_profile(SHORT, "gpu")


def test_the_default_way_of_tuning_is_the_best_that_was_measured():
    from fluogen.figures import fig5b_how_many as fig5b
    from fluogen.models.zoo import find_record
    best = fig5b.best_tuning(find_record("bench-pairs"))
    assert peft_name({"fluogen": "all"}.get(best, best)) == inspect.signature(finetune).parameters["peft"].default


# ---- what a manifest states is obeyed or refused

def state(manifest, **keys):
    "Every row of a manifest with these keys."
    lines = [json.loads(line) | keys for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def test_four_norms_give_four_tensors(tmp_path):
    manifest, stated = write_manifest(tmp_path, [((32, 32), 2, "a"), ((32, 32), 2, "b")]), {}
    plain, _ = read_pairs(manifest)
    for norm, bits in (("dtype", 12), ("minmax", None), ("range:200,3000", None), ("percentile:5,95", None), ("percentile:0.1,99.9", None)):
        stated[norm], notes = read_pairs(state(manifest, norm=norm, bits=bits))
        assert notes == []
    for side in ("target", "condition"):
        tensors = [getattr(pairs, side) for pairs in stated.values()]
        assert torch.equal(tensors.pop(), getattr(plain, side))                     # the weights' own rule changes nothing
        assert all(not torch.equal(one, other) for i, one in enumerate(tensors) for other in tensors[:i])
    counts = read_image(tmp_path / "lr0.tif").array
    np.testing.assert_allclose(stated["dtype"].condition[0, 0], counts / 4095, rtol=1e-6)
    np.testing.assert_allclose(stated["range:200,3000"].condition[0, 0], np.clip((counts - 200.0) / 2800, 0, 1), atol=1e-6)
    state(manifest, norm="dtype", bits=None)
    np.testing.assert_allclose(read_pairs(manifest)[0].condition[0, 0], counts / 65535, rtol=1e-6)


@pytest.mark.parametrize("keys, key, says", [
    ({"norm": "range:70000,80000"}, "norm", "leaves nothing of the image"), ({"bits": 8}, "bits", "above the stated bits"),
    ({"norm": "dtype", "bits": 10}, "bits", "at most 1023")])
def test_keys_that_do_not_fit_the_pixels_are_refused(tmp_path, keys, key, says):
    manifest = state(write_manifest(tmp_path, [((32, 32), 2, "a"), ((32, 32), 2, "b")]), **keys)
    with pytest.raises(ManifestError, match=says) as caught:
        read_pairs(manifest)
    assert f"manifest.jsonl:1:{key}" in str(caught.value) and f"Drop the key {key}" in str(caught.value) and "\n" not in str(caught.value)


def test_floating_point_images_without_a_range_are_refused_where_dtype_is_stated(tmp_path):
    manifest = state(write_manifest(tmp_path, [((32, 32), 2, "a"), ((32, 32), 2, "b")]), norm="dtype")
    write_image(tmp_path / "lr0.tif", np.random.default_rng(0).uniform(0, 900, (32, 32)).astype(np.float32))
    with pytest.raises(ManifestError, match="manifest.jsonl:1:norm.*range:lo,hi, or drop the key norm"):
        read_pairs(manifest)


@pytest.mark.parametrize("weights_norm, expected", [("stabilise", "dtype"), ("labels:binary", "percentile:0.1,99.9")])
def test_a_norm_that_the_weights_cannot_use_is_refused(weights_norm, expected):
    for norm in ("minmax", "range:0,900", "percentile:2,98", "dtype", "percentile:0.1,99.9"):
        record = Record("a.tif", norm=norm, where="pairs.jsonl:7")
        if norm == expected:
            assert stated_rule(record, weights_norm) == weights_norm
            continue
        with pytest.raises(ManifestError, match=r"pairs.jsonl:7:norm.*Drop the key norm") as caught:
            stated_rule(record, weights_norm)
        assert "\n" not in str(caught.value)


def test_weights_remember_the_norm_of_their_pairs(tmp_path):
    save_toy(tmp_path / "toy")
    manifest, said = state(write_manifest(tmp_path, [((32, 32), 2, f"cell{i}") for i in range(4)]), norm="range:0,5000"), []
    call = dict(base=str(tmp_path / "toy"), work=tmp_path / "work", out=tmp_path, config=SHORT, device="cpu", log=said.append, progress=False)
    finetune(manifest, "mine", **call)
    weights = load_weights(str(tmp_path / "mine"))
    assert weights.config["norm"] == "range:0,5000"
    assert torch.equal(measured_unit(read_image(tmp_path / "lr0.tif").array, weights), read_pairs(manifest)[0].condition[0])
    lines = manifest.read_text().replace("range:0,5000", "minmax", 1)
    manifest.write_text(lines)
    finetune(manifest, "mixed", **call)
    assert load_weights(str(tmp_path / "mixed")).config["norm"] == "percentile:0.1,99.9" and any("2 different norms" in line for line in said)
    field = load_dataset(manifest)[1]
    assert read_field(field, weights).counts.shape == (32, 32)
    with pytest.raises(ManifestError, match=r"manifest.jsonl:1:norm.*fluogen restore shows images otherwise.*Drop the key norm"):
        list(read_fields(manifest, load_weights(str(tmp_path / "toy")), log=said.append))


# ---- read once

def mask_files(folder):
    import test_masks
    test_masks.save_prior(folder / "toy")
    return test_masks.write_manifest(folder)


def noisy_pairs(folder):
    import test_denoise
    test_denoise.save_denoiser(folder / "toy")
    return test_denoise.noisy_files(folder)


def sharp_pairs(folder):
    save_toy(folder / "toy")
    return write_manifest(folder, [((32, 32), 2, f"cell{i}") for i in range(5)])


@pytest.mark.parametrize("task, make", [("sr", sharp_pairs), ("denoise", noisy_pairs), ("mask2image", mask_files)])
def test_a_manifest_is_parsed_once_and_a_file_decoded_once(tmp_path, monkeypatch, task, make):
    from fluogen.datasets import registry
    from fluogen.io import image
    manifest, parsed = make(tmp_path), []
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[4]["split"] = "test"
    lines.append(lines[0] | {"text": "Microtubules of HeLa"})                        # one pair named twice
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    decoded, finish, parse = Counter(), image._finish, registry.read_manifest
    monkeypatch.setattr(image, "_finish", lambda path, *rest: decoded.update([Path(path).name]) or finish(path, *rest))
    monkeypatch.setattr(registry, "read_manifest", lambda path, *rest, **more: parsed.append(path) or parse(path, *rest, **more))
    with files_opened() as opened:
        finetune(manifest, "mine", task=task, base=str(tmp_path / "toy"), work=tmp_path / "work", out=tmp_path, device="cpu",
                 config=SHORT, log=lambda line: None, progress=False)
    kept = {Path(name).name for line in lines[:4] for name in (line["image"], line["conditioning_image"])}
    assert decoded == Counter(kept | {Path(lines[4]["conditioning_image"]).name})    # of the split test the input alone, to know its copies
    assert sum(name.endswith(".tif") for name in opened) == len(decoded)
    assert len(parsed) == 1 == sum(name == str(manifest) for name in opened)
