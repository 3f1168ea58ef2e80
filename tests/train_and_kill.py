"""Train, be killed with -9 at random moments, go on: run by test_train.py in a process of its own.

It imports once and forks a child for every life, so that twenty kills cost seconds, not minutes."""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fluogen.core import make_generator
from fluogen.training.checkpoint import hash_tensors, load_checkpoint, load_tensors
from fluogen.training.optim import Phase, TrainConfig
from fluogen.training.trainer import make_accelerator, train

CONFIG = TrainConfig(steps=24, lr=1e-2, warmup=5, ema_decay=0.9, accumulate=2, checkpoint_every=2, validate_every=4,
                     log_every=5, device="cpu")


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.GroupNorm(4, 16), torch.nn.SiLU(),
                               torch.nn.Dropout(0.1), torch.nn.Conv2d(16, 1, 3, padding=1), torch.nn.BatchNorm2d(1))


def batches(index):
    return {"x": torch.rand(4, 1, 12, 12, generator=make_generator(0, "batch", index))}


def loss_fn(net, batch, generator):
    noise = torch.randn(batch["x"].shape, generator=generator, device=generator.device)
    return (net(batch["x"] + noise) - batch["x"]).square().mean()


def validate(net, step):
    x = batches(10 ** 6)["x"]
    return (net(x) - x).square().mean().item()


# ---- the same for two optimisers: a GAN on points, the generator with BatchNorm's statistics, the discriminator with dropout

def make_gan():
    torch.manual_seed(0)
    layers = torch.nn
    return {"generator": layers.Sequential(layers.Linear(2, 16), layers.BatchNorm1d(16), layers.SiLU(), layers.Linear(16, 2)),
            "discriminator": layers.Sequential(layers.Linear(2, 16), layers.SiLU(), layers.Dropout(0.1), layers.Linear(16, 1))}


def points(index):
    return {"x": 2 + 0.5 * torch.randn(32, 2, generator=make_generator(0, "points", index))}


def draw(gan, batch, generator):
    return gan["generator"](torch.randn(batch["x"].shape, generator=generator, device=generator.device))


def discriminator_loss(gan, batch, generator):
    real, fake = gan["discriminator"](batch["x"]), gan["discriminator"](draw(gan, batch, generator).detach())
    return torch.nn.functional.softplus(-real).mean() + torch.nn.functional.softplus(fake).mean()


def generator_loss(gan, batch, generator):
    return torch.nn.functional.softplus(-gan["discriminator"](draw(gan, batch, generator))).mean()


PHASES = [Phase("discriminator", discriminator_loss, ["discriminator"], times=2,
                settings={"lr": 3e-2, "betas": (0.5, 0.9), "ema_decay": 0.0, "clip": 0.5}),
          Phase("generator", generator_loss, ["generator"], every=2, settings={"schedule": "cosine"})]


def distance(gan, step):
    with torch.no_grad():
        z = torch.randn(64, 2, generator=make_generator(0, "z"))
        return (gan["generator"](z).mean(0) - 2).norm().item()


KINDS = {"one": (make_net, loss_fn, batches, validate), "two": (make_gan, PHASES, points, distance)}


def train_kind(kind, folder, config=CONFIG, **more):
    "The training of one or of two optimisers in a folder."
    make, loss, feed, judge = KINDS[kind]
    return train(make(), loss, feed, config, folder, validate=judge, progress=False, **more)


def live(folder, kind, seconds=None):
    "One life of the training in a forked child; killed after so many seconds. True when it ended by itself."
    child = os.fork()
    if child == 0:
        try:
            train_kind(kind, folder)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "the training itself failed"
    return not os.WIFSIGNALED(status)


def fingerprint(folder):
    "Everything that must be equal to the bit, without the clocks."
    tensors, facts = load_checkpoint(folder)
    best, notes = load_tensors(Path(folder) / "best.safetensors")
    p = facts["progress"]
    curves = [[{k: v for k, v in point.items() if k != "seconds"} for point in p[key]]
              for key in ("curve", "validations")]
    return [hash_tensors(tensors), hash_tensors(best), notes, p["step"], p["best_step"], p["window"], curves]


def main(home, kind, trials, kills_each):
    make_accelerator(CONFIG)                                    # its imports, before the first fork
    length = float("inf")
    for name in ("whole", "again"):                             # the first one also warms up
        began = time.monotonic()
        live(f"{home}/{name}", kind)
        length = min(length, time.monotonic() - began)
    expected = fingerprint(f"{home}/whole")
    equal = kills = 0
    left = set()
    for trial in range(trials):
        rng, folder = random.Random(trial), f"{home}/{trial}"
        for _ in range(kills_each):
            kills += not live(folder, kind, rng.uniform(0, 0.4 * length / kills_each))     # a life resumes where the last one ended
        live(folder, kind)
        equal += fingerprint(folder) == expected
        left |= {p.name for p in Path(folder).iterdir()}
    print(json.dumps({"equal": equal, "kills": kills, "left": sorted(left)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
