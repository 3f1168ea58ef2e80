"Records of recipes: whole or absent, made once, found beside the weights, and missed in one line."
import json

import pytest

from fluogen.tasks import records
from fluogen.tasks.records import RecordError, describe_bench, find_record, keep_once, keep_record, read_record, score_row


@pytest.fixture
def shelves(monkeypatch, tmp_path):
    places = [tmp_path / "package", tmp_path / "cache"]
    monkeypatch.setattr(records, "weight_folders", lambda: places)
    return places


def test_the_first_shelf_counts(shelves):
    keep_record(shelves[1] / "bench" / "scores.json", {"from": "cache"})
    assert find_record("bench") == {"from": "cache"} and find_record("bench", "real") is None
    keep_record(shelves[0] / "bench" / "scores.json", {"from": "package"})
    assert read_record("bench", "bench30") == {"from": "package"}


def test_what_is_missing_names_its_recipe(shelves):
    with pytest.raises(RecordError, match=r"brightness/scores\.json.*fluogen train brightness") as caught:
        read_record("brightness", "brightness")
    assert "\n" not in str(caught.value)


def test_a_failure_leaves_nothing_and_is_not_kept(tmp_path):
    path = tmp_path / "fit" / "scores.json"
    with pytest.raises(ZeroDivisionError):
        keep_once(path, lambda: 1 / 0)
    with pytest.raises(TypeError):
        keep_record(path, {"not JSON": object()})
    assert list(tmp_path.rglob("*.json")) == []
    assert keep_once(path, lambda: [1]) == keep_once(path, lambda: [2]) == [1]


def test_rows_are_by_field_and_the_record_is_json():
    class Fields:
        structures, groups = ["er", "ccps"], ["a", "b"]
    row = score_row("held-out", "care", 0, "ever", [{"psnr": 27.0}, {"psnr": 28.0}])
    made = describe_bench([row], [{"method": "care"}], {"held-out": Fields}, [None], seeds=[0])
    assert made["rows"][0]["scores"] == {"psnr": [27.0, 28.0]} and made["fields"] == {"held-out": ["er", "ccps"]}
    assert made["bases"] == [] and json.loads(json.dumps(made)) == made
