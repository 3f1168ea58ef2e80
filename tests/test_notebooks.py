"""Every library notebook runs as a lesson, every figure notebook runs as a smoke test; neither touches the tree.

With `-n 2` two of them run side by side (see conftest.py). How long a lesson takes is measured by `make bench`, not here."""
import json
import os
import subprocess
import sys
import tempfile

import nbformat
import pytest
from nbclient import NotebookClient
from tree import ROOT, figure_notebooks, git_status, library_notebooks, modules, name_of
from traitlets.config import Config

TREE = ("nbs", "figures", "data_manifests", "fluogen")
HANGS_S = 600       # a cell or a notebook that takes longer than this hangs; no measure of speed


def execute_lesson(path):
    """Run a notebook in memory from its own folder, as Jupyter does.

    Its kernel is reached through files of this run: two runs that look for free ports at once may find the same one."""
    with tempfile.TemporaryDirectory() as place:
        files = Config(KernelManager={"transport": "ipc", "ip": f"{place}/k", "connection_file": f"{place}/kernel.json"})
        NotebookClient(nbformat.read(path, as_version=4), kernel_name="python3", timeout=HANGS_S, config=files,
                       resources={"metadata": {"path": str(path.parent)}}).execute(env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_count_of_notebooks():
    assert len(library_notebooks()) == len(modules()) >= 20
    assert len(figure_notebooks()) >= 1


@pytest.mark.parametrize("lesson", library_notebooks(), ids=name_of)
def test_lesson_runs(lesson):
    before = git_status(*TREE)
    execute_lesson(lesson)
    assert git_status(*TREE) == before, "a lesson changed the tree"


@pytest.mark.figures
@pytest.mark.parametrize("figure", figure_notebooks(), ids=name_of)
def test_figure_smoke(figure, tmp_path):
    "Through papermill, from a foreign folder and without a terminal; results go to a folder of the test's own."
    before = git_status(*TREE)
    done = subprocess.run([sys.executable, "-m", "papermill", str(figure), str(tmp_path / "out.ipynb"), "-p", "profile", "smoke"],
                          cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANGS_S,
                          env={**os.environ, "FLUOGEN_FIGURES": str(tmp_path / "figures"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert git_status(*TREE) == before, "the run changed the tree"
    folder = tmp_path / "figures" / figure.stem / "smoke"
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "claims", "run")}
    assert (folder / "figure.png").stat().st_size <= 300_000
    assert found["run"]["status"] == "complete" and found["run"]["parameters"]["profile"] == "smoke"
    assert {"figure", "profile", "dataset", "conventions", "rows"} <= found["metrics"].keys() and found["metrics"]["rows"]
    assert all({"group", "method", "metric", "value", "ci95", "n"} <= row.keys() for row in found["metrics"]["rows"])
    keys = {"id", "claim", "source", "expected", "measured", "ci95", "holds", "verdict", "why"}
    assert found["claims"] and all(keys <= claim.keys() for claim in found["claims"])


@pytest.mark.figures
@pytest.mark.parametrize("figure", figure_notebooks(), ids=name_of)
def test_figure_refuses_unknown_values(figure, tmp_path):
    "papermill only warns about names it does not know; the notebook itself must refuse what it cannot mean."
    done = subprocess.run([sys.executable, "-m", "papermill", str(figure), str(tmp_path / "out.ipynb"), "-p", "profile", "lapdog"],
                          cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANGS_S,
                          env={**os.environ, "FLUOGEN_FIGURES": str(tmp_path / "figures")})
    assert done.returncode != 0 and "lapdog" in done.stderr and "laptop" in done.stderr
    assert not (tmp_path / "figures").exists()
