"report.claims: a verdict follows from numbers, and a value that is not there never holds."
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluogen.report import claims as claims_module
from fluogen.report.claims import ClaimCard, ClaimError, ClaimSpec, judge_claims, round_number, summarize_claims, write_claims


def judge(id, claim, source, measured, ci95=None, why="", **condition):
    "A claim stated and judged at once."
    return claims_module.judge(ClaimSpec(id, claim, source, **condition), measured, ci95, why)


number = st.floats(-1e6, 1e6).map(round_number)


@given(number, number)
def test_thresholds_are_the_definition(value, bound):
    assert judge("a", "c", "s", value, at_least=bound).holds == (value >= bound)
    assert judge("a", "c", "s", value, at_most=bound).holds == (value <= bound)


@given(number, st.floats(0, 100), st.floats(0, 100), number)
def test_intervals_must_lie_on_one_side(value, below, above, bound):
    low, high = round_number(value - below), round_number(value + above)
    assert judge("a", "c", "s", value, ci95=(low, high), interval_above=bound).holds == (low > bound)
    assert judge("a", "c", "s", value, ci95=(low, high), interval_below=bound).holds == (high < bound)


def test_all_conditions_count():
    given = dict(ci95=(-0.1, 1.5), at_least=0.5, interval_above=0)
    assert judge("a", "c", "s", 0.7, **given).holds is False
    assert judge("a", "c", "s", 0.7, **given | {"ci95": (0.1, 1.5)}).holds is True
    assert judge("a", "c", "s", 3.0, at_least=2.5, at_most=5).holds and not judge("a", "c", "s", 6.0, at_least=2.5, at_most=5).holds


@pytest.mark.parametrize("value", [None, math.nan, math.inf, np.float32("nan")])
def test_no_number_is_never_true(value):
    claim = judge("a", "c", "s", value, at_least=-1e9, why="not here")
    assert claim.holds is None and claim.measured is None and claim.ci95 is None
    with pytest.raises(ClaimError, match="reason"):
        judge("a", "c", "s", value, at_least=-1e9)


@pytest.mark.parametrize("wrong", [
    dict(measured=1.0), dict(measured=1.0, interval_above=0), dict(measured=1.0, ci95=(2, 1), at_least=0),
    dict(measured=1.0, ci95=(1.1, 2), at_least=0), dict(measured=1.0, ci95=(math.nan, 2), at_least=0)])
def test_what_cannot_be_judged_is_refused(wrong):
    with pytest.raises(ClaimError) as caught:
        judge("a", "c", "s", **wrong)
    assert "\n" not in str(caught.value) and "claim a" in str(caught.value)


def test_written_exactly_as_the_design_says(tmp_path):
    path = tmp_path / "deep" / "claims.json"
    claims = [judge("a", "A > B", "paper", np.float32(1.23456), ci95=np.array([1, 2]), at_least=1, unit="dB"),
              judge("b", "C", "issue", None, at_most=1, why="no GPU")]
    write_claims(path, claims)
    rows = json.loads(path.read_text())
    assert rows[0] == {"id": "a", "claim": "A > B", "source": "paper", "expected": "≥ 1 dB", "measured": 1.235,
                       "ci95": [1.0, 2.0], "holds": True, "verdict": "holds", "why": ""}
    assert rows[1]["verdict"] == "not measured" and rows[1]["holds"] is None and rows[1]["measured"] is None and rows[1]["ci95"] is None


def test_a_refused_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "claims.json"
    one = judge("a", "c", "s", 1.0, at_least=0)
    write_claims(path, [one])
    before = path.read_text()
    with pytest.raises(ClaimError, match="one id"):
        write_claims(path, [one, one])
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_card_names_the_verdict_in_words_and_escapes():
    card = ClaimCard([judge("a", "<b>x</b>", "s", 1.0, at_least=2), judge("b", "y", "s", 3.0, at_least=2)])
    page = card._repr_html_()
    assert "does not hold" in page and "holds" in page and "<b>x</b>" not in page and "&lt;b&gt;" in page
    assert page.count("<tr>") == 3 and len(repr(card).splitlines()) == 3


def test_specs_and_measurements_are_matched_by_id():
    specs = [ClaimSpec("a", "A is large", "paper", at_least=1), ClaimSpec("b", "and larger than B", "paper", at_least=0, follows=True),
             ClaimSpec("c", "C is small", "paper", at_most=1)]
    claims = judge_claims(specs, {"a": {"measured": 2.0}, "b": {"measured": -1.0}, "c": {"measured": 5.0, "at_most": 9}}, "absent")
    assert [claim.verdict for claim in claims] == ["holds", "fails", "holds"] and claims[2].expected == "≤ 9"
    assert (claims[1].claim, claims[1].sentence) == ("... and larger than B", "A is large, and larger than B")
    assert summarize_claims(claims) == "Held: A is large (2); C is small (5).\nDid not hold: A is large, and larger than B (-1)."
    assert [claim.why for claim in judge_claims(specs, {}, "no record")] == ["no record"] * 3
    with pytest.raises(ClaimError, match="without a claim"):
        judge_claims(specs, {"d": {"measured": 1.0}})
