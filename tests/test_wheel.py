"The built wheel works in an empty folder, without the repository: code, weights and command."
import os
import subprocess
import sys

import pytest
from tree import ROOT, copy_tree, modules, under


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with the installed wheel, built from the tracked files only."
    tree, out, site = (tmp_path_factory.mktemp(name) for name in ("tree", "wheel", "site"))
    copy_tree(tree)
    run(tree, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out))
    wheel, = out.glob("fluogen-*.whl")
    run(tree, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    return site


def run(cwd, *command, **env):
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_it_holds_every_module_and_all_weights(site):
    held = {path.relative_to(site).as_posix() for path in (site / "fluogen").rglob("*")}
    wanted = {path.relative_to(ROOT).as_posix() for path in [*modules(), *under("fluogen/weights")]}
    wanted |= {"fluogen/" + path.relative_to(ROOT).as_posix() for path in under("data_manifests", ".toml")}
    assert wanted - held == set()


def test_weights_of_experiments_stay_in_the_repository(site, tmp_path):
    names = sorted(path.parent.name for path in under("figures/weights", "config.json"))
    assert len(names) >= 13 and "bench30-care" in names
    held = {path.name for path in (site / "fluogen").rglob("*")}
    assert not held & {path.parent.name for path in under("figures/weights") if path.parent.name != "generation"}
    assert not (site / "fluogen" / "weights" / "generation").exists()
    code = ("from fluogen.core import FluogenError; from fluogen.models.zoo import load_weights; from fluogen.experiments.records import read_record\n"
            "for read in (lambda: load_weights('bench30-care'), lambda: read_record('bench30', 'bench30')):\n"
            "    try: read()\n    except FluogenError as error: print(error)")
    said = run(tmp_path, "-c", code, PYTHONPATH=str(site), FLUOGEN_CACHE=str(tmp_path)).splitlines()
    assert len(said) == 2 and all("set FLUOGEN_WEIGHTS to its figures/weights" in line for line in said)
    code = "from fluogen.models.zoo import load_weights; print(load_weights('bench30-care').id)"
    made = run(tmp_path, "-c", code, PYTHONPATH=str(site), FLUOGEN_CACHE=str(tmp_path), FLUOGEN_WEIGHTS=str(ROOT / "figures" / "weights"))
    assert made == run(ROOT, "-c", code, PYTHONPATH=str(site), FLUOGEN_CACHE=str(tmp_path))            # or from a clone
    assert made.startswith("bench30-care@")


def test_it_imports_from_an_empty_folder(site, tmp_path):
    code = "import fluogen, fluogen.core as core; print(fluogen.__file__, core.find_root())"
    where, root = run(tmp_path, "-c", code, PYTHONPATH=str(site)).split()
    assert where.startswith(str(site)) and root == "None"


def test_weights_load_by_name(site, tmp_path):
    names = sorted(path.parent.name for path in under("fluogen/weights", "config.json"))
    assert names, "no weights are shipped"
    code = ("import sys; from fluogen.models.zoo import find_weights, load_weights\n"
            "for name in sys.argv[1:]: load_weights(name); print(find_weights(name))")
    found = run(tmp_path, "-c", code, *names, PYTHONPATH=str(site), FLUOGEN_CACHE=str(tmp_path)).split()
    assert len(found) == len(names) and all(path.startswith(str(site)) for path in found)


def test_the_registry_comes_along(site, tmp_path):
    code = "from fluogen.datasets.registry import list_datasets; print(*list_datasets(), sep='\\n')"
    found = run(tmp_path, "-c", code, PYTHONPATH=str(site)).splitlines()
    assert {"BioSR", "FMD", "DSB2018", "2D HeLa", "DynamicNuclearNet"} <= set(found)


def test_the_command_answers(site, tmp_path):
    code = "import sys; from fluogen.cli.main import main; sys.exit(main(['--version']))"
    assert run(tmp_path, "-c", code, PYTHONPATH=str(site)).startswith("fluogen ")


def test_every_module_imports_without_the_repository(site, tmp_path):
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules()]
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(len(sys.argv) - 1)"
    assert int(run(tmp_path, "-c", code, *names, PYTHONPATH=str(site), MPLBACKEND="Agg")) == len(names)
    assert list(tmp_path.iterdir()) == [], "importing writes nothing"
