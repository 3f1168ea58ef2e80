"Intervals around restored images: the families, what a calibration is bound to, own pairs, maps on disk."
import json
from collections import Counter

import numpy as np
import pytest
import torch
from toys import make_weights, save_interval_toy, save_toy, shake

from fluogen.core import make_rng
from fluogen.io.image import Image, read_image, write_image
from fluogen.models.quantile_heads import HeadsConfig, QuantileHeads
from fluogen.models.zoo import Weights, load_weights
from fluogen.tasks import intervals, intervals as certified, restore, restore_files
from fluogen.recipes import interval_heads as heads
from fluogen.tasks.intervals import (
    IntervalRestorer, calibrate_source, choose_family, load_interval_restorer, read_fields)
from fluogen.tasks.restore_files import restore_file
from fluogen.tasks.intervals import (
    FIELD_PX, Field, calibrate_fields, field_sets, find_heads, load_heads, restore_sets, system_facts)
from fluogen.tasks.restore import RestoreError, RestoreSettings, restore_image, restore_unit
from fluogen.uncertainty.calibration import save_calibration
from fluogen.uncertainty.calibration import CalibrationError

PIXEL = {"Y": 0.06, "X": 0.06}
CHAIN = RestoreSettings(samples=2, steps=2)


def draw_pair(number, gain=1.0, size=20):
    "Counts (size,size) and truth (2 size,2 size): discs, blurred by the camera's pixels."
    rng = make_rng(number, "pair")
    rows, columns = np.indices((2 * size, 2 * size))
    scene = sum((np.hypot(rows - rng.uniform(0, 2 * size), columns - rng.uniform(0, 2 * size)) < 5) * rng.uniform(0.5, 1) for _ in range(6))
    light = scene.reshape(size, 2, size, 2).mean((1, 3))
    counts = 100 + gain * rng.poisson(20 + 200 * light)
    return counts.astype(np.uint16), np.clip(scene / np.percentile(scene, 99.9), 0, 1).astype(np.float32)


def draw_fields(n, first=0):
    return [Field(*draw_pair(first + i), f"cell{first + i}") for i in range(n)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "(folder of the model, its weights, its heads, a calibration on 40 fields, its file)"
    folder = save_interval_toy(tmp_path_factory.mktemp("weights") / "toy")
    weights = load_weights(str(folder))
    own = load_heads(weights, str(folder))
    calibration = calibrate_fields(draw_fields(40), weights, alpha=0.2, heads=own)
    save_calibration(calibration, find_heads(weights, str(folder)) / "calibration.json")
    return folder, weights, own, calibration, find_heads(weights, str(folder)) / "calibration.json"


def control_system():
    weights = make_weights("control")
    velocity = QuantileHeads(HeadsConfig.from_backbone(weights.backbone.config, "velocity"))
    shake(velocity)
    return weights, Weights("control-heads", {"sha256": "2" * 64}, {"heads": velocity})


# ---- raw intervals

@pytest.mark.parametrize("family", ("quantile", "residual"))
def test_direct_families_stand_around_the_restored_picture(toy, family):
    _, weights, own, *_ = toy
    unit = torch.rand(1, 21, 18)
    for settings in (RestoreSettings(), RestoreSettings(tile_px=32, overlap_px=8)):
        mean, lower, upper = restore_sets(unit, weights, settings, heads=own, family=family)
        assert torch.equal(mean, restore_unit(unit, weights, settings)) and mean.shape == (42, 36)
        assert bool((mean - lower >= FIELD_PX - 1e-7).all() and (upper - mean >= FIELD_PX - 1e-7).all())


@pytest.mark.parametrize("family", ("quantile", "spread"))
def test_control_families_stand_around_the_mean_of_the_samples(family):
    weights, own = control_system()
    unit = torch.rand(1, 12, 14)
    mean, lower, upper = restore_sets(unit, weights, CHAIN, "key", heads=own, family=family)
    assert torch.allclose(mean, restore_unit(unit, weights, CHAIN, "key"), atol=1e-6)
    assert bool((lower < mean).all() and (mean < upper).all())
    if family == "spread":
        samples = [restore_unit(unit, weights, RestoreSettings(samples=1, steps=2), "key")]      # the first of the two
        assert samples[0].shape == mean.shape and torch.allclose(mean - lower, upper - mean, atol=1e-6)


def test_spread_is_the_standard_deviation():
    weights, own = control_system()
    unit, many = torch.rand(1, 8, 8), RestoreSettings(samples=3, steps=1)
    from fluogen.tasks.restore import PlanePasses, walk_chains
    from fluogen.tasks.tiling import TileSide
    chains = torch.stack(list(walk_chains(PlanePasses(unit, weights, many, TileSide(256)), many, "k")))
    mean, lower, _ = restore_sets(unit, weights, many, "k", family="spread")
    assert torch.allclose(mean - lower, chains.std(0).clamp_min(FIELD_PX), atol=1e-5)


def test_a_family_that_weights_do_not_have_is_refused(toy):
    _, weights, own, *_ = toy
    with pytest.raises(CalibrationError, match="quantile or residual"):
        restore_sets(torch.rand(1, 8, 8), weights, heads=own, family="spread")
    with pytest.raises(CalibrationError, match="no standard deviation of one sample"):
        restore_sets(torch.rand(1, 8, 8), control_system()[0], RestoreSettings(samples=1), family="spread")


def test_heads_are_found_by_hash(toy, tmp_path):
    folder, weights, own, *_ = toy
    assert find_heads(weights, str(folder)).name == "toy-heads" and own.config["base"]["sha256"] == weights.config["sha256"]
    tuned = Weights("mine", {"sha256": "f" * 64, "base": {"name": "toy", "sha256": weights.config["sha256"]}}, weights.modules)
    assert find_heads(tuned, str(folder)).name == "toy-heads"                     # weights tuned from those of the heads
    other = load_weights(str(save_toy(tmp_path / "toy", seed=3)))
    (tmp_path / "toy-heads").symlink_to(find_heads(weights, str(folder)))
    assert find_heads(other, str(tmp_path / "toy")) is None                       # same name, other weights
    with pytest.raises(CalibrationError, match="have no heads.*fluogen train heads --models"):
        load_heads(other, str(tmp_path / "toy"))


# ---- the promise

def test_the_promise_holds_on_fields_to_come(toy):
    _, weights, own, calibration, _ = toy
    losses = []
    for lower, mean, upper, target in field_sets(draw_fields(30, 500), weights, RestoreSettings(), own, "quantile"):
        low, high = calibration.interval(lower, mean, upper)
        losses.append(((target < low) | (target > high)).mean())
    assert np.mean(losses) <= 0.2 and calibration.n == 40 and len(calibration.inputs) == 40


def test_another_system_is_refused(toy, tmp_path):
    folder, weights, own, _, file = toy
    assert load_interval_restorer(weights, RestoreSettings(), model=str(folder)).calibration.n == 40
    for settings, what in ((RestoreSettings(prompt="ER of COS-7"), "prompt"),):
        with pytest.raises(CalibrationError, match=f"another {what}"):
            load_interval_restorer(weights, settings, file, str(folder))
    other = Weights(weights.name, weights.config | {"sha256": "e" * 64}, weights.modules, weights.schedule, weights.direct)
    with pytest.raises(CalibrationError, match="another weights"):
        IntervalRestorer(file, other, RestoreSettings(), own)
    with pytest.raises(CalibrationError, match="another heads"):
        IntervalRestorer(file, weights, RestoreSettings(), Weights("x", {"sha256": "d" * 64}, own.modules))
    body = json.loads(file.read_text())
    body["factor"] /= 2                                                            # a tempted user
    (tmp_path / "c.json").write_text(json.dumps(body))
    with pytest.raises(CalibrationError, match="not a calibration"):
        load_interval_restorer(weights, RestoreSettings(), tmp_path / "c.json", str(folder))
    with pytest.raises(CalibrationError, match="no calibration, so no interval"):
        load_interval_restorer(weights, RestoreSettings(), tmp_path / "absent.json", str(folder))


def test_steps_and_samples_are_bound():
    weights, own = control_system()
    facts = system_facts(weights, CHAIN, own, "quantile")
    assert (facts["sampler"], facts["steps"], facts["samples"], facts["heads"]) == ("ddim", 2, 2, own.id)
    assert facts != system_facts(weights, RestoreSettings(samples=2, steps=4), own, "quantile")
    assert system_facts(weights, CHAIN, None, "spread")["heads"] == "none"


# ---- own pairs

def write_pairs(folder, numbers, groups=None):
    rows = []
    for number in numbers:
        counts, target = draw_pair(number)
        write_image(folder / f"lr{number}.tif", counts, pixel_um=PIXEL)
        write_image(folder / f"hr{number}.tif", (4000 * target).astype(np.uint16))
        rows.append({"image": f"hr{number}.tif", "conditioning_image": f"lr{number}.tif", "text": "", "group": f"cell{number // (groups or 1)}"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_pairs_count_by_group(toy, tmp_path):
    _, weights, own, *_ = toy
    path = write_pairs(tmp_path, range(24), groups=2)
    with pytest.raises(CalibrationError, match=r"too few groups.*found 12, expected at least 22 .*Bring 10 more"):
        calibrate_source(path, weights, heads=own)
    write_image(tmp_path / "hr3.tif", np.zeros((8, 8), np.uint16))                 # one bad pair is left out by name
    said = []
    found = calibrate_source(path, weights, alpha=0.3, heads=own, log=said.append)
    assert found.n == 12 and len(found.images) == 23 and len(said) == 1 and "hr3.tif" in said[0]
    assert len(list(read_fields(path, weights, said.append))) == 23


def test_few_images_have_no_known_range(toy, tmp_path):
    _, weights, own, *_ = toy
    found = calibrate_source(write_pairs(tmp_path, range(12)), weights, alpha=0.3, delta=0.1, heads=own)
    assert found.inputs == ()
    save_calibration(found, tmp_path / "c.json")
    system = IntervalRestorer(tmp_path / "c.json", weights, RestoreSettings(), own)
    assert "fewer than 20 images" in system.judge(Image(draw_pair(0)[0], "YX"))[0]


# ---- maps

def test_three_images_on_one_scale(toy):
    folder, weights, own, calibration, file = toy
    film = Image(np.stack([draw_pair(700)[0], draw_pair(701)[0]]), "TYX", {"Y": 0.06, "X": 0.06})
    system = IntervalRestorer(file, weights, RestoreSettings(), own)
    restored, lower, upper = system.restore(film)
    assert np.array_equal(restored.array, restore_image(film, weights).array)
    for layer in (lower, upper):
        assert layer.array.shape == restored.array.shape and layer.axes == "TYX" and layer.pixel_um == {"Y": 0.03, "X": 0.03}
    assert (lower.array <= restored.array + 0.01).all() and (upper.array >= restored.array - 0.01).all() and (upper.array > lower.array).mean() > 0.9
    said = upper.metadata["fluogen"]
    assert said["map"] == "upper" and said["interval"]["factor"] == calibration.factor and said["interval"]["alpha"] == 0.2
    assert "interval" not in restored.metadata["fluogen"]


def test_maps_lie_beside_the_result_and_are_not_made_twice(toy, tmp_path):
    folder, weights, own, _, file = toy
    system = IntervalRestorer(file, weights, RestoreSettings(), own)
    write_image(tmp_path / "a.tif", draw_pair(800)[0], pixel_um=PIXEL)
    target = tmp_path / "out" / "a.tif"
    assert restore_file(tmp_path / "a.tif", target, weights, certified=system, dtype="uint16") == "restored"
    assert sorted(p.name for p in target.parent.iterdir()) == ["a.lower.tif", "a.tif", "a.upper.tif"]
    low, high = (read_image(target.with_name(f"a.{name}.tif")) for name in ("lower", "upper"))
    exact = system.restore(read_image(tmp_path / "a.tif"))
    assert low.array.dtype == np.uint16 and (low.array <= exact[1].array).all() and (high.array >= exact[2].array).all()
    assert restore_file(tmp_path / "a.tif", target, weights, certified=system, dtype="uint16") == "kept"
    target.with_name("a.upper.tif").unlink()
    assert restore_file(tmp_path / "a.tif", target, weights, certified=system, dtype="uint16") == "restored"
    assert restore_file(tmp_path / "a.tif", tmp_path / "plain.tif", weights) == "restored"
    assert not list(tmp_path.glob("plain.*er.tif"))                               # nobody asked


def test_images_together_are_each_counted_once(toy, tmp_path):
    _, weights, own, _, file = toy
    system = IntervalRestorer(file, weights, RestoreSettings(), own)
    assert system.judge_together() == ""                                          # nothing judged yet
    for number in range(6):
        write_image(tmp_path / f"{number}.tif", draw_pair(820 + number)[0])
        restore_file(tmp_path / f"{number}.tif", tmp_path / "out" / f"{number}.tif", weights, certified=system)
    assert len(system.seen) == 6 and system.judge_together() == ""
    for number in range(6):
        system.judge(Image(draw_pair(820 + number, gain=3)[0], "YX"))
    assert "these 12 images together are not like" in system.judge_together()


def test_what_is_not_covered_says_so_in_its_name(toy, tmp_path):
    _, weights, own, _, file = toy
    system = IntervalRestorer(file, weights, RestoreSettings(), own)
    write_image(tmp_path / "a.tif", draw_pair(800, gain=30)[0], pixel_um=PIXEL)
    (tmp_path / "out").mkdir()
    with pytest.warns(UserWarning, match="flagged OOD: input outside the calibration range"):
        restore_file(tmp_path / "a.tif", tmp_path / "out" / "a.tif", weights, certified=system)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.lower.not-covered.tif", "a.tif", "a.upper.not-covered.tif"]
    said = read_image(tmp_path / "out" / "a.lower.not-covered.tif").metadata["fluogen"]["interval"]
    assert said["covered"] is False and said["void"]
    write_image(tmp_path / "a.tif", draw_pair(800)[0], pixel_um=PIXEL)            # now a covered one: the old maps go
    restore_file(tmp_path / "a.tif", tmp_path / "out" / "a.tif", weights, certified=system)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.lower.tif", "a.tif", "a.upper.tif"]


def counted(monkeypatch, *names):
    "How often each of these functions of `restore`, `restore_files` and `intervals` is called from now on."
    calls = Counter()
    for module in (restore, restore_files, intervals):
        for name in names:
            if real := getattr(module, name, None):
                monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: (calls.update([name]), real(*a, **k))[1])
    return calls


@pytest.mark.parametrize("frames", (1, 3))
@pytest.mark.parametrize("how", ("mean", "samples", "interval", "interval of samples"))
def test_each_step_of_restoring_is_done_once(toy, tmp_path, monkeypatch, how, frames):
    _, weights, own, calibration, file = toy
    settings = CHAIN if "samples" in how else RestoreSettings()
    if "samples" in how:
        weights, own = control_system()
        file = tmp_path / "c.json"
        save_calibration(calibration.bind(**system_facts(weights, settings, own, "quantile")), file)
    planes = np.stack([draw_pair(830 + frame)[0] for frame in range(frames)])
    source = write_image(tmp_path / "a.tif", Image(planes, "TYX") if frames > 1 else Image(planes[0], "YX"))
    calls = counted(monkeypatch, "check_weights", "fill_camera", "list_planes", "hash_array", "describe_image", "read_image")
    system = IntervalRestorer(file, weights, settings, own) if "interval" in how else None
    for outcome in ("restored", "kept"):
        done, = restore_files.restore_files([(source, tmp_path / "out" / "a.tif")], weights, settings, certified=system)
        assert done[2] == outcome
        if outcome == "restored":
            assert calls.pop("read_image") == 1
            assert calls.pop("describe_image", 0) == (frames if system else 0)
            assert calls.pop("hash_array") == (1 if frames == 1 else 1 + frames)      # the whole time series once, each plane once
            assert calls == {"check_weights": 1, "fill_camera": 1, "list_planes": 1}
    assert system is None or len(system.seen) == frames


@pytest.mark.parametrize("failing", (1, 2, 3))
def test_old_maps_stay_until_new_ones_are_written(toy, tmp_path, monkeypatch, failing):
    _, weights, own, _, file = toy
    system = IntervalRestorer(file, weights, RestoreSettings(), own)
    source, out = tmp_path / "a.tif", tmp_path / "out"
    write_image(source, draw_pair(800, gain=30)[0], pixel_um=PIXEL)
    with pytest.warns(UserWarning, match="named not-covered"):
        restore_file(source, out / "a.tif", weights, certified=system)
    old = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(old) == {"a.lower.not-covered.tif", "a.tif", "a.upper.not-covered.tif"}
    write_image(source, draw_pair(800)[0], pixel_um=PIXEL)                        # now one like those of the calibration
    real, written = write_image, []

    def killed(path, image, *more, **options):
        if out in path.parents and path.parent == out:                            # the trial passes
            written.append(path.name)
            if len(written) == failing:
                raise KeyboardInterrupt
        return real(path, image, *more, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(restore_files, "write_image", killed)
        restore_file(source, out / "a.tif", weights, certified=system)
    for name in ("a.lower.not-covered.tif", "a.upper.not-covered.tif"):
        assert (out / name).read_bytes() == old[name]
    assert restore_file(source, out / "a.tif", weights, certified=system) == "restored"
    assert sorted(p.name for p in out.iterdir()) == ["a.lower.tif", "a.tif", "a.upper.tif"]
    (out / "a.lower.not-covered.tif").write_bytes(old["a.lower.not-covered.tif"])   # a run killed before it could tidy up
    assert restore_file(source, out / "a.tif", weights, certified=system) == "kept"
    assert sorted(p.name for p in out.iterdir()) == ["a.lower.tif", "a.tif", "a.upper.tif"]


def test_a_calibration_for_other_settings_is_not_used(toy, tmp_path):
    _, weights, own, _, file = toy
    system = IntervalRestorer(file, weights, RestoreSettings(), own)
    write_image(tmp_path / "a.tif", draw_pair(800)[0])
    with pytest.raises(RestoreError, match="calibrated for other weights or settings"):
        restore_file(tmp_path / "a.tif", tmp_path / "b.tif", weights, RestoreSettings(seed=1), certified=system)


# ---- the recipe

def test_the_recipe_trains_only_heads_resumes_and_writes_calibrations(tmp_path):
    folder = save_interval_toy(tmp_path / "toy")
    before, said, ids = (folder / "weights.safetensors").read_bytes(), [], []
    for seed in (1, 2):
        torch.manual_seed(seed)                                                   # the recipe has its own seed
        made, = heads.train_heads(tmp_path, tmp_path / "work", (str(folder),), steps=2, batch=2, scenes=4, fields=24, device="cpu", log=said.append)
        ids.append(load_weights(str(made)).id)
    assert ids[0] == ids[1] and (folder / "weights.safetensors").read_bytes() == before
    files = sorted(p.name for p in made.glob("calibration*"))
    assert len(files) == 2 and files[1] == "calibration.json"
    weights = load_weights(str(folder))
    system = load_interval_restorer(weights, RestoreSettings(), model=str(folder))
    rest = load_interval_restorer(weights, RestoreSettings(), made / files[0], str(folder))
    assert system.calibration.width <= rest.calibration.width and {system.family, rest.family} == {"quantile", "residual"}
    assert choose_family(weights, RestoreSettings(), str(folder)) == system.family
    card = (made / "card.md").read_text()
    assert f"{system.calibration.width:.4f}".rstrip("0") in card and sum(p.stat().st_size for p in made.iterdir()) < 200_000


def test_a_control_branch_gets_velocity_heads():
    weights, _ = control_system()
    fitter = heads.HeadsLearner(weights, prompt_dropout=1.0)
    batch = {"target": torch.rand(2, 1, 16, 16), "condition": torch.rand(2, 1, 8, 8), "prompts": ["", ""]}
    loss = fitter.loss(fitter.modules, batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert fitter.kind == "velocity" and all(p.grad is not None for p in fitter.modules.parameters())
    assert all(p.grad is None for net in weights.modules.values() for p in net.parameters())


def test_no_certifiable_family_is_an_error(toy):
    _, weights, own, *_ = toy
    shuffled = [Field(f.counts, draw_fields(1, 900 + i)[0].target, f.group) for i, f in enumerate(draw_fields(24))]
    with pytest.raises(CalibrationError, match="no family can be certified"):
        heads.calibrate_families(weights, own, shuffled, alpha=0.1, log=lambda line: None)
    assert certified.HEADED == intervals.HEADED
