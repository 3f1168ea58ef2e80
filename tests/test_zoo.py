"Weights by name: what loads, and everything that must not."
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import CARD, make_weights, save_toy
from tree import ROOT

from fluogen.core import FluogenError
from fluogen.io import files
from fluogen.models import zoo
from fluogen.models.packing import PackingError
from fluogen.models.cards import CardError
from fluogen.models.zoo import ZooError, describe, find_weights, list_weights, load_weights, register_builder, save_weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache of the test's own, and no shipped weights."
    monkeypatch.setenv("FLUOGEN_CACHE", str(tmp_path))
    monkeypatch.setenv("FLUOGEN_WEIGHTS", str(tmp_path / "experiments"))
    monkeypatch.setattr(zoo, "files", lambda name: tmp_path / "package")
    return tmp_path / "models"


def change_config(folder, bind=False, **changes):
    "Edit config.json; with bind, make all hashes agree again, as somebody who knows them would."
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    if bind:
        states = load_file(folder / "weights.safetensors")
        save_file(states, folder / "weights.safetensors", {"config_sha256": zoo._config_hash(config)})
        config["sha256"] = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    path.write_text(json.dumps(config))


def change_states(folder, change):
    states = load_file(folder / "weights.safetensors")
    change(states)
    save_file(states, folder / "weights.safetensors")
    change_config(folder, bind=True)


# ---- what loads

@pytest.mark.parametrize("kind", ["direct", "control"])
def test_round_trip(cache, kind):
    save_toy(cache / "toy", kind, method="fp32")
    loaded, made = load_weights("toy"), make_weights(kind)
    assert loaded.modules.keys() == made.modules.keys()
    for name, module in made.modules.items():
        found = getattr(loaded, name)
        assert not found.training and not any(p.requires_grad for p in found.parameters())
        assert all(torch.equal(v, found.state_dict()[k]) for k, v in module.state_dict().items())
    assert loaded.direct == made.direct and loaded.schedule.config == made.schedule.config
    numbers = (cache / "toy" / "weights.safetensors").read_bytes()
    assert loaded.id == f"toy@{hashlib.sha256(numbers).hexdigest()[:12]}"
    with pytest.raises(AttributeError, match="have no intervals"):
        loaded.intervals


def test_differences_come_back_onto_their_base(cache):
    save_toy(cache / "base", "direct", seed=0)
    small = save_toy(cache / "tuned", "direct", seed=1, base="base", method="int8")
    loaded, made = load_weights("tuned"), make_weights("direct", seed=1)
    for key, value in made.backbone.state_dict().items():
        assert torch.allclose(loaded.backbone.state_dict()[key], value,
                              atol=0.03 * float(value.abs().max()) + 1e-6)
    assert json.loads((small / "config.json").read_text())["base"]["name"] == "base"


def test_the_base_may_lie_beside_its_weights(cache, tmp_path):
    "Trained into a folder of one's own, also when another base of that name is installed."
    save_toy(tmp_path / "own" / "base", "direct", seed=0)
    save_toy(tmp_path / "own" / "tuned", "direct", seed=1, base=str(tmp_path / "own" / "base"))
    first = load_weights(str(tmp_path / "own" / "tuned")).backbone.state_dict()
    save_toy(cache / "base", "direct", seed=7)
    again = load_weights(str(tmp_path / "own" / "tuned")).backbone.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    shutil.rmtree(tmp_path / "own" / "base")
    with pytest.raises(ZooError, match="another version"):
        load_weights(str(tmp_path / "own" / "tuned"))


def test_names(cache, tmp_path):
    save_toy(cache / "b")
    save_toy(cache / "a")
    save_toy(tmp_path / "package" / "weights" / "a", seed=3)
    assert set(list_weights()) == {"a", "b"}
    assert find_weights("a") == tmp_path / "package" / "weights" / "a"              # the package comes first
    assert find_weights(str(cache / "b")) == cache / "b"
    with pytest.raises(ZooError, match=r"c: no such weights \(expected a, b\)"):
        find_weights("c")
    assert "set FLUOGEN_WEIGHTS" in str(zoo.experiments_hint())
    for name in "abe":
        save_toy(tmp_path / "experiments" / name, seed=4)
    assert find_weights("e") == tmp_path / "experiments" / "e" and find_weights("a").parent == tmp_path / "package" / "weights"
    assert find_weights("b").parent == tmp_path / "experiments" and zoo.experiments_hint() is None       # shipped before one's own
    shutil.copytree(cache / "b", tmp_path / "moved")  # a copied folder still loads
    assert load_weights(str(tmp_path / "moved")).name == "b"


def test_the_card_may_be_corrected(cache):
    save_toy(cache / "toy")
    change_config(cache / "toy", card=CARD | {"summary": "better words"})
    assert load_weights("toy").config["card"]["summary"] == "better words"
    assert "better words" in describe(cache / "toy")


def test_every_shipped_set_comes_back_as_networks():
    for name in list_weights():
        weights = load_weights(name)
        assert weights.modules and all(isinstance(module, torch.nn.Module) for module in weights.modules.values()), name
        assert not any(p.requires_grad for module in weights.modules.values() for p in module.parameters())


def test_experiment_weights_are_found_from_where_the_package_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("FLUOGEN_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert find_weights("bench30-care") == ROOT / "figures" / "weights" / "bench30-care" and zoo.find_record("bench30") is not None
    assert find_weights("nano-sr") == ROOT / "fluogen" / "weights" / "nano-sr" and zoo.weight_folders()[2] == ROOT / "figures" / "weights"


def build_toy(entry, config):
    return torch.nn.Linear(entry["n"], config["scale"])


def test_a_system_adds_a_network_by_name(cache, monkeypatch):
    monkeypatch.setattr(zoo, "BUILDERS", dict(zoo.BUILDERS))
    net = build_toy({"n": 3}, {"scale": 2})
    for folder, entry in (("a", {"n": 3}), ("b", {"n": 3, "builder": "linear"})):
        module = "linear" if folder == "a" else "generator"
        save_weights(cache / folder, {module: net.state_dict()}, {"task": "none", "scale": 2, "modules": {module: entry}}, CARD, "fp32")
    with pytest.raises(ZooError, match="a/linear: no builder of that name is registered .found linear"):
        load_weights("a")
    register_builder("linear", f"{__name__}:build_toy")
    assert torch.equal(load_weights("a").linear.weight, net.weight) and torch.equal(load_weights("b").generator.weight, net.weight)
    with pytest.raises(ZooError, match="this name has another builder"):
        register_builder("linear", "fluogen.models.unet:build_backbone")
    with pytest.raises(ZooError, match="not the name of a builder"):
        register_builder("other", "no colon")


@pytest.mark.parametrize("builder", ["os:system", "canary:build_it", "fluogen.io.files:write_json", "fluogen.core:resolve", "fluogen",
                                     "fluogen.models.unet:Backbone", "fluogen.x:build_y.z", "fluogenx.y:build_z"])
def test_a_config_of_a_stranger_imports_nothing(cache, tmp_path, monkeypatch, builder):
    (tmp_path / "canary.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    save_weights(cache / "evil", {"net": {"weight": torch.zeros(2)}}, {"task": "none", "modules": {"net": {"builder": builder}}}, CARD, "fp32")
    with pytest.raises(ZooError, match="no builder of that name") as caught:
        load_weights("evil")
    assert "\n" not in str(caught.value)


def test_restoring_imports_only_the_networks_that_its_weights_have():
    code = ("import sys; from fluogen.models.zoo import load_weights; load_weights('nano-sr-direct'); "
            "print(*(name for name in sys.modules if name.startswith('fluogen.')))")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fluogen.models.unet" in loaded and not {f"fluogen.models.{name}" for name in (
        "controlnet", "quantile_heads", "convert", "baselines", "classical", "image_encoder")} & set(loaded)


# ---- what does not

@pytest.mark.parametrize("key", ["schedule", "norm", "scale", "task", "adaptation", "modules", "direct",
                                 "format", "base", "new"])
def test_a_changed_config_is_refused(cache, key):
    save_toy(cache / "toy")
    change_config(cache / "toy", **{key: {"n_steps": 500}})
    with pytest.raises(ZooError, match="changed after training"):
        load_weights("toy")


def test_every_flipped_bit_and_every_cut_is_refused(cache):
    folder = save_toy(cache / "toy")
    path, whole = folder / "weights.safetensors", (folder / "weights.safetensors").read_bytes()
    for place in torch.randint(0, len(whole), (40,), generator=torch.Generator().manual_seed(0)).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:])
        with pytest.raises(ZooError, match="hash differs"):
            load_weights("toy")
        path.write_bytes(whole[:place])
        with pytest.raises(ZooError, match="hash differs"):
            load_weights("toy")
    path.unlink()
    with pytest.raises(ZooError, match="weights.safetensors is missing"):
        load_weights("toy")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"sha256": "0"}', b"\xff\xfe"])
def test_a_damaged_config_is_refused(cache, text):
    folder = save_toy(cache / "toy")
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ZooError, match="missing or damaged"):
        load_weights("toy")


def test_a_base_that_changed_or_went_away(cache):
    save_toy(cache / "base", seed=0)
    save_toy(cache / "tuned", seed=1, base="base")
    save_toy(cache / "base", seed=2)
    with pytest.raises(ZooError, match="tuned: the base is another version"):
        load_weights("tuned")
    shutil.rmtree(cache / "base")
    with pytest.raises(ZooError, match="base: no such weights"):
        load_weights("tuned")


def test_a_damaged_base(cache):
    save_toy(cache / "base", seed=0)
    save_toy(cache / "tuned", seed=1, base="base")
    path = cache / "base" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ZooError, match="hash differs"):
        load_weights("tuned")


def test_weights_that_do_not_fit_name_the_first_key(cache):
    key = "backbone/head.weight"

    def reshape(states):
        states[key] = states[key][:1].clone()

    for change, found in ((lambda s: s.pop(key), "head.weight"), (reshape, "head.weight"),
                          (lambda s: s.update({"backbone/zzz": torch.zeros(2)}), "zzz"),
                          (lambda s: s.pop("prompts/table.weight"), "table.weight")):
        folder = save_toy(cache / "toy", method="fp32")
        change_states(folder, change)
        with pytest.raises(ZooError, match=rf"do not fit the configuration \(found {found}\)"):
            load_weights("toy")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(cache, bad):
    change_states(save_toy(cache / "toy", method="fp32"), lambda s: s["backbone/head.bias"].fill_(bad))
    with pytest.raises(ZooError, match="toy/backbone: weights are not finite"):
        load_weights("toy")
    weights = make_weights()
    weights.backbone.head.bias.data.fill_(bad)
    with pytest.raises(PackingError, match="not finite"):
        save_weights(cache / "new", {"backbone": weights.backbone.state_dict()},
                     weights.config | {"modules": {}}, CARD)
    assert not (cache / "new").exists()


def test_a_process_or_a_shape_that_cannot_be_is_one_of_our_errors(cache):
    for change in ({"schedule": {"objective": "eps"}}, {"direct": {"scale": 3}},
                   {"modules": {"backbone": {"channels": [7]}, "prompts": {"prompts": [], "width": 16}}}):
        change_config(save_toy(cache / "toy"), bind=True, **change)
        with pytest.raises(FluogenError):
            load_weights("toy")


# ---- pickles

class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_ever_opened(cache, tmp_path):
    song, canary = tmp_path / "song", Canary(tmp_path / "song")
    evil = pickle.dumps(canary)
    pickle.loads(evil)                                                  # it would sing
    song.rmdir()
    folder = save_toy(cache / "toy")
    (folder / "weights.safetensors").write_bytes(evil)
    with pytest.raises(ZooError, match="hash differs"):
        load_weights("toy")
    config = json.loads((folder / "config.json").read_text()) | {"sha256": hashlib.sha256(evil).hexdigest()}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match="not a readable safetensors file"):
        load_weights("toy")
    for name in ("weights.pt", "weights.pkl", "pytorch_model.bin", "diffusion_pytorch_model.bin",
                 "config.json"):
        other = tmp_path / "other" / name.replace(".", "-")
        other.mkdir(parents=True)
        (other / name).write_bytes(evil)
        torch.save({"w": canary}, other / "model.pth")
        for wrong in (other, other / name, other / "model.pth"):
            for read in (load_weights, describe):
                with pytest.raises(FluogenError):
                    read(str(wrong))
    assert not song.exists()


# ---- saving

def test_a_card_must_be_whole(cache):
    weights = make_weights()
    for key in CARD:
        card = {k: v for k, v in CARD.items() if k != key}
        with pytest.raises(CardError, match=f"lacks a part .*expected {key}"):
            save_weights(cache / "toy", {}, weights.config | {"modules": {}}, card)
    assert not (cache / "toy").exists()


def test_a_failure_while_saving_leaves_the_old_set(cache, monkeypatch):
    old = save_toy(cache / "toy", seed=0)
    before, real = {p.name: p.read_bytes() for p in old.iterdir()}, files._flush
    for stop in range(4):
        count = []

        def full(path, stop=stop, count=count):
            count.append(path)
            if len(count) > stop:
                raise OSError(28, "No space left on device")
            real(path)

        monkeypatch.setattr(files, "_flush", full)
        with pytest.raises(OSError, match="No space"):
            save_toy(cache / "toy", seed=1)
        assert {p.name: p.read_bytes() for p in old.iterdir()} == before and os.listdir(cache) == ["toy"]
    monkeypatch.setattr(files, "_flush", real)
    assert load_weights("toy").id != load_weights(str(save_toy(cache / "toy", seed=1))).id


def test_the_same_numbers_make_the_same_file(tmp_path):
    "A file's hash is the name by which differences and calibrations find their base."
    weights = [load_weights(str(save_toy(tmp_path / f"{i}" / "toy"))).id for i in range(6)]
    assert len(set(weights)) == 1
