"Pictures from prompts: the same whatever the batch, flagged as synthetic, refused or warned in one line."
import warnings
from dataclasses import replace

import numpy as np
import pytest

from fluogen.cli.main import main
from fluogen.core import FluogenError
from fluogen.io.image import read_image
from fluogen.models.text_encoder import split_words
from fluogen.tasks.generate import (GenerateError, GenerateSettings, generate, generate_files, expand_prompts, plan_files,
                                    plan_generation, save_generated)
from toys import PROMPTS, make_weights, save_toy

SMALL = GenerateSettings(steps=3, size_px=32, seed=5)


@pytest.fixture(scope="module")
def toy():
    weights = make_weights()
    weights.config = weights.config | {"task": "generate"}
    return weights


def test_weights_that_draw_nothing_and_weights_that_were_tuned_to_restore(toy):
    with pytest.warns(UserWarning, match="tuned for the task sr"):
        generate("ER of COS-7", 1, SMALL, make_weights())
    other = make_weights()
    other.modules = {"encoder": other.modules["backbone"]}
    with pytest.raises(GenerateError, match="these weights draw nothing"):
        generate("ER of COS-7", 1, SMALL, other)


@pytest.mark.parametrize("sampler, grid", [("dpmpp_2m", "logsnr"), ("ddim", "trailing"), ("ddpm", "trailing")])
def test_a_picture_does_not_depend_on_its_company(toy, sampler, grid):
    settings = GenerateSettings(steps=3, size_px=32, seed=5, sampler=sampler, grid=grid)
    many = generate(list(PROMPTS[:2]), 3, settings, toy, batch=4)
    assert many.images.shape == (6, 32, 32) and many.images.dtype == np.float32 and many.numbers == [0, 1, 2] * 2
    assert 0 <= many.images.min() and many.images.max() <= 1
    single = generate(PROMPTS[1], 3, settings, toy, batch=1)
    np.testing.assert_allclose(single.images, many.images[3:], atol=1e-4)
    assert np.abs(many.images[0] - many.images[1]).max() > 0.01                 # another number, another picture


def test_seed_and_guidance_change_the_picture_and_one_means_off(toy):
    base = generate(PROMPTS[0], 1, SMALL, toy).images
    assert np.array_equal(base, generate(PROMPTS[0], 1, SMALL, toy).images)
    for changed in (dict(seed=6), dict(guidance=3.0)):
        other = generate(PROMPTS[0], 1, GenerateSettings(**{"steps": 3, "size_px": 32, "seed": 5, **changed}), toy).images
        assert np.abs(base - other).max() > 1e-3


def test_alternatives_are_drawn_once_and_for_all():
    drawn = expand_prompts(["A | B", ["C", "D"], ""], 12, seed=3)
    assert {p for p, _ in drawn} == {"A", "B", "C", "D", ""} and len(drawn) == 36
    assert drawn[:5] == expand_prompts("A | B", 5, seed=3)


def test_the_spelling_of_a_known_prompt_does_not_matter(toy, tmp_path):
    odd = " " + PROMPTS[0].upper().replace(" ", "  ")
    assert expand_prompts(odd, 1, 0, PROMPTS) == [(PROMPTS[0], 0)]
    assert np.array_equal(generate(odd, 1, SMALL, toy).images, generate(PROMPTS[0], 1, SMALL, toy).images)


def test_words_without_quotes_are_caught():
    with pytest.raises(GenerateError, match="nothing is named .found 'of'.*Quotes keep"):
        expand_prompts(["F-actin", "of", "COS-7"], 1, 0)
    assert expand_prompts(["", "  ", "|"], 1, 0) == [("", 0)] * 3            # nothing said is meant


def test_an_unknown_word_is_named_once_with_what_is_near(toy):
    with pytest.warns(UserWarning, match="nearest known") as caught:
        generate("Centrosomes", 3, SMALL, toy, batch=1)
    assert sum("nearest known" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(["", PROMPTS[0]], 1, SMALL, toy)


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(steps=10.0), dict(seed=1.5), dict(sampler="euler"), dict(grid="karras"), dict(guidance=-1), dict(seed=-1)])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(GenerateError, match=next(iter(wrong))):
        GenerateSettings(**wrong)


def test_sizes_and_empty_requests_are_refused(toy):
    for size in (33, 8, 4096):
        with pytest.raises(GenerateError, match="a multiple of .* to 512"):
            generate(PROMPTS[0], 1, GenerateSettings(steps=1, size_px=size), toy)
    for prompts, n in (([], 1), (PROMPTS[0], 0)):
        with pytest.raises(GenerateError, match="nothing to generate"):
            generate(prompts, n, SMALL, toy)


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif"])
def test_files_say_what_they_are(toy, tmp_path, suffix):
    made = generate(["F-actin of COS-7", ""], 2, SMALL, toy)
    paths = save_generated(made, tmp_path / "out", SMALL, toy, suffix)
    assert len(set(paths)) == 4
    image = read_image(paths[0])
    about = image.metadata["fluogen"]
    assert about["synthetic"] is True and about["prompt"] == "F-actin of COS-7" and about["seed"] == 5 and about["weights"] == toy.id
    assert image.array.dtype == np.float32 and np.array_equal(image.array, made.images[0])
    assert image.pixel_um["X"] == pytest.approx(0.0313) and read_image(paths[2]).metadata["fluogen"]["prompt"] == ""
    with pytest.raises(FluogenError, match="does not keep"):
        save_generated(made, tmp_path, SMALL, toy, ".png")


def test_a_second_run_keeps_what_is_there_and_writes_over_nothing(toy, tmp_path):
    run = lambda n=3, settings=SMALL: list(generate_files(PROMPTS[0], n, settings, toy, tmp_path, batch=2))
    first = run(2)
    before = {path: path.read_bytes() for path, _ in first}
    assert [there for _, there in first] == [False, False] and [there for _, there in run()] == [True, True, False]
    image = read_image(run()[2][0])
    assert np.abs(image.array - generate(PROMPTS[0], 3, SMALL, toy).images[2]).max() < 1e-4      # whatever it was drawn beside
    for other in (dict(steps=4), dict(guidance=2.0), dict(size_px=64), dict(sampler="ddim")):
        with pytest.raises(GenerateError, match="another image lies here .found " + next(iter(other))):
            run(settings=replace(SMALL, **other))
    assert {path: path.read_bytes() for path in before} == before
    first[0][0].write_bytes(b"not a picture")
    with pytest.raises(GenerateError, match="found made by something else"):
        run()


def test_pictures_are_kept_as_they_are_drawn(toy, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        list(generate_files(PROMPTS[0], 4, SMALL, toy, tmp_path, batch=2, callback=stop))
    assert len(list(tmp_path.glob("*.tif"))) == 2


def test_one_file_a_picture(toy, tmp_path):
    assert len(plan_files([("ER of COS-7", 0)] * 2, tmp_path, SMALL, toy)) == 1
    with pytest.raises(GenerateError, match="two prompts for one file .found 'E. coli' and 'E coli'"):
        plan_files([("E. coli", 0), ("E coli", 0)], tmp_path, SMALL, toy)


def test_the_command(tmp_path, capsys):
    save_toy(tmp_path / "toy")
    common = ["--model", str(tmp_path / "toy"), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["generate", PROMPTS[0], "-n", "2", "--size", "32", *common]) == 0
    paths = capsys.readouterr().out.split()
    assert len(paths) == 2 and all(read_image(path).metadata["fluogen"]["synthetic"] for path in paths)
    assert main(["generate", PROMPTS[0], "-n", "3", "--size", "32", *common]) == 0
    assert "3 synthetic images" in (said := capsys.readouterr().err) and "2 of them there already" in said
    assert main(["generate", PROMPTS[0], "-n", "2", "--size", "40", *common]) == 2
    assert "another image lies here" in capsys.readouterr().err
    assert main(["generate", PROMPTS[0], "--size", "33", *common]) == 2
    assert "\n" not in capsys.readouterr().err.strip().splitlines()[-1]


def test_other_spellings_are_the_same_picture_and_strange_ones_are_said(toy):
    known = toy.prompts.prompts
    words = " ".join(reversed(split_words(known[0])))
    assert expand_prompts([words, known[0].replace("-", "\u2011")], 1, 0, known) == [(known[0], 0)] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_generation([*known, ""], 1, SMALL, toy)
    together = f"{split_words(known[0])[0]} {split_words(known[-1])[0]}"
    for prompt, said in ((together, "not trained together"), (f"{known[0]} | Golgi of MDCK", "unknown golgi, mdck"), ("\u7ec6\u80de", "unknown")):
        with pytest.warns(UserWarning, match=f"{said}.*nearest known: "):
            plan_generation(prompt, 1, SMALL, toy)


@pytest.mark.parametrize("wrong", [dict(prompts=None), dict(prompts=[3]), dict(n=2.5), dict(n=0), dict(batch=0)])
def test_what_is_no_prompt_or_number_is_one_line(toy, wrong):
    with pytest.raises(GenerateError) as caught:
        generate(**{"prompts": PROMPTS[0], "n": 1, "settings": SMALL, "weights": toy} | wrong)
    assert "\n" not in str(caught.value)


def test_a_long_prompt_has_a_file_name(toy, tmp_path):
    with pytest.warns(UserWarning):
        (path, _), = generate_files("zebra " * 60, 1, SMALL, toy, tmp_path)
    assert path.is_file() and len(path.name) < 120
