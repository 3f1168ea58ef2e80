"Checkpoints: whole or refused."
import json
import random
import resource

import pytest
import torch

from fluogen.training.checkpoint import (
    CheckpointError, hash_tensors, list_checkpoints, load_checkpoint, load_tensors, save_checkpoint, save_tensors,
    sweep_checkpoints)


def make_tensors(step, size=50):
    generator = torch.Generator().manual_seed(step)
    return {"weight/a": torch.randn(size, 4, generator=generator), "count": torch.tensor(step),
            "half": torch.randn(3, generator=generator).bfloat16(), "empty": torch.zeros(0)}


def save_two(folder, **more):
    for step in (10, 20):
        save_checkpoint(folder, step, make_tensors(step, **more), {"loss": 1 / step})


def is_generation(found, step):
    return found[1]["step"] == step and hash_tensors(found[0]) == hash_tensors(make_tensors(step))


def test_round_trip_keeps_two_generations(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (5, 10, 20):
        save_checkpoint(tmp_path, step, make_tensors(step), {"loss": 1 / step})
    assert list_checkpoints(tmp_path) == [10, 20] and is_generation(load_checkpoint(tmp_path), 20)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]


def test_layout_and_device_do_not_count_bits_do():
    x = torch.randn(2, 3, 4, 5)
    assert hash_tensors({"x": x}) == hash_tensors({"x": x.to(memory_format=torch.channels_last)})
    assert hash_tensors({"x": x}) != hash_tensors({"x": x.reshape(6, 4, 5)})
    assert hash_tensors({"x": torch.zeros(1)}) != hash_tensors({"x": -torch.zeros(1)})
    assert hash_tensors({"x": x}) != hash_tensors({"y": x}) != hash_tensors({"y": x}, "note")


def damage(path, kind, rng):
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)):]
    elif kind == "grow":
        data += b"\0"
    path.unlink() if kind == "lose" else path.write_bytes(data)


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_is_refused_and_the_generation_before_taken_only_when_asked(tmp_path, seed, capsys):
    rng = random.Random(seed)
    save_two(tmp_path)
    path = tmp_path / f"step-00000020.{rng.choice(['json', 'safetensors'])}"
    kind = rng.choice(["flip", "cut", "grow"] + ["lose"] * (path.suffix == ".safetensors"))
    damage(path, kind, rng)
    try:
        found = load_checkpoint(tmp_path)
    except CheckpointError as error:
        assert "step 10, is there" in str(error) and "\n" not in str(error)
        assert is_generation(load_checkpoint(tmp_path, fallback=True), 10)
        assert "step 10" in capsys.readouterr().err
    else:       # a cut of the last line break, or a blank that is another blank: nothing that counts has changed
        assert path.suffix == ".json" and is_generation(found, 20) and found[1]["loss"] == 1 / 20


def test_generations_cannot_be_mixed(tmp_path):
    save_two(tmp_path)
    (tmp_path / "step-00000020.safetensors").write_bytes((tmp_path / "step-00000010.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="altered"):
        load_checkpoint(tmp_path)
    (tmp_path / "step-00000020.json").write_text((tmp_path / "step-00000010.json").read_text())
    with pytest.raises(CheckpointError, match="altered"):       # step 10 under the name of step 20
        load_checkpoint(tmp_path)


def test_after_a_fallback_the_damaged_one_does_not_come_back(tmp_path):
    save_two(tmp_path)
    (tmp_path / "step-00000020.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 15, make_tensors(15), {})
    assert list_checkpoints(tmp_path) == [10, 15] and is_generation(load_checkpoint(tmp_path), 15)


def test_the_only_one_damaged(tmp_path):
    save_checkpoint(tmp_path, 1, make_tensors(1), {})
    (tmp_path / "step-00000001.json").write_text("{")
    for fallback in (False, True):
        with pytest.raises(CheckpointError, match="not readable"):
            load_checkpoint(tmp_path, fallback)


def test_full_disk_leaves_the_last_good_one(tmp_path):
    save_two(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))         # a real failure of write(2)
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            save_checkpoint(tmp_path, 30, make_tensors(30, size=10_000), {})
        with pytest.raises(CheckpointError, match="could not be written"):
            save_tensors(tmp_path / "best.safetensors", make_tensors(30, size=10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert is_generation(load_checkpoint(tmp_path), 20) and len(list(tmp_path.iterdir())) == 4


def test_orphans_are_swept(tmp_path):
    save_two(tmp_path)
    (tmp_path / "step-00000030.safetensors").write_bytes(b"killed before its json")
    (tmp_path / "notes.txt").write_text("mine")
    assert sweep_checkpoints(tmp_path) == ["step-00000030.safetensors"]
    assert (tmp_path / "notes.txt").exists() and is_generation(load_checkpoint(tmp_path), 20)


def test_single_file(tmp_path):
    path = tmp_path / "best.safetensors"
    save_tensors(path, make_tensors(1), {"step": 40, "value": 0.1})
    tensors, notes = load_tensors(path)
    assert notes == {"step": 40, "value": 0.1} and hash_tensors(tensors) == hash_tensors(make_tensors(1))
    with pytest.raises(CheckpointError, match="no such file"):
        load_tensors(tmp_path / "other.safetensors")


@pytest.mark.parametrize("seed", range(60))
def test_single_file_damaged(tmp_path, seed):
    path, rng = tmp_path / "best.safetensors", random.Random(seed)
    save_tensors(path, make_tensors(1), {"step": 40})
    damage(path, rng.choice(["flip", "flip", "cut", "grow"]), rng)
    try:
        tensors, notes = load_tensors(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:                                                       # padding of the header
        assert notes == {"step": 40} and hash_tensors(tensors) == hash_tensors(make_tensors(1))


def test_a_pickle_is_never_opened(tmp_path):
    class Canary:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")
    torch.save({"a": Canary()}, tmp_path / "best.safetensors")
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path / "best.safetensors")
    save_two(tmp_path)
    torch.save({"a": Canary()}, tmp_path / "step-00000020.safetensors")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_facts_are_readable_json(tmp_path):
    save_two(tmp_path)
    assert json.loads((tmp_path / "step-00000020.json").read_text())["facts"]["loss"] == 1 / 20
