"Masks: told from images, shown to a network, learned from, drawn for; every wrong input in one line."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fluogen.cli.main import main
from fluogen.core import FluogenError
from fluogen.io.image import Image, read_image, write_image
from fluogen.preprocessing.labels import LABEL_NORMS, LabelError, check_labels, find_rims, show_labels
from fluogen.simulation.pairs import simulate_targets
from fluogen.models.zoo import load_weights, save_weights
from fluogen.datasets.pairs import MASK_NORM, PairBatch, gather_tiles, read_mask_pair
from fluogen.metrics.segmentation import measure_following, overlap
from fluogen.training.fit import MASK_CONFIG
from fluogen.training.learners import MaskLearner, build_learner
from fluogen.tasks.finetune import FinetuneError, find_mask_alarm, finetune
from fluogen.tasks.restore import restore_image
from fluogen.tasks.restore import RestoreError, RestoreSettings
from toys import ABOUT, CARD, make_weights

SHORT = replace(MASK_CONFIG, steps=4, batch=2, crop_px=32, validate_every=2, precision="fp32", lr=2e-2, ema_decay=0.5)
ONE = RestoreSettings(samples=1, steps=1)


def save_prior(folder):
    "A prior on disk: shaken weights that only generate."
    weights = make_weights()
    configs = {name: m.config if isinstance(m.config, dict) else m.config.to_dict() for name, m in weights.modules.items()}
    about = {"task": "generate", "adaptation": None, "schedule": ABOUT["schedule"], "direct": None, "norm": None, "modules": configs}
    return save_weights(folder, {name: m.state_dict() for name, m in weights.modules.items()}, about, CARD)


def write_manifest(folder, n=5, size=32):
    "Simulated nuclei and their masks as files; gives the manifest's path."
    made, lines = simulate_targets(["Nuclei of PC-3"], n, size_px=size, seed=2, instances=True), []
    for i in range(n):
        write_image(folder / f"image{i}.tif", (900 * made.target[i, 0].numpy() + 100).astype(np.uint16), pixel_um={"Y": 0.65, "X": 0.65})
        labels = made.instances[i].numpy().astype(np.uint16)
        labels[2:6, 2:6] = labels.max() + 1                                     # never without an object
        write_image(folder / f"mask{i}.tif", labels, pixel_um={"Y": 0.65, "X": 0.65})
        lines.append({"image": f"image{i}.tif", "conditioning_image": f"mask{i}.tif", "text": "ER of COS-7", "group": f"cell{i}"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def drawer(tmp_path_factory):
    "Manifest, result and folder of a toy that was taught to draw."
    folder, said = tmp_path_factory.mktemp("masks"), []
    prior, manifest = save_prior(folder / "prior"), write_manifest(folder)
    made = finetune(manifest, "drawer", task="mask2image", base=str(prior), work=folder / "work", out=folder, config=SHORT, device="cpu", log=said.append,
                       progress=False)
    assert any("held out" in line for line in said)
    return folder, made


def squares():
    labels = np.zeros((32, 40), np.uint8)
    labels[4:20, 4:20], labels[4:20, 20:36] = 1, 2
    return labels


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int32, np.uint32, np.float32, np.float64])
def test_masks_of_every_number_type_are_masks(dtype):
    labels = squares().astype(dtype)
    check_labels(labels)
    assert show_labels(labels, "labels:edges").dtype == np.float32


def test_big_numbers_and_many_small_objects_are_a_mask():
    labels = np.zeros((90, 90), np.uint32)
    for k in range(225):
        labels[6 * (k // 15):6 * (k // 15) + 3, 6 * (k % 15):6 * (k % 15) + 3] = 3_000_000_000 + k
    check_labels(labels)


@pytest.mark.parametrize("wrong, match", [
    (np.random.default_rng(0).integers(0, 255, (32, 32)), "a grey image"),
    ((60 * simulate_targets(["Nuclei of PC-3"], 1, size_px=64, seed=2).target[0, 0].numpy()).astype(np.uint8), "a grey image"),
    (np.random.default_rng(0).random((32, 32)), "not a label map"),
    (np.full((32, 32), np.nan), "not a label map"), (squares().astype(int) - 1, "not a label map"),
    (np.zeros((32, 32), int), "no objects"), (np.stack([squares()] * 3, -1), "not a plane of labels"),
    (np.full((8, 8), 1j), "not a plane of labels")])
def test_what_is_no_mask_is_refused_in_one_line(wrong, match):
    with pytest.raises(LabelError, match=match) as caught:
        check_labels(wrong, "m.tif")
    assert "m.tif" in str(caught.value) and "\n" not in str(caught.value)


def test_rims_against_brute_force():
    labels = np.random.default_rng(1).integers(0, 3, (12, 14))
    expected = np.zeros(labels.shape, bool)
    for y, x in np.argwhere(labels):
        near = [labels[v, u] for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)) if 0 <= v < 12 and 0 <= u < 14]
        expected[y, x] = any(n != labels[y, x] for n in near)
    np.testing.assert_array_equal(find_rims(labels), expected)


@pytest.mark.parametrize("norm", LABEL_NORMS)
def test_numbers_mean_nothing_and_the_picture_turns_with_the_mask(norm):
    labels = squares()
    shown = show_labels(labels, norm)
    assert shown.shape == (LABEL_NORMS[norm], 32, 40) and shown.min() == 0 and shown.max() == 1
    np.testing.assert_array_equal(shown, show_labels(np.array([0, 9, 4])[labels], norm))
    np.testing.assert_array_equal(shown[:, ::-1], show_labels(labels[::-1], norm))
    assert not shown[:, labels == 0].any() and shown.max(0)[labels > 0].all()       # every pixel of an object is told from background


def test_overlap_is_intersection_over_union():
    inside = np.zeros((8, 8), bool)
    inside[2:6, 2:6] = True
    assert overlap(inside * 5.0, inside) == 1 and overlap(np.roll(inside, 2, 0) * 5.0, inside) == pytest.approx(8 / 24)
    assert overlap(~inside * 1.0, inside) == 0
    empty = torch.zeros(1, 2, 8, 8)
    assert np.isnan(measure_following(torch.rand(1, 1, 8, 8), empty))


def test_a_new_branch_judges_as_the_prior_does_and_the_loop_minimises_it():
    weights = make_weights()
    weights.config["task"] = "generate"
    labels = torch.from_numpy(show_labels(squares()[:, :32], "labels:edges"))[None].repeat(3, 1, 1, 1)
    pairs = PairBatch(torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)), labels, ["", "ER of COS-7", ""], ["a", "b", "c"])
    learner = MaskLearner(weights, "labels:edges")
    bare = PairBatch(pairs.target, torch.zeros_like(labels), pairs.prompts, pairs.groups)
    assert learner.validation_loss(learner.modules, pairs) == learner.validation_loss(learner.modules, bare)
    torch.nn.init.normal_(learner.modules["control"].condition.last.weight)
    torch.nn.init.normal_(learner.modules["control"].zero[0].weight)
    assert learner.validation_loss(learner.modules, pairs) != learner.validation_loss(learner.modules, bare)


def test_a_model_is_taught_kept_and_draws(drawer, tmp_path):
    folder, made = drawer
    assert (made.n_train, made.n_held, made.steps) == (4, 1, 4) and made.after < made.before and 0 <= made.follows <= 1
    assert np.isnan(made.chance) and "another mask" not in str(made) and "NaN" not in (made.folder / "config.json").read_text()
    weights = load_weights(str(made.folder))
    assert (weights.config["task"], weights.config["norm"], weights.config["scale"]) == ("mask2image", MASK_NORM, 1)
    assert weights.config["base"]["name"] == "prior" and "overlap" in (made.folder / "card.md").read_text()
    held = [PairBatch(torch.rand(1, 1, 32, 32), torch.from_numpy(show_labels(squares()[:, :32], MASK_NORM))[None], [""])]
    kept = MaskLearner(weights)                                                   # its own branch, not a new one
    assert kept.validation_loss(kept.modules, held[0]) != kept.validation_loss(kept.modules, PairBatch(held[0].target, 0 * held[0].condition, [""]))
    out = tmp_path / "drawn.tif"
    assert main(["restore", str(folder / "mask0.tif"), str(out), "--model", str(made.folder), "--samples", "1", "--passes", "2"]) == 0
    drawn = read_image(out)
    said = drawn.metadata["fluogen"]
    assert said["synthetic"] is True and said["computed"] is True and said["task"] == "mask2image" and said["weights"].startswith("drawer@")
    assert drawn.array.shape == (32, 32) and drawn.pixel_um["X"] == 0.65 and 0 <= drawn.array.min() < drawn.array.max() <= 1


def test_integers_fill_their_range_and_other_seeds_draw_other_pictures(drawer, tmp_path):
    folder, made = drawer
    run = ["restore", str(folder / "mask0.tif"), "{}", "--model", str(made.folder), "--samples", "1", "--passes", "2", "--dtype", "uint16"]
    seen = []
    for name, extra in (("a", []), ("b", ["--seed", "1"]), ("c", [])):
        assert main([w.format(tmp_path / f"{name}.tif") for w in run] + extra) == 0
        seen.append(read_image(tmp_path / f"{name}.tif").array)
    assert seen[0].dtype == np.uint16 and seen[0].max() > 1000
    assert np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize("make, settings, match", [
    (lambda labels: Image(np.random.default_rng(0).integers(1, 999, (32, 32)), "YX"), ONE, "a grey image"),
    (lambda labels: Image(np.random.default_rng(0).random((32, 32)), "YX"), ONE, "not a label map"),
    (lambda labels: Image(np.zeros((32, 32), int), "YX"), ONE, "constant"),
    (lambda labels: Image(np.stack([labels] * 3, -1), "YXS"), ONE, "a colour image"),
    (lambda labels: Image(labels, "YX"), RestoreSettings(samples=4), "one image for a mask"),
    (lambda labels: Image(labels, "YX"), RestoreSettings(), "one image for a mask")])
def test_wrong_masks_and_settings_are_refused(drawer, make, settings, match):
    with pytest.raises(RestoreError, match=match) as caught:
        restore_image(make(squares()), load_weights(str(drawer[1].folder)), settings)
    assert "\n" not in str(caught.value)


def test_a_film_of_masks_is_drawn_plane_by_plane(drawer):
    weights, film = load_weights(str(drawer[1].folder)), np.stack([squares(), squares()[::-1]])
    alone = restore_image(Image(film[1], "YX"), weights, ONE).array
    np.testing.assert_array_equal(restore_image(Image(film, "TYX"), weights, ONE).array[1], alone)


@pytest.mark.parametrize("spoil, match", [
    (lambda f: write_image(f / "mask0.tif", np.random.default_rng(0).integers(0, 999, (32, 32)).astype(np.uint16)), "a grey image"),
    (lambda f: write_image(f / "mask0.tif", np.zeros((32, 32), np.uint16)), "no objects"),
    (lambda f: write_image(f / "mask0.tif", squares()), "differ in size"),
    (lambda f: write_image(f / "image0.tif", np.full((32, 32), 7, np.uint16)), "constant")])
def test_pairs_that_cannot_be_used_are_left_out_by_name(tmp_path, spoil, match):
    manifest = write_manifest(tmp_path, 3)
    spoil(tmp_path)
    pairs, notes = gather_tiles(manifest, read_mask_pair)
    assert set(pairs.groups) == {"cell1", "cell2"} and len(notes) == 1 and match in notes[0] and "0.tif" in notes[0] and "\n" not in notes[0]


def test_two_stains_may_share_a_mask_but_not_their_prompt(tmp_path):
    manifest = write_manifest(tmp_path, 2)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    more = [lines[0] | {"image": "image1.tif", "text": "Microtubules of HeLa"}, lines[0] | {"conditioning_image": "copy.tif"}]
    (tmp_path / "copy.tif").write_bytes((tmp_path / "mask0.tif").read_bytes())
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines + more))
    pairs, notes = gather_tiles(manifest, read_mask_pair)
    assert len(pairs) == 3 and len(notes) == 1 and "repeats" in notes[0]


def test_what_cannot_be_taught_is_one_line(tmp_path, capsys):
    manifest = write_manifest(tmp_path, 2)
    with pytest.raises(FinetuneError, match="another task"):
        finetune(manifest, "x", task="mask2image", base="nano-sr-direct")
    with pytest.raises(FluogenError, match="not a name"):
        finetune(manifest, "a/b", task="mask2image")
    lines = [json.loads(line) | {"group": "one"} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["finetune", str(manifest), "--name", "x", "--task", "mask2image", "--work", str(tmp_path)]) == 2
    assert "one group only" in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["finetune", str(manifest), "--name", "x", "--task", "mask2image", "--free", "norms"]) == 2
    assert "a new branch" in capsys.readouterr().err
    assert main(["restore", str(tmp_path / "mask0.tif"), str(tmp_path / "o.tif"), "--task", "mask2image", "--samples", "1"]) == 2
    assert "fluogen finetune" in capsys.readouterr().err


def test_alarms():
    assert "taught nothing" in find_mask_alarm(0.1, 0.1, 0.9, 0.9)
    assert "do not follow" in find_mask_alarm(0.1, 0.05, 0.3, 0.8)
    assert find_mask_alarm(0.1, 0.05, 0.6, 0.8) == ""


def test_two_runs_begin_with_the_same_branch_whatever_was_drawn_before():
    weights, branches = make_weights(), []
    weights.config["task"] = "generate"
    for before, seed in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        branches.append(build_learner(weights, "mask2image", seed=seed).modules["control"].state_dict())
        assert torch.equal(torch.get_rng_state(), state)                            # nobody else's numbers change
    same = [all(torch.equal(branches[0][key], other[key]) for key in other) for other in branches[1:]]
    assert same == [True, False]
