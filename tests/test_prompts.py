"Prompts: words, alternatives, dropout, and what is unknown."
import builtins
import itertools
import warnings

import numpy as np
import pytest
import torch
from toys import PROMPTS

from fluogen.models.text_encoder import ClipEncoder, PromptError, WordEncoder, drop_prompts, pick_caption, split_words
from fluogen.simulation.stream import PAPER_PROMPTS


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return WordEncoder(PROMPTS, width=8)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(("text", "words"), [
    ("F-actin of COS-7", ("f-actin", "cos-7")), ("Mitochondria  of\tBPAE cells", ("mitochondria", "bpae")),
    ("S. aureus", ("s", "aureus")), ("E. coli, v2.1", ("e", "coli", "v2.1")), ("", ()), ("of and the", ()),
    ("--- .", ()),
    ("DNA and RNA of U2OS", ("dna", "rna", "u2os"))])
def test_words(text, words):
    assert split_words(text) == words


def test_case_spaces_and_order_do_not_matter(encoder):
    same = ["F-actin of COS-7", "f-ACTIN of cos-7", "  F-actin   COS-7 ", "COS-7, F-actin"]
    states = encoder(same)
    assert torch.allclose(states, states[:1].expand(4, -1)) and states.shape == (4, 8)


def test_prompts_share_words_and_differ(encoder):
    states = encoder([*PROMPTS, ""])
    for a, b in itertools.combinations(states, 2):
        assert not torch.allclose(a, b, atol=1e-3)
    word = dict(zip(encoder.words, encoder.table.weight))
    assert torch.allclose(states[1], (word["er"] + word["cos-7"]) / 2**0.5)
    assert torch.allclose(states[3], encoder.table.weight[-1])                  # the empty prompt has its own


def test_variance_does_not_depend_on_the_number_of_words():
    torch.manual_seed(1)
    encoder = WordEncoder(tuple(f"a{i} b{i} c{i} d{i}" for i in range(500)), width=16)
    with torch.no_grad():
        one, four = (encoder([text.format(*[i] * 4) for i in range(500)])
                     for text in ("a{}", "a{} b{} c{} d{}"))
    assert float(four.std() / one.std()) == pytest.approx(1, abs=0.1)


def test_every_word_and_the_empty_prompt_get_gradients(encoder):
    encoder([*PROMPTS, ""]).square().sum().backward()
    assert encoder.table.weight.grad.abs().sum(1).min() > 0


@pytest.mark.parametrize("text", ["Factin of COS-7", "zebra", "ER of COS-8"])
def test_unknown_words_are_said_with_what_is_known(encoder, text):
    with pytest.warns(UserWarning, match="unknown .*nearest known: ") as caught:
        states = encoder([text, "ER of COS-7"])
    assert any(prompt in str(caught[0].message) for prompt in PROMPTS)
    assert states.isfinite().all()
    known = [word for word in split_words(text) if word in encoder.words]
    with torch.no_grad():
        without = encoder([" ".join(known)])[0]
        assert torch.allclose(states[0], without)                   # nothing is put in its place


def test_made_again_from_its_config(encoder):
    config = encoder.config
    again = WordEncoder(tuple(config["prompts"]), config["width"])
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again([*PROMPTS, ""]), encoder([*PROMPTS, ""])) and config["kind"] == "words"


def test_no_prompts_at_all():
    empty = WordEncoder((), 4)
    assert empty(["", ""]).shape == (2, 4)
    with pytest.warns(UserWarning, match="unknown er"):
        empty(["ER"])


def test_the_prompts_of_the_paper_are_known_and_distinct():
    encoder = WordEncoder(PAPER_PROMPTS)
    states = encoder([*PAPER_PROMPTS, ""])                                      # no warning
    assert len({tuple(row.tolist()) for row in states}) == len(PAPER_PROMPTS) + 1


# ---- captions and dropout

@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 1.0])
def test_share_of_dropped_prompts(rate):
    n = 20_000
    texts = [f"p{i}" for i in range(n)]
    dropped = drop_prompts(texts, np.random.default_rng(3), rate)
    assert abs(dropped.count("") / n - rate) <= 4 * (rate * (1 - rate) / n) ** 0.5
    assert all(a in ("", b) for a, b in zip(dropped, texts)) and texts[0] == "p0"
    assert dropped == drop_prompts(texts, np.random.default_rng(3), rate)


def test_a_fifth_is_dropped_if_nothing_is_said():
    assert 0.19 < drop_prompts(["a"] * 20_000, np.random.default_rng(0)).count("") / 20_000 < 0.21


def test_captions():
    rng = np.random.default_rng(0)
    assert pick_caption("one") == pick_caption("one", rng) == "one" and pick_caption(["one", "two"]) == "one"
    drawn = [pick_caption(["one", "two", "three"], rng) for _ in range(3000)]
    assert all(abs(drawn.count(word) / 3000 - 1 / 3) < 0.05 for word in ("one", "two", "three"))
    with pytest.raises(PromptError, match="empty list"):
        pick_caption([])


# ---- CLIP

def test_clip_without_its_extra_or_its_files(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **more):
        if name.startswith("transformers"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PromptError, match=r'pip install "fluogen\[clip\]"'):
        ClipEncoder(str(tmp_path))
