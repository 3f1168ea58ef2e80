"report.parameters: what a notebook does not know or cannot mean is refused before anything runs."
import math

import pytest

from fluogen.report.run import Between, ParameterError, check_parameters, notebook_parameters

ALLOWED = {"profile": ("smoke", "laptop"), "seed": Between(0, 2**31), "share": Between(0.0, 1.0), "dataset": str,
           "save": bool, "n": int}
GOOD = {"profile": "smoke", "seed": 0, "share": 0.5, "dataset": "simulated", "save": True, "n": 3}


def test_good_ones_pass_unchanged():
    assert check_parameters(GOOD, ALLOWED) == GOOD


@pytest.mark.parametrize(("name", "given", "meant"), [("seed", 1e3, 1000), ("share", 1, 1.0), ("n", 2.0, 2)])
def test_crude_numbers_become_what_was_meant(name, given, meant):
    found = check_parameters(GOOD | {name: given}, ALLOWED)[name]
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize(("name", "value"), [
    ("profile", "lapdog"), ("profile", 1), ("seed", -1), ("seed", 2**31 + 1), ("seed", 1.5), ("seed", "0"), ("seed", True),
    ("share", 1.01), ("share", math.nan), ("share", None), ("dataset", 5), ("dataset", None), ("save", 1), ("save", "no"),
    ("n", True), ("n", math.inf), ("profile", ["smoke"])])
def test_impossible_values_are_one_line(name, value):
    with pytest.raises(ParameterError) as caught:
        check_parameters(GOOD | {name: value}, ALLOWED, where="fig4_sr")
    line = str(caught.value)
    assert "\n" not in line and f"fig4_sr: {name}" in line and repr(value) in line and "expected" in line


def test_unknown_names_say_what_was_perhaps_meant():
    with pytest.raises(ParameterError, match="found sead.*Did you mean seed"):
        check_parameters(GOOD | {"sead": 1}, ALLOWED)
    with pytest.raises(ParameterError, match="missing.*expected seed"):
        check_parameters({key: value for key, value in GOOD.items() if key != "seed"}, ALLOWED)


@pytest.mark.parametrize("text", ["__import__('os').system('touch canary')", "a\nb", "'; import os", "$(touch canary)"])
def test_text_stays_text(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_parameters(GOOD | {"dataset": text}, ALLOWED)["dataset"] == text
    assert not list(tmp_path.iterdir())


def test_names_come_from_parameter_cells_only():
    cells = ["", "# Parameters\nseed: int = 0\na = b = 1\nx.y = 3\n", "other = 5", "  # parameters of papermill\nstepz = 2"]
    namespace = {"In": cells, "seed": 7, "a": 1, "b": 1, "other": 5, "stepz": 2}
    assert notebook_parameters(namespace) == {"seed": 7, "a": 1, "b": 1, "stepz": 2}
    assert notebook_parameters({"seed": 1}) == {}
