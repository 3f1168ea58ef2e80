"The direct adaptation: the measurement in the place of the noisy image."
import pytest
import torch
import torch.nn.functional as F
from toys import make_weights

from fluogen.core import to_model
from fluogen.diffusion.direct import DirectConfig, DirectError, direct_loss, restore_direct, upsample
from fluogen.diffusion.schedule import Schedule, ScheduleConfig


@pytest.mark.parametrize(("change", "says"), [({"signal": 1.0}, "signal"), ({"signal": 0.0}, "signal"),
                                              ({"signal": float("nan")}, "signal"), ({"scale": 3}, "scale")])
def test_refused(change, says):
    with pytest.raises(DirectError, match=says):
        DirectConfig(**change)


@pytest.mark.parametrize("signal", [0.1, 0.5, 0.85, 0.99])
def test_the_time_is_the_one_of_the_amplitude(signal):
    schedule = Schedule()
    t = DirectConfig(signal=signal).timestep(schedule)
    assert float(schedule.signal(t)) == pytest.approx(signal, abs=2e-3)
    assert 0 < t < 999


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_upsampling_keeps_places_and_constants(scale):
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    spot = torch.exp(-((y - 10.7) ** 2 + (x - 12.2) ** 2) / 10)[None, None]
    fine = upsample(spot, scale)
    places = torch.arange(24.0 * scale)
    for axis, centre in ((3, 10.7), (2, 12.2)):
        found = float((fine.sum(axis).flatten() * places).sum() / fine.sum())
        assert found == pytest.approx(scale * centre + (scale - 1) / 2, abs=0.02 * scale)
    assert torch.allclose(upsample(torch.full((1, 1, 5, 7), 0.3), scale),
                          torch.full((1, 1, 5 * scale, 7 * scale), 0.3))


@pytest.mark.parametrize("objective", ["v", "x0", "eps"])
def test_a_backbone_that_knows_the_answer_gives_it(objective):
    schedule = Schedule(ScheduleConfig(objective=objective, zero_snr=objective != "eps"))
    config, generator = DirectConfig(), torch.Generator().manual_seed(0)
    truth = torch.rand(2, 1, 16, 16, generator=generator)
    seen = []

    def backbone(x, t, states, **cached):
        seen.append((x, t, states, cached))
        eps = (x - schedule.signal(t) * to_model(truth)) / schedule.noise(t)
        return schedule.target(to_model(truth), eps, t)

    condition = torch.rand(2, 1, 8, 8, generator=generator)
    x0 = restore_direct(backbone, condition, "states", schedule, config, prompt_embedding="kept")
    assert torch.allclose(x0, to_model(truth), atol=1e-5)
    (x, t, states, cached), = seen
    assert states == "states" and cached == {"prompt_embedding": "kept"} and t.shape == (2,)
    assert torch.allclose(x / schedule.signal(t), to_model(upsample(condition, 2)), atol=1e-5)
    assert float(direct_loss(lambda *a: backbone(*a), truth, condition, "states", schedule, config)) < 1e-9


def test_the_loss_is_the_mean_square_in_model_range_and_reaches_every_weight():
    weights = make_weights("direct")
    weights.backbone.requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(2, 1, 16, 16, generator=generator)
    condition = torch.rand(2, 1, 8, 8, generator=generator)
    states = weights.prompts(["ER of COS-7"] * 2)
    args = (states, weights.schedule, weights.direct)
    loss = direct_loss(weights.backbone, truth, condition, *args)
    x0 = restore_direct(weights.backbone, condition, *args)
    assert torch.allclose(loss, F.mse_loss(x0, 2 * truth - 1))
    loss.backward()
    still = [name for name, p in weights.backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_each_picture_for_itself_and_its_prompt():
    weights, generator = make_weights("direct"), torch.Generator().manual_seed(2)
    condition = torch.rand(3, 1, 8, 12, generator=generator)
    states = weights.prompts(["ER of COS-7", "F-actin of COS-7", ""])
    with torch.no_grad():
        whole = restore_direct(weights.backbone, condition, states, weights.schedule, weights.direct)
        alone, other = (restore_direct(weights.backbone, condition[1:2], states[k:k + 1], weights.schedule,
                                       weights.direct) for k in (1, 2))
    assert whole.shape == (3, 1, 16, 24)
    assert torch.allclose(whole[1:2], alone, atol=1e-5) and not torch.allclose(alone, other, atol=1e-3)
