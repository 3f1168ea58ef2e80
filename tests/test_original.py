"Checkpoints of the original code: same numbers, or one line that says what does not fit."
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluogen.models.convert import OriginalError, original_name, read_tensors, translate_config
from fluogen.models.convert import IntervalHeads, import_original
from fluogen.diffusion.samplers import sample_ddim
from fluogen.diffusion.schedule import Schedule, trailing_grid

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "original_checkpoint"
WEIGHTS = "diffusion_pytorch_model.safetensors"

needs_fixture = pytest.mark.skipif(
    not FIXTURE.is_dir(), reason="no ../shared/fixtures/original_checkpoint beside the repository")


# ---------------------------------------------------------------- against the original code

@pytest.fixture(scope="module")
def original():
    return import_original(FIXTURE), load_file(FIXTURE / "io.safetensors")


@needs_fixture
def test_networks_compute_what_the_original_computed(original):
    models, io = original
    inputs = io["sample"], io["timestep"], io["prompt_states"]
    with torch.no_grad():
        residuals = models.control(*inputs, io["condition"])
        found = {"unet_output": models.backbone(*inputs),
                 "controlled_output": models.backbone(*inputs, residuals),
                 "interval_output": torch.cat(models.intervals(*inputs, residuals=residuals), dim=1)}
    for name, value in found.items():
        assert value.shape == io[name].shape and float((value - io[name]).abs().max()) < 1e-4, name
    assert float((io["unet_output"] - io["controlled_output"]).abs().max()) > 0.1


@needs_fixture
def test_chain_of_ten_ddim_steps(original):
    models, io = original
    schedule = Schedule(models.schedule)
    assert trailing_grid(schedule, models.scheduler["steps"]) == io["ddim_timesteps"].tolist()
    torch.testing.assert_close(schedule.abar.float(), io["alphas_cumprod_zero_snr"], atol=1e-6, rtol=0)
    prompts = io["prompt_states"]
    cached = dict(prompt_embedding=models.control.encode_prompt(prompts),
                  condition_embedding=models.control.encode_condition(io["condition"]))

    def predict(x, t):
        return models.backbone(x, t, residuals=models.control(x, t, **cached),
                               prompt_embedding=models.backbone.encode_prompt(prompts))
    with torch.no_grad():
        out = sample_ddim(predict, io["ddim_init"], schedule, trailing_grid(schedule, 10))
    assert float((out - io["ddim_output"]).abs().max()) < 1e-4


@needs_fixture
def test_bottom_heads_of_the_branch_have_one_channel(original):
    models, io = original
    assert models.control.config.backbone.mid_head_dim == 1
    attention = models.control.encoder.mid_attention
    attention.head_dim = models.backbone.encoder.mid_attention.head_dim
    inputs = io["sample"], io["timestep"], io["prompt_states"]
    with torch.no_grad():
        wrong = models.backbone(*inputs, residuals=models.control(*inputs, io["condition"]))
    attention.head_dim = 1
    assert float((wrong - io["controlled_output"]).abs().max()) > 2e-4          # right: 3e-6


@needs_fixture
@pytest.mark.parametrize("name, attribute", [("unet", "backbone"), ("controlnet", "control"),
                                             ("uncertainty", "intervals")])
def test_one_folder_alone(name, attribute):
    models = import_original(FIXTURE / name)
    present = [a for a in ("backbone", "control", "intervals") if getattr(models, a) is not None]
    assert present == [attribute] and models.scheduler is None and models.schedule.objective == "v"


# ---------------------------------------------------------------- other shapes, written from the format's rules

def write_names(config):
    "Every tensor of the format with its shape, from the format's rules and not from our tables."
    channels, n, shapes = config["block_out_channels"], config["layers_per_block"], {}
    control, time = config["_class_name"] == "ControlNetModel", 4 * config["block_out_channels"][0]

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def resnet(name, n_in, n_out):
        layer(f"{name}.norm1", n_in), layer(f"{name}.conv1", n_out, n_in, 3, 3)
        layer(f"{name}.time_emb_proj", n_out, time), layer(f"{name}.norm2", n_out)
        layer(f"{name}.conv2", n_out, n_out, 3, 3)
        if n_in != n_out:
            layer(f"{name}.conv_shortcut", n_out, n_in, 1, 1)

    def attention(name, width):
        layer(f"{name}.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{name}.{part}", width, width)

    layer("conv_in", channels[0], config["in_channels"], 3, 3)
    layer("time_embedding.linear_1", time, channels[0]), layer("time_embedding.linear_2", time, time)
    if config["use_prompt"]:
        layer("prompt_embedding.0", time, config["encoder_size"]), layer("prompt_embedding.2", time, time)
    width, skips = channels[0], [channels[0]]
    for i, out in enumerate(channels):
        for j in range(n):
            resnet(f"down_blocks.{i}.resnets.{j}", width, out)
            if config["down_block_types"][i] == "AttnDownBlock2D":
                attention(f"down_blocks.{i}.attentions.{j}", out)
            width = out
            skips.append(out)
        if i < len(channels) - 1:
            layer(f"down_blocks.{i}.downsamplers.0.conv", out, out, 3, 3)
            skips.append(out)
    for j in range(2):
        resnet(f"mid_block.resnets.{j}", width, width)
    if config["add_attention"]:
        attention("mid_block.attentions.0", width)
    if control:
        wide = config["conditioning_embedding_out_channels"]
        layer("controlnet_cond_embedding.conv_in", wide[0], config["conditioning_channels"], 3, 3)
        for i, (a, b) in enumerate(zip(wide, wide[1:])):
            layer(f"controlnet_cond_embedding.blocks.{2 * i}", a, a, 3, 3)
            layer(f"controlnet_cond_embedding.blocks.{2 * i + 1}", b, a, 3, 3)
        layer("controlnet_cond_embedding.conv_out", channels[0], wide[-1], 3, 3)
        for i, skip in enumerate(skips):
            layer(f"controlnet_down_blocks.{i}", skip, skip, 1, 1)
        layer("controlnet_mid_block", width, width, 1, 1)
        return shapes
    for i, out in enumerate(channels[::-1]):
        for j in range(n + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", width + skips.pop(), out)
            if config["up_block_types"][i] == "AttnUpBlock2D":
                attention(f"up_blocks.{i}.attentions.{j}", out)
            width = out
        if i < len(channels) - 1:
            layer(f"up_blocks.{i}.upsamplers.0.conv", out, out, 3, 3)
    layer("conv_norm_out", width)
    for head in ("conv_out", *(("lower", "upper") if config["_class_name"] == "UNet2DUncertainty" else ())):
        layer(head, config["out_channels"], width, 3, 3)
    return shapes


def make_config(kind="UNet2DModel", channels=(8, 16), attention=(1,), up_attention=None, **changes):
    ups = attention if up_attention is None else up_attention
    config = {"_class_name": kind, "_diffusers_version": "0.30.0", "in_channels": 1, "out_channels": 1,
              "block_out_channels": list(channels), "layers_per_block": 1, "norm_num_groups": 4,
              "norm_eps": 1e-5, "dropout": 0.0, "attention_head_dim": 8, "add_attention": True,
              "use_prompt": True, "encoder_size": 24,
              "down_block_types": [f"{'Attn' * (i in attention)}DownBlock2D" for i in range(len(channels))],
              "up_block_types": [f"{'Attn' * (i in ups)}UpBlock2D" for i in range(len(channels))][::-1]}
    if kind == "ControlNetModel":
        config |= {"conditioning_channels": 3, "conditioning_embedding_out_channels": [4, 6, 10]}
    return config | changes


def write_network(folder, config, seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    names = write_names(config)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | extra, folder / WEIGHTS)
    return tensors


SHAPES = {
    "four levels, two blocks": dict(channels=(8, 8, 16, 24), attention=(1, 3), layers_per_block=2),
    "attention everywhere": dict(channels=(8, 16, 16), attention=(0, 1, 2), attention_head_dim=4),
    "attention up only": dict(attention=(), up_attention=(0,)),
    "no attention at all": dict(attention=(), add_attention=False, attention_head_dim=5),
    "no prompt": dict(use_prompt=False, encoder_size=None),
    "wide prompt": dict(encoder_size=77 * 12),
    "one level": dict(channels=(12,), attention=(), attention_head_dim=3, norm_num_groups=3),
    "two channels": dict(in_channels=2, norm_num_groups=2, norm_eps=1e-6),
    "one head": dict(attention_head_dim=None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_load_whole(name, tmp_path):
    config = make_config(**SHAPES[name])
    tensors = write_network(tmp_path / "unet", config)
    heads = write_network(tmp_path / "heads", make_config("UNet2DUncertainty", **SHAPES[name]), seed=1)
    branch = write_network(tmp_path / "controlnet", make_config("ControlNetModel", **SHAPES[name]), seed=2)
    models = import_original(tmp_path)
    for network, wanted in ((models.backbone, tensors), (models.intervals, heads), (models.control, branch)):
        found = {original_name(key): value for key, value in network.state_dict().items()}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert not network.training and all(p.device.type == "cpu" for p in network.parameters())
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, config["in_channels"], 16, 24, generator=generator)
    prompts = torch.randn(2, config["encoder_size"] or 7, generator=generator)
    condition = torch.rand(2, 3, 11, 9, generator=generator)                    # resized to the sample's size
    with torch.no_grad():
        residuals = models.control(sample, torch.tensor([1, 900]), prompts, condition)
        plain = models.backbone(sample, torch.tensor([1, 900]), prompts)
        steered = models.backbone(sample, torch.tensor([1, 900]), prompts, residuals)
        three = models.intervals(sample, torch.tensor([1, 900]), prompts, residuals=residuals)
    assert plain.shape == steered.shape == three.lower.shape == three.prediction.shape == three.upper.shape
    assert not torch.allclose(plain, steered, atol=1e-6)
    assert not torch.allclose(three.lower, three.upper, atol=1e-6)


def test_prediction_of_the_heads_is_the_backbone(tmp_path):
    tensors = write_network(tmp_path, make_config("UNet2DUncertainty"))
    models = import_original(tmp_path)
    assert isinstance(models.intervals, IntervalHeads) and models.backbone is None
    sample, prompts = torch.randn(1, 1, 8, 8), torch.randn(1, 24)
    with torch.no_grad():
        three, one = models.intervals(sample, 10, prompts), models.intervals.backbone(sample, 10, prompts)
        features = models.intervals.backbone.features(sample, 10, prompts)
        lower = torch.nn.functional.conv2d(features, tensors["lower.weight"], tensors["lower.bias"],
                                           padding=1)
    torch.testing.assert_close(three.prediction, one)
    torch.testing.assert_close(three[0], lower)


def test_half_precision_is_read_as_float32_and_outlives_the_file(tmp_path):
    tensors = write_network(tmp_path, make_config())
    models = import_original(tmp_path)
    half = {k: v.half() if "conv" in k else v.bfloat16() for k, v in tensors.items()}
    with open(tmp_path / WEIGHTS, "r+b") as file:                               # over the file that was read
        file.write(b"\x7f" * (tmp_path / WEIGHTS).stat().st_size)
    state = {original_name(k): v for k, v in models.backbone.state_dict().items()}
    assert all(torch.equal(state[k], tensors[k]) for k in tensors)
    save_file(half, tmp_path / WEIGHTS)
    state = {original_name(k): v for k, v in import_original(tmp_path).backbone.state_dict().items()}
    assert all(v.dtype == torch.float32 and torch.equal(v, half[k].float()) for k, v in state.items())


def test_scheduler_is_found_and_translated(tmp_path):
    write_network(tmp_path / "unet", make_config())
    (tmp_path / "scheduler").mkdir()
    told = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "beta_end": 0.01}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    write_network(tmp_path / "unet_ema", make_config(), seed=4)
    models = import_original(tmp_path)
    assert models.scheduler == told
    schedule = models.schedule
    assert (schedule.objective, schedule.zero_snr, schedule.beta_end) == ("eps", False, 0.01)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "squaredcos_cap_v2"}')
    with pytest.raises(OriginalError, match="unsupported scheduler"):
        import_original(tmp_path).schedule


# ---------------------------------------------------------------- refused

def expect(words, folder):
    with pytest.raises(OriginalError, match=words) as error:
        import_original(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (dict(act_fn="gelu"), "act_fn: unsupported setting"),
    (dict(time_embedding_type="fourier"), "time_embedding_type"),
    (dict(downsample_padding=0), "downsample_padding"), (dict(freq_shift=1), "freq_shift"),
    (dict(down_block_types=["DownBlock2D", "ResnetDownsampleBlock2D"]), "found ResnetDownsampleBlock2D"),
    (dict(down_block_types=["DownBlock2D"]), "one block type for each level"),
    (dict(block_out_channels=None), "missing"),
    (dict(norm_num_groups=5), "multiples of groups = 5"), (dict(norm_num_groups=None), "groups"),
    (dict(attention_head_dim=3), "head_dim"),
    (dict(encoder_size=25), "prompt_embedding.0.weight: wrong shape"),
    (dict(use_prompt=False), "found prompt_embedding.0.bias"),
    (dict(layers_per_block="2"), "blocks_per_level"),
    (dict(layers_per_block=2), "tensor missing"), (dict(add_attention=False), "unknown tensor"),
])
def test_configurations_that_do_not_fit(change, words, tmp_path):
    config = make_config()
    write_network(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    expect(words, tmp_path)


def test_first_wrong_tensor_is_named(tmp_path):
    config = make_config()
    tensors = write_network(tmp_path, config, zebra=torch.zeros(1), extra=torch.zeros(1))
    expect(r"unknown tensor \(found extra\)", tmp_path)
    save_file({k: v for k, v in tensors.items() if k != "conv_out.bias"}, tmp_path / WEIGHTS)
    expect(r"tensor missing \(found conv_out.bias\)", tmp_path)
    save_file(tensors | {"conv_in.weight": torch.zeros(8, 2, 3, 3)}, tmp_path / WEIGHTS)
    expect(r"conv_in.weight: wrong shape \(found \(8, 2, 3, 3\), expected \(8, 1, 3, 3\)\)", tmp_path)


@pytest.mark.parametrize("bad, words", [(torch.tensor([float("nan")]), "NaN"),
                                        (torch.tensor([float("inf")]), "NaN or inf"),
                                        (torch.tensor([1]), "found I64"),
                                        (torch.tensor([True]), "found BOOL")])
def test_bad_numbers_are_refused(bad, words, tmp_path):
    write_network(tmp_path, make_config(), **{"conv_out.bias": bad})
    expect(f"conv_out.bias: .*{words}", tmp_path)


def test_damaged_files_are_refused(tmp_path):
    write_network(tmp_path, make_config())
    whole = (tmp_path / WEIGHTS).read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:200], whole[:4], b"", b"\xff" * 8 + whole[8:],
                    b"{}" * 40):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        expect("not a complete safetensors file", tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    assert len(read_tensors(tmp_path / WEIGHTS)) == len(write_names(make_config()))
    for text in ("", "{", "[1]", '{"_class_name": "UNet2DModel"}'):
        (tmp_path / "config.json").write_text(text)
        expect("JSON|missing or not a list", tmp_path)


def test_pickles_and_empty_folders_are_refused(tmp_path):
    expect("no network in the original's format", tmp_path)
    expect("no network in the original's format", tmp_path / "nowhere")
    write_network(tmp_path / "unet", make_config())
    (tmp_path / "unet" / WEIGHTS).unlink()
    expect("no weights", tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    expect("pickle, which is never opened", tmp_path)


def test_networks_that_do_not_belong_together(tmp_path):
    write_network(tmp_path / "unet", make_config())
    write_network(tmp_path / "other", make_config())
    expect("two networks for backbone", tmp_path)
    write_network(tmp_path / "other", make_config("ControlNetModel", channels=(8, 16, 16)))
    expect("steers another backbone", tmp_path)


def test_the_trap_of_the_branch():
    unet, branch = (translate_config(make_config(kind)) for kind in ("UNet2DModel", "ControlNetModel"))
    assert unet.mid_attention_numbers["head_dim"] == 8 and branch.mid_attention_numbers["head_dim"] == 1
    assert translate_config(make_config(attn_norm_num_groups=2)).mid_attention_numbers["groups"] == 2
