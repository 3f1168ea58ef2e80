"Records, key maps and manifests: what is read, what is refused and in which words, what survives a round trip."
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluogen.core import FluogenError
from fluogen.datasets.record import KeyMap, KeyMapError, fill_template
from fluogen.datasets.manifest import read_manifest, stamp_sha256, validate, write_manifest
from fluogen.datasets.record import ManifestError, Record

GOOD = {"image": "gt/1.tif", "conditioning_image": "wf/1.tif", "text": "ER of COS-7"}


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("row, key, says", [
    ({"image": "a.tif"}, "text", "missing key"),
    ({"text": "ER"}, "image", "missing key"),
    ({"image": None, "text": ""}, "image", "missing key"),
    ({"image": "a.tif", "file_name": "b.tif", "text": ""}, "image", "two names"),
    ({"image": 3, "text": ""}, "image", "expected a path"),
    ({"image": " ", "text": ""}, "image", "expected a path"),
    ({"image": "a\0b", "text": ""}, "image", "expected a path"),
    ({**GOOD, "conditioning_image": ["1.tif"]}, "conditioning_image", "expected a path"),
    ({**GOOD, "text": []}, "text", "at least one"),
    ({**GOOD, "text": ["a", 1]}, "text", "at least one"),
    ({**GOOD, "text": 7}, "text", "found 7"),
    ({**GOOD, "bits": "16"}, "bits", 'found "16"'),
    ({**GOOD, "bits": True}, "bits", "1 to 64"),
    ({**GOOD, "bits": 0}, "bits", "1 to 64"),
    ({**GOOD, "norm": "percentile:99,1"}, "norm", "range:lo,hi"),
    ({**GOOD, "norm": "percentile:-1,101"}, "norm", "range:lo,hi"),
    ({**GOOD, "norm": "BioSR"}, "norm", "range:lo,hi"),
    ({**GOOD, "group": 4}, "group", "expected a name"),
    ({**GOOD, "split": "a b"}, "split", "such as train"),
    ({**GOOD, "pixel_um": 0}, "pixel_um", "above 0"),
    ({**GOOD, "pixel_um": {"X": 0.06, "T": 1}}, "pixel_um", "above 0"),
    ({**GOOD, "pixel_um": {}}, "pixel_um", "above 0"),
    ({**GOOD, "sha256": "abc"}, "sha256", "64 hex"),
])
def test_a_wrong_row_is_named_by_file_line_and_key(tmp_path, row, key, says):
    path = write(tmp_path / "m.jsonl", GOOD, "", row)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}:3:{key}: ") and says in str(caught.value)
    assert "\n" not in str(caught.value) and isinstance(caught.value, FluogenError)


@pytest.mark.parametrize("line, says", [
    ("{", "not JSON"), ("[1]", "not a record"), ('"text"', "not a record"), ("null", "not a record"),
    ('{"image": "a", "text": "", "pixel_um": NaN}', "NaN is not a number"), ('{"image": "a", "text": "", "image": "b"}', "'image' is given twice"), ("[" * 100000, "not JSON"),
])
def test_a_line_that_is_no_record(tmp_path, line, says):
    path = write(tmp_path / "m.jsonl", GOOD, line)
    problems = validate(path)
    assert len(problems) == 1 and str(problems[0]).startswith(f"{path}:2: ") and says in str(problems[0])


def test_all_problems_at_once(tmp_path):
    path = write(tmp_path / "m.jsonl", {"bits": 0}, GOOD, "{", {"image": "a.tif", "text": 1, "norm": "x"})
    assert [problem.where.rsplit("m.jsonl", 1)[1] for problem in validate(path)] == [
        ":1:image", ":1:text", ":1:bits", ":3", ":4:text", ":4:norm"]


def test_files_that_are_no_manifest(tmp_path):
    (tmp_path / "stack.tif").write_bytes(b"\xff\xd8" + bytes(3 << 20))
    (tmp_path / "latin.jsonl").write_bytes('{"image": "zelle_ä.tif", "text": ""}\n'.encode("latin-1"))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for name, says in (("stack.tif", "a line of a megabyte"), ("latin.jsonl", "latin.jsonl:1: not JSON"),
                       ("empty.jsonl", "no records"), ("absent.jsonl", "no such manifest"),
                       (".", "no such manifest")):
        with pytest.raises(ManifestError, match=says):
            read_manifest(tmp_path / name)


def test_byte_order_mark_and_windows_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode())
    assert len(read_manifest(path)) == 2


def test_paths_defaults_and_extras(tmp_path):
    write(tmp_path / "manifest.jsonl", {**GOOD, "label": "er", "files": {"a": 1}, "split": None},
          {"file_name": "./x/../a.tif", "text": ["nuclei", ""]},
          {"image": "/far/b.tif", "text": "", "group": "cell 1"})
    pair, single, far = read_manifest(tmp_path)                                 # a folder means its manifest
    assert pair.path == tmp_path / "gt/1.tif" and pair.conditioning_path == tmp_path / "wf/1.tif"
    assert pair.extra == {"label": "er",
                          "files": {"a": 1}} and pair.split is None and pair.group == "gt/1.tif"
    assert single.path == tmp_path / "a.tif" and single.group == "a.tif" and single.is_own_group
    assert single.prompts == ("nuclei", "") and single.conditioning_path is None
    assert far.path == Path("/far/b.tif") and far.group == "cell 1" and not far.is_own_group
    assert far.where.endswith("manifest.jsonl:3")


def test_records_survive_a_change_of_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "m.jsonl", GOOD)
    monkeypatch.chdir(tmp_path)
    record, = read_manifest("m.jsonl")
    monkeypatch.chdir("/")
    assert record.path == tmp_path / "gt/1.tif"


names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8).map(lambda text: text + ".tif")
rows = st.builds(
    Record, image=names,
    text=st.one_of(st.text(max_size=20), st.lists(st.text(max_size=9), min_size=1, max_size=3)),
    conditioning_image=st.one_of(st.none(), names), bits=st.one_of(st.none(), st.integers(1, 64)),
    norm=st.sampled_from([None, "dtype", "minmax", "range:-5,1e4", "percentile:0.1,99.9"]),
    group=st.one_of(st.none(), st.text(min_size=1, max_size=9)),
    split=st.sampled_from([None, "train", "test"]),
    pixel_um=st.one_of(st.none(), st.floats(1e-6, 1e3), st.just({"Y": 0.1, "X": 0.2})),
    extra=st.dictionaries(st.sampled_from(["label", "licence", "scale"]),
                          st.one_of(st.integers(), st.text(max_size=5))))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows, min_size=1, max_size=5))
def test_round_trip(tmp_path, records):
    path = write_manifest(tmp_path / "m.jsonl", records)
    once = read_manifest(path)
    assert [record.extra for record in once] == [record.extra for record in records] and len(once) == len(records)
    text = path.read_text()
    assert write_manifest(tmp_path / "again.jsonl",
                          once).read_text() == text      # same folder: to the letter
    moved = read_manifest(write_manifest(tmp_path / "beside" / "m.jsonl",
                                         once))    # another folder: same files
    assert [r.path for r in moved] == [r.path for r in once]
    assert [r.conditioning_path for r in moved] == [r.conditioning_path for r in once]
    assert [(r.text, r.bits, r.norm, r.split, r.pixel_um) for r in moved] == [
        (r.text, r.bits, r.norm, r.split, r.pixel_um) for r in records]


def test_far_away_files_are_written_absolute(tmp_path):
    record = Record("a.tif", base=tmp_path / "data" / "set")
    near = write_manifest(tmp_path / "data" / "lists" / "m.jsonl", [record]).read_text()
    far = write_manifest(tmp_path / "x" / "y" / "z" / "m.jsonl", [record]).read_text()
    assert json.loads(near)["file_name"] == "../set/a.tif"
    assert json.loads(far)["file_name"] == (tmp_path / "data/set/a.tif").as_posix()


def test_nothing_half_written(tmp_path):
    path = write_manifest(tmp_path / "m.jsonl", [Record("a.tif")])
    before = path.read_text()
    for bad in (Record("b.tif", bits=0), Record("b.tif", extra={"x": object()}),
                Record("b.tif", extra={"x": float("nan")})):
        with pytest.raises(ManifestError, match="m.jsonl:2"):
            write_manifest(path, [Record("a.tif"), bad])
    with pytest.raises(ManifestError, match="no records"):
        write_manifest(path, [])
    assert path.read_text() == before and [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_checksum(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"pixels")
    record = stamp_sha256(Record("a.tif", base=tmp_path))
    assert record.sha256 == hashlib.sha256(b"pixels").hexdigest()
    assert stamp_sha256(Record("gone.tif", base=tmp_path)).sha256 is None


def test_key_map_places_values_defaults():
    key_map = KeyMap({"image": ["files.hr", "files.clean"], "text": ["{structure} of {line}", "structure"],
                      "bits": "dtype"},
                     {"dtype": {"uint16 (12-bit)": 12, "*": ""}, "line": {"unknown": ""}},
                     {"norm": "dtype", "text": ""})
    row = {"files": {"clean": "c.png"}, "structure": "ER", "line": "COS-7", "dtype": "uint16 (12-bit)"}
    ours = key_map.apply(row)
    assert (ours["image"], ours["text"], ours["bits"], ours["norm"]) == ("c.png", "ER of COS-7", 12, "dtype")
    assert {key: ours[key] for key in row} == row                              # theirs are kept
    assert key_map.apply({**row, "line": "unknown"})["text"] == "ER"
    assert key_map.apply({**row, "line": None, "structure": None})["text"] == ""
    assert "bits" not in key_map.apply({**row, "dtype": "float32"})
    assert "image" not in key_map.apply({"files": "a.png"})                    # not a table: not there, no crash
    assert key_map.apply({"image": "x.png", "text": "ours"})["image"] == "x.png"


def test_key_map_errors(tmp_path):
    for tables in ({"keys": []}, {"keys": {"image": []}}, {"keys": {"image": 1}},
                   {"keys": {}, "values": {"a": 1}}):
        with pytest.raises(KeyMapError):
            KeyMap.from_dict(tables)
    path = write(tmp_path / "m.jsonl", {"files": {"lr": "a"}, "text": ""})
    with pytest.raises(ManifestError,
                       match="m.jsonl:1:image: missing key .*expected files.hr or files.gt or image"):
        read_manifest(path, {"image": ["files.hr", "files.gt"]})


def test_templates_are_names_only():
    assert fill_template("{a} of {b}", {"a": "ER", "b": 3}.get) == "ER of 3"
    assert fill_template("{a.__class__}", {"a": "ER"}.get) is None
    assert fill_template("{a} {}", {"a": "ER"}.get) is None


def test_an_image_is_no_manifest_and_is_not_overwritten_by_one(tmp_path):
    image = tmp_path / "cell.tif"
    image.write_bytes(b"II*\0" + bytes(range(256)))
    with pytest.raises(ManifestError, match="folder of the images"):
        read_manifest(image)
    with pytest.raises(ManifestError, match="ends in .jsonl"):
        write_manifest(image, [Record("a.tif")])
    assert image.stat().st_size == 260
