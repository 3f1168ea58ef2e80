"The control branch: nothing at first, then the measurement's way into the backbone."
import copy

import pytest
import torch
import torch.nn.functional as F

from fluogen.models.unet import Backbone
from fluogen.models.controlnet import ControlBranch, ControlConfig
from fluogen.models.unet import BackboneConfig, NetworkConfigError, NetworkInputError

TINY, FOLDED = BackboneConfig.tiny(), BackboneConfig.tiny(stem="unshuffle2")
LAYOUTS = {                         # name: (config, height and width of the condition for 16 x 24)
    "camera grid, unshuffled": (ControlConfig.from_backbone(FOLDED), (8, 12)),
    "camera grid, plain": (ControlConfig.tiny(), (8, 12)),
    "mask, unshuffled": (ControlConfig.from_backbone(FOLDED, scale=1, condition_channels=3), (16, 24)),
    "mask, plain": (ControlConfig.tiny(scale=1), (16, 24)),
    "x4, unshuffled": (ControlConfig.from_backbone(FOLDED, scale=4), (4, 6)),
    "nine frames, any size": (ControlConfig.tiny(scale=None, condition_channels=9, widths=(4, 6, 8)),
                              (9, 31)),
    "any size, unshuffled": (ControlConfig.from_backbone(FOLDED, scale=None), (17, 5)),
}


def shake(net, seed=0):
    "All weights random: zeros would hide mistakes."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 / max(p[0].numel(), 4) ** 0.5))
    return net.eval()


def make_inputs(config, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 1, 16, 24, generator=generator), torch.tensor([3, 870]),
            torch.randn(2, config.backbone.prompt_width, generator=generator),
            torch.rand(2, config.condition_channels, *size, generator=generator))


@pytest.mark.parametrize("name", LAYOUTS)
def test_step_zero_is_the_backbone_bit_for_bit(name):
    config, size = LAYOUTS[name]
    backbone = shake(Backbone(config.backbone))
    control = ControlBranch.from_backbone(backbone, config)
    sample, times, prompts, condition = make_inputs(config, size)
    with torch.no_grad():
        residuals = control(sample, times, prompts, condition)
        assert torch.equal(backbone(sample, times, prompts, residuals=residuals),
                           backbone(sample, times, prompts))
    assert tuple(s.shape[1] for s in residuals.skips) == config.backbone.skip_channels


def test_paper_branch_has_18_and_1_residuals_and_the_published_size():
    with torch.device("meta"):
        branch = ControlBranch(ControlConfig.paper())
        residuals = branch(torch.empty(1, 1, 512, 512), torch.zeros(1), torch.empty(1, 77, 768),
                           torch.empty(1, 9, 512, 512))
    assert len(residuals.skips) == len(branch.zero) == 18 and residuals.mid.shape == (1, 512, 16, 16)
    sides = [512] * 3 + [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3
    assert [s.shape[2] for s in residuals.skips] == sides
    assert round(sum(p.numel() for p in branch.parameters()) / 1e6, 1) == 75.9
    convolutions = branch.condition.first, *branch.condition.blocks, branch.condition.last
    assert [tuple(c.weight.shape[:2]) for c in convolutions] \
        == [(16, 9), (16, 16), (32, 16), (32, 32), (96, 32), (96, 96), (256, 96), (128, 256)]


def test_copy_is_a_copy():
    backbone = shake(Backbone(TINY))
    before = copy.deepcopy(backbone.state_dict())
    control = ControlBranch.from_backbone(backbone, ControlConfig.tiny())
    for key, value in control.encoder.state_dict().items():
        assert torch.equal(value, before[f"encoder.{key}"])
    shake(control, 5)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert all(p.abs().sum() == 0 for net in [ControlBranch(ControlConfig.tiny())]
               for part in (net.zero, net.zero_mid, net.condition.last) for p in part.parameters())


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_reach_the_whole_branch(name):
    config, size = LAYOUTS[name]
    backbone = shake(Backbone(config.backbone)).requires_grad_(False)
    control = shake(ControlBranch(config), 3)
    sample, times, prompts, condition = make_inputs(config, size)
    condition.requires_grad_()
    out = backbone(sample, times, prompts, residuals=control(sample, times, prompts, condition))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in control.parameters())
    assert condition.grad.abs().sum() > 0 and all(p.grad is None for p in backbone.parameters())


def test_learning_starts_at_the_zero_convolutions():
    backbone = shake(Backbone(TINY)).requires_grad_(False)
    control = ControlBranch.from_backbone(backbone, ControlConfig.tiny()).requires_grad_(True)
    sample, times, prompts, condition = make_inputs(control.config, (8, 12))
    optimizer = torch.optim.SGD(control.parameters(), 0.1)
    sizes = []
    for _ in range(3):
        out = backbone(sample, times, prompts, residuals=control(sample, times, prompts, condition))
        loss = (out - F.interpolate(condition, scale_factor=2.0)).square().mean()
        optimizer.zero_grad(), loss.backward()
        sizes.append([sum(float(p.grad.abs().sum()) for p in part.parameters())
                      for part in (control.zero, control.encoder, control.condition)])
        optimizer.step()
    assert sizes[0][0] > 0 and sizes[0][1:] == [0, 0]
    assert min(sizes[2]) > 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_cached_embeddings_are_bit_exact(name):
    config, size = LAYOUTS[name]
    control = shake(ControlBranch(config))
    sample, times, prompts, condition = make_inputs(config, size)
    with torch.no_grad():
        plain = control(sample, times, prompts, condition)
        cached = control(sample, times, prompt_embedding=control.encode_prompt(prompts),
                         condition_embedding=control.encode_condition(condition, sample.shape[-2:]))
    pairs = zip((*plain.skips, plain.mid), (*cached.skips, cached.mid), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_scale_is_the_strength():
    control = shake(ControlBranch(ControlConfig.tiny()))
    inputs = make_inputs(control.config, (8, 12))
    with torch.no_grad():
        one, half, none = (control(*inputs, scale=s) for s in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half.mid * 2, one.mid)
    torch.testing.assert_close(half.skips[1] * 2, one.skips[1])
    assert none.mid.abs().max() == 0 and all(s.abs().max() == 0 for s in none.skips)


def test_condition_is_placed_on_the_stem_grid():
    ramp = torch.linspace(0, 1, 8).expand(1, 1, 6, 8)
    bilinear = F.interpolate(ramp, scale_factor=2.0, mode="bilinear")
    for config, wanted in [
        (ControlConfig.from_backbone(FOLDED), ramp),                                # camera grid = stem grid
        (ControlConfig.tiny(), bilinear),
        (ControlConfig.tiny(scale=1), ramp),
        (ControlConfig.from_backbone(FOLDED, scale=1), F.pixel_unshuffle(ramp, 2)),
        (ControlConfig.from_backbone(FOLDED, scale=4), bilinear),
        (ControlConfig.tiny(scale=None), ramp),
    ]:
        torch.testing.assert_close(ControlBranch(config).condition.place(ramp), wanted)
    anywhere = ControlBranch(ControlConfig.tiny(scale=None)).condition
    assert anywhere.place(ramp, (16, 24)).shape == (1, 1, 16, 24)
    torch.testing.assert_close(anywhere.place(torch.full((1, 1, 5, 9), 0.3), (16, 24)),
                               torch.full((1, 1, 16, 24), 0.3))


def test_wrong_inputs_are_refused_in_one_line():
    control = ControlBranch(ControlConfig.tiny())
    sample, times, prompts, condition = make_inputs(control.config, (8, 12))
    for change, words in [
        (dict(condition=condition.repeat(1, 2, 1, 1)), r"expected \(B, 1, h, w\)"),
        (dict(condition=condition[0]), "condition"),
        (dict(condition=sample), "do not fit"), (dict(condition=None), r"expected \(B, 1, h, w\)"),
        (dict(sample=sample[..., :17]), "multiples of 2"), (dict(prompt_states=None), "wrong prompt"),
    ]:
        with pytest.raises(NetworkInputError, match=words) as error:
            control(**{**dict(sample=sample, timestep=times, prompt_states=prompts, condition=condition),
                       **change})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [dict(condition_channels=0), dict(condition_channels=10), dict(widths=()),
                                    dict(widths=(8, 0)), dict(scale=3), dict(scale=0)])
def test_impossible_branches_are_refused(change):
    with pytest.raises(NetworkConfigError, match=next(iter(change))):
        ControlConfig.tiny(**change)


def test_branch_of_another_backbone_is_refused():
    with pytest.raises(NetworkConfigError, match="another backbone"):
        ControlBranch.from_backbone(Backbone(FOLDED), ControlConfig.tiny())


@pytest.mark.parametrize("config", [*(c for c, _ in LAYOUTS.values()), ControlConfig.paper(1),
                                    ControlConfig()])
def test_config_survives_json(config):
    assert ControlConfig.from_json(config.to_json()) == config == ControlConfig.from_dict(config.to_dict())
    with pytest.raises(NetworkConfigError, match="unknown key"):
        ControlConfig.from_dict(config.to_dict() | {"size": 1})
    with pytest.raises(NetworkConfigError, match="unknown key"):
        ControlConfig.from_dict(config.to_dict() | {"backbone": {"size": 1}})
