"TIFF: descriptions that do not outrank sound pages, and arithmetic that refuses what tifffile would read with a guess."
import json
import logging
import struct
import warnings

import numpy as np
import pytest
import tifffile

from damaged import make_tiff, page_tags
from fluogen.core import make_rng
from fluogen.io.files import ImageReadError
from fluogen.io.image import read_image

PLANES = make_rng(0, "tiff").integers(1, 4096, (4, 24, 32), dtype=np.uint16)
OME = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'


def ome_xml(body: str, sizes: str = 'SizeX="32" SizeY="24" SizeZ="1" SizeC="1" SizeT="4"', more: str = "", images: int = 1) -> bytes:
    pixels = f'<Pixels DimensionOrder="XYZCT" Type="uint16" {sizes} PhysicalSizeX="0.1" PhysicalSizeY="0.1">'
    image = "".join(f"<Image>{pixels}{body.replace('%', str(n))}</Pixels></Image>" for n in range(images))
    return f'<?xml version="1.0" encoding="UTF-8"?>{OME}{more}>{image}</OME>'.encode()


def write(path, array, **how):
    tifffile.imwrite(path, array, **{"photometric": "minisblack", "metadata": None} | how)
    return path


@pytest.mark.parametrize("shape, axes", [((24, 32, 1), None), ((1, 24, 32, 1), None), ((24, 32, 1), "YXC"), ((1, 1, 24, 32), None)])
def test_axes_of_length_one_after_the_page_do_not_matter(shape, axes, tmp_path):
    metadata = {} if axes is None else {"axes": axes}
    found = read_image(write(tmp_path / "a.tif", PLANES[0].reshape(shape), metadata=metadata))
    assert found.axes == "YX" and (found.array == PLANES[0]).all()


@pytest.mark.parametrize("how", ["one file, plane by plane", "appended", "trailing axis"])
def test_a_time_series_written_plane_by_plane_is_one_stack(how, tmp_path):
    path = tmp_path / "a.tif"
    if how == "trailing axis":
        write(path, PLANES[..., None], metadata={})
    elif how == "appended":
        for n, plane in enumerate(PLANES):
            tifffile.imwrite(path, plane, append=n > 0)
    else:
        with tifffile.TiffWriter(path) as file:
            for plane in PLANES:
                file.write(plane)
    with pytest.raises(ImageReadError, match="ZYX or TYX or CYX"):
        read_image(path)
    assert (read_image(path, axes="TYX").array == PLANES).all()
    assert (read_image(path, axes="TYX", plane={"T": 2}).array == PLANES[2]).all()


@pytest.mark.parametrize("text", [
    b'<?xml version="1.0"?><ScanRecord><Exposure>50</Exposure></ScanRecord>', b"<?xml version=1.0?><note>a & b",
    f'<?xml version="1.0"?>{OME} UUID="urn:uuid:2"><BinaryOnly MetadataFile="a.companion.ome" UUID="urn:uuid:1"/></OME>'.encode()])
def test_xml_that_does_not_describe_the_page_is_a_note(text, tmp_path):
    path = write(tmp_path / "a.tif", PLANES[0], description=text)
    with pytest.warns(UserWarning, match="read without description"):
        found = read_image(path)
    assert found.axes == "YX" and (found.array == PLANES[0]).all()


def test_one_file_of_a_fileset_gives_its_own_planes(tmp_path):
    block = '<TiffData IFD="0" PlaneCount="4"><UUID FileName="%.ome.tif">urn:uuid:%</UUID></TiffData>'
    xml = ome_xml(block, more=' UUID="urn:uuid:1"', images=3)
    with warnings.catch_warnings(action="error"):
        found = read_image(write(tmp_path / "a.ome.tif", PLANES, description=xml))
    assert found.axes == "TYX" and found.pixel_um == {"Y": 0.1, "X": 0.1} and (found.array == PLANES).all()
    parts = "".join(f'<TiffData FirstT="{n}" IFD="0"><UUID>urn:uuid:{n}</UUID></TiffData>' for n in range(4))
    write(tmp_path / "b.ome.tif", PLANES[0], description=ome_xml(parts))
    with pytest.raises(ImageReadError, match="lie in several files"):
        read_image(tmp_path / "b.ome.tif")


@pytest.mark.parametrize("what, body, frames", [
    ("fewer planes than pages", "<TiffData/>", 2), ("more planes than pages", "<TiffData/>", 5),
    ("all planes of one page", "".join(f'<TiffData FirstT="{n}" IFD="0"/>' for n in range(4)), 4),
    ("a plane twice", "".join(f'<TiffData FirstT="{max(n, 1)}" IFD="{n}"/>' for n in range(4)), 4),
    ("beyond the sizes", "".join(f'<TiffData FirstZ="{n}" IFD="{n}"/>' for n in range(4)), 4),
    ("a page that is not there", '<TiffData IFD="1" PlaneCount="4"/>', 4),
    ("numbers without end", f'<TiffData FirstT="{10**30}" IFD="0"/>', 4)])
def test_each_plane_has_a_page_and_each_page_a_plane(what, body, frames, tmp_path):
    xml = ome_xml(body, f'SizeX="32" SizeY="24" SizeZ="1" SizeC="1" SizeT="{frames}"')
    write(tmp_path / "a.ome.tif", PLANES, description=xml)
    with pytest.raises(ImageReadError, match="contradict"):
        read_image(tmp_path / "a.ome.tif")
    with pytest.warns(UserWarning, match="without description"):
        assert (read_image(tmp_path / "a.ome.tif", axes="TYX").array == PLANES).all()


def test_text_that_nothing_refers_to_is_not_a_lost_plane(tmp_path):
    plain = write(tmp_path / "a.tif", PLANES[0]).read_bytes()
    for more in (json.dumps({"Summary": "x" * 9000}).encode(), b"<Summary>" + b"x" * 9000 + b"</Summary>"):
        (tmp_path / "b.tif").write_bytes(plain + more)
        assert (read_image(tmp_path / "b.tif").array == PLANES[0]).all()
    for more in (PLANES[1].tobytes(), b'{"cut": "' + b"x" * 9000, b"<!DOCTYPE a [" + b"x" * 9000):
        (tmp_path / "b.tif").write_bytes(plain + more)
        with pytest.raises(ImageReadError, match="planes lost"):
            read_image(tmp_path / "b.tif")
    labels = np.kron(np.eye(8, dtype=np.uint8), np.ones((16, 16), np.uint8))
    xml = ome_xml("<TiffData/>" + "<Plane/>" * 300, 'SizeX="128" SizeY="128" SizeZ="1" SizeC="1" SizeT="1"').replace(b"uint16", b"uint8")
    write(tmp_path / "c.ome.tif", labels, compression="zlib", description=xml)
    tifffile.tiffcomment(tmp_path / "c.ome.tif", xml.replace(b"<Image>", b'<Image Name="a longer name, edited by hand">'))
    assert (read_image(tmp_path / "c.ome.tif").array == labels).all()


def test_pixels_may_overlap_nothing(tmp_path):
    path = write(tmp_path / "a.tif", PLANES[0], rowsperstrip=6)
    data, page = path.read_bytes(), tifffile.TiffFile(path).pages[0]
    at, places = page.tags[273].valueoffset, page.dataoffsets
    for strip, offset in ((1, places[2]), (1, places[2] - 1), (0, 8), (3, page.offset)):
        changed = bytearray(data)
        struct.pack_into("<I", changed, at + 4 * strip, offset)
        path.write_bytes(changed)
        with pytest.raises(ImageReadError, match="overlap"):
            read_image(path)


def test_what_tifffile_reports_is_an_error_however_its_logger_is_set(tmp_path):
    tags = page_tags(8, 8, 64) | {278: (4, 1, 4)}                           # two strips of four rows, one offset
    (tmp_path / "a.tif").write_bytes(make_tiff(tags, bytes(64)))
    logger = logging.getLogger("tifffile")
    for disabled, level in ((False, logging.WARNING), (True, logging.CRITICAL)):
        before, logger.disabled = (logger.disabled, logger.level), disabled
        logger.setLevel(level)
        try:
            with pytest.raises(ImageReadError, match="damaged|segments"):
                read_image(tmp_path / "a.tif")
            assert (logger.disabled, logger.level, logger.filters) == (disabled, level, [])
        finally:
            logger.disabled = before[0]
            logger.setLevel(before[1])


def test_units_per_axis_and_in_another_encoding(tmp_path):
    for text, um in ((b"unit=\xb5m\n", {"Y": 0.5, "X": 0.5}), (b"unit=micron\nyunit=nm\n", {"Y": 0.0005, "X": 0.5})):
        write(tmp_path / "a.tif", PLANES[0], resolution=(2, 2), resolutionunit=1, description=b"ImageJ=1.53t\n" + text)
        assert read_image(tmp_path / "a.tif").pixel_um == um
    write(tmp_path / "b.tif", PLANES[0], resolution=(72, 72), resolutionunit=2, description=b"ImageJ=1.53t\nunit=inch\n")
    assert read_image(tmp_path / "b.tif").pixel_um is None


def test_bytes_that_do_nothing_are_bounded(tmp_path):
    "PackBits of no-ops, and LZW with a clear code after each code: counted, not timed."
    from fluogen.io.tiff_pages import unpack_lzw, unpack_packbits
    assert unpack_packbits(b"\x80" * 2**20 + b"\x02abc", 3) == b""
    bits = "".join(f"{256:09b}{65:09b}" for _ in range(500)) + f"{257:09b}"
    data = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    assert unpack_lzw(data, 500) == b""
