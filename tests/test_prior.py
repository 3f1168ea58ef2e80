"""The prior: what it learns from, that it goes on where it stopped, and what its card says."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fluogen.io.image import Image, write_image
from fluogen.simulation.pairs import simulate_targets
from fluogen.datasets.record import Record
from fluogen.diffusion.schedule import Schedule, ScheduleConfig
from fluogen.models.unet import BackboneConfig
from fluogen.models.zoo import load_weights
from fluogen.training.augment import draw_crop
from fluogen.recipes.prior import OpenImagesError, known_prompt, licences, may_learn, open_images
from fluogen.recipes import prior
from fluogen.recipes.prior import (
    SCENE_MIXES, RecipeError, SceneMix, draw_times, prior_batch, scenes_seen, stream_state, train_prior)
from fluogen.simulation.stream import PAPER_PROMPTS, SceneStream


@pytest.fixture
def shelf(tmp_path):
    "Writes images and the manifest that lists them."
    def write(*rows, shape=(140, 150)):
        lines = []
        for i, (text, licence) in enumerate(rows):
            write_image(tmp_path / f"{i}.tif", Image(np.random.default_rng(i).poisson(30, shape).astype(np.uint16), "YX"))
            lines.append(json.dumps({"image": f"{i}.tif", "text": text, "group": f"cell {i}", "licence_class": licence, "licence": licence}))
        (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path / "manifest.jsonl"
    return write


def test_every_known_prompt_speaks_the_vocabulary():
    said = ["nuclei of U2OS", "nuclei of BPAE", "Nuclei", "actin of BPAE", "membranes of zebrafish", "lysosomes of HeLa", "er of Vero"]
    words = {word for prompt in PAPER_PROMPTS for word in prompt.split()}
    for text in said:
        assert set(known_prompt(text).split()) <= words, text
    assert known_prompt("nuclear envelope") is None and known_prompt("") is None


def test_only_open_licences_teach(shelf):
    manifest = shelf(("nuclei", "open-CC0"), ("ER", "unclear"), ("ER", "copyleft-code-licence"), ("nuclei and golgi", "open-CC0"))
    images = open_images([manifest])
    assert {prompt: len(found) for prompt, found in images.items()} == {"Nuclei": 1}
    assert licences([manifest]) == "1 open-CC0"
    one = images["Nuclei"][0]
    assert one.shape == (1, 140, 150) and 0 <= one.min() and one.max() <= 1


@pytest.mark.parametrize("rows, shape", [([("ER", "unclear")], (140, 150)), ([("nuclei", "open-CC0")], (100, 150))])
def test_a_source_without_anything_to_learn_is_refused(shelf, rows, shape):
    with pytest.raises(OpenImagesError, match="no image to learn from"):
        open_images([shelf(*rows, shape=shape)])


def test_one_field_in_five_stays_for_judging():
    rows = [Record(f"{i}.tif", text="nuclei", group=f"field {i % 200}", extra={"licence_class": "open-CC0"}) for i in range(400)]
    kept = may_learn(rows)
    held = {r.group for r in rows} - {r.group for r in kept}
    assert 20 <= len(held) <= 60 and not held & {r.group for r in kept}
    assert may_learn(rows[:3]) == rows[:3]                      # too few fields to spare any


def test_structures_take_turns():
    many = {"Nuclei": [torch.zeros(1, 64, 64)] * 99, "ER": [torch.ones(1, 64, 64)]}
    rng = np.random.default_rng(0)
    assert 30 < sum(draw_crop(many, 32, rng)[1] == "ER" for _ in range(100)) < 70


@pytest.mark.parametrize("kind", [{}, {"zero_snr": False}])
def test_times_linger_where_noise_and_picture_are_level(kind):
    schedule = Schedule(ScheduleConfig(**kind))
    t = draw_times(schedule, 40_000, torch.Generator().manual_seed(1))
    assert t.min() >= 0 and t.max() <= 999 and t.dtype == torch.int64
    angle = torch.atan2(schedule.noise(t), schedule.signal(t)).flatten() * (2 / torch.pi)
    assert torch.histc(angle, 4, 0, 1).div(len(t)).tolist() == pytest.approx([0.25] * 4, abs=0.012)


def test_trains_goes_on_and_starts_from_weights(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(prior, "SceneStream", lambda simulate, seed, **more: SceneStream(simulate, seed, **(more | {"n": 8})))
    manifest = shelf(("nuclei", "open-CC0"))
    options = dict(crops=4, device="cpu", config=BackboneConfig.tiny(), real=[manifest])
    out = train_prior(tmp_path / "one", tmp_path / "work", steps=2, **options)
    weights = load_weights(str(out))
    assert set(weights.modules) == {"backbone", "prompts"}
    card = (out / "card.md").read_text()
    assert "1 open-CC0" in card and "--steps 2" in card and "after packing" in card
    again = train_prior(tmp_path / "two", tmp_path / "two-work", steps=1, lr=1e-4, start=str(out), **options | {"real": ()})
    said = (again / "card.md").read_text()
    assert f"resumed from {weights.id}" in said and f"Before, as {weights.id}: Simulated specimens" in said
    assert "real images of open licences were seen too" in said and "no real image" in said            # the weights that it began from saw some
    assert load_weights(str(again)).backbone.config == weights.backbone.config
    assert [(seen["seed"], seen["steps"], seen["scenes"]) for seen in scenes_seen(load_weights(str(again)))] == [(0, 2, 1024), (0, 1, 1024)]
    with pytest.raises(RecipeError, match="encoder-nano: training cannot resume from these weights"):
        train_prior(tmp_path / "b", tmp_path / "wb", steps=1, start="encoder-nano")


def test_what_is_drawn_badly_is_dealt_more_often():
    deal, rare = SCENE_MIXES["nano-generate"], {"S. aureus", "E. coli", "Lysosomes of HeLa"}
    def share(deal):
        rounds = SceneStream(simulate_targets, 3, n=60, groups=deal.groups)
        batches = [prior_batch(step, 0, 16, rounds, whole=deal.whole) for step in range(8)]
        prompts = [p for batch in batches for p in batch["prompts"] if p]
        return sum(p in rare for p in prompts) / len(prompts), [batch["target"].shape[-1] for batch in batches]
    plain, more = share(SceneMix()), share(deal)
    assert plain[0] < 0.3 < more[0] < 0.6
    assert plain[1] == [64, 64, 64, 128] * 2 and more[1] == [64, 128] * 4


def test_what_a_prior_saw_is_stated_and_not_guessed():
    assert scenes_seen(load_weights("fluogen-nano")) == [stream_state(SceneMix(), 0, 14_500)]
    assert [(seen["seed"], seen["steps"]) for seen in scenes_seen(load_weights("nano-generate"))] == [(0, 14_500), (1, 15_000), (2, 15_000), (3, 10_000)]
    assert scenes_seen(SimpleNamespace(config={}, facts={})) == []
