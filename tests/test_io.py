"Reading and writing images: the battery R1-R9 and R12, against tifffile, Pillow and mrcfile as oracles."
import hashlib
import importlib.util
import json
import os
import pickle
import re
import resource
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as PILImage

import fluogen
from counts import Calls
from damaged import damage, make_attacks, make_seeds, make_tiff, page_tags
from fluogen.core import make_rng
from fluogen.io.files import ImageReadError, ImageWriteError, hash_file
from fluogen.io.image import Image, read_image, write_image

FULL = os.environ.get("FLUOGEN_BATTERY") == "full"
REAL = Path(__file__).resolve().parents[2] / "shared" / "realdata"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("seeds"))


def damaged_copy(seed: Path, target: Path, rng) -> Path:
    "A damaged copy of a file, or of a folder in which one file is damaged or gone."
    if seed.is_file():
        target = target.with_suffix("".join(seed.suffixes))
        target.write_bytes(damage(seed.read_bytes(), rng))
        return target
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(seed, target)
    victim = sorted(p for p in target.rglob("*") if p.is_file())
    victim = victim[rng.integers(len(victim))]
    victim.unlink() if rng.random() < 0.1 else victim.write_bytes(damage(victim.read_bytes(), rng))
    return target


@pytest.mark.battery
def test_damaged_files_end_in_the_image_or_in_one_error(seeds, tmp_path):
    "R1 and R3: right shape and number type or ImageReadError; changed bytes are caught by the checksum. Seconds: `make bench`."
    number, counts, most = (5000 if FULL else 300), Counter(), 0
    whole = {name: (read_image(path), hash_file(path)) for name, path in seeds.items()}
    assert len(whole) >= 12
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in range(number):
        name = list(seeds)[trial % len(seeds)]
        path = damaged_copy(seeds[name], tmp_path / "damaged", make_rng(1, "damage", trial))
        expected, checksum = whole[name]
        try:
            with Calls() as calls:
                found = read_image(path)
            same = found.array.dtype == expected.array.dtype and found.array.shape == expected.array.shape
            assert same, f"trial {trial} {name}: {found} for {expected}"
            counts["image" if (found.array == expected.array).all() else "other pixels"] += 1
            if hash_file(path) != checksum:
                with pytest.raises(ImageReadError, match="not the file that was recorded"):
                    read_image(path, sha256=checksum)
        except ImageReadError as error:
            foreseen = "\n" not in str(error) and "no check foresaw" not in str(error)
            assert foreseen, f"trial {trial} {name}: {error}"
            counts["error"] += 1
        most = max(most, calls.number)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"{number} damaged files: {dict(counts)}, at most {most} calls, {grown:.0f} MB more")
    assert most < 200_000 and grown < 300 and counts["error"] > number / 5 and counts["image"] > 0


def test_every_cut_is_refused(seeds, tmp_path):
    "R2: truncation at each sixty-fourth of each seed."
    silent = []
    for name, seed in seeds.items():
        path = tmp_path / seed.name
        if seed.is_dir():
            shutil.copytree(seed, path)
        inside = [""] if seed.is_file() else ["zarr.json", "0/zarr.json", "0/c/2/0/0"]
        for whole in (seed / part for part in inside):
            data, target = whole.read_bytes(), path / whole.relative_to(seed)
            for part in range(64):
                target.write_bytes(data[: len(data) * part // 64])
                try:
                    read_image(path)
                    silent.append((name, whole.name, part))
                except ImageReadError:
                    pass
            target.write_bytes(data)
    assert not silent


def test_attacks_are_refused_quickly_and_small(tmp_path):
    "R4: at most two million calls (each page of 100,000 is looked at) and 200 MB each; a second, measured by `make bench`."
    attacks, path = make_attacks(), tmp_path / "attack.tif"
    assert len(attacks) >= 12
    for name, data in attacks.items():
        path.write_bytes(data)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ImageReadError) as caught, Calls() as calls:
            read_image(path, axes="TYX" if "pages" in name else None)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        assert "no check foresaw" not in str(caught.value), name
        assert calls.number < (2_000_000 if "pages" in name else 20_000) and grown < 200, f"{name}: {calls.number} calls, {grown:.0f} MB"


def test_each_flipped_bit_of_a_png_is_seen(seeds, tmp_path):
    whole, path, rng = seeds["16.png"].read_bytes(), tmp_path / "a.png", make_rng(0, "flips")
    for _ in range(150):
        data = bytearray(whole)
        data[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        with pytest.raises(ImageReadError):
            read_image(path)


def test_a_missing_chunk_and_a_missing_end_are_named(seeds, tmp_path):
    "Neither would change the pixels that a plain reader returns in the second case, nor raise in the first."
    shutil.copytree(seeds["stack.ome.zarr"], tmp_path / "a.ome.zarr")
    (tmp_path / "a.ome.zarr" / "0" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(ImageReadError, match="missing and would read as zeros"):
        read_image(tmp_path / "a.ome.zarr")
    tags = page_tags(8, 8, 64) | {305: (2, 40, 8 + 64 + 2 + 12 * 10 + 4)}     # a program's name, cut off
    (tmp_path / "a.tif").write_bytes(make_tiff(tags, bytes(64)) + bytes(20))
    with pytest.raises(ImageReadError, match="truncated, TIFF tag 305"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", "u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8 ?".split())
def test_number_types(kind, tmp_path):
    "R5: exact values in native order, negatives preserved."
    numbers = make_rng(0, kind).normal(0, 3e4, (9, 13))
    array = numbers > 0 if kind == "?" else (np.abs(numbers) if kind[0] == "u" else numbers).astype(kind)
    for order in "<>":
        for big in (False, True):
            tifffile.imwrite(tmp_path / "a.tif", array, byteorder=order, bigtiff=big, metadata=None)
            found = read_image(tmp_path / "a.tif").array
            assert found.dtype == array.dtype and found.dtype.isnative and (found == array).all()


@pytest.mark.parametrize("kind", ["c8", "c16"])
def test_complex_numbers_are_refused(kind, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((8, 8), kind))
    with pytest.raises(ImageReadError, match="complex numbers"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(ImageWriteError):
        write_image(tmp_path / "b.tif", np.ones((8, 8), kind))


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (4096, 3), (37, 53), (33, 65)])
def test_odd_sizes(shape, tmp_path):
    "R6: any size comes back as it is."
    array = make_rng(0, shape).integers(0, 65536, shape, dtype=np.uint16)
    for name in ("a.tif", "a.ome.tif", "a.png", "a.mrc", "a.ome.zarr"):
        found = read_image(write_image(tmp_path / name, array))
        assert found.axes == "YX" and (found.array == array).all()


def test_nothing_is_written_for_nothing(tmp_path):
    with pytest.raises(ImageWriteError, match="nothing to write"):
        write_image(tmp_path / "a.tif", np.zeros((0, 5), np.uint8))
    assert not list(tmp_path.iterdir())


AXES = [("no description", "YX", (16, 20), dict(metadata=None), "YX"),
        ("no description", None, (3, 16, 20), dict(metadata=None), "ZYX or TYX or CYX"),
        ("no axes", None, (3, 16, 20), {}, "ZYX or TYX or CYX"),
        ("length one", "YX", (1, 1, 16, 20), {}, "YX"),
        ("tifffile", "TYX", (3, 16, 20), dict(metadata={"axes": "TYX"}), "TYX"),
        ("letters unknown to us", None, (3, 16, 20), dict(metadata={"axes": "QYX"}), "ZYX"),
        ("ImageJ", "TZCYX", (2, 3, 4, 16, 20), dict(imagej=True, metadata={"axes": "TZCYX"}), ""),
        ("ImageJ, one axis", "CYX", (3, 16, 20), dict(imagej=True, metadata={"axes": "CYX"}), ""),
        ("OME", "TCZYX", (2, 3, 4, 16, 20), dict(ome=True, metadata={"axes": "TCZYX"}), ""),
        ("OME, other order", "CTYX", (2, 3, 16, 20), dict(ome=True, metadata={"axes": "CTYX"}), ""),
        ("RGB", "YXS", (16, 20, 3), dict(photometric="rgb"), ""),
        ("RGBA", "YXS", (16, 20, 4), dict(photometric="rgb", extrasamples=["unassalpha"]), ""),
        ("RGB stack", None, (2, 16, 20, 3), dict(photometric="rgb"), "ZYXS"),
        ("samples apart", "SYX", (3, 16, 20), dict(photometric="rgb", planarconfig="separate"), ""),
        ("grey samples", "CYX", (5, 16, 20), dict(planarconfig="separate", metadata=None), ""),
        ("OME RGB stack", "ZYXS", (2, 16, 20, 3),
         dict(ome=True, photometric="rgb", metadata={"axes": "ZYXS"}), "")]


@pytest.mark.parametrize("what, axes, shape, how, said", AXES)
def test_axes(what, axes, shape, how, said, tmp_path):
    "R7: stated axes are found, others refused with the choices."
    array = make_rng(0, what).integers(0, 256, shape, dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, **{"photometric": "minisblack"} | how)
    if axes is None:
        with pytest.raises(ImageReadError, match=said):
            read_image(tmp_path / "a.tif")
        given = "TYXS"[: array.ndim]
        found = read_image(tmp_path / "a.tif", axes=given)
        assert found.axes == given and found.metadata["axes_source"] == "given by the caller"
    else:
        found = read_image(tmp_path / "a.tif")
        assert found.axes == axes
    assert (found.array == array.reshape(found.array.shape)).all()


def test_contradicting_descriptions_are_refused_and_can_be_overruled(tmp_path):
    stack = make_rng(0, "contradict").integers(0, 256, (3, 16, 20), dtype=np.uint8)
    cases = {"a.ome.tif": (dict(ome=True, metadata={"axes": "TYX"}), b'SizeT="3"', b'SizeT="2"'),
             "b.ome.tif": (dict(ome=True, metadata={"axes": "TYX"}), b'SizeX="20"', b'SizeX="10"'),
             "c.ome.tif": (dict(ome=True, metadata={"axes": "TYX"}), b"uint8", b"int16"),
             "d.tif": (dict(imagej=True, metadata={"axes": "TYX"}), b"frames=3", b"frames=2"),
             "e.tif": (dict(metadata={"axes": "TYX"}), b"[3, 16", b"[9, 16")}
    for name, (how, old, new) in cases.items():
        path = tmp_path / name
        tifffile.imwrite(path, stack, photometric="minisblack", **how)
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        if name != "a.ome.tif":                             # fewer planes than pages: see below
            with pytest.raises(ImageReadError, match="contradict"):
                read_image(path)
            assert (read_image(path, axes="ZYX").array == stack).all()
    with pytest.raises(ImageReadError):
        read_image(tmp_path / "a.ome.tif")


def test_pixel_sizes_need_a_unit(tmp_path):
    array = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for resolution, unit, um in (((72, 72), 2, None), ((300, 300), 2, None), ((160_000, 160_000), 3, 0.0625),
                                 ((1 / 0.0626,) * 2, 1, None)):
        tifffile.imwrite(tmp_path / "a.tif", array, resolution=resolution, resolutionunit=unit, metadata=None)
        found = read_image(tmp_path / "a.tif")
        assert (found.pixel_um or {}).get("X") == um
        assert ("pixel_source" in found.metadata) == (um is not None)
    for unit, um in (("micron", 0.5), ("nm", 0.0005), ("\\u00B5m", 0.5), ("pixel", None)):
        tifffile.imwrite(tmp_path / "b.tif", array, imagej=True, resolution=(2, 2), metadata={"unit": unit})
        assert (read_image(tmp_path / "b.tif").pixel_um or {}).get("X") == um
    for unit, um in (("nm", 0.0626), ("µm", 62.6), ("pixel", None)):
        facts = {f"PhysicalSize{a}": 62.6 for a in "XY"} | {f"PhysicalSize{a}Unit": unit for a in "XY"}
        tifffile.imwrite(tmp_path / "c.ome.tif", array, metadata={"axes": "YX"} | facts)
        assert (read_image(tmp_path / "c.ome.tif").pixel_um or {}).get("Y") == um


FACTS = {"computed": True, "weights": "9f3c", "seed": 7,
         "fluogen": {"steps": [1, 2.5, None], "µ": "<&\"'\n>"}}


@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif", "a.png", "a.mrc", "a.ome.zarr"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_round_trip(name, dtype, tmp_path):
    "R8: bit-equal pixels, axes, pixel size and metadata, for every order of axes that the format takes."
    kept = 0
    for axes in ("YX", "ZYX", "TYX", "CYX", "TCZYX", "ZCYX", "YXS", "TYXS"):
        shape = [{"T": 2, "C": 3, "Z": 1, "Y": 17, "X": 23, "S": 3}[a] for a in axes]
        array = (make_rng(0, axes).random(shape) * 250).astype(dtype)
        pixel = {a: 0.0626 + 0.01 * i for i, a in enumerate(axes) if a in "ZYX"}
        try:
            write_image(tmp_path / name, Image(array, axes, pixel, FACTS))
        except ImageWriteError:
            continue
        found = read_image(tmp_path / name)
        assert found.array.dtype == array.dtype and (found.array == array).all()
        assert (found.axes, found.pixel_um, found.path) == (axes, pixel, tmp_path / name)
        assert all(found.metadata[key] == value for key, value in FACTS.items())
        kept += 1
    assert kept == {"a.tif": 8, "a.ome.tif": 8, "a.png": 2 if dtype == "uint8" else dtype == "uint16",
                    "a.mrc": 4, "a.ome.zarr": 5}[name]


def test_other_programs_read_what_we_write(tmp_path):
    stack = make_rng(0, "others").integers(0, 65536, (2, 3, 16, 20), dtype=np.uint16)
    for name, axes in (("a.tif", "TCYX"), ("a.ome.tif", "CZYX"), ("big.tif", "TCYX"), ("big.btf", "TCYX")):
        big = name.startswith("big")
        write_image(tmp_path / name, stack, axes=axes, pixel_um={"Y": 0.1, "X": 0.1}, bigtiff=None if name == "big.btf" else big)
        with tifffile.TiffFile(tmp_path / name) as file:
            assert file.series[0].axes == axes and (file.asarray() == stack).all()
            assert file.is_bigtiff == big and file.is_imagej == (name == "a.tif")
        assert read_image(tmp_path / name).metadata["container"] == ("BigTIFF" if big else "TIFF")
    write_image(tmp_path / "a.png", stack[0, 0])
    assert (np.array(PILImage.open(tmp_path / "a.png")) == stack[0, 0]).all()


def test_an_edited_file_does_not_keep_our_note(tmp_path):
    "Another program crops the image and keeps the text: refused, and readable with axes."
    write_image(tmp_path / "a.png", np.zeros((8, 8), np.uint8), metadata={"computed": True})
    with PILImage.open(tmp_path / "a.png") as picture:
        from PIL.PngImagePlugin import PngInfo
        info = PngInfo()
        info.add_text("fluogen", picture.text["fluogen"])
        picture.crop((0, 0, 4, 8)).save(tmp_path / "b.png", pnginfo=info)
    with pytest.raises(ImageReadError, match="contradict"):
        read_image(tmp_path / "b.png")
    found = read_image(tmp_path / "b.png", axes="YX")
    assert found.array.shape == (8, 4) and "computed" not in found.metadata


def test_pages_of_imagej_share_their_description(tmp_path):
    "ImageJ writes the values of tags once for all pages; found on real files."
    tifffile.imwrite(tmp_path / "a.tif", np.arange(192, dtype=np.uint8).reshape(3, 8, 8), imagej=True,
                     metadata={"axes": "ZYX", "Info": "x" * 5000})
    data = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tag = file.pages[0].tags[270]
        entry = tag.offset
        first, chain = data[entry: entry + 12], [page.offset for page in file.pages]
    for offset in chain[1:]:                                # point Software at the first description
        number = int.from_bytes(data[offset: offset + 2], "little")
        for at in range(offset + 2, offset + 2 + 12 * number, 12):
            if int.from_bytes(data[at: at + 2], "little") == 305:
                data[at + 2: at + 12] = first[2:]
    (tmp_path / "a.tif").write_bytes(data)
    assert read_image(tmp_path / "a.tif").axes == "ZYX"


def test_planes_series_and_limits(tmp_path):
    stack = make_rng(0, "planes").integers(0, 256, (4, 2, 16, 20), dtype=np.uint8)
    for name in ("a.tif", "a.ome.tif", "a.ome.zarr"):
        axes = "TCYX"
        write_image(tmp_path / name, stack, axes=axes)
        one = read_image(tmp_path / name, plane={"T": 3, "C": 0})
        assert one.axes == "YX" and (one.array == stack[3, 0]).all()
        assert (read_image(tmp_path / name, plane={"C": 1}).array == stack[:, 1]).all()
        for wrong in ({"T": 4}, {"T": -1}, {"Z": 0}, {"Y": 0}, {"T": "0"}, {"T": True + 0.5}):
            with pytest.raises(ImageReadError, match="no such plane"):
                read_image(tmp_path / name, plane=wrong)
        with pytest.raises(ImageReadError, match="larger than allowed"):
            read_image(tmp_path / name, max_bytes=1000)
        assert read_image(tmp_path / name, plane={"T": 0, "C": 0}, max_bytes=1000).array.nbytes == 320
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        file.write(stack[0, 0], metadata=None)
        file.write(stack[0, 0, :8].astype(np.uint16), metadata=None)
    with pytest.raises(ImageReadError, match="several images"):
        read_image(tmp_path / "two.tif")
    assert read_image(tmp_path / "two.tif", series=1).array.shape == (8, 20)
    with pytest.raises(ImageReadError, match="no such series"):
        read_image(tmp_path / "two.tif", series=2)


def test_only_the_chosen_plane_is_decoded(tmp_path):
    stack = np.zeros((3, 64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stack, compression="zlib", photometric="minisblack",
                     metadata={"axes": "TYX"})
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        at = file.pages[2].dataoffsets[0]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[at + 3] ^= 0xFF
    (tmp_path / "a.tif").write_bytes(data)
    assert read_image(tmp_path / "a.tif", plane={"T": 1}).array.shape == (64, 64)
    with pytest.raises(ImageReadError, match="damaged"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("array, name", [
    (np.zeros((3, 8, 8), np.uint8), "a.png"), (np.zeros((8, 8), np.float32), "a.png"),
    (np.zeros((8, 8), np.uint64), "a.ome.tif"), (np.zeros((8, 8), np.int32), "a.mrc"),
    (np.zeros((8, 8)), "a.jpg"), (np.zeros((8, 8)), "a"), (np.array([["a"]]), "a.tif")])
def test_what_a_format_cannot_hold_is_refused(array, name, tmp_path):
    with pytest.raises(ImageWriteError):
        write_image(tmp_path / name, array, axes="ZYX"[-array.ndim:])
    assert not list(tmp_path.iterdir())


def test_conversion_rounds_and_never_wraps(tmp_path):
    values = np.array([[0.4, 1.6], [254.4, 255.4]])
    found = read_image(write_image(tmp_path / "a.tif", values, dtype="uint8")).array
    assert found.dtype == np.uint8 and (found == [[0, 2], [254, 255]]).all()
    for wrong in (values - 1, values + 1, values * np.nan):
        with pytest.raises(ImageWriteError, match="do not fit"):
            write_image(tmp_path / "b.tif", wrong, dtype="uint8")
    for metadata in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(ImageWriteError):
            write_image(tmp_path / "b.tif", values, metadata=metadata)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_wrong_paths_are_one_kind_of_error(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    inside = [tmp_path / name for name in ("absent.tif", "folder", "pipe")]
    for path in (*inside, "", "a\0b", None, 3, "x" * 5000):
        with pytest.raises(ImageReadError):
            read_image(path)
    with pytest.raises(ImageWriteError):
        write_image("/proc/nothing/a.tif", np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize("tag, value, said", [
    (259, 7, "JPEG"), (259, 34887, "LERC"), (259, 50000, "imagecodecs"), (262, 5, "colours"),
    (274, 3, "orientation"), (258, 12, "numbers")])
def test_unread_kinds_of_tiff_are_named(tag, value, said, tmp_path):
    tags = page_tags(8, 8, 64) | {tag: (3, 1, value)}
    (tmp_path / "a.tif").write_bytes(make_tiff(tags, bytes(64)))
    if said == "imagecodecs" and importlib.util.find_spec("imagecodecs"):
        said = "damaged"                                    # sixty-four zeros are no Zstandard stream
    with pytest.raises(ImageReadError, match=said):
        read_image(tmp_path / "a.tif")


def test_nothing_is_ever_executed(tmp_path):
    "R12: a pickle that writes a canary, offered under every name."
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    payload = pickle.dumps(Bomb())
    for name in ("a.tif", "a.pt", "a.pkl", "a.npy", "a.mrc", "a.png"):
        (tmp_path / name).write_bytes(payload)
    np.savez(tmp_path / "b.npz", np.array([Bomb()], dtype=object))
    np.save(tmp_path / "b.npy", np.array([Bomb()], dtype=object))
    folder = tmp_path / "c.zarr" / "0"
    folder.mkdir(parents=True)
    (folder.parent / ".zattrs").write_text(json.dumps({"multiscales": [
        {"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}]}]}))
    (folder / "0.0").write_bytes(payload)
    for more in (dict(dtype="|O", filters=[{"id": "pickle"}]), dict(dtype="<u2", filters=[{"id": "pickle"}]),
                 dict(dtype="<u2", filters=None, compressor={"id": "pickle"})):
        meta = dict(zarr_format=2, shape=[4, 4], chunks=[4, 4], compressor=None, fill_value=0, order="C")
        (folder / ".zarray").write_text(json.dumps(meta | more))
        with pytest.raises(ImageReadError):
            read_image(folder.parent)
    for path in tmp_path.iterdir():
        if path.is_file():
            with pytest.raises(ImageReadError):
                read_image(path)
    assert not canary.exists()
    package = Path(fluogen.__file__).parent
    sources = [path for name in ("io", "preprocessing", "datasets", "simulation") for path in (package / name).glob("*.py")]
    assert len(sources) > 10
    for source in sources:
        never = r"\b(import pickle|eval\(|exec\(|allow_pickle=True|torch\.load)"
        found = re.search(never, source.read_text())
        assert not found, f"{source.name}: {found}"


@pytest.mark.skipif(not REAL.is_dir(), reason="no real images beside the repository")
def test_real_files():
    "Axes, shapes and values of published files, against tifffile and Pillow."
    seen = Counter()
    for room in ("volume3d", "timelapse", "sr_pairs", "structures_clean"):
        for path in sorted((REAL / room).rglob("*.tif"))[:8] + sorted((REAL / room).rglob("*.png"))[:2]:
            expected = tifffile.imread(path) if path.suffix == ".tif" else np.array(PILImage.open(path))
            try:
                found = read_image(path)
            except ImageReadError as error:
                assert "does not say what its axes are" in str(error) and expected.ndim == 3
                found = read_image(path, axes="ZYX")
                seen["asked"] += 1
            assert found.array.dtype == expected.dtype and (found.array == expected).all(), path
            seen[found.axes] += 1
    assert seen["ZYX"] >= 5 and seen["TYX"] >= 5 and seen["YX"] >= 5 and seen["asked"] < 6


def test_the_checksum_of_a_folder_covers_names_and_contents(tmp_path):
    path = write_image(tmp_path / "a.ome.zarr", np.arange(64, dtype=np.uint8).reshape(8, 8))
    before = hash_file(path)
    assert read_image(path, sha256=before).array.shape == (8, 8)
    for wrong in ("", "0" * 64, before[:-1], 5):
        with pytest.raises(ImageReadError, match="not the file that was recorded"):
            read_image(path, sha256=wrong)
    (path / "more").write_text("x")
    with pytest.raises(ImageReadError, match="not the file that was recorded"):
        read_image(path, sha256=before)
    assert hashlib.sha256(b"x").hexdigest() == hash_file(path / "more")
