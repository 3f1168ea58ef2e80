"""Every library notebook runs as a lesson, every figure notebook runs as a smoke test; neither touches the tree.

Two kernels run side by side; each test waits for the one that it names."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbclient import NotebookClient
from tree import ROOT, figure_notebooks, git_status, library_notebooks, modules, name_of

CPU_S = 10          # 8 s for the lesson, 2 s for starting Python: processor time, so that a busy machine does not fail it
TREE = ("nbs", "figures", "data_manifests", "fluogen")


def execute_lesson(path) -> float:
    "Run a notebook in memory from its own folder, as Jupyter does; the seconds of processor time that it took."
    notebook = nbformat.read(path, as_version=4)
    clock = nbformat.v4.new_code_cell("import time as _t; print(_t.process_time())")
    notebook.cells = [*notebook.cells, clock]
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    return float("".join(out["text"] for out in notebook.cells[-1].outputs))      # a line may come in two parts


@pytest.fixture(scope="module")
def lessons(request):
    "Lessons asked for in this session, running in the background."
    os.environ["OMP_NUM_THREADS"] = "1"
    before = git_status(*TREE)
    asked = [item.callspec.params["lesson"] for item in request.session.items
             if item.path.name == "test_notebooks.py" and "lesson" in getattr(getattr(item, "callspec", None), "params", {})]
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(execute_lesson, path) for path in asked}
    assert git_status(*TREE) == before, "a lesson changed the tree"


def test_the_count_of_notebooks():
    assert len(library_notebooks()) == len(modules()) >= 20
    assert len(figure_notebooks()) >= 1


@pytest.mark.parametrize("lesson", library_notebooks(), ids=name_of)
def test_lesson_runs(lesson, lessons):
    assert lessons[lesson].result() < CPU_S


@pytest.mark.figures
@pytest.mark.parametrize("figure", figure_notebooks(), ids=name_of)
def test_figure_smoke(figure, tmp_path):
    "Through papermill, from a foreign folder and without a terminal; results go to a folder of the test's own."
    before = git_status(*TREE)
    done = subprocess.run([sys.executable, "-m", "papermill", str(figure), str(tmp_path / "out.ipynb"), "-p", "profile", "smoke"],
                          cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "FLUOGEN_FIGURES": str(tmp_path / "figures"), "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert git_status(*TREE) == before, "the run changed the tree"
    folder = tmp_path / "figures" / figure.stem / "smoke"
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "claims", "run")}
    assert (folder / "figure.png").stat().st_size <= 300_000
    assert found["run"]["status"] == "complete" and found["run"]["parameters"]["profile"] == "smoke"
    assert {"figure", "profile", "dataset", "conventions", "rows"} <= found["metrics"].keys() and found["metrics"]["rows"]
    assert all({"group", "method", "metric", "value", "ci95", "n"} <= row.keys() for row in found["metrics"]["rows"])
    keys = {"id", "claim", "source", "expected", "measured", "ci95", "holds", "why"}
    assert found["claims"] and all(keys <= claim.keys() for claim in found["claims"])


@pytest.mark.figures
@pytest.mark.parametrize("figure", figure_notebooks(), ids=name_of)
def test_figure_refuses_unknown_values(figure, tmp_path):
    "papermill only warns about names it does not know; the notebook itself must refuse what it cannot mean."
    done = subprocess.run([sys.executable, "-m", "papermill", str(figure), str(tmp_path / "out.ipynb"), "-p", "profile", "lapdog"],
                          cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "FLUOGEN_FIGURES": str(tmp_path / "figures")})
    assert done.returncode != 0 and "lapdog" in done.stderr and "laptop" in done.stderr
    assert not (tmp_path / "figures").exists()
