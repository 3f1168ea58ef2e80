"The registry's files, where a data set is found, and what is said when it is not."
import hashlib
import http.server
import multiprocessing
import os
import re
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from counts import files_opened

from fluogen.core import FluogenError, find_root
from fluogen.datasets import download as download_module
from fluogen.datasets.download import DownloadError, cache_folder, download_dataset, download_file, unpack
from fluogen.datasets.check import lint_records
from fluogen.datasets.record import ManifestError
from fluogen.datasets.registry import (
    MissingDataError, RegistryError, find_dataset, find_entry, list_datasets, load_dataset, read_entry)

TEXT = 'name = "Mine"\naliases = ["my set"]\ntitle = "t"\nsource = "s"\nlicence = "CC0"\nobtain = "Ask me."\n'
REAL = Path(find_root(Path(__file__).parent) or ".").parent / "shared" / "realdata"
REAL_SETS = {"sr_pairs": 8, "structures_clean": 196, "denoise_pairs": 130, "nuclei_instance": 492,
             "classify": 354}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    "No data folder, an empty cache, no key of the user's."
    monkeypatch.setenv("FLUOGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLUOGEN_DATA", raising=False)
    monkeypatch.setattr(download_module, "TIMEOUT_S", 3.0)


def registry(tmp_path, more="", text=TEXT):
    folder = tmp_path / "registry"
    folder.mkdir(exist_ok=True)
    (folder / "mine.toml").write_text(text + more)
    return folder


def manifest(folder, text="ER"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.jsonl").write_text('{"file_name": "1.tif", "text": "%s"}\n' % text)
    return folder / "manifest.jsonl"


# --- the files -----------------------------------------------------------------------------------------------------

def test_registry_holds_what_the_figures_need_and_nothing_of_this_machine():
    entries = list_datasets()
    assert {"BioSR", "FMD", "DSB2018", "2D HeLa", "DynamicNuclearNet", "W2S", *REAL_SETS} <= set(entries)
    names = [name.casefold() for entry in entries.values() for name in entry.names]
    assert len(set(name for name in names)) >= len(entries)
    for entry in entries.values():
        others = {name.casefold() for other in entries.values() if other is not entry for name in other.names}
        assert not others & {name.casefold() for name in entry.names}
        assert entry.layout or entry.keys, f"{entry.name} can be neither scanned nor read"
        assert set(entry.folders.values()) <= set(entry.prompts)
    for path in (find_root(Path(__file__).parent) / "data_manifests").glob("*.toml"):
        assert not re.search(r"https?://|/home/|/work/|/mnt/|[A-Z]:\\", path.read_text()), path.name


@pytest.mark.parametrize("more, says", [
    ('prompt = ["a"]\n', "mine.toml:prompt: unknown key .*expected prompts"),
    ('prompts = "a"\n', "mine.toml:prompts: wrong kind of value"),
    ('bits = "16"\n', "mine.toml:bits: wrong kind"),
    ('[keys]\nimage = 3\n', "mine.toml:keys.image"),
    ('[values]\ndtype = 8\n', "mine.toml:values.dtype"),
    ('[[download]]\nurl = "https://x"\n', "a download needs url and sha256"),
    ("[keys\n", "cannot be read as TOML"),
])
def test_a_registry_file_that_cannot_be_meant(tmp_path, more, says):
    with pytest.raises(RegistryError, match=says):
        read_entry(registry(tmp_path, more) / "mine.toml")


def test_required_keys(tmp_path):
    for key in ("name", "title", "source", "licence", "obtain"):
        text = "".join(line + "\n" for line in TEXT.splitlines() if not line.startswith(key))
        with pytest.raises(RegistryError, match=f"mine.toml:{key}: missing key"):
            read_entry(registry(tmp_path, text=text) / "mine.toml")


# --- where a data set is found -------------------------------------------------------------------------------------

def test_order_of_search(tmp_path, monkeypatch):
    place = registry(tmp_path)
    in_cache = manifest(tmp_path / "cache" / "data" / "Mine", "cache")
    assert find_dataset("mine", place).manifest == in_cache
    first, second = tmp_path / "first", tmp_path / "second"
    in_second = manifest(second / "Mine", "second")
    monkeypatch.setenv("FLUOGEN_DATA", f"{first}{os.pathsep}{second}")
    assert find_dataset("MINE", place).manifest == in_second
    in_first = manifest(first / "my set",
                        "first")                              # an alias is as good as the name
    assert find_dataset("Mine", place).manifest == in_first
    given = manifest(tmp_path / "Mine", "given")
    monkeypatch.chdir(tmp_path)
    assert load_dataset("Mine", registry=place)[0].text == "given"              # a path comes first
    assert load_dataset(given, registry=place) == load_dataset(given.parent, registry=place)


def test_a_set_nobody_registered_is_found_in_the_data_folder(tmp_path, monkeypatch):
    manifest(tmp_path / "own")
    monkeypatch.setenv("FLUOGEN_DATA", str(tmp_path))
    found = find_dataset("own")
    assert found.entry is None and found.records()[0].text == "ER"


def test_defaults_and_key_map_by_name_and_by_path(tmp_path, monkeypatch):
    place = registry(tmp_path, 'licence_class = "open-CC0"\nnorm = "minmax"\nbits = 12\n'
                               '[keys]\nimage = "files.hr"\ntext = "structure"\n[defaults]\nsplit = "test"\n')
    folder = tmp_path / "data" / "Mine"
    folder.mkdir(parents=True)
    (folder / "manifest.jsonl").write_text('{"files": {"hr": "a.tif"}, "structure": "ER"}\n'
                                           '{"files": {"hr": "b.tif"}, "structure": "ER", "norm": "dtype", "split": "val"}\n')
    monkeypatch.setenv("FLUOGEN_DATA", str(tmp_path / "data"))
    first, second = load_dataset("Mine", registry=place)
    assert (first.norm, first.bits, first.split, first.extra["licence"],
            first.is_open) == ("minmax", 12, "test", "CC0", True)
    assert (second.norm, second.split) == ("dtype", "val")
    assert load_dataset(folder / "manifest.jsonl", registry=place) == [first, second]
    assert load_dataset("Mine", split="val", registry=place) == [second]
    with pytest.raises(ManifestError, match="missing key"):
        load_dataset(folder / "manifest.jsonl", registry=tmp_path)              # no registry, no key map


def test_one_line_when_absent(tmp_path, monkeypatch):
    with pytest.raises(MissingDataError) as caught:
        load_dataset("BioSR")
    line = str(caught.value)
    assert line.startswith("BioSR: not on this machine. Fetch CCPs") and "$FLUOGEN_DATA/BioSR/manifest.jsonl" in line
    assert "\n" not in line and isinstance(caught.value, FluogenError)
    with pytest.raises(MissingDataError, match="Bio-SR: unknown data set .expected BioSR"):
        find_dataset("Bio-SR")
    with pytest.raises(MissingDataError, match="no such manifest"):
        find_dataset("somewhere/else.jsonl")
    (tmp_path / "BioSR").mkdir()
    monkeypatch.setenv("FLUOGEN_DATA", str(tmp_path))
    with pytest.raises(MissingDataError, match=r"its folder has no manifest .*build_manifest"):
        find_dataset("BioSR")


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FLUOGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder().name == "fluogen"


# --- downloads -----------------------------------------------------------------------------------------------------

def served(tmp_path):
    "An archive with a manifest and an image, and the registry entry's download table for it."
    source = tmp_path / "source"
    manifest(source / "set")
    (source / "set" / "1.tif").write_bytes(b"pixels")
    archive = Path(shutil.make_archive(str(tmp_path / "set"), "zip", source / "set"))
    return archive, hashlib.sha256(archive.read_bytes()).hexdigest()


def leftovers(folder):
    return [path for path in folder.rglob("*") if ".fluogen-" in path.name]


def test_download_of_a_registered_set(tmp_path):
    archive, sha256 = served(tmp_path)
    more = f'[[download]]\nurl = "{archive.as_uri()}"\nsha256 = "{sha256}"\nunpack = true\n'
    place = registry(tmp_path, more)
    with pytest.raises(MissingDataError, match="not on this machine"):
        find_dataset("Mine", place, download=False)
    record, = load_dataset("Mine", registry=place)
    assert record.path == tmp_path / "cache" / "data" / "Mine" / "1.tif" and record.path.read_bytes() == b"pixels"
    archive.unlink()                                                            # the second time nothing is fetched
    assert load_dataset("Mine", registry=place) == [record] and not leftovers(tmp_path)


def test_checksum_mismatch_leaves_nothing(tmp_path):
    archive, sha256 = served(tmp_path)
    target = tmp_path / "cache" / "data" / "x"
    with pytest.raises(DownloadError,
                       match="another than was recorded .*expected sha256|another than was recorded"):
        download_dataset([{"url": archive.as_uri(), "sha256": "0" * 64}], target, progress=False)
    assert not target.exists() and not leftovers(tmp_path)
    kept = tmp_path / "kept.zip"
    kept.write_bytes(b"older")
    with pytest.raises(DownloadError):
        download_file(archive.as_uri(), kept, "0" * 64, progress=False)
    assert kept.read_bytes() == b"older"                                        # what was there stays
    assert download_file(archive.as_uri(), kept, sha256, progress=False).read_bytes() == archive.read_bytes()


def test_offline_is_one_line(tmp_path):
    place = registry(tmp_path, '[[download]]\nurl = "http://127.0.0.1:9/x.zip"\nsha256 = "%s"\n' % ("0" * 64))
    with pytest.raises(FluogenError) as caught:
        find_dataset("Mine", place)
    line = str(caught.value)
    assert line.startswith("Mine: not on this machine (found could not be fetched, http://127.0.0.1:9/x.zip")
    assert "Ask me." in line and "\n" not in line
    assert not leftovers(tmp_path)


class Handler(http.server.BaseHTTPRequestHandler):
    "Serves ten bytes and says a hundred, or says that there is nothing."
    def do_GET(self):
        self.send_response(200 if "short" in self.path else 404)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x" * 10)

    def log_message(self, *args):
        pass


def test_a_transfer_that_breaks_off(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name in ("short", "none"):
            with pytest.raises(DownloadError, match="could not be fetched"):
                download_file(f"http://127.0.0.1:{server.server_port}/{name}", tmp_path / "a.bin", "0" * 64,
                              progress=False)
    finally:
        server.shutdown()
        server.server_close()
    assert not list(tmp_path.iterdir())


def test_archives_cannot_leave_their_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr("../out.txt", "x")
    with tarfile.open(tmp_path / "bad.tar", "w") as file:
        (tmp_path / "in.txt").write_text("x")
        file.add(tmp_path / "in.txt", arcname="../out.txt")
    (tmp_path / "none.zip").write_bytes(b"no archive")
    for name in ("bad.zip", "bad.tar", "none.zip"):
        with pytest.raises(DownloadError):
            unpack(tmp_path / name, tmp_path / "inside")
    assert not (tmp_path / "out.txt").exists()
    with pytest.raises(DownloadError, match="leads outside"):
        download_dataset([{"url": "https://x/y", "sha256": "0" * 64, "path": "../y"}], tmp_path / "set",
                         progress=False)


def test_a_copy_that_arrives_meanwhile_is_kept(tmp_path, monkeypatch):
    folder, gather = tmp_path / "cache" / "set", download_module._gather

    def slowly(*args):
        gather(*args)
        folder.mkdir(exist_ok=True)
        (folder / "theirs.txt").write_text("in use")
    archive, sha256 = served(tmp_path)
    monkeypatch.setattr(download_module, "_gather", slowly)
    assert download_dataset([{"url": archive.as_uri(), "sha256": sha256}], folder, progress=False) == folder
    assert [path.name for path in folder.iterdir()] == ["theirs.txt"] and not leftovers(tmp_path)


def _fetch(url, sha256, folder, barrier):
    barrier.wait(30)
    found = download_dataset([{"url": url, "sha256": sha256, "unpack": True}], folder, progress=False)
    assert (found / "1.tif").read_bytes() == b"pixels"


def test_two_processes_at_once(tmp_path):
    archive, sha256 = served(tmp_path)
    context = multiprocessing.get_context("fork")
    for turn in range(5):
        barrier = context.Barrier(3)
        folder = tmp_path / "cache" / f"set{turn}"
        workers = [context.Process(target=_fetch,
                                   args=(archive.as_uri(), sha256, folder, barrier)) for _ in range(3)]
        [worker.start() for worker in workers]
        [worker.join(120) for worker in workers]
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert sorted(path.name for path in folder.iterdir()) == ["1.tif", "manifest.jsonl"]
    assert not leftovers(tmp_path)


# --- real manifests ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REAL_SETS)
def test_real_manifests_are_read_through_the_registry(name, monkeypatch):
    if not (REAL / name / "manifest.jsonl").is_file():
        pytest.skip("the shared collection of real images is not here")
    monkeypatch.setenv("FLUOGEN_DATA", str(REAL))
    records, entry = load_dataset(name), find_entry(name)
    assert len(records) == REAL_SETS[name]
    assert records == load_dataset(REAL / name) == load_dataset(REAL / name / "manifest.jsonl")
    assert all(record.path.is_file() for record in records)
    assert all(record.conditioning_path is None or record.conditioning_path.is_file() for record in records)
    assert {prompt for record in records for prompt in record.prompts} == set(entry.prompts)
    assert all(record.extra["licence_class"] for record in records)
    serious = [finding for finding in lint_records(records, entry.prompts,
                                           content=None) if finding.kind != "duplicate"]
    assert serious == [], [str(finding) for finding in serious]
    if name == "nuclei_instance":                       # these two sources overlap: one group, so one split
        large = {record.group for record in records if record.extra["shape"] == [520, 696]}
        assert len(large) == 1 and {"BBBC039v1 (43 of 200)"} <= {
            record.extra["dataset"] for record in records if record.group in large}


def test_the_registry_is_read_once():
    with files_opened() as names:
        found = list_datasets()
    assert len(names) == len(set(names)) == len(found) and all(name.endswith(".toml") for name in names)


def test_a_folder_of_pairs_without_manifest_is_told_how_to_get_one(tmp_path):
    with pytest.raises(MissingDataError, match="fluogen check .* --manifest"):
        find_dataset(tmp_path, download=False)
