"A laboratory's pairs: read, cut, split by cell, tuned, kept with a card; every wrong input in one line."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fluogen.cli import main
from fluogen.core import FluogenError
from fluogen.data.io import write_image
from fluogen.data.pairs import simulate_pairs
from fluogen.diffusion.zoo import load_weights
from fluogen.tasks import own_pairs
from fluogen.tasks.bench30 import TUNE_CONFIG
from fluogen.tasks.finetune import DirectFitter, Pairs, blend_weights, fit
from fluogen.tasks.own_pairs import OwnPairsError, adapt, cut_pair, find_alarm, read_pairs, split_pairs
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
    with pytest.raises(OwnPairsError, match=match) as caught:
        read_pairs(write_manifest(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_no_group_on_both_sides():
    def pairs(groups):
        return Pairs(torch.zeros(len(groups), 1, 32, 32), torch.zeros(len(groups), 1, 16, 16), [""] * len(groups), groups)
    for seed in range(20):
        training, held = split_pairs(pairs([f"cell{i % 7}" for i in range(50)]), seed)
        assert not set(training.groups) & set(held.groups) and len(training) and len(held)
    training, held = split_pairs(pairs(["a"] * 2 + ["b"] * 200))
    assert 1 <= len(held) <= own_pairs.MAX_VALIDATION
    with pytest.raises(OwnPairsError, match="one group only"):
        split_pairs(pairs(["a"] * 5))


def test_alarms():
    assert "gained nothing" in find_alarm(25.0, 25.0, [25.0])
    assert "Overfitting" in find_alarm(25.0, 26.0, [25, 26, 25.2])
    assert find_alarm(25.0, 26.0, [25, 26, 25.9]) == ""


def test_blended_weights_lie_half_way(tmp_path):
    data = simulate_pairs(["er"], 4, size_px=32, seed=1)
    rows = Pairs(data.target, data.condition, data.prompts)
    ends = {}
    for share in (0.5, 1.0):
        fitter = DirectFitter(make_weights())
        start = {k: v.clone() for k, v in fitter.modules.state_dict().items()}
        fit(fitter, rows.take([0, 1]), rows.take([2, 3]), replace(SHORT, lr=1e-2, blend=share, validate_every=4), tmp_path / str(share))
        ends[share] = {k: v.clone() for k, v in fitter.modules.state_dict().items()}
    moved = [k for k in start if not torch.equal(start[k], ends[1.0][k])]
    for name in moved:
        torch.testing.assert_close(ends[0.5][name], (start[name] + ends[1.0][name]) / 2)
    blend_weights(fitter.modules, start, 0.0)
    assert all(torch.equal(v, start[k]) for k, v in fitter.modules.state_dict().items())


@pytest.mark.parametrize("samples", [False, True])
def test_a_model_is_tuned_kept_and_used(tmp_path, samples):
    save_toy(tmp_path / "toy", "control" if samples else "direct")
    manifest, said = write_manifest(tmp_path, [((32, 32), 2, f"cell{i}") for i in range(5)]), []
    made = adapt(manifest, "mine", base=str(tmp_path / "toy"), samples=samples, work=tmp_path / "work", out=tmp_path, config=SHORT,
                 device="cpu", say=said.append)
    assert any("set aside" in line for line in said) and made.n_held == 1 and made.n_train == 4
    weights = load_weights(str(tmp_path / "mine"))
    assert weights.config["task"] == "sr" and ("control" in weights.modules) == samples
    assert "before" in (tmp_path / "mine" / "card.md").read_text()
    write_image(tmp_path / "in.tif", np.random.default_rng(0).integers(0, 900, (32, 32)).astype(np.uint16))
    extra = ["--samples", "1", "--passes", "1"] if samples else []
    assert main(["restore", str(tmp_path / "in.tif"), str(tmp_path / "out.tif"), "--model", str(tmp_path / "mine"), *extra]) == 0


@pytest.mark.parametrize("name", ["", "..", "a/b", "a:b"])
def test_names_that_are_no_names(tmp_path, name):
    with pytest.raises(FluogenError, match="not a name"):
        adapt(tmp_path, name)


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
