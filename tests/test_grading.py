"The grading recipe on a toy prior: blocks kept and not drawn twice, planted copies found, grades bound to their weights."
import json
from types import SimpleNamespace

import numpy as np
import pytest
from toys import save_toy

from fluogen.metrics.memorization import shrink_images
from fluogen.experiments import generation as grading
from fluogen.models.image_encoder import load_encoder
from fluogen.figures.fig3_synthesis import FIG3_CLAIMS, fig3_rows, format_grades, measure_fig3, open_grades, summarize_fig3
from fluogen.report.claims import judge_claims
from fluogen.tasks.generate import GenerateError
from fluogen.experiments.generation import (
    IMAGES_A_BLOCK, GradingError, block_prompts, disguise, draw_variant, grade_copies, grade_set, held_out_specimens)
from fluogen.recipes.prior import SCENE_MIXES, SceneMix, stream_state
from fluogen.simulation.stream import PAPER_PROMPTS, SceneStream


pytestmark = pytest.mark.filterwarnings("ignore:prompt")         # the toy knows three prompts


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "toy"
    save_toy(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scenes():
    return held_out_specimens(8), held_out_specimens(8, seed=1)


def test_held_out_specimens_graded_as_if_generated(scenes):
    (real, words), (other, others) = scenes
    grade = grade_set(other, others, real, words, load_encoder())
    assert abs(grade["kernel"]) < 0.03                  # eight of each prompt; unless it is told so: about -0.09
    assert grade["fidelity"] > 0.85 and grade["precision"] > 0.7 and grade["recall"] > 0.7 and 0.85 < grade["diversity"] < 1.15
    shuffled = grade_set(other, list(np.random.default_rng(0).permutation(others)), real, words, load_encoder())
    assert shuffled["fidelity"] < 0.35 and shuffled["brightness"] > grade["brightness"]
    spoilt = grade_set(other * 0.5 + 0.2, others, real, words, load_encoder())
    assert spoilt["kernel"] > 10 * abs(grade["kernel"]) and spoilt["histogram"] > 0.1
    collapsed = grade_set(np.repeat(other[:1], 128, 0), others, real, words, load_encoder())
    assert collapsed["diversity"] < 0.01 and collapsed["recall"] < 0.2


def test_planted_copies_are_found_among_honest_pictures(scenes):
    (real, words), (other, others) = scenes
    originals, whose = held_out_specimens(8, seed=2)
    pictures = np.concatenate([other[:60], disguise(originals[:6], 4)])
    report = grade_copies(pictures, others[:60] + whose[:6], real, words, shrink_images(originals), (originals[:20], whose[:20]))
    assert report["planted_found"] == 20 and report["excess"] and report["flagged"] >= 6
    assert {row["scene"] for row in report["nearest"]} == set(range(6))
    honest = grade_copies(other, others, real, words, shrink_images(originals), (originals[:20], whose[:20]))
    assert not honest["excess"]


def test_the_recipe_goes_on_where_it_stopped_and_its_record_is_read(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "training_specimens", lambda weights, most: shrink_images(held_out_specimens(2, 9)[0]))
    monkeypatch.setattr(grading, "SceneStream", lambda simulate, seed, n, groups: SceneStream(simulate, seed, n=32, groups=groups))
    monkeypatch.setattr(grading, "scenes_seen", lambda weights: [stream_state(SceneMix(), 0, 20)])
    monkeypatch.setattr(grading, "IMAGES_A_BLOCK", 1)
    monkeypatch.setattr(grading, "FEWER_BY", {"guidance 2": 2})
    said, run = [], lambda: grading.grade_prior(tmp_path, tmp_path / "work", toy, 4, log=said.append, size_px=64, precision="fp32")
    record = json.loads((run() / "scores.json").read_text())
    assert (record["copies"]["planted"], record["copies"]["planted_found"]) == (32, 0)        # of all kinds; searched among other scenes
    assert len(said) == 4 + 4 + 4 + 2 and record["grades"]["ten passes"]["n"] == 64 and record["grades"]["guidance 2"]["n"] == 32
    before = said.copy()
    assert json.loads((run() / "scores.json").read_text())["grades"] == record["grades"] and said == before     # nothing drawn twice
    monkeypatch.setattr("fluogen.models.zoo.weight_folders", lambda: [tmp_path])
    found, why = open_grades(record["weights"])
    assert why == "" and "ten passes" in format_grades(found) and summarize_fig3(found, "")
    claims = {claim.id: claim for claim in judge_claims(FIG3_CLAIMS, measure_fig3(found))}
    assert all(claim.measured is not None or claim.why for claim in claims.values())
    assert f"{found['grades']['held-out scenes']['fidelity']:.3f} of as many held-out specimens" in claims["fidelity"].why
    assert all(row["n"] > 0 for row in fig3_rows(found, {"a": [np.zeros((4, 4))]}, {"a": np.zeros((4, 4))}))
    none, why = open_grades("other@123")
    assert none is None and "other@123" in why and "benchmark generation" in why
    assert all(claim.measured is None and claim.why for claim in judge_claims(FIG3_CLAIMS, measure_fig3(none), why))


def test_copies_are_looked_for_in_the_scenes_of_every_training(monkeypatch):
    monkeypatch.setattr(grading, "SceneStream", lambda simulate, seed, n, groups: SceneStream(simulate, seed, n=12, groups=groups))
    some = [stream_state(SceneMix(), 0, 1501), stream_state(SCENE_MIXES["nano-generate"], 1, 20)]
    weights = SimpleNamespace(config={"seen": some})
    scenes = grading.training_specimens(weights)
    assert len(scenes) == 3 * 12 and len(grading.training_specimens(weights, 1)) == 12
    first = shrink_images(grading.stream_again(some[0]).at(0)[0].target)
    assert np.array_equal(scenes[:len(first)], first)


def test_no_grades_is_one_line(toy, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("fluogen.models.zoo.weight_folders", lambda: [tmp_path])
        record, why = open_grades("a@1")
    assert record is None and "fluogen benchmark generation" in why and "\n" not in why
    with pytest.raises(GradingError, match="multiple of 4"):
        grading.grade_prior(tmp_path, tmp_path, per_prompt=10)
    with pytest.raises(GradingError, match="learned from is not known"):
        grading.grade_prior(tmp_path, tmp_path, toy)
    with pytest.raises(GenerateError, match="encoder-nano: these weights draw nothing"):
        grading.grade_prior(tmp_path, tmp_path, "encoder-nano")


def test_the_note_by_eye_is_about_the_shipped_prior():
    "New weights, new pictures: look at figure 3 again and write the note `What still looks wrong` anew, with their id."
    from tree import ROOT

    from fluogen.models.zoo import load_weights
    cells = json.loads((ROOT / "nbs" / "fig3_synthesis.ipynb").read_text())["cells"]
    note = "".join(cells[-1]["source"])
    assert f"`{load_weights('nano-generate').id}`" in note and "seed" in note


def test_blocks_know_their_prompts(toy, tmp_path):
    from fluogen.models.zoo import load_weights
    images, seconds = draw_variant(load_weights(toy), "guidance 2", 8, tmp_path, size_px=32, precision="fp32")
    assert len(images) == IMAGES_A_BLOCK * 16 == len(block_prompts(len(images))) and seconds > 0
    assert block_prompts(64)[:IMAGES_A_BLOCK] == [PAPER_PROMPTS[0]] * IMAGES_A_BLOCK
