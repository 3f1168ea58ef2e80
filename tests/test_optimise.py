"The pieces of one optimiser step: closed forms."
import math

import pytest
import torch

from fluogen.training.optim import (
    Ema, TrainConfig, TrainingError, ema_decay_at, group_parameters, join_modules, learning_rate, place, select_state,
    select_trainable, set_training)


def make_net():
    return torch.nn.ModuleDict({
        "body": torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5)),
        "head": torch.nn.Conv2d(4, 1, 1)})


def test_ema_is_the_weighted_sum_of_all_values():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, generator=generator) for _ in range(50)]
    named = {"w": values[0].clone(), "count": torch.tensor(0)}
    ema = Ema(named, decay=0.9)
    for step, value in enumerate(values[1:]):
        named["w"].copy_(value)
        named["count"] += 1
        ema.update(named, step)
    expected, left = torch.zeros(3, dtype=torch.float64), 1.0
    for step in range(48, -1, -1):                      # newest first: (1 - d_s) times all later decays
        d = ema_decay_at(0.9, step)
        expected += left * (1 - d) * values[step + 1].double()
        left *= d
    expected += left * values[0].double()
    assert torch.allclose(ema.shadow["w"].double(), expected, atol=1e-6)
    assert ema.shadow["count"] == 49


def test_ema_decay_warms_up_and_zero_means_no_average():
    assert ema_decay_at(0.999, 0) == 0.1 and ema_decay_at(0.999, 10 ** 6) == 0.999
    named = {"w": torch.randn(5)}
    ema = Ema(named, decay=0.0)
    named["w"].normal_()
    ema.update(named, 1000)
    assert torch.equal(ema.shadow["w"], named["w"])


def test_applied_average_is_taken_back_to_the_bit_even_after_an_error():
    named = {"w": torch.randn(100)}
    ema, before = Ema({"w": torch.zeros(100)}, 0.9), named["w"].clone()
    with pytest.raises(ZeroDivisionError):
        with ema.applied(named):
            assert not named["w"].any()
            1 / 0
    assert torch.equal(named["w"], before)


def test_learning_rate():
    config = TrainConfig(steps=200, warmup=10, lr=1.0, schedule="cosine")
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 100) == pytest.approx(0.5)
    assert learning_rate(config, 200) == pytest.approx(0.0)
    assert learning_rate(TrainConfig(warmup=0, lr=0.3), 0) == 0.3


def test_norms_and_biases_do_not_decay():
    net = make_net()
    wide, thin = group_parameters(dict(net.named_parameters()), 0.05)
    assert wide["weight_decay"] == 0.05 and {p.ndim for p in wide["params"]} == {4}
    assert thin["weight_decay"] == 0.0 and len(thin["params"]) == 4        # two biases, the norm's two


def test_selection():
    net = make_net()
    assert list(select_trainable(net, ["head"])) == ["head.weight", "head.bias"]
    assert list(select_trainable(net, lambda name: name == "head.bias")) == ["head.bias"]
    net["body"].requires_grad_(False)
    assert list(select_trainable(net)) == ["head.weight", "head.bias"]
    with pytest.raises(TrainingError, match="nothing to train"):
        select_trainable(net, ["tail"])
    assert "body.1.running_mean" in select_state(net, select_trainable(net))
    assert set(dict(join_modules({"a": net}).named_parameters())) == {f"a.{n}" for n, _ in net.named_parameters()}


def test_frozen_parts_rest():
    net = make_net()
    net["body"].requires_grad_(False)
    set_training(net)
    assert net["head"].training and not any(m.training for m in net["body"].modules())


def test_place_keeps_values_and_what_is_no_tensor():
    batch = {"image": torch.randn(2, 3, 4, 4), "level": torch.randn(2), "prompt": ["ER", "F-actin"]}
    placed = place(batch, "cpu", channels_last=True)
    assert placed["image"].is_contiguous(memory_format=torch.channels_last) and placed["prompt"] == batch["prompt"]
    assert torch.equal(placed["image"], batch["image"]) and torch.equal(placed["level"], batch["level"])


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"accumulate": 0}, {"lr": -1}, {"lr": math.nan}, {"ema_decay": 1.0},
                                   {"precision": "half"}, {"schedule": "linear"}, {"device": "gpu"}, {"patience": 2}])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        TrainConfig(**wrong)
