"Denoising: exposures, the matched time, the recipe's batches and resume, restore and finetune from the shell, wrong inputs."
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from fluogen.cli.main import main
from fluogen.core import FluogenError, hash_array, make_rng
from fluogen.io.image import read_image, write_image
from fluogen.preprocessing.noise import NoiseModel
from fluogen.simulation.camera import EXPOSURES, TEST_EXPOSURES, expose, expose_training_levels
from fluogen.simulation.pairs import simulate_clean
from fluogen.preprocessing.anscombe import anscombe_input, anscombe_inverse, input_light, keep_low_frequencies
from fluogen.models.unet import Backbone
from fluogen.models.controlnet import ControlBranch, ControlConfig
from fluogen.diffusion.direct import DirectConfig, direct_loss, match_time, restore_direct
from fluogen.models.text_encoder import WordEncoder
from fluogen.diffusion.schedule import Schedule, ScheduleConfig
from fluogen.models.cards import CARD_KEYS
from fluogen.models.zoo import load_weights, save_weights
from fluogen.recipes import denoising as denoise
from fluogen.training.fit import TUNE_CONFIG
from fluogen.experiments.baselines import hide_pixels
from fluogen.training import learners
from fluogen.training.learners import ControlLearner
from fluogen.training.peft import PEFT, peft_name
from fluogen.datasets.pairs import UnusablePairError, judge_noisy_pair, match_scale, show_pair
from fluogen.datasets.pairs import read_pairs
from fluogen.tasks.finetune import finetune
from fluogen.tasks.restore import restore_image, restore_unit
from fluogen.tasks.restore import RestoreError, RestoreSettings
from fluogen.simulation.stream import SceneStream
from toys import PROMPTS, TINY, shake

SHORT = replace(TUNE_CONFIG, steps=4, batch=2, crop_px=32, validate_every=2, precision="fp32")


def save_denoiser(folder, seed=0):
    "Weights on disk that denoise, small and random."
    modules = {"backbone": shake(Backbone(TINY), seed, 0.1), "prompts": shake(WordEncoder(PROMPTS, TINY.prompt_width), seed)}
    config = {"task": "denoise", "scale": 1, "norm": "stabilise", "adaptation": "direct", "schedule": asdict(ScheduleConfig()),
              "direct": asdict(denoise.DENOISE), "modules": {"backbone": TINY.to_dict(), "prompts": modules["prompts"].config}}
    return save_weights(folder, {k: m.state_dict() for k, m in modules.items()}, config, dict.fromkeys(CARD_KEYS, "a test"), "fp32")


def save_sampler(folder, channels=3, seed=0):
    "Weights on disk with a control branch, small and random; of three channels for noisy images, of one for super-resolution."
    backbone = shake(Backbone(TINY), seed, 0.1)
    control = shake(ControlBranch.from_backbone(backbone, ControlConfig.from_backbone(
        TINY, condition_channels=channels, scale=1 if channels == 3 else 2, widths=(8,))), seed, 0.1)
    modules = {"backbone": backbone, "control": control, "prompts": shake(WordEncoder(PROMPTS, TINY.prompt_width), seed)}
    task = {"task": "denoise", "scale": 1, "norm": "stabilise"} if channels == 3 else {"task": "sr", "scale": 2, "norm": "percentile:0.1,99.9"}
    config = task | {"adaptation": "control", "schedule": asdict(ScheduleConfig()), "direct": None,
                     "modules": {"backbone": TINY.to_dict(), "control": control.config.to_dict(), "prompts": modules["prompts"].config}}
    return save_weights(folder, {k: m.state_dict() for k, m in modules.items()}, config, dict.fromkeys(CARD_KEYS, "a test"), "fp32")


def noisy_files(folder, n=5, size=64, photons=40, flaw=None):
    "Noisy and clean images of n scenes and their manifest; clean ones brighter, with another offset."
    clean, lines = simulate_clean("mitochondria", n, size, seed=1), []
    seen = expose(clean, photons, make_rng(0, "files"))
    for i in range(n):
        light = clean.target[i, 0].numpy() + 0.1
        write_image(folder / f"noisy{i}.tif", seen.counts[i, 0].numpy().astype(np.uint16))
        write_image(folder / f"clean{i}.tif", (300 + 5 * photons * light).astype(np.uint16))
        lines.append({"image": f"clean{i}.tif", "conditioning_image": f"noisy{i}.tif", "text": "", "group": f"cell{i}"})
    lines = flaw(lines) if flaw else lines
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "manifest.jsonl"


def test_light_comes_back_from_stable_values_without_bias():
    rng, noise = np.random.default_rng(0), NoiseModel(2.0, 2.0**2 - 200.0, (100, 900))
    truth = np.broadcast_to(np.linspace(105, 900, 96), (96, 96))
    frames = 100 + 2 * (rng.poisson((truth - 100) / 2, (60, 96, 96)) + rng.standard_normal((60, 96, 96)))
    planes, levels = anscombe_input(frames[0], noise)
    ends = [2 / noise.gain * np.sqrt(noise.gain * v + 0.375 * noise.gain**2 + noise.intercept) for v in (levels.dark, levels.white)]
    assert abs(ends[1] - ends[0] - 1 / levels.sigma) < 1e-6 and abs(ends[0] * levels.sigma - levels.bend) < 1e-6
    stable = np.mean([anscombe_input(f, noise)[1].to_counts(0) * 0 + (2 / noise.gain * np.sqrt(np.maximum(
        noise.gain * f + 0.375 * noise.gain**2 + noise.intercept, 0)) - ends[0]) * levels.sigma for f in frames], axis=0)
    back = levels.to_counts(anscombe_inverse(stable, levels.sigma, levels.bend))
    assert abs((back - truth)[:, 8:].mean()) < 1.0


def test_a_camera_without_photon_noise_is_a_straight_line():
    noise = NoiseModel(0.0, 25.0, (0, 100), 25.0)
    image = np.random.default_rng(1).normal(np.linspace(0, 400, 64), 5, (64, 64))
    planes, levels = anscombe_input(image, noise)
    np.testing.assert_allclose(levels.to_counts(anscombe_inverse(planes[0].astype(float), 0, levels.bend)), image, atol=0.1)


def test_exposures_of_the_test_lie_in_the_gaps():
    assert all(not low <= photons <= high for photons in TEST_EXPOSURES for low, high in EXPOSURES)
    seen = expose_training_levels(simulate_clean("cocci", 4, 32), make_rng(0, "x"))
    assert seen.condition.shape == (4, 3, 32, 32) and torch.equal(seen.condition, expose_training_levels(simulate_clean("cocci", 4, 32), make_rng(0, "x")).condition)
    with pytest.raises(FluogenError, match="no such exposure"):
        expose(simulate_clean("cocci", 1, 32), -1, make_rng(0))


@pytest.mark.parametrize("sigma", [0.02, 0.2, 1.5])
def test_the_time_matches_the_noise(sigma):
    schedule, clean = Schedule(), torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    t = match_time(torch.tensor([sigma]), schedule)
    perfect = lambda x, times, states: (schedule.signal(times) * (x - schedule.signal(times) * (2 * clean - 1)) / schedule.noise(times)
                                        - schedule.noise(times) * (2 * clean - 1))
    condition = torch.cat([noisy, 0 * noisy + sigma, 0 * noisy + 1e6], 1)
    restored = restore_direct(perfect, condition, None, schedule, denoise.DENOISE)
    torch.testing.assert_close(restored, 2 * clean - 1, atol=2e-3, rtol=0)
    assert abs(float(schedule.noise(t) / schedule.signal(t)) / 2 / sigma - 1) < 0.06
    loss = direct_loss(perfect, clean, condition, None, schedule, denoise.DENOISE)
    assert float(loss) < 1e-4


def test_super_resolution_is_what_it_was():
    "The default direct adaptation keeps its fixed time: two configurations, one path each."
    assert DirectConfig().matched is False and DirectConfig(**{"signal": 0.85, "scale": 2}) == DirectConfig()


def test_batches_are_a_function_of_seed_and_step():
    rounds = lambda: SceneStream(simulate_clean, 0, n=6)
    one, same, other = (denoise.denoise_batch(step, 0, 4, rounds()) for step in (3, 3, 4))
    assert torch.equal(one["condition"], same["condition"]) and not torch.equal(one["condition"], other["condition"])
    assert one["condition"].shape == (4, 3, 64, 64) and one["target"].shape == (4, 1, 64, 64)


def test_the_recipe_stops_and_goes_on(tmp_path, monkeypatch):
    save_denoiser(tmp_path / "base")
    monkeypatch.setattr(denoise, "score_denoise", lambda fitter, modules, **options: {"PSNR (dB), 5 photons": 1.0})
    monkeypatch.setattr(denoise, "SceneStream", lambda simulate, seed, n, device: SceneStream(simulate, seed, n=4, device=device))
    options = dict(base=str(tmp_path / "base"), steps=2, crops=2, device="cpu")
    made = denoise.train_denoise(tmp_path / "nano-denoise", tmp_path / "work", **options)
    weights = load_weights(str(made))
    assert weights.direct == denoise.DENOISE and weights.config["norm"] == "stabilise" and weights.config["scale"] == 1
    assert "photons 1.5 to 4" in (made / "card.md").read_text() and weights.config["base"]["name"] == "base"
    before = weights.config["sha256"]
    assert load_weights(str(denoise.train_denoise(tmp_path / "nano-denoise", tmp_path / "work", **options))).config["sha256"] == before


def test_the_recipe_of_samples_keeps_all_but_the_reading(tmp_path, monkeypatch):
    save_sampler(tmp_path / "sr", channels=1)
    monkeypatch.setattr(denoise, "score_denoise", lambda fitter, modules, **options: {"PSNR (dB), 5 photons": 1.0})
    monkeypatch.setattr(denoise, "SceneStream", lambda simulate, seed, n, device: SceneStream(simulate, seed, n=4, device=device))
    learner, given = denoise.add_branch(load_weights(str(tmp_path / "sr"))), load_weights(str(tmp_path / "sr"))
    assert torch.equal(learner.modules["control"].zero_mid.weight, given.control.zero_mid.weight) and learner.top is None
    assert learner.modules["control"].config.condition_channels == 3 and not learner.modules["control"].condition.last.weight.any()
    made = denoise.train_denoise(tmp_path / "samples", tmp_path / "work", base=str(tmp_path / "sr"), steps=1, crops=2, device="cpu",
                                 adaptation="control")
    weights = load_weights(str(made))
    assert weights.direct is None and weights.config["norm"] == "stabilise" and not weights.config.get("base")
    assert denoise.add_branch(weights).modules["control"].condition.last.weight.any()          # its own branch goes on whole


def test_light_of_a_sample_has_no_upper_end(tmp_path, monkeypatch):
    save_sampler(tmp_path / "toy")
    monkeypatch.setattr(learners, "keep_low_frequencies", lambda drawn, shown: drawn)
    condition, highest = torch.rand(1, 3, 32, 32), {}
    for light in (True, False):
        learner = ControlLearner(load_weights(str(tmp_path / "toy")), light=light)
        list(learner.modules["backbone"].parameters())[-1].data.fill_(-3)                        # of the last layer: far above white
        highest[light] = float(learner.restore(learner.modules, condition, [""], passes=2).max())
    assert highest[True] > 1 and highest[False] == 1


def test_a_sample_is_as_bright_as_the_recording_whatever_was_drawn(tmp_path):
    save_sampler(tmp_path / "toy", seed=5)
    weights, fields = load_weights(str(tmp_path / "toy")), expose(simulate_clean("nuclei", 2, 96), 200, make_rng(0, "bright"))
    settings, learner = RestoreSettings(samples=1, steps=2), ControlLearner(weights, light=True, passes=2)
    recorded = input_light(fields.condition)
    fitted = learner.restore(weights.modules, fields.condition, ["", ""])
    for i in range(2):
        found = restore_unit(fields.condition[i], weights, settings, hash_array(fields.condition[i].numpy()))
        assert torch.allclose(found, fitted[i, 0], atol=1e-4)
        for part in ((slice(0, 48), slice(0, 96)), (slice(48, 96), slice(0, 96))):
            assert abs(found[part].mean() - recorded[i, 0][part].mean()) < 0.05, part
        assert (found - recorded[i, 0]).std() > 0.03, "a drawn sample, not the recording"


def test_light_is_held_only_as_finely_as_the_recording_tells_it():
    truth = torch.full((1, 1, 64, 64), 0.5)
    fine = 0.1 * torch.where(torch.arange(64) % 16 < 8, 1.0, -1.0)
    left = []
    for sigma in (0.02, 0.15, 0.8):
        shown = torch.cat([truth, torch.full_like(truth, sigma), torch.full_like(truth, 1e4)], 1)          # a straight line: light is shown
        held = keep_low_frequencies(truth + 0.2 + fine, shown)
        assert abs(held.mean() - truth.mean()) < 1e-3
        left.append(float((held - truth).std()))
    assert left[0] < left[1] < left[2] and left[0] < 0.05 and left[2] > 0.095


def test_noisy_images_are_restored_by_samples(tmp_path):
    save_sampler(tmp_path / "toy")
    manifest, weights = noisy_files(tmp_path, 5), load_weights(str(tmp_path / "toy"))
    image = read_image(tmp_path / "noisy0.tif")
    one, two = (restore_image(image, weights, RestoreSettings(samples=2, steps=2, seed=seed)) for seed in (0, 1))
    assert one.array.shape == image.array.shape and np.isfinite(one.array).all() and not np.array_equal(one.array, two.array)
    with pytest.raises(RestoreError, match="not a mean"):
        restore_image(image, weights)
    made = finetune(manifest, "mine", base=str(tmp_path / "toy"), samples=True, task="denoise", work=tmp_path / "work", out=tmp_path, config=SHORT,
                 device="cpu", log=lambda line: None, progress=False)
    assert np.isfinite(made.after) and "control" in load_weights(str(tmp_path / "mine")).modules
    assert main(["restore", str(tmp_path / "noisy0.tif"), str(tmp_path / "out.tif"), "--model", str(tmp_path / "mine"), "--samples", "1",
                 "--passes", "1"]) == 0


def test_a_noisy_image_is_restored_from_the_shell(tmp_path, capsys):
    save_denoiser(tmp_path / "toy")
    noisy_files(tmp_path, 1)
    command = ["restore", str(tmp_path / "noisy0.tif"), str(tmp_path / "out.tif"), "--task", "denoise", "--model", str(tmp_path / "toy")]
    assert main([*command, "--camera", "2,100,1.6"]) == 0
    out, noisy = read_image(tmp_path / "out.tif"), read_image(tmp_path / "noisy0.tif")
    assert out.array.shape == noisy.array.shape and out.metadata["fluogen"]["camera"] == [2.0, 100.0, 1.6]
    assert abs(np.median(out.array) - np.median(noisy.array)) < 30                      # counts, not [0, 1]
    assert main([*command[:2], str(tmp_path / "estimated.tif"), *command[3:]]) == 0
    write_image(tmp_path / "smooth.tif", np.outer(np.arange(64), np.arange(64)).astype(np.uint16))
    for wrong, said in (([str(tmp_path / "smooth.tif"), str(tmp_path / "o.tif"), *command[3:]], "--camera"),
                        ([*command[1:2], str(tmp_path / "o.tif"), *command[3:], "--samples", "2"], "mean, not samples"),
                        ([*command[1:2], str(tmp_path / "o.tif"), *command[3:], "--camera", "0,100,1"], "camera: setting out of range")):
        capsys.readouterr()
        assert main(["restore", *wrong]) == 2
        assert said in (error := capsys.readouterr().err.strip().splitlines()[-1]), error


def test_a_denoiser_is_tuned_on_pairs_of_two_scales(tmp_path):
    save_denoiser(tmp_path / "toy")
    manifest, said = noisy_files(tmp_path), []
    made = finetune(manifest, "mine", base=str(tmp_path / "toy"), work=tmp_path / "work", out=tmp_path, config=SHORT, device="cpu",
                 log=said.append, task="denoise")
    assert load_weights(str(tmp_path / "mine")).direct.matched and made.n_train == 4 and made.n_held == 1
    with pytest.raises(FluogenError, match="weights of another task"):
        finetune(manifest, "mine", base=str(tmp_path / "toy"), out=tmp_path, work=tmp_path / "w2", task="sr")


def test_a_repeated_frame_is_left_out(tmp_path):
    manifest = noisy_files(tmp_path, 3, flaw=lambda lines: lines + [dict(lines[0], conditioning_image="copy.tif")])
    (tmp_path / "copy.tif").write_bytes((tmp_path / "noisy0.tif").read_bytes())
    pairs, notes = read_pairs(manifest, 1, "stabilise")
    assert len(set(pairs.groups)) == 3 and len(pairs) == 3 and any("pixel for pixel" in note for note in notes)


def wrong_pairs():
    rng = np.random.default_rng(3)
    clean = simulate_clean("factin", 1, 96, seed=2)
    noisy = expose(clean, 30, make_rng(0)).counts[0, 0].numpy().astype(np.uint16)
    good = (100 + 300 * clean.target[0, 0].numpy()).astype(np.uint16)
    return {"noisier than the input": (good, noisy), "same pixels": (noisy, noisy), "differ in size": (noisy, good[:80]),
            "lies beside": (noisy[:, 5:], good[:, :-5]), "not a plane": (np.stack([noisy] * 3), good),
            "constant": (noisy, np.full_like(good, 7)), "nothing in common": (rng.poisson(30, good.shape).astype(np.uint16), good[::-1])}


@pytest.mark.parametrize("said, pair", wrong_pairs().items())
def test_wrong_pairs_are_one_line(said, pair):
    with pytest.raises(UnusablePairError, match=said) as caught:
        judge_noisy_pair(*pair, "7.tif")
    assert "\n" not in str(caught.value) and "7.tif" in str(caught.value)


def test_scales_are_matched_without_bias_by_noise():
    rng = np.random.default_rng(0)
    clean = rng.uniform(0, 1000, (128, 128))
    noisy = 0.2 * clean + 50 + rng.normal(0, 30, clean.shape)
    _, gain, offset = match_scale(noisy, clean)
    assert abs(gain - 0.2) < 0.003 and abs(offset - 50) < 1.5
    target, condition = show_pair(noisy, clean, NoiseModel(0.0, 900.0, (0, 300), 900.0))
    assert target.shape == (1, 128, 128) and condition.shape == (3, 128, 128)


def test_hidden_pixels_never_show_themselves():
    stable = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    shown, hidden = hide_pixels(stable, torch.Generator().manual_seed(2))
    assert bool((shown == stable)[~hidden].all()) and 0.01 < float(hidden.float().mean()) < 0.03
    assert float((shown == stable)[hidden].float().mean()) < 0.05           # reflection at the border may land on itself


def test_the_camera_is_known():
    noise = expose(simulate_clean("cocci", 1, 32), 9, make_rng(0), read_noise=1.5).setups[0].camera.noise_model()
    assert abs(float(noise.predict_variance(100 + 2 * 9)) - (4 * (9 + 1.5**2) + 1 / 12)) < 1e-6


@pytest.mark.parametrize("way", ["norm", "lora", "l2sp", "norms", "low-rank", "anchored"])
def test_tuning_with_fewer_trainable_weights_leaves_plain_weights(tmp_path, way):
    save_denoiser(tmp_path / "toy")
    finetune(noisy_files(tmp_path, 4), "mine", base=str(tmp_path / "toy"), work=tmp_path / "work", out=tmp_path, task="denoise",
          config=replace(SHORT, lr=1e-2, wise_ft_weight=1.0), device="cpu", log=lambda line: None, **{"peft" if way in PEFT else "free": way})
    before, after = (load_weights(str(tmp_path / name)).modules["backbone"].state_dict() for name in ("toy", "mine"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    kernels = {name for name in moved if before[name].ndim > 1}
    assert moved and bool(kernels) == (peft_name(way) != "norm")


def test_an_unknown_way_of_tuning_is_one_line(tmp_path):
    save_denoiser(tmp_path / "toy")
    with pytest.raises(FluogenError, match="no such way of tuning .found half, expected all, norm, lora, l2sp"):
        finetune(noisy_files(tmp_path, 2), "mine", base=str(tmp_path / "toy"), out=tmp_path, task="denoise", peft="half", log=lambda line: None)
