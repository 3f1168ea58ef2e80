"Planted mistakes are found, and lists without mistakes stay silent."
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fluogen.core import hash_array
from fluogen.datasets.check import KINDS, check_folders, check_prompts, find_leaks, lint_records
from fluogen.datasets.manifest import read_manifest, stamp_sha256, write_manifest
from fluogen.datasets.record import Record
from fluogen.datasets.splits import split_by_group


@pytest.fixture
def records(tmp_path):
    "Forty images of ten cells, split by cell."
    rng = np.random.default_rng(0)
    for number in range(40):
        np.save(tmp_path / f"{number}.npy", rng.integers(0, 99, (4, 4)))
    made = [Record(f"{number}.npy", "ER of COS-7", group=f"cell {number // 4}",
                   base=tmp_path) for number in range(40)]
    write_manifest(tmp_path / "m.jsonl", split_by_group(made, seed=1))
    return read_manifest(tmp_path / "m.jsonl")


def kinds(findings):
    return [finding.kind for finding in findings]


def test_a_clean_list_is_silent(records):
    assert lint_records(records, ["ER of COS-7"]) == []


def test_planted_leak_by_content(records, tmp_path):
    train, test = (next(r for r in records if r.split == split) for split in ("train", "test"))
    shutil.copy(test.path, tmp_path / "copy.npy")
    planted = replace(train, image="copy.npy", where="m.jsonl:41")
    finding, = lint_records([*records, planted])
    assert finding.kind == "leak-content" and finding.where.rsplit("m.jsonl", 1)[1] == ":41"
    assert "copy.npy has the content of" in finding.what and "test and train" in finding.what
    same = replace(train, image="copy.npy", group=test.group, split="test")     # within one split: no leak
    assert kinds(lint_records([*records, same])) == ["duplicate"]
    assert lint_records([*records, planted], content=None) == []


def test_planted_leak_by_group_and_by_file(records):
    test = next(r for r in records if r.split == "test")
    moved = [replace(r, split="train") if r is test else r for r in records]
    finding, = lint_records(moved)
    assert finding.kind == "leak-group" and finding.count == 4 and test.group in finding.what
    assert kinds(lint_records([*records, replace(test, split="train", group="cell 99")])) == ["leak-file"]
    assert kinds(lint_records([*records,
                       replace(test, split="train", image=f"x/../{test.image}")])) == ["leak-group",
                                                                                       "leak-file"]


def test_a_condition_shared_by_two_splits_leaks_too(records):
    train, test = (next(r for r in records if r.split == split) for split in ("train", "test"))
    pair = replace(train, conditioning_image=test.image)
    assert kinds(find_leaks([pair if r is train else r for r in records])) == ["leak-file"]


def test_copies_in_another_format_by_a_content_function(records, tmp_path):
    train, test = (next(r for r in records if r.split == split) for split in ("train", "test"))
    np.savetxt(tmp_path / "copy.txt", np.load(test.path), fmt="%d")
    planted = [*records, replace(train, image="copy.txt")]

    def pixels(path):
        return hash_array(np.load(path) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64))
    assert lint_records(planted) == [] and kinds(lint_records(planted, content=pixels)) == ["leak-content"]


def test_missing_files_checksums_and_pairs_of_one_file(records, tmp_path):
    stamped = [stamp_sha256(record) for record in records[:3]]
    assert lint_records(stamped) == []
    records[1].path.write_bytes(b"changed")
    records[2].path.unlink()
    twice = replace(records[4], conditioning_image=records[4].image)
    found = lint_records([*stamped, twice])
    assert kinds(found) == ["missing-file", "checksum", "same-file"]
    assert str(found[0]).split("m.jsonl")[1].startswith(":3: missing-file: ")
    assert [KINDS.index(kind) for kind in kinds(found)] == sorted(KINDS.index(kind) for kind in kinds(found))


def test_the_same_row_twice(records):
    finding, = lint_records([*records, replace(records[0], where="m.jsonl:41")], content=None)
    assert finding.kind == "duplicate" and finding.where == "m.jsonl:41"
    noisy = [replace(records[0], conditioning_image=records[i].image, split=records[0].split) for i in (1, 2,
                                                                                                        3)]
    assert find_leaks(noisy, content=None) == []        # one target with many noisy frames is no duplicate


def ctc(prompts):
    "The Cell Tracking Challenge folders of the published list, with these prompts."
    folders = {"Fluo-N2DL-HeLa": 184, "Fluo-N2DH-SIM+": 215, "Fluo-N2DH-GOWT1": 184, "Fluo-C2DL-MSC": 96,
               "Fluo-C2DL-Huh7": 60}
    return [Record(f"{folder}/01/t{i:03d}.tif", prompts[folder], where=f"{folder}:{i + 1}")
            for folder, count in folders.items() for i in range(count)]


RIGHT = {"Fluo-N2DL-HeLa": "h2b of hela cells", "Fluo-N2DH-SIM+": "dna of HL60 cells",
         "Fluo-N2DH-GOWT1": "GOWT1 of mouse stem cells", "Fluo-C2DL-MSC": "rat mesenchymal stem cells",
         "Fluo-C2DL-Huh7": "tia-1 of human hepatocarcinoma-derived cells"}
SWAPPED = {**RIGHT, "Fluo-N2DL-HeLa": RIGHT["Fluo-N2DH-SIM+"], "Fluo-N2DH-SIM+": RIGHT["Fluo-N2DL-HeLa"]}


def test_swapped_prompts_are_found_without_being_told():
    assert check_folders(ctc(RIGHT)) == []
    found = check_folders(ctc(SWAPPED))
    assert [(finding.where, finding.count) for finding in found] == [("Fluo-N2DL-HeLa:1", 184),
                                                                     ("Fluo-N2DH-SIM+:1", 215)]
    assert '"hela"' in found[0].what and '"dna of HL60 cells"' in found[0].what


def test_swapped_prompts_against_a_stated_table():
    sim = [record for record in ctc(SWAPPED) if "SIM+" in record.image]
    assert check_folders(sim) == []                     # alone it leaves no trace in the words
    finding, = check_folders(sim, {"Fluo-N2DH-SIM+": RIGHT["Fluo-N2DH-SIM+"]})
    assert 'belongs to "dna of HL60 cells"' in finding.what
    assert check_folders(ctc(RIGHT), RIGHT) == []


def test_neutral_folders_raise_no_suspicion():
    mixed = [Record("data/1.tif", "actin of BPAE"), Record("data/2.tif", "ER of COS-7"),
             Record("actin/3.tif", "actin"),
             Record("er/4.tif", "ER of COS-7")]
    assert check_folders(mixed) == []
    assert kinds(check_folders([*mixed, Record("actin/5.tif", "ER of COS-7")])) == ["folder-prompt"]


def test_unknown_prompts():
    vocabulary = ["F-actin of COS-7", "ER of COS-7"]
    found = check_prompts([Record("1", "Factin of COS-7"), Record("2", "Factin of COS-7"),
                           Record("3", ["er of cos-7", "??"]),
                           Record("4", "")], vocabulary)
    assert [(finding.count, "F-actin of COS-7" in finding.what) for finding in found] == [(2, True),
                                                                                          (1, False)]
