"The encoder: trained, packed and read again; right about scenes, blind to nothing that matters; wrong inputs in one line."
import numpy as np
import pytest
import torch

from fluogen.simulation.pairs import simulate_targets
from fluogen.simulation.structures import STRUCTURES
from fluogen.models.zoo import load_weights
from fluogen.metrics.generation import frechet_distance, kernel_distance
from fluogen.recipes import image_encoder as room
from fluogen.models.image_encoder import EncoderError, ImageEncoder, embed, load_encoder, measure_statistics
from fluogen.recipes.image_encoder import blur_picture, encoder_batch
from fluogen.simulation.stream import PAPER_PROMPTS, SceneStream


@pytest.fixture(scope="module")
def scenes():
    return simulate_targets(PAPER_PROMPTS, 96, 128, seed=77, split="test", optics="train")


@pytest.fixture(scope="module")
def shipped():
    return load_encoder()


def test_the_shipped_encoder_names_structures_of_scenes_it_never_saw(shipped, scenes):
    _, named = embed(shipped, scenes.target)
    assert np.mean([a == b for a, b in zip(named, scenes.structures)]) > 0.85
    assert shipped.classes == tuple(STRUCTURES) and sum(p.numel() for p in shipped.parameters()) < 500_000


def test_symmetries_leave_a_picture_where_it_is_and_its_kind_does_not(shipped, scenes):
    straight, turned = (embed(shipped, x)[0] for x in (scenes.target, scenes.target.flip(2).transpose(2, 3)))
    own = np.linalg.norm(straight - turned, axis=1)
    other = np.linalg.norm(straight - np.roll(turned, 1, 0), axis=1)
    assert np.median(own) < 0.5 * np.median(other)


@pytest.mark.parametrize("spoil", [lambda x, s: torch.stack([blur_picture(p, 3 * s) for p in x]), lambda x, s: (x * (1 - s)).clamp(0, 1),
                                   lambda x, s: (x + 0.2 * s * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
                                   lambda x, s: (x + 0.3 * s).clamp(0, 1)], ids=["blur", "dark", "noise", "haze"])
def test_distances_grow_when_pictures_get_worse(shipped, scenes, spoil):
    features = [embed(shipped, spoil(scenes.target, strength))[0] for strength in (0.0, 0.3, 0.9)]
    for distance in (frechet_distance, kernel_distance):
        none, some, much = (distance(features[0], made) for made in features)
        assert none < some < much


def test_features_are_standardised(shipped, scenes):
    features = embed(shipped, scenes.target)[0]
    assert features.shape == (96, 32) and abs(features.mean()) < 0.3 and 0.7 < features.std() < 1.3


def test_batches_are_a_function_of_seed_and_step():
    few = lambda: SceneStream(simulate_targets, 5, n=16)
    one, two, other = (encoder_batch(step, 5, 6, few()) for step in (3, 3, 4))
    assert all(torch.equal(one[key], two[key]) for key in one) and not torch.equal(one["images"], other["images"])
    assert 0 <= one["images"].min() and one["images"].max() <= 1


def test_statistics_do_not_care_about_size_or_symmetry(scenes):
    picture = scenes.target[:4]
    assert torch.allclose(measure_statistics(picture), measure_statistics(picture.flip(3)), atol=1e-4)
    assert measure_statistics(torch.zeros(2, 1, 96, 70)).shape == (2, 8)


def test_a_small_training_is_packed_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "SceneStream", lambda simulate, seed, n, steps: SceneStream(simulate, seed, n=16, steps=steps))
    monkeypatch.setattr(room, "simulate_targets", lambda prompts, n, *rest, **more: simulate_targets(prompts, min(n, 16), *rest, **more))
    folder = room.train_encoder(tmp_path / "small", tmp_path / "work", steps=2, crops=4)
    first = load_encoder(str(folder))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1.5e6
    card = (folder / "card.md").read_text()
    assert "accuracy on 704 specimens, held-out microscopes" in card and "--steps 2" in card
    room.train_encoder(tmp_path / "more", tmp_path / "work2", steps=1, crops=4, start=str(folder))
    assert f"--start {first.id}" in (tmp_path / "more" / "card.md").read_text()


def test_one_command_makes_both_legs_and_goes_on_after_the_first(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "SceneStream", lambda simulate, seed, n, steps: SceneStream(simulate, seed, n=16, steps=steps))
    monkeypatch.setattr(room, "simulate_targets", lambda prompts, n, *rest, **more: simulate_targets(prompts, min(n, 16), *rest, **more))
    monkeypatch.setattr(room, "LEGS", (2, 1))
    run = lambda minutes: room.train_encoder(tmp_path / "out" / "two", tmp_path / "work", minutes, crops=4)
    with pytest.raises(EncoderError, match="the first of two parts.*same command again"):
        run(1e-9)
    card = load_weights(str(run(5))).config["card"]
    first = load_encoder(str(tmp_path / "work" / "first-0" / "two"))
    assert card["recipe"] == "fluogen train encoder --seed 0" and card["training"]["steps"] == 1
    assert card["training"]["after"] == f"2 steps of {first.id}"


def test_the_shipped_card_says_how_it_was_made():
    card = load_weights("encoder-nano").config["card"]
    assert "fluogen train encoder" in card["recipe"] and ("two parts" in card["recipe"] or "after" in card["training"])


@pytest.mark.parametrize("wrong, words", [(np.zeros((2, 32, 32)), "64 pixels or more"), (np.zeros((2, 3, 64, 64)), "set of images"),
                                          (np.full((1, 64, 64), np.nan), "finite"), (np.zeros((0, 64, 64)), "set of images")])
def test_what_is_no_picture_is_refused(wrong, words):
    with pytest.raises(EncoderError, match=words):
        embed(ImageEncoder(("a", "b")), wrong)


def test_other_weights_are_refused():
    with pytest.raises(EncoderError, match="hold no encoder"):
        load_encoder("fluogen-nano")
