"The U-Net: what it is made of, what it takes, what it computes."
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fluogen.models.unet import Attention, Backbone, ResBlock, embed_time
from fluogen.models.unet import BackboneConfig, NetworkConfigError, NetworkInputError

SHAPES = {
    "tiny": BackboneConfig.tiny(),
    "unshuffled": BackboneConfig.tiny(stem="unshuffle2"),
    "deep": BackboneConfig(channels=(8, 8, 16, 24), blocks_per_level=2, attention_levels=(1, 3), head_dim=4,
                           groups=4,
                           time_width=6, prompt_width=5, stem="conv", in_channels=2, out_channels=3),
    "uneven attention": BackboneConfig.tiny(channels=(8, 8, 8), attention_levels=(),
                                            up_attention_levels=(0, 2)),
    "one level, no prompt": BackboneConfig.tiny(channels=(8,), attention_levels=(), prompt_width=0),
    "no attention": BackboneConfig.tiny(attention_levels=(), mid_attention=False, head_dim=7),
    "other bottom": BackboneConfig.tiny(mid_head_dim=1, mid_groups=16),
}


def shake(net, seed=0):
    "All weights random: new networks have zeros that would hide mistakes."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 / math.sqrt(max(p[0].numel(), 4))))
    return net.eval()


def make_inputs(config, batch=2, size=(2, 3), seed=1):
    generator = torch.Generator().manual_seed(seed)
    h, w = (n * config.size_multiple for n in size)
    return (torch.randn(batch, config.in_channels, h, w, generator=generator),
            torch.tensor([3.0, 870.5])[:batch],
            torch.randn(batch, config.prompt_width, generator=generator) if config.prompt_width else None)


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- what it is made of

def test_paper_has_the_published_size():
    with torch.device("meta"):
        net = Backbone(BackboneConfig.paper())
    assert count(net) == 144_209_409
    prompt = net.encoder.embedding.prompt
    assert [tuple(p.shape) for p in prompt.parameters()] == [(512, 59136), (512,), (512, 512), (512,)]
    assert count(prompt) == 30_540_800
    time = net.encoder.embedding.time
    assert [tuple(p.shape) for p in time.parameters()] == [(512, 128), (512,), (512, 512), (512,)]


def test_paper_attends_only_at_32_and_at_the_bottom():
    with torch.device("meta"):
        net = Backbone(BackboneConfig.paper())
        picture = torch.empty(1, 1, 512, 512)
        places = [name for name, m in net.named_modules() if isinstance(m, Attention)]
        seen = {}
        for name in places:
            net.get_submodule(name).register_forward_hook(
                lambda m, _, out, name=name: seen.update({name: (out.shape[1] // m.head_dim, *out.shape[2:])}))
        out = net(picture, torch.zeros(1), torch.empty(1, 77, 768))
    assert out.shape == picture.shape
    assert sorted(places) == sorted(["encoder.mid_attention",
                                     *[f"encoder.down.4.attention.{i}" for i in range(2)],
                                     *[f"up.1.attention.{i}" for i in range(3)]])
    assert seen.pop("encoder.mid_attention") == (64, 16, 16)
    assert set(seen.values()) == {(64, 32, 32)} and len(seen) == 5
    assert len(net.encoder.down) == len(net.up) == 6
    assert {len(level.blocks) for level in net.encoder.down} == {2}
    assert {len(level.blocks) for level in net.up} == {3}
    assert len(net.config.skip_channels) == 18


def test_small_presets_keep_their_promises():
    nano, tiny = Backbone(BackboneConfig.nano()), Backbone(BackboneConfig.tiny())
    assert 1.5e6 < count(nano) <= 3e6 and count(tiny) < 50e3
    assert all(c % 16 == 0 for c in nano.config.channels) and nano.config.stem == "unshuffle2"
    assert [n for n, m in nano.named_modules() if isinstance(m, Attention)] == ["encoder.mid_attention"]


# ---------------------------------------------------------------- what it takes

@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_skips(name):
    config = SHAPES[name]
    net = shake(Backbone(config))
    sample, times, prompts = make_inputs(config)
    with torch.no_grad():
        out = net(sample, times, prompts)
        skips, mid = net.encoder(net.encoder.open(sample), net.embed(times, prompts))
    assert out.shape == (2, config.out_channels, *sample.shape[2:]) and torch.isfinite(out).all()
    assert tuple(s.shape[1] for s in skips) == config.skip_channels and mid.shape[1] == config.channels[-1]


@pytest.mark.parametrize("size", [(20, 16), (16, 12), (0, 16), (7, 16)])
def test_other_sizes_are_refused_in_one_line(size):
    net = Backbone(BackboneConfig.nano(channels=(8, 8, 8), mid_attention=False))
    with pytest.raises(NetworkInputError, match="H and W multiples of 8") as error:
        net(torch.zeros(1, 1, *size), 0, torch.zeros(1, 64))
    assert "\n" not in str(error.value)


def test_other_inputs_are_refused_in_one_line():
    net = Backbone(BackboneConfig.tiny())
    with pytest.raises(NetworkInputError, match=r"found \(1, 3, 16, 16\)"):
        net(torch.zeros(1, 3, 16, 16), 0, torch.zeros(1, 16))
    with pytest.raises(NetworkInputError, match="16 numbers per image"):
        net(torch.zeros(1, 1, 16, 16), 0, torch.zeros(1, 4, 16))
    with pytest.raises(NetworkInputError, match="wrong prompt"):
        net(torch.zeros(1, 1, 16, 16), 0)
    with pytest.raises(ValueError):                     # residuals of another network
        net(torch.zeros(1, 1, 16, 16), 0, torch.zeros(1, 16), residuals=((0, 0), 0))


@pytest.mark.parametrize("change, field", [
    (dict(channels=()), "channels"), (dict(channels=(8, 12)), "head_dim"),
    (dict(channels=(8, 18)), "channels"),
    (dict(channels=(8, 16.0)), "channels"), (dict(attention_levels=(2,)), "attention_levels"),
    (dict(up_attention_levels=(-1,)), "up_attention_levels"), (dict(head_dim=0), "head_dim"),
    (dict(mid_head_dim=5), "head_dim"), (dict(mid_groups=5), "groups"), (dict(time_width=7), "time_width"),
    (dict(prompt_width=-1), "prompt_width"), (dict(stem="patch"), "stem"),
    (dict(blocks_per_level=True), "blocks"),
    (dict(norm_eps=0), "norm_eps"), (dict(in_channels=0), "in_channels"),
])
def test_impossible_shapes_are_refused(change, field):
    with pytest.raises(NetworkConfigError, match=field):
        BackboneConfig.tiny(**change)


@pytest.mark.parametrize("config", [*SHAPES.values(), BackboneConfig.paper(), BackboneConfig.nano()])
def test_config_survives_json(config):
    assert BackboneConfig.from_json(config.to_json()) == config
    assert BackboneConfig.from_dict(config.to_dict()) == config == BackboneConfig(**config.to_dict())
    assert hash(BackboneConfig.from_json(config.to_json())) == hash(config)
    assert replace(config, in_channels=5).in_channels == 5


def test_unknown_keys_are_refused():
    with pytest.raises(NetworkConfigError, match="unknown key"):
        BackboneConfig.from_dict({"chanels": [8]})


# ---------------------------------------------------------------- what it computes

def test_time_embedding_is_the_closed_form():
    t, width = torch.tensor([0.0, 1.0, 12.5, 999.0]), 10
    rates = [10000 ** (-i / 5) for i in range(5)]
    wanted = [[f(float(x) * r) for f in (math.cos, math.sin) for r in rates] for x in t]
    torch.testing.assert_close(embed_time(t, width), torch.tensor(wanted), atol=1e-4, rtol=0)


def test_attention_is_softmax_over_all_places():
    block = shake(Attention(12, head_dim=4, groups=3, norm_eps=1e-5))
    x = torch.randn(2, 12, 3, 5, generator=torch.Generator().manual_seed(2))
    places = F.group_norm(x, 3, block.norm.weight, block.norm.bias).reshape(2, 12, 15)
    wanted = torch.zeros(2, 12, 15)
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        q, k, v = (torch.einsum("oc,bcn->bon", f.weight[rows], places) + f.bias[rows, None]
                   for f in (block.query, block.key, block.value))
        weight = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 2, dim=2)           # sqrt(head_dim) = 2
        wanted[:, rows] = torch.einsum("bnm,bcm->bcn", weight, v)
    wanted = torch.einsum("oc,bcn->bon", block.out.weight, wanted) + block.out.bias[:, None]
    torch.testing.assert_close(block(x), x + wanted.reshape(x.shape), atol=1e-5, rtol=1e-4)


def test_new_blocks_are_identities():
    block, x = ResBlock(8, 8, BackboneConfig.tiny()), torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(1, 32)), x)
    attention = Attention(8, 4, 4, 1e-5)
    assert torch.equal(attention(x), x)


def test_every_input_and_every_weight_counts():
    config = SHAPES["deep"]
    net, (sample, times, prompts) = shake(Backbone(config)), make_inputs(SHAPES["deep"])
    sample.requires_grad_(), prompts.requires_grad_()
    out = net(sample, times, prompts)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert sample.grad.abs().sum() > 0 and prompts.grad.abs().sum() > 0
    with torch.no_grad():
        assert not torch.allclose(out, net(sample, times + 1, prompts), atol=1e-6)


def test_new_network_learns():
    torch.manual_seed(0)
    net, config = Backbone(BackboneConfig.tiny()), BackboneConfig.tiny()
    sample, times, prompts = make_inputs(config)
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(25):
        loss = (net(sample, times, prompts) - sample).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("name", ["tiny", "deep"])
def test_cached_prompt_is_bit_exact(name):
    net, (sample, times, prompts) = shake(Backbone(SHAPES[name])), make_inputs(SHAPES[name])
    with torch.no_grad():
        cached = net(sample, times, prompt_embedding=net.encode_prompt(prompts))
        assert torch.equal(net(sample, times, prompts), cached)


def test_forms_of_time_and_prompt_agree():
    net, (sample, _, prompts) = shake(Backbone(SHAPES["tiny"])), make_inputs(SHAPES["tiny"])
    with torch.no_grad():
        out = net(sample, torch.tensor([500, 500]), prompts)
        for time in (500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500.0, 500.0])):
            torch.testing.assert_close(net(sample, time, prompts), out)
        torch.testing.assert_close(net(sample, 500, prompts.reshape(2, 4, 4)), out)     # (B, tokens, width)
        one = torch.cat([net(s[None], 500, p[None]) for s, p in zip(sample, prompts)])
    torch.testing.assert_close(one, out, atol=1e-5, rtol=1e-4)


def test_a_network_without_prompts_ignores_them():
    config = SHAPES["one level, no prompt"]
    net, (sample, times, _) = shake(Backbone(config)), make_inputs(config)
    with torch.no_grad():
        assert torch.equal(net(sample, times), net(sample, times, torch.randn(2, 77, 8)))


def test_unshuffling_is_the_same_as_a_network_on_four_channels():
    folded = BackboneConfig.tiny(stem="unshuffle2")
    net = shake(Backbone(folded))
    plain = Backbone(replace(folded, stem="conv", in_channels=4, out_channels=4))
    plain.load_state_dict(net.state_dict())
    sample, times, prompts = make_inputs(folded)
    with torch.no_grad():
        wanted = F.pixel_shuffle(plain(F.pixel_unshuffle(sample, 2), times, prompts), 2)
        torch.testing.assert_close(net(sample, times, prompts), wanted)


def test_residuals_are_added_to_skips_and_bottom():
    net, (sample, times, prompts) = shake(Backbone(SHAPES["tiny"])), make_inputs(SHAPES["tiny"])
    with torch.no_grad():
        made = net.encoder(net.encoder.open(sample), net.embed(times, prompts))
        nothing = tuple(torch.zeros_like(s) for s in made.skips), torch.zeros_like(made.mid)
        plain = net(sample, times, prompts)
        assert torch.equal(net(sample, times, prompts, residuals=nothing), plain)
        for k in range(len(made.skips) + 1):
            some = [*nothing[0], nothing[1]]
            some[k] = torch.ones_like(some[k])
            steered = net(sample, times, prompts, residuals=(tuple(some[:-1]), some[-1]))
            assert not torch.allclose(steered, plain)
        with pytest.raises(ValueError):
            net(sample, times, prompts, residuals=(nothing[0][:-1], nothing[1]))


def test_other_memory_and_number_formats():
    net, (sample, times, prompts) = shake(Backbone(SHAPES["tiny"])), make_inputs(SHAPES["tiny"])
    with torch.no_grad():
        out = net(sample, times, prompts)
        net = net.to(memory_format=torch.channels_last)
        last = net(sample.to(memory_format=torch.channels_last), times, prompts)
        torch.testing.assert_close(last, out, atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = net(sample, times, prompts)
        half = net.bfloat16()(sample.bfloat16(), times, prompts)
    scale = float(out.std())
    for other in (rough, half):
        assert other.dtype == torch.bfloat16 and float((other.float() - out).std()) < 0.05 * scale


def test_compiles_into_one_graph():
    net, (sample, times, prompts) = shake(Backbone(SHAPES["tiny"])), make_inputs(SHAPES["tiny"])
    with torch.no_grad():
        whole = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(sample, times, prompts), net(sample, times, prompts))
