"Every rule on a fake tree, against the manifest it has to give."
import json

import pytest

from fluogen.datasets.registry import list_datasets
from fluogen.datasets.scan import FACT_RULES, PAIR_RULES, ScanError, list_files, make_rule
from fluogen.datasets.scan import ScanRules, build_manifest, scan_folder, split_per


def tree(root, *names, **texts):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, text in texts.items():
        (root / name.replace("__", ".")).write_text(text)
    return root


def golden(root, rules, *lines):
    "The manifest written by the rules is these lines, to the letter."
    assert build_manifest(root, rules).read_text().splitlines() == list(lines)


def test_suffix(tmp_path):
    tree(tmp_path, "A01_DNA.tif", "A01_pH3.tif", "A01_actin.tif")
    golden(tmp_path, {"images": "*.tif", "text": "{stain} of ht29",
                      "fields": [{"by": "suffix", "name": "stain",
                                  "values": {"DNA": "DNA", "pH3": "pH3", "actin": "actin"}}]},
           '{"file_name": "A01_DNA.tif", "text": "DNA of ht29"}',
           '{"file_name": "A01_actin.tif", "text": "actin of ht29"}',
           '{"file_name": "A01_pH3.tif", "text": "pH3 of ht29"}')


def test_substring_takes_the_longest(tmp_path):
    tree(tmp_path, "r1-ch1-sk1.tiff", "r1-ch10-sk1.tiff")
    golden(tmp_path, {"images": "*", "text": "{stain} of U2OS",
                      "fields": [{"by": "substring", "name": "stain",
                                  "values": {"ch1": "DNA", "ch10": "RNA"}}]},
           '{"file_name": "r1-ch1-sk1.tiff", "text": "DNA of U2OS"}',
           '{"file_name": "r1-ch10-sk1.tiff", "text": "RNA of U2OS"}')


def test_folder_with_and_without_a_table(tmp_path):
    tree(tmp_path, "plate1/Hoechst/2.tif", "plate1/ERSyto/10.tif", "plate1/ERSyto/9.tif")
    golden(tmp_path, {"images": "**/*.tif", "text": "{stain} of U2OS", "group": "{plate}", "fields": [
        {"by": "folder", "name": "stain", "values": {"Hoechst": "DNA", "ERSyto": "ER"}},
        {"by": "folder", "name": "plate", "level": 2}]},
           '{"file_name": "plate1/ERSyto/9.tif", "text": "ER of U2OS", "group": "plate1"}',
           '{"file_name": "plate1/ERSyto/10.tif", "text": "ER of U2OS", "group": "plate1"}',
           '{"file_name": "plate1/Hoechst/2.tif", "text": "DNA of U2OS", "group": "plate1"}')


def test_regex_and_prefix(tmp_path):
    tree(tmp_path, "HUVEC-01/Plate1/AA02_s1_w1.png", "RPE-11/Plate1/AA02_s2_w6.png")
    golden(tmp_path, {"images": "**/*.png", "text": "{channel} of {line}", "keep": ["site"], "fields": [
        {"by": "regex", "pattern": r"^(?P<line>[A-Z0-9]+)-\d+/.*_s(?P<site>\d)_(?P<channel>w\d)\.",
         "values": {"line": {"HUVEC": "huvec", "RPE": "rpe"}, "channel": {"w1": "nuclei", "w6": "golgi"}}}]},
           '{"file_name": "HUVEC-01/Plate1/AA02_s1_w1.png", "text": "nuclei of huvec", "site": "1"}',
           '{"file_name": "RPE-11/Plate1/AA02_s2_w6.png", "text": "golgi of rpe", "site": "2"}')


def test_constant_set_and_alternatives(tmp_path):
    tree(tmp_path, "a.tif")
    golden(tmp_path,
           {"images": "*.tif", "text": ["DNA of {line}", "DNA"],
            "set": {"bits": 12, "norm": "minmax", "licence": "CC0"},
                      "fields": [{"by": "constant", "name": "line", "value": "hepatocytes"}]},
           '{"file_name": "a.tif", "text": ["DNA of hepatocytes", "DNA"], "bits": 12, "norm": "minmax", "licence": "CC0"}')


def test_csv_join_by_several_columns(tmp_path):
    tree(tmp_path, "P1/r02c03.tif", "P1/r02c04.tif",
         wells__csv="plate,row,col,line\nP1,02,03,HPSI-1\nP1,02,04,HPSI-2\n")
    golden(tmp_path, {"images": "P1/*.tif", "text": "DNA of {line}", "fields": [
        {"by": "regex", "pattern": r"^(?P<plate>\w+)/r(?P<row>\d+)c(?P<col>\d+)"},
        {"by": "csv", "file": "wells.csv", "on": {"plate": "{plate}", "row": "{row}", "col": "{col}"},
         "take": {"line": "line"}}]},
           '{"file_name": "P1/r02c03.tif", "text": "DNA of HPSI-1"}',
           '{"file_name": "P1/r02c04.tif", "text": "DNA of HPSI-2"}')


def test_csv_parts_and_split_per_organelle(tmp_path):
    tree(tmp_path, "1_green.jpg", "2_green.jpg", "3_green.jpg",
         hpa__csv="id,organelles,line\n1,0,U-2 OS\n2,0;5,A-431\n3,5,U-2 OS\n")
    rules = {"images": "*_green.jpg", "text": "{organelle} of {line}", "keep": ["organelle"], "fields": [
        {"by": "regex", "pattern": r"^(?P<id>\d+)_"},
        {"by": "csv", "file": "hpa.csv", "on": {"id": "{id}"},
         "take": {"organelle": "organelles", "line": "line"},
         "parts": ";", "values": {"organelle": {"0": "nucleoplasm", "5": "golgi"}}}]}
    records = scan_folder(tmp_path, rules)
    assert [record.text for record in records] == [
        "nucleoplasm of U-2 OS", "nucleoplasm and golgi of A-431", "golgi of U-2 OS"]
    apart = split_per(records, "organelle", skip=" and ")
    assert {value: [record.image for record in members] for value, members in apart.items()} == {
        "nucleoplasm": ["1_green.jpg"], "golgi": ["3_green.jpg"]}
    assert len(split_per(records)) == 3


def test_csv_mistakes(tmp_path):
    tree(tmp_path, "1.tif", t__csv="id,line\n1,a\n1,b\n")
    rules = {"images": "*.tif", "text": "{line}",
             "fields": [{"by": "csv", "file": "t.csv", "on": {"id": "{stem}"}, "take": {"line": "line"}}]}
    with pytest.raises(ScanError, match=r"t.csv:3: two rows for one key"):
        scan_folder(tmp_path, rules)
    (tmp_path / "t.csv").write_text("name,line\n1,a\n")
    with pytest.raises(ScanError, match="t.csv:2:id: no such column"):
        scan_folder(tmp_path, rules)
    (tmp_path / "t.csv").unlink()
    with pytest.raises(ScanError, match="table cannot be read"):
        scan_folder(tmp_path, rules)


def test_pairs_by_replaced_folder(tmp_path):
    tree(tmp_path, "ER/training_gt/1.tif", "ER/training_9/1.tif")
    golden(tmp_path,
           {"images": "*/training_gt/*.tif", "text": "{s} of COS-7",
            "fields": [{"by": "folder", "name": "s", "level": 2}],
                      "pair": {"by": "folder", "replace": {"training_gt": "training_9"}}},
           '{"image": "ER/training_gt/1.tif", "conditioning_image": "ER/training_9/1.tif", "text": "ER of COS-7"}')


def test_pairs_by_common_stem(tmp_path):
    tree(tmp_path, "images/a.png", "images/b.png", "masks/a_mask.tif", "masks/b_mask.tif", "masks/c_mask.tif")
    rules = {"images": "images/*", "pair": {"by": "stem", "images": "masks/*", "strip": ["_mask"]}}
    golden(tmp_path, rules,
           '{"image": "images/a.png", "conditioning_image": "masks/a_mask.tif", "text": ""}',
           '{"image": "images/b.png", "conditioning_image": "masks/b_mask.tif", "text": ""}')
    tree(tmp_path, "masks/a.tif")
    with pytest.raises(ScanError, match="images/a.png: 2 partners"):
        scan_folder(tmp_path, rules)


def test_first_per_folder_counts_only_files_that_become_records(tmp_path):
    tree(tmp_path, "raw/1/f1.png", "raw/1/f2.png", "raw/2/f10.png", "raw/2/f9.png", "gt/1.png", "gt/2.png")
    rules = {"images": "raw/*/*.png", "role": "conditioning_image", "first_per": "{parent}",
             "pair": {"by": "path", "paths": "gt/{folder}.png"}, "group": "{folder}"}
    golden(tmp_path, rules,
           '{"image": "gt/1.png", "conditioning_image": "raw/1/f1.png", "text": "", "group": "1"}',
           '{"image": "gt/2.png", "conditioning_image": "raw/2/f9.png", "text": "", "group": "2"}')
    mixed = {**rules, "unmatched": "skip", "fields": [{"by": "regex", "pattern": r"f(?P<n>[2-9]\d*)\."}]}
    told = []
    kept = scan_folder(tmp_path, mixed, on_skip=lambda path, why: told.append((path, why)))
    assert [record.conditioning_image for record in kept] == ["raw/1/f2.png", "raw/2/f9.png"]
    assert [path for path, _ in told] == ["raw/1/f1.png", "raw/2/f10.png"]


def test_later_rules_win_and_optional_ones_may_fail(tmp_path):
    tree(tmp_path, "18/a.png", "19/a.png")
    rules = {"images": "*/*.png", "split": "{split}", "fields": [
        {"by": "constant", "name": "split", "value": "train"},
        {"by": "regex", "name": "split", "value": "test", "pattern": "^19/", "optional": True}]}
    assert [record.split for record in scan_folder(tmp_path, rules)] == ["train", "test"]


def test_files_that_no_rule_covers(tmp_path):
    tree(tmp_path, "a_DNA.tif", "a_XYZ.tif", "a_P_1.tif", "._a_DNA.tif")
    rules = {"images": "*.tif", "exclude": ["*P_*"], "text": "{s}",
             "fields": [{"by": "suffix", "name": "s", "values": {"DNA": "DNA"}}]}
    with pytest.raises(ScanError, match="a_XYZ.tif: rule `suffix` finds no s"):
        scan_folder(tmp_path, rules)
    told = []
    scan_folder(tmp_path, {**rules, "unmatched": "skip"}, on_skip=lambda path, why: told.append(path))
    assert told == ["a_XYZ.tif"]
    with pytest.raises(ScanError, match="`text` names a field"):
        scan_folder(tmp_path, {"images": "a_DNA.tif", "text": "{line}"})


@pytest.mark.parametrize("rules, says", [
    ({}, "images: missing key"), ({"images": "*", "txt": ""}, "txt: unknown key"),
    ({"images": "*", "role": "mask"}, "role"),
    ({"images": "*", "fields": [{"by": "prefix"}]}, "no such rule"),
    ({"images": "*", "pair": {"by": "stem"}}, "lacks a key"),
    ({"images": "*", "fields": [{"by": "regex", "pattern": "(", "name": "a", "value": "b"}]},
     "not a regular expression"),
    ({"images": "*", "fields": [{"by": "constant", "name": "a", "value": "b", "optinal": True}]}, "optinal"),
    ({"images": "/*.tif"}, "not a pattern"), ({"images": 5}, "not a pattern"), ({"images": "../*"}, "not a pattern"),
    ({"images": "*.nope"}, "no file fits"),
])
def test_rules_that_cannot_be_meant(tmp_path, rules, says):
    tree(tmp_path, "a.tif")
    with pytest.raises(ScanError, match=says):
        scan_folder(tmp_path, rules)


def test_order_of_files_is_the_order_of_numbers(tmp_path):
    tree(tmp_path, *[f"t{i}.tif" for i in (10, 9, 1, 100)], "²x.tif")
    assert list_files(tmp_path, "t*.tif") == ["t1.tif", "t9.tif", "t10.tif", "t100.tif"]
    assert len(list_files(tmp_path, ["*.tif", "*"])) == 5


LAYOUTS = {
    "BioSR": (["ER/Cell_001/RawSIMData/RawSIMData_level_02.mrc", "ER/Cell_001/GTSIM/GTSIM_level_02.mrc",
               "CCPs/Cell_007/RawSIMData_level_01.mrc", "CCPs/Cell_007/SIM_gt.mrc",
               "CCPs/Cell_007/RawSIMData_gt.mrc"],
              [("CCPs/Cell_007/SIM_gt.mrc", "CCPs of COS-7", "BioSR/CCPs/Cell_007", None),
               ("ER/Cell_001/GTSIM/GTSIM_level_02.mrc", "ER of COS-7", "BioSR/ER/Cell_001", None)]),
    "FMD": (["Confocal_BPAE_R/raw/19/HV1.png", "Confocal_BPAE_R/gt/19/avg50.png",
             "TwoPhoton_MICE/raw/2/HV1.png",
             "TwoPhoton_MICE/gt/2/avg50.png", "test_mix/raw/1/x.png"],
            [("Confocal_BPAE_R/gt/19/avg50.png", "mitochondria of BPAE", "FMD/Confocal_BPAE_R/19", "test"),
             ("TwoPhoton_MICE/gt/2/avg50.png", "mouse brain tissues", "FMD/TwoPhoton_MICE/2", "train")]),
    "DSB2018": (["images/0a.png", "masks/0a.png"], [("images/0a.png", "", "DSB2018/0a", None)]),
    "2D HeLa": (["golgpp/r1.png"],
                [("golgpp/r1.png", "golgi of hela, gpp130", "HeLa2D/golgpp/r1.png", None)]),
    "DynamicNuclearNet": (["train/PC-3/m1/images/000.tif", "train/PC-3/m1/masks/000.tif"],
                          [("train/PC-3/m1/images/000.tif", "nuclei of PC-3", "DynamicNuclearNet/PC-3/m1",
                            "train")]),
    "W2S": (["avg1/080_1.png", "avg400/080_1.png", "avg1/081_0.png", "avg400/081_0.png"],
            [("avg400/080_1.png", "microtubules", "W2S/080", "train"),
             ("avg400/081_0.png", "mitochondria", "W2S/081", "test")]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_registry(tmp_path, name):
    files, expected = LAYOUTS[name]
    tree(tmp_path, *files)
    entry = list_datasets()[name]
    records = scan_folder(tmp_path, entry.layout)
    assert [(record.image, record.text, record.group, record.split) for record in records] == expected
    assert {record.text for record in records} <= set(entry.prompts)


def test_every_layout_of_the_registry_is_valid_and_covered():
    with_layout = {name for name, entry in list_datasets().items() if entry.layout}
    assert with_layout == set(LAYOUTS)
    for name in with_layout:
        rules = ScanRules.from_dict(list_datasets()[name].layout)
        assert all(make_rule(rule, FACT_RULES) for rule in rules.fields)
        assert rules.pair is None or make_rule(rules.pair, PAIR_RULES)


def test_values_of_the_written_manifest_are_checked(tmp_path):
    tree(tmp_path, "a.tif")
    with pytest.raises(Exception, match="a.tif:bits: wrong value"):
        scan_folder(tmp_path, {"images": "*.tif", "set": {"bits": "many"}})
    assert not list(tmp_path.glob("*.jsonl"))
    assert json.loads(build_manifest(tmp_path, {"images": "*.tif"}).read_text()) == {"file_name": "a.tif",
                                                                                     "text": ""}
