"Intervals of a denoiser: fields at every exposure, heads that count in noise, the promise on counts, its refusals."
import json
import shutil
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_denoise import noisy_files, save_denoiser, save_sampler
from toys import CARD, TINY

from fluogen.simulation.camera import PHOTONS

from fluogen.simulation.camera import true_counts

from fluogen.simulation.camera import expose_log_uniform

from fluogen.cli.main import main
from fluogen.core import make_rng
from fluogen.io.image import Image, read_image, write_image
from fluogen.simulation.camera import EXPOSURES
from fluogen.simulation.pairs import simulate_clean
from fluogen.datasets.registry import load_dataset
from fluogen.preprocessing.anscombe import noise_of_light
from fluogen.models.unet import Backbone
from fluogen.models.quantile_heads import HeadsConfig, QuantileHeads, noise_scale, restore_direct_interval
from fluogen.models.zoo import list_weights, load_weights, save_weights
from fluogen.recipes import interval_heads as exposed, interval_heads as heads
from fluogen.tasks.intervals import calibrate_source, load_interval_restorer, read_field
from fluogen.tasks.intervals import as_shown, calibrate_fields, field_sets, load_heads, measured_unit, restore_sets
from fluogen.datasets.pairs import UnusablePairError
from fluogen.tasks.restore import restore_unit
from fluogen.simulation.stream import SceneStream
from fluogen.tasks.restore import RestoreSettings
from fluogen.uncertainty.calibration import save_calibration
from fluogen.uncertainty.calibration import CalibrationError

CAMERA = (2.2, 100.0, 1.6)


def draw_fields(n, seed=0, photons=None, size=64):
    clean = simulate_clean(("nuclei", "mitochondria"), n, size, seed=seed, split="validation")
    return exposed.exposed_fields(clean, make_rng(seed, "fields"), photons, f"seed{seed}")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "(folder, weights, heads): answers hardly changed, heads that say 0.1 of the noise everywhere."
    folder = save_denoiser(tmp_path_factory.mktemp("weights") / "toy")
    weights = load_weights(str(folder))
    for part in (weights.backbone.head.weight, weights.backbone.head.bias):
        torch.nn.init.zeros_(part)
    config = {key: weights.config[key] for key in ("task", "scale", "norm", "adaptation", "schedule", "direct", "modules")}
    save_weights(folder, {k: m.state_dict() for k, m in weights.modules.items()}, config, CARD, "fp32")
    own = QuantileHeads(HeadsConfig.from_backbone(TINY))
    save_weights(folder.parent / "toy-heads", {"heads": own.state_dict()}, {"task": "interval", "modules": {"heads": own.config.to_dict()}},
                 CARD, base=str(folder))
    weights = load_weights(str(folder))
    return folder, weights, load_heads(weights, str(folder))


@pytest.fixture(scope="module")
def calibration(toy):
    _, weights, own = toy
    return calibrate_fields(draw_fields(40), weights, alpha=0.2, heads=own)


# ---- fields

def test_every_exposure_and_the_same_scale():
    clean = simulate_clean("nuclei", 30, 64, seed=2)
    seen = expose_log_uniform(clean, make_rng(0, "x"))
    photons = np.array([setup.photons for setup in seen.setups])
    low, high = PHOTONS
    assert photons.min() < 3 * low and photons.max() > high / 3 and ((photons >= low) & (photons <= high)).all()
    truth = true_counts(clean, seen)
    noise = seen.counts[:, 0].numpy() - truth
    assert np.abs(noise.mean((1, 2)) / noise.std((1, 2)) * 64).max() < 4.5             # mean 0, up to its own standard error
    fields = exposed.exposed_fields(clean, make_rng(0, "x"))
    assert np.array_equal(fields[0].counts, seen.counts[0, 0].numpy()) and np.allclose(fields[0].target, truth[0])
    assert len({f.group for f in fields}) == len(fields)
    assert {round(s.photons) for s in expose_log_uniform(clean, make_rng(0, "x"), 20).setups} == {20}


def test_an_image_whose_noise_is_unknown_is_left_out(monkeypatch):
    clean, calls = simulate_clean("nuclei", 4, 64, seed=2), []

    def refuse_second(counts, estimate=exposed.estimate_noise):
        calls.append(0)
        if len(calls) == 2:
            raise exposed.NoiseError("neighbouring pixels share their noise")
        return estimate(counts)
    monkeypatch.setattr(exposed, "estimate_noise", refuse_second)
    assert [f.group[-1] for f in exposed.exposed_fields(clean, make_rng(0, "x"))] == ["0", "2", "3"]


def test_batches_are_of_training_exposures_and_repeat():
    rounds = SceneStream(simulate_clean, 0, n=8)
    batch, again = (exposed.exposed_batch(3, 1, 5, rounds) for _ in range(2))
    assert torch.equal(batch["condition"], again["condition"]) and batch["target"].shape == (5, 1, 128, 128) and len(batch["prompts"]) == 5
    assert not torch.equal(batch["condition"], exposed.exposed_batch(4, 1, 5, rounds)["condition"])
    assert all(low < high for low, high in EXPOSURES)


# ---- heads

def test_noise_of_light_is_that_of_the_camera():
    rng = make_rng(0, "noise")
    for photons, read in ((4, 1.0), (400, 0.0)):
        truth = np.linspace(0.2, 1, 4000)[None] * photons
        light = lambda counts: (counts - 0.1 * photons) / (0.9 * photons)                     # dark 0.1, white 1
        seen = light(rng.poisson(truth, (300, 4000)) + read * rng.standard_normal((300, 4000)))
        ends = 2 * np.sqrt(np.array([0.1, 1]) * photons + 0.375 + read**2)
        sigma, bend = 1 / (ends[1] - ends[0]), ends[0] / (ends[1] - ends[0])
        ratio = seen.std(0) / noise_of_light(light(truth)[0], sigma, bend)
        assert ratio.mean() == pytest.approx(1, abs=0.04) and ratio[:400].mean() == pytest.approx(1, abs=0.08)
    straight = noise_of_light(torch.tensor([0.0, 1.0]), torch.tensor(0.3), torch.tensor(1e4))
    assert torch.allclose(straight, torch.tensor(0.3), rtol=1e-3)                             # no photon noise: one width everywhere


def test_heads_count_in_the_noise_of_each_pixel(toy):
    _, weights, own = toy
    unit = measured_unit(draw_fields(1, 7, photons=20)[0].counts, weights)[None]
    states = weights.prompts.encode([""])
    with torch.no_grad():
        x0, maps = restore_direct_interval(weights.backbone, own.heads, unit, states, weights.schedule, weights.direct)
    assert torch.allclose(maps["below"], 0.1 * noise_scale(x0, unit), rtol=1e-3)
    bright = x0 > x0.mean()
    assert maps["below"][bright].mean() > 1.2 * maps["below"][~bright].mean()


def test_the_restored_plane_is_that_without_intervals_and_light_has_no_end(toy):
    _, weights, own = toy
    unit = measured_unit(draw_fields(1, 8, photons=5)[0].counts, weights)
    for settings in (RestoreSettings(), RestoreSettings(tile_px=32, overlap_px=8)):
        mean, lower, upper = restore_sets(unit, weights, settings, heads=own)
        assert torch.equal(mean, restore_unit(unit, weights, settings)) and bool((lower < mean).all() and (mean < upper).all())
    assert mean.max() > 1


def test_only_heads_learn_and_the_loss_counts_in_noise(toy):
    _, weights, _ = toy
    fitter = heads.HeadsLearner(weights)
    batch = exposed.exposed_batch(0, 0, 2, SceneStream(simulate_clean, 0, n=4))
    fitter.loss(fitter.modules, batch, torch.Generator().manual_seed(0)).backward()
    assert fitter.noisy and all(p.grad is not None for p in fitter.modules.parameters())
    assert all(p.grad is None for net in weights.modules.values() for p in net.parameters())
    features, x0, truth, scale = fitter.look(batch, weights.prompts.encode(["", ""]), None)
    assert torch.equal(scale, noise_scale(x0, batch["condition"])) and isinstance(weights.backbone, Backbone)
    assert ((truth - x0) / scale).abs().median() < 3                                        # errors of the size of the noise, at any exposure


# ---- the promise

def test_the_promise_holds_on_counts_to_come(toy, calibration):
    _, weights, own = toy
    losses = [float(((y < low) | (y > high)).mean()) for lower, mean, upper, y in field_sets(draw_fields(30, 5), weights, RestoreSettings(), own, "quantile")
              for low, high in [calibration.interval(lower, mean, upper, None)]]
    assert np.mean(losses) <= 0.2 and calibration.facts["normalisation"] == "stabilise, noise estimated"
    assert calibration.facts["task"] == "denoise" and calibration.facts["steps"] == 1


def test_truth_is_brought_to_the_scale_of_the_answer(toy):
    _, weights, _ = toy
    field = draw_fields(1, 9, photons=200)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                                          # hundreds of fields, hundreds of notes
        (unit, light), (_, other) = as_shown(field, weights), as_shown(field, weights, RestoreSettings(camera=CAMERA))
    assert np.percentile(light, 99.9) == pytest.approx(1, abs=0.15) and abs(np.percentile(light, 1)) < 0.1 and unit.shape == (3, 64, 64)
    slope, offset = np.polyfit(field.target.ravel(), light.ravel(), 1)
    assert np.allclose(slope * field.target + offset, light, atol=1e-4) and other.shape == light.shape


def test_another_camera_prompt_or_samples_are_refused(toy, calibration, tmp_path):
    folder, weights, own = toy
    save_calibration(calibration, tmp_path / "c.json")
    system = load_interval_restorer(weights, RestoreSettings(), tmp_path / "c.json", str(folder))
    film = Image(draw_fields(1, 11, photons=30)[0].counts.astype(np.uint16), "YX")
    restored, lower, upper = system.restore(film)
    assert (lower.array < restored.array).all() and (restored.array < upper.array).all() and abs(restored.array.mean() - film.array.mean()) < 5
    for settings, what in ((RestoreSettings(camera=CAMERA), "normalisation"), (RestoreSettings(prompt=weights.prompts.config["prompts"][0]), "prompt")):
        with pytest.raises(CalibrationError, match=f"another {what}"):
            load_interval_restorer(weights, settings, tmp_path / "c.json", str(folder))
    with pytest.raises(CalibrationError, match="super-resolution and denoising"):
        restore_sets(torch.rand(3, 8, 8), replace(weights, config=weights.config | {"task": "mask2image"}), heads=own)


def test_own_noisy_pairs_on_any_scale(toy, tmp_path):
    _, weights, own = toy
    path = noisy_files(tmp_path, 24)
    records = load_dataset(path)
    field = read_field(records[0], weights)
    assert field.counts.dtype == np.uint16 and abs(field.counts.mean() - field.target.mean()) < 1e-6      # least squares keep the mean
    found = calibrate_source(path, weights, alpha=0.3, heads=own, settings=RestoreSettings(camera=CAMERA))
    assert found.n == 24 and found.facts["normalisation"] == "stabilise, noise stated"
    write_image(tmp_path / "clean3.tif", read_image(tmp_path / "noisy3.tif").array)
    with pytest.raises(UnusablePairError, match="same pixels"):
        read_field(records[3], weights)
    with pytest.raises(UnusablePairError, match="not a pair"):
        read_field(replace(records[0], conditioning_image=None), weights)


def test_from_the_shell(toy, tmp_path, capsys):
    folder, *_ = toy
    path, out = noisy_files(tmp_path, 24), tmp_path / "c.json"
    assert main(["calibrate", str(path), "--task", "denoise", "--model", str(folder), "--alpha", "0.3", "--device", "cpu", "--out", str(out)]) == 0
    assert f"--calibration {out} --task denoise --model {folder}" in capsys.readouterr().err
    go = ["restore", str(tmp_path / "noisy0.tif"), str(tmp_path / "out" / "a.tif"), "--task", "denoise", "--model", str(folder), "--device", "cpu", "--interval"]
    assert main([*go, "--calibration", str(out)]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.lower.tif", "a.tif", "a.upper.tif"]
    capsys.readouterr()
    for more, says in ((["--calibration", str(out), "--camera", "2.2,100,1.6"], "calibrated for another normalisation"), ([], "no calibration, so no interval")):
        assert main([*go[:2], str(tmp_path / "b.tif"), *go[3:], *more]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fluogen: ")]
        assert len(said) == 1 and says in said[0] and not (tmp_path / "b.tif").exists()


def test_the_recipe_makes_heads_and_calibrations(toy, tmp_path):
    folder, weights, said = shutil.copytree(toy[0], tmp_path / "toy"), toy[1], []
    made, = heads.train_heads(tmp_path, tmp_path / "work", (str(folder),), steps=2, batch=2, scenes=4, fields=26, device="cpu", log=said.append)
    assert sorted(p.name for p in made.glob("calibration*"))[-1] == "calibration.json" and len(list(made.glob("calibration*"))) == 2
    card = (made / "card.md").read_text()
    assert card.count("fraction of pixels outside the interval, test specimens") == 4 and "2 to 1500 photons, noise estimated from each" in card and load_weights(str(made)).config["base"]["sha256"] == weights.config["sha256"]


def test_a_branch_on_noisy_images_gets_heads_and_needs_none_for_its_spread(tmp_path, monkeypatch, capsys):
    save_sampler(tmp_path / "toy")
    monkeypatch.setattr(heads, "CHAIN", RestoreSettings(samples=2, steps=1))
    made, = heads.train_heads(tmp_path, tmp_path / "work", (str(tmp_path / "toy"),), steps=1, batch=2, scenes=4, fields=24, device="cpu",
                              log=lambda line: None)
    card, weights = (made / "card.md").read_text(), load_weights(str(tmp_path / "toy"))
    assert card.count("fraction of pixels outside the interval, test specimens") == 4 and "velocity" in card
    system = load_interval_restorer(weights, heads.settings_of(weights), model=str(tmp_path / "toy"))
    restored, lower, upper = system.restore(Image(draw_fields(1, 5)[0].counts, "YX"))
    assert (lower.array <= restored.array).all() and (restored.array <= upper.array).all()
    shutil.rmtree(made)
    manifest, out = noisy_files(tmp_path, 24), tmp_path / "calibration.json"
    go = ["--task", "denoise", "--model", str(tmp_path / "toy"), "--samples", "2", "--passes", "1"]
    assert main(["calibrate", str(manifest), *go, "--alpha", "0.3", "--delta", "0.3", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["family"] == "spread"
    assert main(["restore", str(tmp_path / "noisy0.tif"), str(tmp_path / "out" / "a.tif"), *go, "--interval", "--calibration", str(out)]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3


# ---- what ships

def test_shipped_heads_are_small_and_of_the_shipped_weights():
    names = [name for name in list_weights() if name.endswith("-heads")]
    assert {f"{name}-heads" for name in heads.MODELS} == set(names)
    assert sum(p.stat().st_size for name in names for p in list_weights()[name].iterdir()) <= 2**20
    for name in names:
        base = load_weights(name.removesuffix("-heads"))
        assert load_interval_restorer(base, heads.settings_of(base)).calibration.facts["weights"] == base.id


def test_the_shipped_denoiser_keeps_its_promise_out_of_the_box(tmp_path):
    weights = load_weights("nano-denoise")
    system = load_interval_restorer(weights, RestoreSettings())
    clean = simulate_clean(("nuclei", "er", "lysosomes", "microtubules"), 8, 128, seed=21, split="test")
    fields = exposed.exposed_fields(clean, make_rng(21, "shipped"), split="test")
    losses = []
    for lower, mean, upper, y in field_sets(fields, weights, RestoreSettings(), system.heads, system.family):
        low, high = system.calibration.interval(lower, mean, upper, None)
        losses.append(float(((y < low) | (y > high)).mean()))
    assert np.mean(losses) <= 0.15 and asdict(system.calibration)["alpha"] == 0.1
    write_image(tmp_path / "a.tif", fields[0].counts.astype(np.uint16))
    assert main(["restore", str(tmp_path / "a.tif"), str(tmp_path / "out" / "a.tif"), "--task", "denoise", "--interval", "--device", "cpu"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
