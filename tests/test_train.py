"The training loop: exact resume, honest skipping, early stopping, and what it leaves on disk."
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluogen.training.checkpoint import (
    CheckpointError, OtherTrainingError, hash_tensors, list_checkpoints, load_checkpoint, load_tensors)
from fluogen.training.optim import Phase, TrainConfig, TrainingError
from fluogen.training.trainer import load_state, train

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from train_and_kill import (                                                             # noqa: E402
    CONFIG, PHASES, batches, distance, fingerprint, generator_loss, loss_fn, make_gan, make_net, points, train_kind, validate)

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(make_net(), loss_fn, batches, CONFIG, folder, validate=validate, **QUIET)


class Stop(Exception):
    pass


def stop_at(step):
    "A validation that breaks at a step, as any error would."
    def broken(net, now):
        if now == step:
            raise Stop
        return validate(net, now)
    return broken


# ---- resume

def test_stopped_and_resumed_is_bit_identical(tmp_path, whole):
    for minutes in (0.0, 0.0003, 0.0003):
        part = train(make_net(), loss_fn, batches, replace(CONFIG, minutes=minutes), tmp_path, validate, **QUIET)
        assert part.stopped in ("minutes", "steps")
    end = train(make_net(), loss_fn, batches, CONFIG, tmp_path, validate=validate, **QUIET)
    assert end.stopped == "steps" and fingerprint(tmp_path) == fingerprint(whole.folder)


def test_every_batch_has_draws_of_its_own_and_the_seed_decides_them(tmp_path):
    def draw(seed, name):
        drawn = []

        def loss(net, batch, generator):
            drawn.append((torch.rand(1, generator=generator).item(), torch.rand(1).item()))
            return loss_fn(net, batch, generator)
        train(make_net(), loss, batches, replace(CONFIG, steps=3, seed=seed), tmp_path / name, validate=validate, **QUIET)
        return drawn
    one, again, other = draw(0, "one"), draw(0, "again"), draw(1, "other")
    assert len(one) == 6 and len({x for pair in one for x in pair}) == 12
    assert one == again and not set(one) & set(other)


def test_an_error_in_the_middle_costs_only_the_steps_since_the_checkpoint(tmp_path, whole):
    with pytest.raises(Stop):
        train(make_net(), loss_fn, batches, CONFIG, tmp_path, validate=stop_at(12), **QUIET)
    assert load_checkpoint(tmp_path)[1]["step"] == 12
    train(make_net(), loss_fn, batches, CONFIG, tmp_path, validate=validate, **QUIET)
    assert fingerprint(tmp_path) == fingerprint(whole.folder)


def test_the_callers_random_state_and_flags_are_untouched(tmp_path):
    net, before, handler = make_net(), torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    net[0].requires_grad_(False)
    train(net, loss_fn, batches, replace(CONFIG, steps=2), tmp_path, validate=validate, trainable=["4"], **QUIET)
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [p.requires_grad for p in net.parameters()] == [False, False] + [True] * 6 and not net.training


@pytest.mark.battery
@pytest.mark.parametrize("kind", ["one", "two"])
def test_kill_9_at_random_moments(tmp_path, kind):
    trials, kills_each = (20, 3) if os.environ.get("FLUOGEN_BATTERY") == "full" else (3, 1)
    command = [sys.executable, HERE / "train_and_kill.py", tmp_path, kind, str(trials), str(kills_each)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120 * trials,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["equal"] == trials and result["kills"] >= trials * kills_each * 0.8
    assert result["left"] == ["best.safetensors", "log.jsonl", *(f"step-000000{s}.{e}" for s in (22, 24)
                              for e in ("json", "safetensors")), "training.lock"]       # no orphans


def test_bf16_with_channels_last_resumes_exactly_too(tmp_path):
    config = replace(CONFIG, precision="bf16", channels_last=True, steps=6)
    train(make_net(), loss_fn, batches, config, tmp_path / "a", validate=validate, **QUIET)
    train(make_net(), loss_fn, batches, replace(config, steps=3), tmp_path / "b", validate=validate, **QUIET)
    train(make_net(), loss_fn, batches, config, tmp_path / "b", validate=validate, **QUIET)
    one, two = load_checkpoint(tmp_path / "a")[0], load_checkpoint(tmp_path / "b")[0]
    assert hash_tensors(one) == hash_tensors(two)
    train(make_net(), loss_fn, batches, replace(config, precision="fp32"), tmp_path / "c", validate=validate, **QUIET)
    full = load_checkpoint(tmp_path / "c")[0]
    assert 0 < (one["weight/0.weight"] - full["weight/0.weight"]).abs().max() < 2e-2      # bf16 was really used


# ---- what must agree

@pytest.mark.parametrize("change, named", [({"config": replace(CONFIG, steps=4, lr=0.1)}, "lr differs"),
                                           ({"config": replace(CONFIG, steps=4, seed=1)}, "seed differs"),
                                           ({"facts": {"schedule": "linear"}}, "schedule differs"),
                                           ({"trainable": ["0"]}, "differs")])
def test_a_checkpoint_of_another_training_is_refused(tmp_path, change, named):
    given = {"config": replace(CONFIG, steps=2), "facts": {"schedule": "cosine"}, "validate": validate, **QUIET}
    train(make_net(), loss_fn, batches, folder=tmp_path, **given)
    with pytest.raises(OtherTrainingError, match=named) as error:
        train(make_net(), loss_fn, batches, folder=tmp_path, **(given | change))
    assert f"{error.value.key} differs" in str(error.value)
    train(make_net(), loss_fn, batches, folder=tmp_path, **(given | {"config": replace(CONFIG, steps=3, log_every=1)}))


def test_frozen_modules_stay_and_are_stored_by_hash(tmp_path):
    def two(seed):
        torch.manual_seed(seed)
        return {"body": make_net(), "head": torch.nn.Conv2d(1, 1, 1)}

    def loss(modules, batch, generator):
        return (modules["head"](modules["body"](batch["x"])) - batch["x"]).square().mean()
    modules, config = two(0), replace(CONFIG, steps=4, validate_every=0)
    before = hash_tensors(modules["body"].state_dict())
    train(modules, loss, batches, config, tmp_path, trainable=["head"], **QUIET)
    assert hash_tensors(modules["body"].state_dict()) == before          # BatchNorm's statistics too
    assert not [n for n in load_checkpoint(tmp_path)[0] if n.startswith("optimizer/body")]
    other = two(0)
    with torch.no_grad():
        other["body"][0].weight[0, 0, 0, 0] += 1e-7
    with pytest.raises(CheckpointError, match="frozen differs"):
        train(other, loss, batches, config, tmp_path, trainable=["head"], **QUIET)


def test_a_damaged_newest_checkpoint(tmp_path, whole, capsys):
    train(make_net(), loss_fn, batches, replace(CONFIG, steps=12), tmp_path, validate=validate, **QUIET)
    newest = tmp_path / "step-00000012.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="step 10, is there"):
        train(make_net(), loss_fn, batches, CONFIG, tmp_path, validate=validate, **QUIET)
    train(make_net(), loss_fn, batches, CONFIG, tmp_path, validate=validate, resume="previous", **QUIET)
    assert "Taking the checkpoint before, step 10" in capsys.readouterr().err
    assert fingerprint(tmp_path)[0] == fingerprint(whole.folder)[0]


def test_one_process_a_folder(tmp_path):
    def nested(net, step):
        train(make_net(), loss_fn, batches, CONFIG, tmp_path, validate=validate, **QUIET)
    with pytest.raises(TrainingError, match="another process is training"):
        train(make_net(), loss_fn, batches, CONFIG, tmp_path, validate=nested, **QUIET)


# ---- numbers

def test_accumulation_is_a_larger_batch(tmp_path):
    def large(index):
        return {"x": torch.cat([batches(4 * index + i)["x"] for i in range(4)])}

    def loss(net, batch, generator):                # no noise and no batch statistics: then both are the same sum
        return (net(batch["x"]) - batch["x"]).square().mean()

    def smooth():
        return torch.nn.Sequential(*list(make_net())[:3], torch.nn.Conv2d(16, 1, 3, padding=1))
    config = TrainConfig(steps=10, lr=1e-3, warmup=0, device="cpu")
    torch.manual_seed(1)
    one = smooth()
    two = smooth()
    two.load_state_dict(one.state_dict())
    train(one, loss, batches, replace(config, accumulate=4), tmp_path / "one", **QUIET)
    train(two, loss, large, config, tmp_path / "two", **QUIET)
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def test_gradients_are_clipped_and_reported(tmp_path):
    def steep(net, batch, generator):
        return 1e3 * loss_fn(net, batch, generator)
    seen = []
    train(make_net(), steep, batches, replace(CONFIG, steps=4, log_every=1, accumulate=1), tmp_path, validate=validate,
          callback=seen.append, **QUIET)
    assert all(entry["norm"] > 10 for entry in seen if entry["event"] == "step")


# ---- not finite

def spoil(*bad, key="x", value=math.nan):
    def spoiled(index):
        batch = batches(index)
        if index in bad:
            batch[key][0, 0, 0, 0] = value
        return batch | {"name": f"field-{index}.tif"}
    return spoiled


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_batch_is_skipped_and_counted_and_never_touches_the_weights(tmp_path, value):
    config = replace(CONFIG, steps=12, accumulate=1)
    net = make_net()[:4].append(torch.nn.Conv2d(16, 1, 3, padding=1))   # batch statistics would see the batch: none
    result = train(net, loss_fn, spoil(4, 7, value=value), config, tmp_path, validate=validate, **QUIET)
    assert result.skipped == 2 and result.step == 12
    tensors, facts = load_checkpoint(tmp_path)
    assert all(t.isfinite().all() for t in tensors.values()) and tensors["optimizer/0.weight/step"] == 10
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry["event"] == "skipped"] == [5, 8]


def test_giving_up_names_the_batch_and_keeps_the_checkpoint(tmp_path):
    config = replace(CONFIG, accumulate=1, max_skips=3)
    with pytest.raises(TrainingError, match=r"batches\(6\)\['x'\] is not finite \(field-6.tif\)") as error:
        train(make_net(), loss_fn, spoil(*range(6, 40)), config, tmp_path, validate=validate, **QUIET)
    assert "\n" not in str(error.value) and list_checkpoints(tmp_path)[-1] <= 8
    assert all(t.isfinite().all() for n, t in load_checkpoint(tmp_path)[0].items() if "running" not in n)


def test_a_gradient_that_explodes_on_finite_data(tmp_path):
    def explode(net, batch, generator):
        return (net(batch["x"]).sum() * 0).sqrt()       # the value is 0, its slope infinite
    with pytest.raises(TrainingError, match="are finite: lower lr"):
        train(make_net(), explode, batches, replace(CONFIG, max_skips=2), tmp_path, validate=validate, **QUIET)


# ---- stopping

def test_early_stopping_keeps_the_best_average(tmp_path):
    values = {0: 5.0, 4: 3.0, 8: 2.0, 12: 4.0, 16: 2.5, 20: 1.0}
    seen = {}

    def scripted(net, step):
        seen[step] = hash_tensors(dict(net.state_dict()))
        return values[step]
    net = make_net()
    result = train(net, loss_fn, batches, replace(CONFIG, patience=2), tmp_path, validate=scripted, **QUIET)
    assert (result.stopped, result.step, result.best_step, result.best_value) == ("patience", 16, 8, 2.0)
    assert load_state(net, tmp_path) == {"step": 8, "value": 2.0}
    assert hash_tensors(dict(net.state_dict())) == seen[8]
    assert result.best_within(result.validations[1]["seconds"])["value"] == 3.0
    again = train(make_net(), loss_fn, batches, replace(CONFIG, patience=2), tmp_path, validate=scripted, **QUIET)
    assert again.stopped == "patience" and again.step == 16              # nothing more is trained


def test_a_validation_without_a_number_is_never_the_best(tmp_path):
    result = train(make_net(), loss_fn, batches, replace(CONFIG, steps=8), tmp_path,
                   validate=lambda net, step: math.nan if step < 8 else 1.0, **QUIET)
    assert result.best_step == 8 and [v["value"] for v in result.validations] == [None, None, 1.0]


def test_time_box_makes_at_least_a_step_and_counts_each_call(tmp_path):
    config = replace(CONFIG, steps=10 ** 6, minutes=0.0)
    steps = [train(make_net(), loss_fn, batches, config, tmp_path, validate=validate, **QUIET).step for _ in range(3)]
    assert steps == [1, 2, 3] and list_checkpoints(tmp_path) == [2, 3]


def test_ctrl_c_finishes_the_step_and_tells_how_to_go_on(tmp_path, capsys):
    def interrupt(index):
        if index == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(index)
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt):
        train(make_net(), loss_fn, interrupt, CONFIG, tmp_path, validate=validate, resume_command="fluogen train x",
              **QUIET)
    assert list_checkpoints(tmp_path)[-1] == 11 and "To go on: fluogen train x" in capsys.readouterr().err


# ---- the disk

def test_a_full_disk_does_not_stop_the_training_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(index):
        if index == 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
        if index == 40:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        return batches(index)
    try:
        result = train(make_net(), loss_fn, fill, replace(CONFIG, validate_every=0, steps=30), tmp_path, **QUIET)
        assert result.step == 30 and "could not be written" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match="could not be written"):      # but the end must be on disk
            train(make_net(), loss_fn, lambda index: fill(20), replace(CONFIG, validate_every=0, steps=32), tmp_path,
                  **QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert load_checkpoint(tmp_path)[1]["step"] == 30
    assert not list(tmp_path.glob(".fluogen-*"))


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        train(make_net(), loss_fn, batches, replace(CONFIG, validate_every=0), tmp_path / "file" / "run", **QUIET)


def test_what_is_left_is_safetensors_and_json(whole):
    assert sorted(p.name for p in whole.folder.iterdir()) == [
        "best.safetensors", "log.jsonl", "step-00000022.json", "step-00000022.safetensors", "step-00000024.json",
        "step-00000024.safetensors", "training.lock"]
    assert load_tensors(whole.folder / "best.safetensors")[1]["step"] == whole.best_step
    assert [json.loads(line)["event"] for line in (whole.folder / "log.jsonl").open()][0] == "started"


def test_progress_line_and_tiny_errors(tmp_path, capsys):
    train(make_net(), loss_fn, batches, replace(CONFIG, steps=3, validate_every=0), tmp_path)
    assert "step 3/3" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="validate_every without validate"):
        train(make_net(), loss_fn, batches, CONFIG, tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="CUDA"):
            train(make_net(), loss_fn, batches, replace(CONFIG, precision="fp16"), tmp_path, validate=validate)


# ---- several optimisers

@pytest.fixture(scope="module")
def gan(tmp_path_factory):
    return train_kind("two", tmp_path_factory.mktemp("gan"))


def test_two_optimisers_stopped_and_resumed_are_bit_identical(tmp_path, gan):
    for minutes in (0.0, 0.0003, 0.0):
        train_kind("two", tmp_path, replace(CONFIG, minutes=minutes))
    assert train_kind("two", tmp_path).step == gan.step == 24 and fingerprint(tmp_path) == fingerprint(gan.folder)


def test_every_times_and_losses_by_name(gan):
    tensors, facts = load_checkpoint(gan.folder)
    assert tensors["optimizer/discriminator.0.weight/step"] == 48 and tensors["optimizer/generator.0.weight/step"] == 12
    assert list(facts["phases"]) == ["discriminator", "generator"]
    for point in gan.curve:
        assert point["loss"] == pytest.approx(point["loss/discriminator"] + point["loss/generator"])
        assert point["lr/discriminator"] > 2.9e-2 and "norm" not in point and "lr" not in point
    assert gan.curve[0]["lr/generator"] > gan.curve[-1]["lr/generator"]                 # cosine; the other rate is constant
    assert gan.validations[-1]["value"] < gan.validations[0]["value"]
    shown = tensors["ema/discriminator.0.weight"], tensors["weight/discriminator.0.weight"]
    assert torch.equal(*shown)                                                          # ema_decay 0: no average
    assert not torch.equal(tensors["ema/generator.0.weight"], tensors["weight/generator.0.weight"])
    saved = load_tensors(gan.folder / "best.safetensors")[0]
    assert {"generator.1.running_mean", "generator.0.weight", "discriminator.3.weight"} <= saved.keys()


def test_a_phase_changes_its_own_modules_only_and_needs_no_gradient_of_others(tmp_path):
    seen = []

    def watch(gan, batch, generator):
        seen.append({name: p.requires_grad for key in gan for name, p in gan[key].named_parameters(prefix=key)})
        return generator_loss(gan, batch, generator)
    frozen = Phase("discriminator", lambda gan, batch, generator: 0 * gan["discriminator"](batch["x"]).sum(),
                   ["discriminator"], settings={"lr": 0.0})
    gan = make_gan()
    before = [hash_tensors(dict(gan[key].named_parameters())) for key in gan]
    train(gan, [frozen, Phase("generator", watch, ["generator"])], points, replace(CONFIG, steps=3, validate_every=0), tmp_path,
          **QUIET)
    after = [hash_tensors(dict(gan[key].named_parameters())) for key in gan]
    assert after[1] == before[1] and after[0] != before[0]
    assert all(required == name.startswith("generator") for moment in seen for name, required in moment.items())
    assert all(p.requires_grad for key in gan for p in gan[key].parameters())           # given back as they came


def test_one_phase_is_the_training_of_a_loss_function(tmp_path, whole):
    net = train(make_net(), [Phase("main", loss_fn)], batches, CONFIG, tmp_path, validate=validate, **QUIET)
    assert fingerprint(net.folder) == fingerprint(whole.folder) and "phases" not in load_checkpoint(net.folder)[1]


@pytest.mark.parametrize("change, key", [({"times": 3}, "times"), ({"every": 2}, "every"), ({"name": "critic"}, "critic"),
                                         ({"settings": {"lr": 1e-3}}, "betas"), (None, "order")])
def test_another_plan_of_phases_is_another_training(tmp_path, change, key):
    first, second = replace(PHASES[0], times=2), replace(PHASES[1], every=1)
    config = replace(CONFIG, steps=2)
    train(make_gan(), [first, second], points, config, tmp_path, validate=distance, **QUIET)
    plan = [replace(first, **change), second] if change else [second, first]
    with pytest.raises(OtherTrainingError) as error:
        train(make_gan(), plan, points, config, tmp_path, validate=distance, **QUIET)
    assert error.value.key == key
    with pytest.raises(OtherTrainingError):             # two optimisers are not resumed as one
        train(make_gan(), generator_loss, points, config, tmp_path, validate=distance, **QUIET)


def test_a_bad_update_of_one_phase_leaves_the_other_alone(tmp_path):
    def sometimes(gan, batch, generator):
        return generator_loss(gan, batch, generator) * (math.nan if batch["index"] == 2 else 1.0)
    plan = [replace(PHASES[0], times=1), Phase("generator", sometimes, ["generator"])]
    config = replace(CONFIG, accumulate=1, steps=5, validate_every=0)
    result = train(make_gan(), plan, lambda index: points(index) | {"index": index}, config, tmp_path / "once", **QUIET)
    tensors = load_checkpoint(tmp_path / "once")[0]
    assert result.skipped == 1 and tensors["optimizer/generator.0.weight/step"] == 4
    assert tensors["optimizer/discriminator.0.weight/step"] == 5
    log = [json.loads(line) for line in (tmp_path / "once" / "log.jsonl").open()]
    assert [entry["phase"] for entry in log if entry["event"] == "skipped"] == ["generator"]
    plan[1] = Phase("generator", lambda *given: generator_loss(*given) * math.nan, ["generator"])
    with pytest.raises(TrainingError, match="of phase generator at step 3"):
        train(make_gan(), plan, points, replace(config, max_skips=3), tmp_path / "ever", **QUIET)


@pytest.mark.parametrize("plan, message", [
    ([PHASES[0], PHASES[0]], "two phases of one name"), ([], "not a training objective"), ([PHASES[1]], "no phase runs in every step"),
    ([PHASES[0], Phase("generator", generator_loss)], "discriminator.0.weight: a parameter in two optimisers"),
    ([PHASES[0], Phase("generator", generator_loss, ["brush"])], "phase 'generator': nothing to train")])
def test_a_plan_that_cannot_be_meant_is_refused_and_flags_are_left(tmp_path, plan, message):
    gan = make_gan()
    with pytest.raises(TrainingError, match=message) as error:
        train(gan, plan, points, CONFIG, tmp_path, validate=distance, **QUIET)
    assert "\n" not in str(error.value) and all(p.requires_grad for key in gan for p in gan[key].parameters())


def test_bf16_with_two_optimisers_resumes_exactly_too(tmp_path):
    config = replace(CONFIG, precision="bf16", steps=4, schedule="constant")
    plan = [replace(PHASES[0], settings={}), replace(PHASES[1], every=1, settings={})]
    for steps in (4, 2, 4):
        train(make_gan(), plan, points, replace(config, steps=steps), tmp_path / ("a" if not (tmp_path / "a").exists() else "b"),
              validate=distance, **QUIET)
    one, two = (load_checkpoint(tmp_path / name)[0] for name in "ab")
    assert hash_tensors(one) == hash_tensors(two)


# ---- several processes

@pytest.mark.battery
@pytest.mark.parametrize("kind", ["one", "two"])
def test_two_processes_are_one_that_accumulates(tmp_path, kind):
    if os.environ.get("FLUOGEN_BATTERY") != "full":
        pytest.skip("starts two processes: make battery")
    script = ("import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from dataclasses import replace\n"
              "from train_and_kill import *\n"
              "config, given = replace(CONFIG, steps=10, accumulate=int(sys.argv[3])), {'progress': False}\n"
              "if sys.argv[4] == 'one':\n"
              "    net = make_net()[:3].append(torch.nn.Conv2d(16, 1, 3, padding=1))\n"
              "    train(net, loss_fn, batches, config, sys.argv[2], validate=validate, **given)\n"
              "else:\n"
              "    gan = make_gan()\n"
              "    gan['generator'][1], gan['discriminator'][2] = torch.nn.Identity(), torch.nn.Identity()\n"
              "    train(gan, PHASES, points, config, sys.argv[2], validate=distance, **given)\n")
    (tmp_path / "go.py").write_text(script)
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    alone = [sys.executable, tmp_path / "go.py", HERE, tmp_path / "alone", "2", kind]
    pair = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
            tmp_path / "go.py", HERE, tmp_path / "pair", "1", kind]
    for command in (alone, pair):
        done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_checkpoint(tmp_path / name) for name in ("alone", "pair"))
    assert one[1]["progress"]["step"] == two[1]["progress"]["step"] == 10
    for name, tensor in one[0].items():
        assert torch.allclose(tensor.float(), two[0][name].float(), atol=1e-4), name
