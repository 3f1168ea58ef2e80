"Atomic writes and the sweep of what killed processes leave."
import os
import signal
import subprocess
import sys
import time

import pytest

from fluogen.core import FluogenError, make_rng
from fluogen.io.files import CheckedFile, ImageReadError, atomic_write, check_writable, hash_file, sweep_temporaries

WRITER = """
import sys
from fluogen.io.files import atomic_write
print("ready", flush=True)
number = 0
while True:
    number += 1
    with atomic_write(sys.argv[1]) as temporary:
        with open(temporary, "wb") as file:
            for _ in range(64):
                file.write(number.to_bytes(4, "little") * 4096)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    "kill -9 at random moments of a write loop: the file is whole each time, and orphans are swept."
    target, rng = tmp_path / "weights.bin", make_rng(0, "kill")
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE)
        process.stdout.readline()
        deadline = time.monotonic() + 20
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0.01, 0.1)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        content = target.read_bytes()
        assert len(content) == 64 * 4096 * 4 and content == content[:4] * (len(content) // 4)
    sweep_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.bin"]


def test_a_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.endswith("a.txt")
        temporary.write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as temporary:
            temporary.write_text("new")
            raise error
    with pytest.raises(FluogenError, match="nothing was written"), atomic_write(path):
        pass
    assert path.read_text() == "old" and len(list(path.parent.iterdir())) == 1


def test_folders_and_links(tmp_path):
    for content in ("one", "two"):
        with atomic_write(tmp_path / "a.zarr") as temporary:
            temporary.mkdir()
            (temporary / "chunk").write_text(content)
    assert (tmp_path / "a.zarr" / "chunk").read_text() == "two"
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with atomic_write(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "link.txt", "real.txt"]


@pytest.mark.parametrize("faster", (True, False))
def test_a_renaming_that_fails_leaves_one_whole_folder(tmp_path, monkeypatch, faster):
    "Another process puts its copy there between the two renamings, or the second renaming is refused."
    def replace(source, target, real=os.replace):
        if (tmp_path / "a.zarr").exists() or "-old-" in str(source):
            return real(source, target)
        if faster:
            (tmp_path / "a.zarr").mkdir()
            (tmp_path / "a.zarr" / "chunk").write_text("theirs")
            return real(source, target)
        raise PermissionError("refused")
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "chunk").write_text("old")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError), atomic_write(tmp_path / "a.zarr") as temporary:
        temporary.mkdir()
        (temporary / "chunk").write_text("new")
    assert (tmp_path / "a.zarr" / "chunk").read_text() == ("theirs" if faster else "old")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_a_folder_that_is_there_may_be_kept(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "theirs").write_text("in use")
    with pytest.raises(OSError), atomic_write(tmp_path / "set", keep=True) as temporary:
        temporary.mkdir()
        (temporary / "ours").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "theirs"]


def test_the_sweep_spares_the_living_and_the_unknown(tmp_path):
    with atomic_write(tmp_path / "mine.bin") as temporary:
        temporary.write_text("x")
        prefix = temporary.name[: len(".fluogen-") + 6]
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        other = ".fluogen-" + ("000000" if "000000" not in prefix else "111111")
        names = {"alive": f"{prefix}-{child.pid}-00000000-a", "dead": f"{prefix}-{2**22 + 1}-00000000-b",
                 "namesake": f"{prefix}-{os.getpid()}-00000000-c", "not ours": ".fluogen-zzzzzz-1-00000000-d",
                 "other machine": f"{other}-1-00000000-e"}
        for name in names.values():
            (tmp_path / name).write_text("x")
        removed = {p.name for p in sweep_temporaries(tmp_path)}
        assert removed == {names["dead"], names["namesake"]} and temporary.exists()
        os.utime(tmp_path / names["other machine"], (0, 0))
        assert [p.name for p in sweep_temporaries(tmp_path)] == [names["other machine"]]
        child.communicate(b"\n")
    assert (tmp_path / "mine.bin").exists()


def test_a_folder_moved_aside_is_put_back(tmp_path):
    with atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("x")
        prefix = temporary.name[: len(".fluogen-") + 6]
    aside = tmp_path / f"{prefix}-{2**22 + 1}-00000000-old-a.zarr"
    aside.mkdir()
    assert sweep_temporaries(tmp_path) == [] and (tmp_path / "a.zarr").is_dir() and not aside.exists()


def test_names_of_any_length(tmp_path):
    for name in ("é" * 120 + ".tif", "x" * 250, "a b\n.tif"):
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_text("x")
        assert (tmp_path / name).read_text() == "x"


def test_reads_beyond_the_end_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    with CheckedFile(tmp_path / "a") as file:
        assert file.read(8, 2) == b"89" and file.unpack("<H", 0) == (0x3130,)
        assert file.sha256() == hash_file(tmp_path / "a")
        for offset, count in ((9, 2), (2**63, 1), (0, 2**62)):
            with pytest.raises(ImageReadError, match="truncated"):
                file.read(offset, count)


def test_nothing_of_another_kind_is_replaced(tmp_path):
    "A user who names a folder of images where a file or new weights should go keeps the images."
    def put(path, *names):
        with atomic_write(path) as temporary:
            if names:
                temporary.mkdir()
                for name in names:
                    (temporary / name).write_text("new")
            else:
                temporary.write_text("new")
    raw = tmp_path / "cells"
    raw.mkdir()
    (raw / "1.tif").write_bytes(b"raw")
    with pytest.raises(FluogenError, match="a folder lies there"):
        put(raw)
    with pytest.raises(FluogenError, match="something else"):
        put(raw, "config.json", "card.md")
    with pytest.raises(FluogenError, match="a file lies there"):
        put(raw / "1.tif", "config.json")
    assert (raw / "1.tif").read_bytes() == b"raw" and [p.name for p in tmp_path.rglob("*")] == ["cells", "1.tif"]
    (tmp_path / "empty").mkdir()
    for _ in range(2):                                  # an empty folder, then one of the same kind
        put(tmp_path / "empty", "config.json", "card.md")
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == ["card.md", "config.json"]


def test_a_place_is_tried_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "deeper" / "a.tif")
    (tmp_path / "file").write_text("x")
    for path, says in ((tmp_path / "file" / "a.tif", "a file, so nothing"), ("/proc/nowhere/a.tif", "cannot be written there")):
        if str(path).startswith("/proc") and not os.path.isdir("/proc"):
            continue
        with pytest.raises(FluogenError, match=says) as caught:
            check_writable(path)
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
