"Quantile heads: the loss finds the quantile, one chain does for three, only the heads learn."

import pytest
import torch
from counts import Operations
from toys import TINY, make_weights, save_toy, shake

from fluogen.core import make_generator
from fluogen.diffusion.direct import DirectConfig, restore_direct
from fluogen.models.quantile_heads import (
    OUTPUTS, HeadsConfig, IntervalChain, QuantileError, QuantileHeads, direct_heads_loss, pinball, quantile_images,
    restore_direct_interval, run_three_chains, velocity_heads_loss, with_heads)
from fluogen.diffusion.samplers import sample_ddim, sample_dpmpp_2m
from fluogen.diffusion.schedule import Schedule, trailing_grid
from fluogen.models.unet import NetworkConfigError
from fluogen.models.zoo import ZooError, load_weights, save_weights

CARD = dict.fromkeys(("summary", "data", "licence", "recipe", "training", "scores", "limits"), "a test")


def make_heads(kind, seed=0):
    return shake(QuantileHeads(HeadsConfig.from_backbone(TINY, kind)), seed)


def masked_pinball(output, target, level):
    "The public code's form: boolean indexing."
    above, loss = target > output, torch.zeros_like(target)
    loss[above] = level * (target[above] - output[above])
    loss[~above] = (1 - level) * (output[~above] - target[~above])
    return loss.mean()


@pytest.mark.parametrize("level", (0.05, 0.5, 0.95))
def test_pinball_is_the_public_loss_with_its_gradient(level):
    target = torch.randn(3, 50, generator=make_generator(0, "target"))
    ours, theirs = (torch.randn(3, 50, generator=make_generator(1, "guess")).requires_grad_() for _ in range(2))
    pinball(ours, target, level).backward()
    masked_pinball(theirs, target, level).backward()
    assert torch.allclose(pinball(ours, target, level), masked_pinball(theirs, target, level), atol=1e-7)
    assert (ours.grad - theirs.grad).abs().max() <= 1e-7


@pytest.mark.battery
def test_pinball_does_less_than_masks():
    "P2: forward and backward; 17 operations for 32, and none of the ten that gather or scatter by a mask. Seconds: `make bench`."
    target = torch.randn(2, 256, 256, generator=make_generator(0, "speed"))
    guess, done = torch.zeros_like(target).requires_grad_(), []
    for loss in (masked_pinball, pinball):
        with Operations() as counted:
            loss(guess, target, 0.9).backward()
        done.append(counted)
    slow, fast = done
    assert len(slow.names) / len(fast.names) >= 1.5 and slow.numbers / fast.numbers >= 1.4
    assert len([name for name in slow.names if "index" in name]) >= 8 and not [name for name in fast.names if "index" in name]


@pytest.mark.parametrize("sample", (sample_ddim, sample_dpmpp_2m))
def test_lower_velocity_is_the_brighter_picture(sample):
    "Heads that stand 0.2 beside the prediction: at every pass, and at the end of the paper's chains."
    schedule = Schedule()
    constant = lambda x, t: torch.zeros(len(x), 3, *x.shape[-2:]) + torch.tensor([-0.2, 0.0, 0.2]).view(1, 3, 1, 1)
    for at, start in ((0, 999), (1, 499), (3, 249)):
        x = torch.randn(1, 1, 8, 8, generator=make_generator(at, "x"))
        lower, mean, upper = quantile_images(schedule, x, constant(x, start), start)
        assert bool((lower < mean).all() and (mean < upper).all())
        assert torch.allclose(upper - mean, 0.2 * schedule.noise(start).expand_as(mean), atol=1e-5)
    three = run_three_chains(constant, [torch.zeros(1, 1, 8, 8)] * 3, schedule, trailing_grid(schedule, 4), sample)
    assert bool((three.lower < three.mean).all() and (three.mean < three.upper).all())


def test_crossed_heads_are_sorted():
    x, v = torch.zeros(1, 1, 4, 4), torch.tensor([0.5, 0.0, -0.5]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    lower, mean, upper = quantile_images(Schedule(), x, v, 999)
    assert bool((lower < upper).all())


def test_one_chain_gives_the_picture_of_three_with_a_third_of_the_passes():
    weights, heads, calls = make_weights("control"), make_heads("velocity"), []
    network, states = with_heads(weights.backbone, heads), weights.prompts.encode([""])

    def predict(x, t):
        calls.append(t)
        return network(x, t, states)
    times = trailing_grid(weights.schedule, 10)
    starts = [torch.randn(1, 1, 16, 16, generator=make_generator(i, "start")) for i in range(3)]
    with torch.no_grad():
        plain = sample_ddim(lambda x, t: weights.backbone(x, t, states), starts[1], weights.schedule, times)
        for at in (0, 9):
            calls.clear()
            chain = IntervalChain(predict, weights.schedule, times[at])
            end, (seen,) = sample_ddim(chain, starts[1], weights.schedule, times), chain.kept
            assert len(calls) == 10 and torch.equal(end, plain) and bool((seen.lower <= seen.upper).all())
        calls.clear()
        three = run_three_chains(predict, starts, weights.schedule, times)
    assert len(calls) == 30 and torch.equal(three.mean, plain)


def test_the_direct_mean_is_that_of_the_restorer():
    weights, heads = make_weights(), make_heads("direct")
    condition, states = torch.rand(2, 1, 12, 12), weights.prompts.encode(["", "ER of COS-7"])
    with torch.no_grad():
        x0, maps = restore_direct_interval(weights.backbone, heads, condition, states, weights.schedule, DirectConfig())
        assert torch.equal(x0, restore_direct(weights.backbone, condition, states, weights.schedule, DirectConfig()))
    assert set(maps) == set(OUTPUTS["direct"]) and all(bool((m > 0).all()) and m.shape == x0.shape for m in maps.values())


def test_only_the_heads_learn():
    weights = make_weights("control")
    features = torch.randn(2, TINY.channels[0], 8, 8, generator=make_generator(0, "features"))
    target = torch.randn(2, 1, 16, 16, generator=make_generator(0, "target"))
    for kind, loss in (("velocity", lambda h: velocity_heads_loss(h, features, target)),
                       ("direct", lambda h: direct_heads_loss(h, features, torch.zeros_like(target), target))):
        heads = make_heads(kind)
        loss(heads).backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in heads.parameters())
    assert all(p.grad is None for net in (weights.backbone, weights.control) for p in net.parameters())


def test_training_moves_each_head_to_its_quantile():
    "A constant world: the lower head goes to the low quantile of the velocity."
    heads = QuantileHeads(HeadsConfig("velocity", features=1, factor=1, hidden=0))
    target, features = torch.randn(16, 1, 8, 8, generator=make_generator(0, "v")), torch.ones(16, 1, 8, 8)
    optimiser = torch.optim.Adam(heads.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        velocity_heads_loss(heads, features, target).backward()
        optimiser.step()
    maps = heads(features)
    assert maps["lower"].mean().item() == pytest.approx(-1.645, abs=0.2)
    assert maps["upper"].mean().item() == pytest.approx(1.645, abs=0.2)


def test_what_does_not_fit_is_refused_in_one_line():
    for wrong in (dict(kind="softmax"), dict(features=0), dict(factor=3), dict(kind="velocity", hidden=4), dict(levels=(0.5, 0.1)),
                  dict(levels=(0.1,))):
        with pytest.raises(NetworkConfigError) as caught:
            HeadsConfig(**wrong)
        assert "\n" not in str(caught.value)
    weights = make_weights()
    with pytest.raises(QuantileError, match="drive no chain"):
        with_heads(weights.backbone, make_heads("direct"))
    with pytest.raises(QuantileError, match="stand on no direct pass"):
        restore_direct_interval(weights.backbone, make_heads("velocity"), torch.rand(1, 1, 8, 8), None, weights.schedule, weights.direct)
    with pytest.raises(QuantileError, match="another backbone"):
        QuantileHeads(HeadsConfig("velocity", features=3, hidden=0)).start_from(weights.backbone)


def test_heads_are_weights_bound_to_their_base(tmp_path):
    base = save_toy(tmp_path / "toy")
    heads = make_heads("direct")
    about = {"task": "interval", "modules": {"heads": heads.config.to_dict()}}
    for method, largest in (("int8", 0.02), ("fp16", 1e-3)):
        folder = save_weights(tmp_path / "toy-heads", {"heads": heads.state_dict()}, about, CARD, method, str(base))
        loaded = load_weights(str(folder))
        assert loaded.heads.config == heads.config and set(loaded.modules) == {"heads"}
        assert all((a - b).abs().max() <= largest * b.abs().max() for a, b in zip(loaded.heads.parameters(), heads.parameters()))
        assert (folder / "weights.safetensors").stat().st_size < 100_000
    save_toy(tmp_path / "toy", seed=5)
    with pytest.raises(ZooError, match="another version"):
        load_weights(str(folder))
