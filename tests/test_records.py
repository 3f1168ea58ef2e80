"Records of recipes: whole or absent, made once, found beside the weights, and missed in one line."
import json

import pytest

from fluogen.io.files import write_json, write_json_once
from fluogen.models import zoo
from fluogen.models.zoo import find_record
from fluogen.experiments.records import RecordError, describe_results, is_comparable, join_record, read_record, score_row


@pytest.fixture
def shelves(monkeypatch, tmp_path):
    places = [tmp_path / "package", tmp_path / "cache"]
    monkeypatch.setattr(zoo, "weight_folders", lambda: places)
    return places


def test_the_first_shelf_counts(shelves):
    write_json(shelves[1] / "bench" / "scores.json", {"from": "cache"})
    assert find_record("bench") == {"from": "cache"} and find_record("bench", "real") is None
    write_json(shelves[0] / "bench" / "scores.json", {"from": "package"})
    assert read_record("bench", "sr") == {"from": "package"}


def test_what_is_missing_names_its_recipe(shelves):
    with pytest.raises(RecordError, match=r"brightness/scores\.json.*fluogen benchmark brightness") as caught:
        read_record("brightness", "brightness")
    assert "\n" not in str(caught.value)


def test_a_failure_leaves_nothing_and_is_not_kept(tmp_path):
    path = tmp_path / "fit" / "scores.json"
    with pytest.raises(ZeroDivisionError):
        write_json_once(path, lambda: 1 / 0)
    with pytest.raises(TypeError):
        write_json(path, {"not JSON": object()})
    assert list(tmp_path.rglob("*.json")) == []
    assert write_json_once(path, lambda: [1]) == write_json_once(path, lambda: [2]) == [1]


def test_rows_are_by_field_and_the_record_is_json():
    class Fields:
        structures, groups, own_groups = ["er", "ccps"], ["a", "b"], False
    row = score_row("held-out", "care", 0, "ever", [{"psnr": 27.0}, {"psnr": 28.0}])
    made = describe_results([row], [{"method": "care"}], {"held-out": Fields}, [None], seeds=[0])
    assert made["rows"][0]["scores"] == {"psnr": [27.0, 28.0]} and made["fields"] == {"held-out": ["er", "ccps"]}
    assert made["bases"] == [] and json.loads(json.dumps(made)) == made


def bench(method, psnr, seed=0, base="nano@1", plain=25.0):
    rows = [score_row("held-out", "bicubic", None, "ever", [{"psnr": plain}, {"psnr": 26.0}]),
            score_row("held-out", method, seed, "ever", [{"psnr": psnr}, {"psnr": psnr}])]
    return {"bases": [base], "seeds": [seed], "fits": [{"method": method.split(",")[0], "seed": seed, "steps": 9}], "rows": rows,
            "fields": {"held-out": ["er", "er"]}, "groups": {"held-out": None}, "n_per_structure": 2}


def test_a_record_grows_by_other_fits_and_renews_those_made_again(tmp_path):
    path = tmp_path / "bench" / "scores.json"
    for made in (bench("care", 27.0), bench("control, 4 passes", 28.0, seed=2), bench("care", 27.5, plain=25.015), bench("care", 26.0, seed=1)):
        join_record(path, made)
    record = json.loads(path.read_text())
    assert {(r["way"], r["seed"]): r["scores"]["psnr"][0] for r in record["rows"] if r["seed"] is not None} == {
        ("care", 0): 27.5, ("care", 1): 26.0, ("control, 4 passes", 2): 28.0}
    assert sum(r["way"] == "bicubic" for r in record["rows"]) == 1 and record["seeds"] == [0, 1, 2] and len(record["fits"]) == 3


@pytest.mark.parametrize("other", [dict(base="nano@2"), dict(plain=25.2)])
def test_what_cannot_be_compared_is_put_aside_not_lost(tmp_path, other):
    path = join_record(tmp_path / "scores.json", bench("care", 27.0))
    with pytest.warns(UserWarning, match="of other fields or weights"):
        join_record(path, bench("rcan", 28.0, **other))
    assert [r["way"] for r in json.loads(path.read_text())["rows"]] == ["bicubic", "rcan"]
    assert [r["way"] for r in json.loads((tmp_path / "scores.older.json").read_text())["rows"]] == ["bicubic", "care"]
    made = bench("care", 27.0)
    made["fields"]["held-out"] = ["er", "ccps"]
    assert not is_comparable(bench("care", 27.0), made)
