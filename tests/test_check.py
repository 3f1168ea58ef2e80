"Planted faults are found, each with what to do; sound sets stay silent; shifts are measured and taken back."
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as Picture
from scipy.ndimage import gaussian_filter
from scipy.ndimage import shift as move
from scipy.ndimage import zoom

from fluogen.cli.main import main
from fluogen.core import FluogenError, hash_array
from fluogen.datasets.align import align_pairs
from fluogen.datasets.check import ADVICE, KINDS, check_data, check_folders, check_prompts, find_leaks, lint_records, next_step
from fluogen.datasets.manifest import read_manifest, stamp_sha256, write_manifest
from fluogen.datasets.pairs import read_mask_pair, read_noisy_pair, read_pair
from fluogen.datasets.record import Record
from fluogen.datasets.scan import build_manifest, pairs_from_folder
from fluogen.datasets.splits import split_by_group
from fluogen.experiments.sample_size import setting_pairs
from fluogen.io.files import ImageReadError
from fluogen.io.image import read_image, read_plane, write_image
from fluogen.preprocessing.registration import PairError, align_pair, find_scale, measure_shift

REAL = Path(__file__).resolve().parents[2] / "shared" / "realdata"
PIXEL = {"Y": 0.1, "X": 0.1}


def draw(seed, size=128):
    "A clean field and its noisy recording, in counts."
    rng = np.random.default_rng(seed)
    clean = gaussian_filter(rng.normal(0, 1, (size, size)), 2)
    clean = 200 + 900 * np.maximum(clean / clean.max(), 0)
    return clean, rng.poisson(clean) + rng.normal(0, 15, clean.shape)


def save(path, image, dtype=np.uint16):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, np.clip(np.rint(image), 0, np.iinfo(dtype).max).astype(dtype), pixel_um=PIXEL)


@pytest.fixture
def folder(tmp_path):
    for seed in range(5):
        clean, noisy = draw(seed)
        save(tmp_path / "set" / "clean" / f"{seed}.tif", clean)
        save(tmp_path / "set" / "noisy" / f"{seed}.tif", noisy)
    return tmp_path / "set"


def change(path, how, **options):
    image = read_image(path).array.astype(float)
    save(path, how(image), **options)


# ---- silence

def test_a_sound_set_is_silent(folder):
    report = check_data(folder)
    assert report.findings == [] and len(report.pairs) == 5 and report.errors == []
    assert max(pair.shift.length for pair in report.pairs) < 0.2
    assert any("128 x 128 uint16" in line for line in report.summary())


def test_a_sound_set_of_two_samplings_is_silent(tmp_path):
    for seed in range(4):
        clean, _ = draw(seed, 256)
        coarse = clean.reshape(128, 2, 128, 2).mean((1, 3))
        save(tmp_path / "hr" / f"{seed}.tif", clean)
        save(tmp_path / "lr" / f"{seed}.tif", np.random.default_rng(seed).poisson(coarse))
    report = check_data(tmp_path)
    assert report.findings == [] and {pair.shift.scale for pair in report.pairs} == {2}
    assert "fluogen finetune m.jsonl" in next_step(report, "m.jsonl")


def test_every_kind_has_its_advice():
    assert set(KINDS) <= ADVICE.keys()
    assert all(advice.endswith(".") for _, advice in ADVICE.values())


# ---- planted faults

def jpeg(image):
    packed = io.BytesIO()
    Picture.fromarray(np.clip(image / 5, 0, 255).astype(np.uint8)).save(packed, "jpeg", quality=40)
    return np.array(Picture.open(packed)).astype(float)


def swap(folder):
    for seed in range(5):
        one, other = folder / "clean" / f"{seed}.tif", folder / "noisy" / f"{seed}.tif"
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(kept)


PLANTS = {
    "shifted": lambda f: change(f / "clean/0.tif", lambda a: move(a, (0.8, -0.7), mode="nearest")),
    "slightly-shifted": lambda f: change(f / "clean/0.tif", lambda a: move(a, (0.42, 0.0), mode="nearest")),
    "exchanged": swap,
    "constant": lambda f: change(f / "noisy/1.tif", lambda a: a * 0 + 7),
    "stack": lambda f: write_image(f / "noisy/1.tif", np.ones((3, 128, 128), np.uint16), axes="ZYX"),
    "unreadable": lambda f: (f / "noisy/1.tif").write_bytes((f / "noisy/1.tif").read_bytes()[:900]),
    "unpaired": lambda f: (f / "noisy/1.tif").unlink(),
    "sizes": lambda f: change(f / "clean/2.tif", lambda a: a[:-3]),
    "same-image": lambda f: shutil.copy(f / "clean/3.tif", f / "noisy/3.tif"),
    "two-fields": lambda f: save(f / "clean/3.tif", draw(99)[0]),
    "duplicate": lambda f: [shutil.copy(f / r / "0.tif", f / r / "9.tif") for r in ("clean", "noisy")],
    "near-duplicate": lambda f: [save(f / "clean/9.tif", draw(1)[0] * 1.1 + 3), save(f / "noisy/9.tif", draw(1)[1])],
    "saturated": lambda f: change(f / "noisy/2.tif", lambda a: np.minimum(a, np.percentile(a, 97))),
    "jpeg": lambda f: change(f / "noisy/2.tif", jpeg),
    "8-bit": lambda f: change(f / "noisy/2.tif", lambda a: a / 8, dtype=np.uint8),
    "not-a-number": lambda f: write_image(f / "noisy/2.tif", np.where(np.eye(128), np.nan, 5).astype(np.float32)),
    "small": lambda f: [change(f / r / "2.tif", lambda a: a[:20, :24]) for r in ("clean", "noisy")],
    "shift-unknown": lambda f: [save(f / r / "2.tif", np.random.default_rng(i).poisson(400, (40, 40))) for i, r in enumerate(("clean", "noisy"))],
    "one-pair": lambda f: [path.unlink() for path in f.rglob("*.tif") if path.stem != "0"],
}


@pytest.mark.parametrize("kind", PLANTS)
def test_planted(folder, kind):
    PLANTS[kind](folder)
    report = check_data(folder)
    also = {"8-bit", "duplicate", "near-duplicate", "mixed"} if kind in ("jpeg", "near-duplicate", "same-image") else {"mixed"}
    assert kind in report.kinds() and set(report.kinds()) <= {kind} | also
    line, = (line for line in report.lines() if f"  {kind}: " in line)
    assert line.startswith("ERROR" if ADVICE[kind][0] else "note") and line.endswith(ADVICE[kind][1]) and "\n" not in line
    assert bool(report.errors) == ADVICE[kind][0]


def test_pairs_that_cannot_be_read_are_still_pairs(folder):
    for path in folder.rglob("*.tif"):
        path.write_bytes(b"")
    assert check_data(folder).summary()[0] == "images      5 pairs, of which none can be read"


def test_small_drawings_are_not_taken_for_jpeg():
    "Few blocks say little: of 96 pixels a smooth picture can look like them by chance."
    from fluogen.datasets.image_stats import measure_blocks
    assert max(measure_blocks(draw(seed, 96)[0]) for seed in range(30)) == 0
    assert max(measure_blocks(draw(seed, 128)[0]) for seed in range(30)) < 0.1


def test_twins_of_one_name_are_told_apart(folder):
    shutil.copy(folder / "clean/3.tif", folder / "noisy/3.tif")
    assert any("noisy/3.tif has the content of clean/3.tif" in finding.what for finding in check_data(folder).findings)


def rows(folder, splits, groups=None):
    return [Record(f"clean/{n}.tif", "", f"noisy/{n}.tif", split=split, group=groups and groups[n], base=folder)
            for n, split in enumerate(splits)]


@pytest.mark.parametrize("kind, make", [
    ("leak-group", lambda f: rows(f, ["train"] * 4 + ["test"], ["a", "b", "c", "d", "a"])),
    ("leak-file", lambda f: rows(f, ["train"] * 4 + ["test"]) + [Record("clean/0.tif", "", "noisy/0.tif", split="test",
                                                                      group="z", base=f)]),
    ("leak-content", lambda f: [shutil.copy(f / "clean/0.tif", f / "clean/4.tif"),
                                shutil.copy(f / "noisy/0.tif", f / "noisy/4.tif"), rows(f, ["train"] * 4 + ["test"])][-1]),
    ("leak-near", lambda f: [save(f / "clean/4.tif", draw(0)[0] * 1.2), save(f / "noisy/4.tif", draw(0)[1]),
                             rows(f, ["train"] * 4 + ["test"])][-1]),
    ("split-name", lambda f: rows(f, ["train"] * 4 + ["Test"])),
    ("missing-file", lambda f: rows(f, ["train"] * 4 + ["test"]) + [Record("no.tif", "", "noisy/0.tif", base=f)]),
    ("same-file", lambda f: rows(f, ["train"] * 4) + [Record("clean/4.tif", "", "clean/4.tif", base=f)]),
])
def test_planted_in_a_manifest(folder, kind, make):
    report = check_data(write_manifest(folder / "manifest.jsonl", make(folder)))
    assert kind in report.kinds() and report.errors
    assert check_data(folder).kinds() == report.kinds()                 # the folder of a manifest means the manifest


def test_splits_by_group_are_no_leak(folder):
    assert check_data(write_manifest(folder / "manifest.jsonl", rows(folder, ["train"] * 3 + ["val", "test"]))).findings == []


# ---- roles

def test_masks_are_no_recordings(folder, tmp_path):
    report = check_data(folder)
    threshold = lambda path: save(path, 255 * (read_image(path).array > 400), np.uint8)         # a mask of bright parts, in eight bits
    for path in (folder / "noisy").iterdir():
        shutil.copy(folder / "clean" / path.name, path)
        threshold(path)
    masks = check_data(write_manifest(tmp_path / "masks.jsonl", report.records))
    assert not masks.errors and "8-bit" not in masks.kinds() and "--task mask2image" in next_step(masks, "masks.jsonl")
    save(folder / "noisy" / "0.tif", np.kron(np.eye(2), np.ones((40, 40))))
    shutil.copy(folder / "clean" / "1.tif", tmp_path / "image.tif")
    shutil.copy(folder / "noisy" / "1.tif", folder / "clean" / "1.tif")
    shutil.copy(tmp_path / "image.tif", folder / "noisy" / "1.tif")
    assert {"sizes", "exchanged"} <= set(check_data(tmp_path / "masks.jsonl").kinds())


def test_names_that_pair(tmp_path):
    for name in ("a_GT.tif", "a_raw.tif", "b_gt.tif", "b_raw_1.tif", "b_raw_2.tif"):
        save(tmp_path / name, draw(0, 64)[0])
    records, lonely = pairs_from_folder(tmp_path)
    assert {(r.conditioning_image, r.image) for r in records} == {("a_raw.tif", "a_GT.tif"), ("b_raw_1.tif", "b_gt.tif"),
                                                                 ("b_raw_2.tif", "b_gt.tif")}
    assert lonely == [] and len({r.group for r in records}) == 2


@pytest.mark.parametrize("inputs, targets", [("confocal/noisy", "confocal/clean"), ("masks", "images"), ("a/labels", "a/img"), ("high NA/raw", "high NA/gt")])
def test_folders_that_pair(tmp_path, inputs, targets):
    for n in range(3):
        save(tmp_path / inputs / f"{n}.tif", draw(n, 64)[0])
        save(tmp_path / targets / f"{n}.tif", draw(n, 64)[0])
    records, lonely = pairs_from_folder(tmp_path)
    assert {(r.conditioning_image, r.image) for r in records} == {(f"{inputs}/{n}.tif", f"{targets}/{n}.tif") for n in range(3)} and not lonely


def test_single_images_are_no_fault(tmp_path):
    for seed in range(3):
        save(tmp_path / f"cell{seed}.tif", draw(seed)[0])
    report = check_data(tmp_path)
    assert report.findings == [] and "no pairs" in next_step(report)


# ---- registration

@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("shift", [(0, 0), (0.5, -0.5), (-3.3, 1.7), (12.2, -9.6)])
def test_shift_is_measured_and_taken_back(scale, shift):
    fine, _ = draw(3, 128 * scale)
    fine = gaussian_filter(fine, scale)
    coarse = fine.reshape(128, scale, 128, scale).mean((1, 3))
    noisy = np.random.default_rng(0).poisson(coarse / 10)
    moved = move(fine, np.multiply(shift, scale), order=3, mode="nearest")
    found = measure_shift(noisy, moved)
    assert found[:2] == pytest.approx(shift, abs=0.15) and found.scale == scale and found.is_certain
    condition, target = align_pair(noisy, moved, found)
    assert measure_shift(condition, target).length < 0.2 and find_scale(condition.shape, target.shape) == scale
    assert condition.dtype == noisy.dtype and np.isin(condition, noisy).all()


def test_no_pair_no_shift():
    assert not measure_shift(draw(0)[1], draw(1)[0]).is_certain
    with pytest.raises(PairError, match="Exchange"):
        measure_shift(draw(0, 256)[0], draw(0, 128)[0])
    with pytest.raises(PairError, match="sizes"):
        measure_shift(np.ones((64, 64)), np.ones((96, 128)))


def test_aligning_leaves_the_originals_alone(folder, tmp_path):
    PLANTS["shifted"](folder)
    PLANTS["unreadable"](folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.tif")}
    manifest, left_out = align_pairs(check_data(folder), tmp_path / "out")
    assert left_out == [] and {path: path.read_bytes() for path in folder.rglob("*.tif")} == before
    records = read_manifest(manifest)
    assert len(records) == 4 and check_data(manifest).errors == []
    aligned = read_image(records[0].path)
    assert aligned.pixel_um == PIXEL and aligned.array.dtype == np.uint16
    assert aligned.metadata["mended_shift_px"] == pytest.approx([0.8, -0.7], abs=0.1)
    with pytest.raises(PairError, match="not empty"):
        align_pairs(check_data(folder), tmp_path / "out")


def test_dim_pairs_that_lie_over_one_another_are_left_where_they_are(tmp_path):
    made = setting_pairs(0, 10)                                          # nuclei at five photons: the peak wanders by a pixel
    for i in range(10):
        save(tmp_path / "set" / "noisy" / f"{i}.tif", made.counts[i, 0].numpy())
        save(tmp_path / "set" / "clean" / f"{i}.tif", 100 + 1000 * made.target[i, 0].numpy())
    report = check_data(tmp_path / "set")
    assert max(pair.shift.length for pair in report.pairs if pair.shift) > 0.5 and "shifted" not in report.kinds()
    manifest, left_out = align_pairs(report, tmp_path / "out")
    sizes = [read_image(record.path).array.shape for record in read_manifest(manifest)]
    assert left_out == [] and sizes.count((128, 128)) >= 9


@pytest.mark.parametrize("scale, words", [(1, "--task denoise"), (2, "finetune LIST --name"), (4, "bring all to twice")])
def test_the_next_step_fits_the_sizes(tmp_path, scale, words):
    for seed in range(3):
        save(tmp_path / "noisy" / f"{seed}.tif", draw(seed, 64)[1])
        save(tmp_path / "clean" / f"{seed}.tif", zoom(draw(seed, 64)[0], scale, order=1, grid_mode=True, mode="nearest"))
    report = check_data(tmp_path)
    assert report.errors == [] and words in next_step(report, "LIST")


def test_frames_of_structured_illumination_are_averaged(tmp_path):
    for seed in range(3):
        fine = gaussian_filter(draw(seed, 128)[0], 1)
        coarse = fine.reshape(64, 2, 64, 2).mean((1, 3))
        frames = np.random.default_rng(seed).poisson(np.stack([coarse * (1 + 0.4 * np.cos(k)) for k in range(9)]))
        folder = tmp_path / "ER" / f"Cell_00{seed}"
        (folder / "GTSIM").mkdir(parents=True)
        write_image(folder / "RawSIMData_level_01.mrc", frames.astype(np.uint16), axes="TYX")
        write_image(folder / "GTSIM" / "GTSIM_level_01.mrc", fine.astype(np.float32))
        raw = bytearray((folder / "RawSIMData_level_01.mrc").read_bytes())              # as written by other programs:
        raw[104:108], raw[208:216] = b"\0" * 4, b"\0" * 8                               # no note, no stamp
        (folder / "RawSIMData_level_01.mrc").write_bytes(raw)
    records = read_manifest(build_manifest(tmp_path, "BioSR"))
    assert {record.extra["frames"] for record in records} == {"mean"} and len(records) == 3
    report = check_data(tmp_path / "manifest.jsonl")
    assert report.errors == [] and {pair.condition.shape for pair in report.pairs} == {(64, 64)}
    target, condition, _, notes = read_pair(records[0])
    assert target.shape == (1, 128, 128) and condition.shape == (1, 64, 64) and notes == []
    with pytest.raises(ImageReadError, match="no such way to join frames"):
        read_plane(records[0].conditioning_path, "median")
    with pytest.raises(ImageReadError, match="no frames to average"):
        read_plane(records[0].path, "mean")


def test_two_fields_can_be_tuned_on_but_not_judged(folder):
    for path in folder.rglob("[2-4].tif"):
        path.unlink()
    report = check_data(folder)
    assert report.kinds() == ["two-fields-only"] and report.errors == []


def test_what_changed_after_it_was_listed_is_left_out(folder, tmp_path):
    listed = tmp_path / "set" / "pairs.jsonl"
    assert main(["check", str(folder), "--manifest", str(listed)]) == 0
    records = read_manifest(listed)
    assert all(record.sha256 for record in records)
    change(folder / "clean/1.tif", lambda image: image + (np.indices(image.shape).sum(0) == 20))
    report = check_data(listed)
    assert [finding.kind for finding in report.errors] == ["checksum"]
    manifest, left_out = align_pairs(report, tmp_path / "mended")
    assert left_out == [records[1].conditioning_image] and len(read_manifest(manifest)) == 4
    for read in (read_pair, read_noisy_pair, read_mask_pair):
        with pytest.raises(ImageReadError, match="not the file that was recorded"):
            read(records[1])
    assert read_noisy_pair(records[0])
    assert main(["check", str(listed), "--manifest", str(listed)]) == 1 and check_data(listed).errors == []


# ---- the command

def test_every_wrong_partner_is_seen_and_no_right_one(tmp_path):
    for seed in range(8):                                                   # dim fields, each with the next one's clean image
        rng = np.random.default_rng(seed)
        save(tmp_path / "set/noisy" / f"{seed}.tif", 100 + 4 * rng.poisson((draw(seed)[0] - 200) / 100) + rng.normal(0, 4, (128, 128)))
        save(tmp_path / "set/clean" / f"{seed}.tif", draw((seed + 1) % 8)[0])
    report = check_data(tmp_path / "set")
    assert sum(finding.kind == "two-fields" for finding in report.findings) == 8
    for record in report.records:
        with pytest.raises(FluogenError, match="nothing in common"):
            read_noisy_pair(record)
    for seed in range(8):
        save(tmp_path / "set/clean" / f"{seed}.tif", draw(seed)[0])
    report = check_data(tmp_path / "set")
    assert report.errors == []
    [read_noisy_pair(record) for record in report.records]


def test_a_far_shift_is_a_shift_and_what_cannot_be_measured_is_not_called_aligned(folder, tmp_path):
    for path in (folder / "clean").iterdir():
        change(path, lambda a: np.roll(a, (20, -11), (0, 1)))
    for i, role in enumerate(("clean", "noisy")):
        save(folder / role / "4.tif", np.random.default_rng(i).poisson(400, (128, 128)))
    report = check_data(folder)
    assert sum(finding.kind == "shifted" for finding in report.findings) == 4 and "shift-unknown" in report.kinds()
    manifest, left_out = align_pairs(report, tmp_path / "out")
    assert left_out == ["noisy/4.tif"] and len(read_manifest(manifest)) == 4


def test_a_stack_without_axes_is_a_stack(folder):
    tifffile.imwrite(folder / "noisy/1.tif", np.ones((3, 128, 128), np.uint16), photometric="minisblack", metadata=None)
    line, = (line for line in check_data(folder).lines() if "noisy/1.tif" in line)
    assert line.startswith("ERROR  stack: ") and "--axes" not in line


def test_a_changed_recording_is_seen_as_a_changed_target_is(folder, tmp_path):
    listed = tmp_path / "pairs.jsonl"
    assert main(["check", str(folder), "--manifest", str(listed)]) == 0
    change(folder / "noisy/1.tif", lambda a: a + np.eye(128))                       # still a good pair, but another recording
    assert [finding.what for finding in check_data(listed).errors] == ["set/noisy/1.tif is not the file that was recorded"]
    record = next(record for record in read_manifest(listed) if "1.tif" in record.image)
    for read in (read_noisy_pair, lambda r: read_pair(r, 1)):
        with pytest.raises(FluogenError, match="not the file that was recorded"):
            read(record)


def test_a_list_that_somebody_wrote_is_not_written_over(folder, tmp_path, capsys):
    listed = tmp_path / "my pairs.jsonl"
    command = ["check", str(folder), "--manifest", str(listed)]
    assert [main(command), main(command)] == [0, 0] and f"'{listed}'" in capsys.readouterr().out.splitlines()[-1]
    edited = listed.read_text().replace('"image"', '"split": "test", "image"', 1)
    listed.write_text(edited)
    assert main(command) == 2 and "another list lies there" in capsys.readouterr().err and listed.read_text() == edited
    assert main(["check", str(listed), "--manifest", str(listed)]) == 0


def test_command(folder, tmp_path, capsys):
    listed, sheet = tmp_path / "pairs.jsonl", tmp_path / "sheet.png"
    assert main(["check", str(folder), "--manifest", str(listed), "--sheet", str(sheet)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "images      5 pairs" and "--task denoise" in said[-1]
    assert sheet.read_bytes()[:4] == b"\x89PNG" and len(listed.read_text().splitlines()) == 5
    assert main(["check", str(listed)]) == 0
    PLANTS["shifted"](folder)
    capsys.readouterr()
    assert main(["check", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("--align OUT")
    assert main(["check", str(folder), "--align", str(tmp_path / "aligned")]) == 0
    assert main(["check", str(folder), "--mend", str(tmp_path / "mended")]) == 0                    # its name in 0.1.0
    assert json.loads((tmp_path / "mended/manifest.jsonl").read_text().splitlines()[0])["image"].startswith("clean/")
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("fluogen: ")


@pytest.mark.skipif(not (REAL / "denoise_pairs").is_dir(), reason="the real pairs are not on this machine")
def test_real_pairs(tmp_path):
    "One pair of each scene of two real sets: no errors."
    records = [record for record in read_manifest(REAL / "denoise_pairs", {"image": "files.clean", "conditioning_image":
               "files.noisy", "text": "structure"}) if "_raw_1" in record.extra["id"]]
    report = check_data(write_manifest(tmp_path / "m.jsonl", [record for record in records]))
    assert len(report.pairs) == 9 and report.errors == [] and "8-bit" in report.kinds()


# ---- what the records alone show: planted mistakes are found, and lists without mistakes stay silent

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
