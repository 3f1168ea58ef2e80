"Fine-tuning: batches as a pure function, pairs that stay pairs, what is frozen, and when it stops."
import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import PROMPTS, make_weights

from fluogen.models.controlnet import ControlConfig
from fluogen.training.trainer import load_state as load_trained
from fluogen.datasets.pairs import PairBatch, UnusablePairError, cut_pair
from fluogen.training.augment import draw_crops
from fluogen.training.fit import FitConfig, fit
from fluogen.training.learners import ControlLearner, DirectLearner, Learner, NetworkLearner, validation_psnr
from fluogen.models.text_encoder import drop_prompts
from fluogen.simulation.stream import SceneStream, draw_rows
from fluogen.training.augment import dihedral

QUICK = FitConfig(steps=6, batch=2, crop_px=16, validate_every=2, warmup=1, precision="fp32", lr=1e-3)


def make_pairs(n=6, size=24, seed=0, channels=1, first=0):
    "The 2 x 2 mean of every fine picture is its measurement; pixel values name the pair and the place."
    fine = torch.rand(n, 1, size, size + 8, generator=torch.Generator().manual_seed(seed))
    coarse = F.avg_pool2d(fine, 2).repeat(1, channels, 1, 1)
    return PairBatch(fine, coarse, [PROMPTS[i % 3] for i in range(n)], [f"cell {first + i}" for i in range(n)])


def control_fitter(**options):
    weights = make_weights("direct")
    config = ControlConfig.from_backbone(weights.backbone.config, widths=(8,))
    return ControlLearner(weights, config=config, passes=2, **options)


def plain_fitter():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(1, 1, 3, padding=1))
    return NetworkLearner("plain", network, F.mse_loss)


FITTERS = {"direct": lambda: DirectLearner(make_weights("direct")), "control": control_fitter,
           "control-frozen": lambda: control_fitter(frozen=True), "plain": plain_fitter}


# ---- pairs

def test_pairs_that_do_not_match():
    fine, coarse = torch.rand(4, 1, 16, 16), torch.rand(4, 1, 8, 8)
    for args, says in (((fine[:3], coarse, ["a"] * 4), "do not match up"),
                       ((fine, coarse, ["a"] * 3), "do not match up"),
                       ((fine, coarse, ["a"] * 4, ["g"] * 3), "do not match up"),
                       ((fine[..., :15, :15], coarse, ["a"] * 4), "whole multiple"),
                       ((fine, coarse[..., :4], ["a"] * 4), "whole multiple")):
        with pytest.raises(UnusablePairError, match=says):
            PairBatch(*args)
    pairs = PairBatch(fine, coarse, ["a", "b", "c", "d"])
    assert pairs.scale == 2 and len(pairs) == 4 and len(set(pairs.groups)) == 4
    some = pairs.take([2, 0])
    assert some.prompts == ["c", "a"] and some.groups == ["2", "0"] and torch.equal(some.target[1], fine[0])


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2), (1, 1, 1)])
def test_a_z_stack_fits(factors):
    deep = torch.rand(3, 1, 8, 24, 32, generator=torch.Generator().manual_seed(0))
    stacks = PairBatch(deep, F.avg_pool3d(deep, factors), [""] * 3, ["a", "a", "b"])
    assert (stacks.axes, stacks.scales, stacks.scale, len(stacks)) == ("ZYX", factors, factors[-1], 3)
    assert stacks.take([2]).groups == ["b"] and not stacks.own_groups and torch.equal(stacks.to("cpu").target, deep)
    joined = PairBatch.join([stacks, stacks.take([2])])
    assert joined.groups == ["a", "a", "b", "b"] and joined.condition.shape[0] == 4
    for step in range(8):
        batch = draw_crops(stacks, step, 0, 4, 16)
        assert batch["target"].shape == (4, 1, 8, 16, 16) and torch.allclose(F.avg_pool3d(batch["target"], factors), batch["condition"], atol=1e-6)
    for big, small in cut_pair(stacks.target[0], stacks.condition[0], 16):
        assert big.shape == (1, 8, 16, 16) and torch.allclose(F.avg_pool3d(big, factors), small, atol=1e-6)
    assert len(cut_pair(stacks.target[0], stacks.condition[0], 4)) == 2 * 6 * 8
    with pytest.raises(UnusablePairError, match="whole multiple"):
        PairBatch(deep, stacks.condition[:, :, :, :5], [""] * 3)
    with pytest.raises(UnusablePairError, match="whole multiple"):
        PairBatch(deep, stacks.condition[:, :, 0], [""] * 3)
    with pytest.raises(UnusablePairError, match="not a batch of images"):
        PairBatch(deep[:, 0, 0], None, [""] * 3)


def test_groups_that_nobody_stated_are_named_by_structure_and_number_and_counted_anew():
    fine = torch.rand(3, 1, 8, 8)
    batch = PairBatch(fine, None, [""] * 3, structures=["er", "er", "cocci"])
    assert batch.own_groups and batch.axes == "YX" and batch.scales == (1, 1) and batch.groups == ["er-0", "er-1", "cocci-2"]
    assert batch.take([2, 0]).groups == ["cocci-2", "er-0"] and batch.take([2, 0]).own_groups and len(batch.take([])) == 0
    assert PairBatch.join([batch, batch]).groups == ["er-0", "er-1", "cocci-2", "er-3", "er-4", "cocci-5"]
    assert not PairBatch(fine, None, [""] * 3, list("abc")).own_groups


# ---- batches

def test_a_batch_is_a_function_of_seed_and_step():
    pairs = make_pairs()
    before = [pairs.target.clone(), torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]
    steps = {}
    for step in (5, 0, 11, 5, 0):                                               # in any order
        batch = draw_crops(pairs, step, seed=3, size=4, crop_px=16)
        steps.setdefault(step, []).append(batch)
        torch.manual_seed(step)                                                 # nobody's generator matters
        np.random.seed(step)
    for one, again in (steps[5], steps[0]):
        assert all(torch.equal(one[key], again[key]) for key in ("target", "condition"))
        assert one["prompts"] == again["prompts"]
    assert not torch.equal(steps[5][0]["target"], steps[0][0]["target"])
    assert not torch.equal(steps[5][0]["target"], draw_crops(pairs, 5, 4, 4, 16)["target"])
    assert torch.equal(pairs.target, before[0])
    torch.set_rng_state(before[1])


@pytest.mark.parametrize("channels", [1, 9])
def test_pairs_are_cut_and_turned_together(channels):
    pairs, seen = make_pairs(channels=channels), set()
    places = {float(v): i for i, picture in enumerate(pairs.target) for v in picture.flatten()}
    for step in range(40):
        batch = draw_crops(pairs, step, seed=0, size=4, crop_px=16)
        assert batch["target"].shape == (4, 1, 16, 16) and batch["condition"].shape == (4, channels, 8, 8)
        measured = F.avg_pool2d(batch["target"], 2).expand_as(batch["condition"])
        assert torch.allclose(measured, batch["condition"], atol=1e-6)
        rows = [places[float(picture[0, 0, 0])] for picture in batch["target"]]
        assert batch["prompts"] == [pairs.prompts[i] for i in rows] and len(set(rows)) == 4  # no pair twice
        seen |= set(rows)
    assert seen == set(range(6))


def test_all_eight_turns_and_all_places_are_drawn():
    fine = torch.arange(24.0 * 24).reshape(1, 1, 24, 24)
    pairs, turns, corners = PairBatch(fine, F.avg_pool2d(fine, 2), [""]), set(), set()
    for step in range(300):
        crop = draw_crops(pairs, step, 0, 1, 16)["target"][0, 0]
        corner = float(crop.min())
        top, left = int(corner // 24), int(corner % 24)
        plain = fine[0, 0, top:top + 16, left:left + 16]
        corners.add((top, left))
        turns |= {k for k in range(8) if torch.equal(dihedral(plain, k), crop)}
    assert turns == set(range(8)) and corners == {(y, x) for y in range(0, 9, 2) for x in range(0, 9, 2)}


def test_turns_are_the_eight_symmetries():
    image = torch.arange(12.0).reshape(1, 3, 4)
    everything = {tuple(dihedral(image, k)[0].flatten().tolist()) + tuple(dihedral(image, k).shape) for k in range(8)}
    square = torch.arange(9.0).reshape(3, 3)
    assert len(everything) == 8
    assert {tuple(dihedral(square, k).flatten().tolist()) for k in range(8)} == {
        tuple(np.rot90(flip, k).ravel().tolist())
        for k in range(4) for flip in (square.numpy(), square.numpy().T)}


def test_crops_are_no_larger_than_the_pictures():
    batch = draw_crops(make_pairs(n=2, size=12), 0, 0, size=5, crop_px=64)      # more crops than pairs, too
    assert batch["target"].shape == (5, 1, 12, 12)


def test_rounds_are_a_function_of_the_step():
    class Part:
        condition = None

        def __init__(self, names, n, seed):
            generator = torch.Generator().manual_seed(seed % 2**31)
            self.target, self.prompts = torch.rand(n, 1, 2, 2, generator=generator), [names[0]] * n

        def __len__(self):
            return len(self.target)

    made = []

    def simulate(names, n, size_px, seed, split, device):
        made.append(seed)
        return Part(names, n, seed)

    rounds = SceneStream(simulate, seed=1, n=8, steps=10)
    first = rounds.at(3)[0].target
    assert torch.equal(first, rounds.at(9)[0].target) and len(made) == 2        # kept within a round
    second = rounds.at(10)[0].target
    assert not torch.equal(first, second)
    later = SceneStream(simulate, seed=1, n=8, steps=10)
    assert torch.equal(later.at(15)[0].target, second)                          # resumed in the second round
    target, condition, prompts = draw_rows(np.random.default_rng(0), rounds.at(0), 6)
    assert target.shape == (6, 1, 2, 2) and condition is None
    assert len(set(prompts)) == 2 and prompts[0] != prompts[-1]


def test_dropped_prompts():
    texts = ["a"] * 20_000
    for generator in (lambda: torch.Generator().manual_seed(0), lambda: np.random.default_rng(0)):
        draw = lambda: drop_prompts(texts, generator(), 0.2)
        assert draw() == draw() and 0.19 < draw().count("") / 20_000 < 0.21
    assert drop_prompts(texts, None, 0.0) is texts


def test_adaptations_for_users_learn_the_empty_prompt():
    batch = draw_crops(make_pairs(), 0, 0, 4, 16)
    for fitter in (DirectLearner(make_weights(), prompt_dropout=1.0), control_fitter(prompt_dropout=1.0)):
        if isinstance(fitter, ControlLearner):  # a new branch hides nothing, but starts at zero
            fitter.modules["backbone"].requires_grad_(True)
        fitter.loss(fitter.modules, batch, torch.Generator().manual_seed(0)).backward()
        moved = fitter.modules["prompts"].table.weight.grad.abs().sum(1)
        assert moved[-1] > 0 and not moved[:-1].any()


# ---- fitting

@pytest.mark.parametrize("name", FITTERS)
def test_every_fitter_goes_through_the_loop_and_gets_better(name, tmp_path):
    fitter, pairs, validation = FITTERS[name](), make_pairs(), make_pairs(3, seed=1, first=6)
    start = validation_psnr(fitter, fitter.modules, validation)
    result = fit(fitter, pairs, validation, replace(QUICK, steps=30, validate_every=5), tmp_path)
    values = [-v["value"] for v in result.validations]
    assert values[0] == pytest.approx(start, abs=0.05) and len(values) == 7
    assert max(values) > start
    assert validation_psnr(fitter, fitter.modules, validation) == pytest.approx(max(values), abs=1e-3)


def test_the_weights_that_were_given_are_not_touched(tmp_path):
    weights = make_weights("direct")
    before = copy.deepcopy(weights.backbone.state_dict())
    light = ControlConfig.from_backbone(weights.backbone.config)
    for fitter in (DirectLearner(weights), ControlLearner(weights, config=light)):
        fit(fitter, make_pairs(), make_pairs(2, first=6), QUICK, tmp_path / fitter.name)
    assert all(torch.equal(v, before[k]) for k, v in weights.backbone.state_dict().items())


def test_a_frozen_backbone_stays_as_it_is(tmp_path):
    for frozen in (True, False):
        fitter = control_fitter(frozen=frozen)
        before = copy.deepcopy(fitter.modules.state_dict())
        fit(fitter, make_pairs(), make_pairs(2, first=6), replace(QUICK, weight_decay=0.1),
            tmp_path / str(frozen))
        after = fitter.modules.state_dict()
        changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
        assert changed == ({"control"} if frozen else {"control", "backbone", "prompts"})


class Scripted(Learner):
    "A fitter whose validation follows a script: what is kept and when it stops can be told exactly."
    name = "scripted"

    def __init__(self, script):
        self.script, self.modules = script, torch.nn.ModuleDict({"network": torch.nn.Conv2d(1, 1, 1)})

    def loss(self, modules, batch, generator=None):
        return modules["network"](batch["target"]).square().mean()

    def restore(self, modules, condition, prompts):
        error = 10 ** (-self.script.pop(0) / 20)
        return torch.full((len(condition), 1, 24, 32), error)  # against targets of zero: this PSNR


def test_early_stopping_keeps_the_best_and_not_the_last(tmp_path):
    script = [10.0, 20.0, 30.0, 25.0, 29.0, 24.0, 40.0, 50.0]
    fitter, dark = Scripted(script), make_pairs(2, first=6)
    dark.target.zero_()
    result = fit(fitter, make_pairs(), dark, replace(QUICK, steps=100, patience=3, ema_decay=0.0), tmp_path)
    assert result.stopped == "patience" and result.step == 10 and script == [40.0, 50.0]
    assert result.best_step == 4 and -result.best_value == pytest.approx(30, abs=1e-4)
    kept = copy.deepcopy(fitter.modules.state_dict())
    last = torch.nn.ModuleDict({"network": torch.nn.Conv2d(1, 1, 1)})
    load_trained(last, tmp_path, "average")
    assert not all(torch.equal(v, kept[k]) for k, v in last.state_dict().items())
    again = Scripted([30.0, 30.0])
    four = replace(QUICK, steps=4, validate_every=4, patience=3, ema_decay=0.0)
    shorter = fit(again, make_pairs(), dark, four, tmp_path / "short")
    assert shorter.step == 4


def test_validation_is_the_mean_of_psnr_per_picture():
    pairs = make_pairs(3)
    fitter = plain_fitter()
    restored = fitter.restore(fitter.modules, pairs.condition, pairs.prompts)
    each = [10 * np.log10(1 / float(((restored[i] - pairs.target[i]) ** 2).mean())) for i in range(3)]
    assert validation_psnr(fitter, fitter.modules, pairs) == pytest.approx(np.mean(each), abs=1e-4)


def test_groups_may_not_be_shared(tmp_path):
    with pytest.raises(UnusablePairError, match="share a group .found cell 5"):
        fit(plain_fitter(), make_pairs(), make_pairs(2, first=5), QUICK, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_restoring_samples_depends_on_each_measurement_alone():
    fitter, pairs = control_fitter(), make_pairs(3)
    for zero in fitter.modules["control"].zero:
        torch.nn.init.normal_(zero.weight, generator=torch.Generator().manual_seed(0))
    whole = fitter.restore(fitter.modules, pairs.condition, pairs.prompts, samples=2)
    alone = fitter.restore(fitter.modules, pairs.condition[1:2], pairs.prompts[1:2], samples=2)
    other = fitter.restore(fitter.modules, pairs.condition[1:2], pairs.prompts[1:2], samples=2, seed=1)
    assert whole.shape == (3, 1, 24, 32) and torch.allclose(whole[1:2], alone, atol=1e-5)
    assert not torch.allclose(alone, other, atol=1e-3)
