"Seed images of every kind and seeded damage to them, for the battery in test_io.py."
import struct
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image as PILImage

from fluogen.core import make_rng
from fluogen.io.image import write_image


def make_seeds(folder: Path) -> dict[str, Path]:
    "One small file (or OME-Zarr folder) of each kind, by name."
    rng = make_rng(0, "seeds")
    plane = rng.poisson(300, (48, 40)).astype(np.uint16)
    stack = rng.poisson(300, (4, 32, 24)).astype(np.uint16)
    hyper = rng.poisson(300, (2, 3, 2, 24, 20)).astype(np.uint16)
    colour = rng.integers(0, 256, (32, 24, 3), dtype=np.uint8)
    tiff = {
        "plain": (plane, {}), "big-endian": (plane, dict(byteorder=">")),
        "bigtiff": (plane, dict(bigtiff=True)),
        "strips": (plane, dict(rowsperstrip=7)), "tiled": (plane, dict(tile=(16, 16))),
        "zlib": (plane, dict(compression="zlib", rowsperstrip=9)),
        "zlib-predictor": (plane, dict(compression="zlib", predictor=True)),
        "float": (plane.astype(np.float32), {}), "signed": ((plane.astype(np.int16) - 300), {}),
        "ome": (hyper, dict(ome=True, metadata={"axes": "TCZYX"})),
        "ome-zlib": (stack, dict(ome=True, metadata={"axes": "ZYX"}, compression="zlib")),
        "imagej": (hyper, dict(imagej=True, metadata={"axes": "TZCYX"})),
        "imagej-big-endian": (stack, dict(imagej=True, byteorder=">", metadata={"axes": "TYX"})),
        "shaped": (stack, dict(metadata={"axes": "ZYX"})),
        "channels": (stack, dict(metadata={"axes": "CYX"}, compression="zlib")),
        "rgb": (colour, dict(photometric="rgb")),
        "planar": (np.ascontiguousarray(colour.transpose(2, 0, 1)),
                   dict(photometric="rgb", planarconfig="separate")),
    }
    paths = {}
    for name, (array, how) in tiff.items():
        paths[name] = folder / f"{name}{'.ome' if 'ome' in name else ''}.tif"
        tifffile.imwrite(paths[name], array, **{"photometric": "minisblack"} | how)
    for name in ("tiff_lzw", "packbits"):
        paths[name] = folder / f"{name}.tif"
        PILImage.fromarray(plane).save(paths[name], compression=name)
    ours = (("ours.tif", stack, "CYX"), ("ours.ome.tif", stack, "ZYX"), ("8.png", plane % 256, "YX"),
            ("16.png", plane, "YX"), ("rgb.png", colour, "YXS"), ("volume.mrc", stack, "ZYX"),
            ("stack.ome.zarr", stack, "ZYX"))
    for name, array, axes in ours:
        array = array.astype(np.uint8) if name == "8.png" else array
        paths[name] = write_image(folder / name, array, axes=axes, pixel_um={"Y": 0.0626, "X": 0.0626})
    return paths


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    "One seeded change: bits, bytes, numbers, cuts, holes, repeats, insertions; half of them near the header."
    data, kind, size = bytearray(data), rng.integers(8), len(data)
    at = int(rng.integers(min(size, 512)) if rng.random() < 0.5 else rng.integers(size))
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[at] = int(rng.integers(256))
    elif kind == 2:                                                         # an interesting number
        value = int(rng.choice([0, 1, 2, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]))
        data[at: at + 4] = struct.pack(rng.choice(["<I", ">I"]), value)
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        data[at: at + 16] = bytes(16)
    elif kind == 5:                                                         # a block moved
        other = int(rng.integers(size))
        data[at: at + 12] = data[other: other + 12]
    elif kind == 6:
        del data[at: at + int(rng.integers(1, 9))]
    else:
        data[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
    return bytes(data)


def make_tiff(tags: dict, data: bytes = b"", order: str = "<", following: int = 0) -> bytes:
    "A classic TIFF of one page, written by hand: `{code: (type, count, value)}`, data at byte 8."
    at = 8 + len(data)
    entries = b"".join(struct.pack(order + "HHII", code, *entry) for code, entry in sorted(tags.items()))
    return (struct.pack("<2s" if order == "<" else ">2s", b"II" if order == "<" else b"MM")
            + struct.pack(order + "HI", 42, at) + data + struct.pack(order + "H", len(tags)) + entries
            + struct.pack(order + "I", following))


def page_tags(height: int, width: int, count: int, compression: int = 1, at: int = 8) -> dict:
    "Tags of a grey 8-bit page with one strip."
    return {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, compression), 262: (3, 1, 1),
            273: (4, 1, at), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, count)}


def make_attacks() -> dict[str, bytes]:
    "Files made to exhaust a reader."
    page = make_tiff(page_tags(8, 8, 64), bytes(64))
    bomb = zlib.compress(bytes(2**26), 9)
    tags = page_tags(8, 8, 64)
    step = 2 + 12 * len(tags) + 4
    chain = b"".join(make_tiff(tags, b"", following=8 + step * (n + 1))[8:] for n in range(100_000))
    wide = zlib.compress(bytes(2**20))
    idat = struct.pack(">I", len(wide)) + b"IDAT" + wide + struct.pack(">I", zlib.crc32(b"IDAT" + wide))
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    ihdr = struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    mrc = bytearray(2048)
    struct.pack_into("<4i", mrc, 0, 2**31 - 1, 2**31 - 1, 2**31 - 1, 2)
    struct.pack_into("<3i", mrc, 64, 1, 2, 3)
    mrc[208:214] = b"MAP DD"
    return {
        "2^31 x 2^31": make_tiff(page_tags(2**31, 2**31, 64), bytes(64)),
        "2^31 - 1, one strip": make_tiff(page_tags(2**31 - 1, 2**31 - 1, 64, 8), bytes(64)),
        "tag of 2^32 - 1 values": make_tiff(page_tags(8, 8, 64) | {273: (4, 2**32 - 1, 8)}, bytes(64)),
        "text of 2^32 - 1 letters": make_tiff(page_tags(8, 8, 64) | {270: (2, 2**32 - 1, 8)}, bytes(64)),
        "65535 tags": page[:8 + 64] + b"\xff\xff" + page[8 + 66:],
        "a page that follows itself": make_tiff(page_tags(8, 8, 64), bytes(64), following=8 + 64),
        "100,000 pages": struct.pack("<2sHI", b"II", 42, 8) + chain,
        "a strip of 64 MB declared as 64 bytes": make_tiff(page_tags(8, 8, len(bomb), 8), bomb),
        "a million for one": make_tiff(page_tags(1000, 1000, 1, 8), b"x"),
        "strips that overlap": make_tiff(
            page_tags(64, 8, 64) | {278: (4, 1, 8), 273: (4, 8, 8), 279: (4, 8, 8)},
            struct.pack("<8I", *[64] * 8) + bytes(64)),
        "billion laughs": make_tiff(page_tags(8, 8, 64) | {270: (2, 90, 8)}, (
            b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha">]><OME>&a;</OME>').ljust(90)),
        "a PNG of 50,000 x 50,000": b"\x89PNG\r\n\x1a\n" + ihdr + idat + b"\0\0\0\0IEND\xae\x42\x60\x82",
        "an MRC of 2^93 numbers": bytes(mrc),
    }
