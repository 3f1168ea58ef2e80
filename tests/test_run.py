"report.run: a record never claims more than happened."
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from fluogen.core import DeviceError, FluogenError
from fluogen.report.claims import ClaimSpec, judge
from fluogen.report.run import Between, ParameterError
from fluogen.report.run import figures_folder, open_run, save_results, write_metrics

ALLOWED = {"seed": Between(0, 99), "device": str}
ROW = {"group": "ER", "method": "m", "metric": "psnr", "value": 1.23456, "ci95": (1, 2), "n": 3}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUOGEN_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


def begin(**changes):
    return open_run("fig0_demo", "smoke", {"seed": 1, "device": "cpu"} | changes, ALLOWED)


def record(run):
    return json.loads((run.folder / "run.json").read_text())


def test_the_record_from_begin_to_end(home):
    run = begin()
    first = record(run)
    assert run.folder == home / "fig0_demo" / "smoke" and first["status"] == "running"
    assert first["parameters"] == {"profile": "smoke", "seed": 1, "device": "cpu"} and first["seed"] == 1
    assert first["command"].startswith("papermill nbs/fig0_demo.ipynb runs/fig0_demo.ipynb -p profile smoke")
    assert first["device"] == "cpu" and first["threads"] >= 1 and first["versions"]["torch"]
    with run.stage("a"):
        assert record(run)["stage"] == "a" and record(run)["status"] == "running"
    with run.stage("b"):
        pass
    run.finish()
    last = record(run)
    assert last["status"] == "complete" and list(last["seconds"]) == ["a", "b"] and last["peak_memory_mb"]["process"] > 10
    assert "fig0_demo, profile smoke, seed 1, on cpu" in str(run)


def test_a_refused_run_leaves_nothing(home):
    for error, change in ((ParameterError, {"seed": -1}), (ParameterError, {"sead": 1}), (DeviceError, {"device": "tpu"})):
        with pytest.raises(error) as caught:
            begin(**change)
        assert "\n" not in str(caught.value)
    with pytest.raises(ParameterError, match="lapdog.*laptop"):
        open_run("fig0_demo", "lapdog", {"seed": 1, "device": "cpu"}, ALLOWED)
    assert not home.exists()


def test_a_failing_stage_is_named(home):
    run = begin()
    with pytest.raises(ValueError), run.stage("train"):
        raise ValueError("two\nlines")
    found = record(run)
    assert (found["status"], found["stage"]) == ("failed", "train") and "train" in found["seconds"]
    assert found["failures"] == [{"stage": "train", "error": "ValueError: two lines"}]


SCRIPT = """
import sys, os
from fluogen.report.run import open_run
run = open_run("fig0_demo", "smoke", {}, {})
with run.stage("work"):
    if sys.argv[1] == "kill": os.kill(os.getpid(), 9)
if sys.argv[1] == "finish": run.finish()
"""


@pytest.mark.parametrize(("end", "status"), [("kill", "running"), ("stop", "failed"), ("finish", "complete")])
def test_only_a_finished_process_is_complete(home, end, status):
    subprocess.run([sys.executable, "-c", SCRIPT, end], stdin=subprocess.DEVNULL, capture_output=True)
    found = json.loads((home / "fig0_demo" / "smoke" / "run.json").read_text())
    assert found["status"] == status
    assert not list((home / "fig0_demo" / "smoke").glob(".*"))


def test_a_raising_cell_is_recorded(home, tmp_path):
    "Through a real kernel: the cell after open_run raises outside of any stage."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    texts = ['# Parameters\nseed = 1\ndevice = "cpu"', "from fluogen.report.run import open_run\n"
             "from fluogen.report.run import Between, notebook_parameters\n"
             'run = open_run("fig0_demo", "smoke", notebook_parameters(globals()), {"seed": Between(0, 9), "device": str})',
             "1 / 0", "run.finish()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, kernel_name="python3", timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = json.loads((home / "fig0_demo" / "smoke" / "run.json").read_text())
    assert found["status"] == "failed" and found["failures"][0]["error"] == "ZeroDivisionError: division by zero"


def test_numbers_are_written_as_the_design_says(home):
    run = begin()
    write_metrics(run, "simulated", {"crop": 4}, [ROW, ROW | {"value": np.float32("nan"), "ci95": None, "n": np.int64(2)}])
    table = json.loads((run.folder / "metrics.json").read_text())
    assert list(table) == ["figure", "profile", "dataset", "conventions", "rows"]
    assert table["rows"] == [ROW | {"value": 1.235, "ci95": [1.0, 2.0]}, ROW | {"value": None, "ci95": None, "n": 2}]
    write_metrics(run, "simulated", {}, [])
    assert json.loads((run.folder / "metrics.json").read_text())["rows"] == []
    with pytest.raises(FluogenError, match="metrics row 2"):
        write_metrics(run, "simulated", {}, [ROW, {"value": 1}])


def test_everything_in_one_call(home):
    run = begin()
    card = save_results(run, Figure((1, 1)), "simulated", {}, [ROW], [judge(ClaimSpec("a", "b", "c", at_least=0), 1)], weights=["nano@abc"])
    assert {path.name for path in run.folder.iterdir()} == {"figure.png", "metrics.json", "claims.json", "run.json"}
    assert record(run)["weights"] == ["nano@abc"] and record(run)["status"] == "running" and card.claims[0].holds


def test_a_failed_run_says_whose_picture_lies_there(home):
    first, options = begin(), dict(figure=Figure((1, 1)), dataset="simulated", conventions={}, rows=[ROW], claims=[])
    assert record(first)["results"] is None
    save_results(first, **options)
    first.finish()
    second = begin()
    second.facts["started"] = "later"
    second.fail("no luck")
    assert record(second)["status"] == "failed" and record(second)["results"]["started"] == first.facts["started"]
    save_results(second, **options)
    assert record(second)["results"]["started"] == "later"


def test_where_results_go(home, tmp_path, monkeypatch):
    assert figures_folder() == home
    monkeypatch.delenv("FLUOGEN_FIGURES")
    monkeypatch.chdir(tmp_path)               # outside of any repository: that of the installed package, if it is one
    assert figures_folder().name == "figures" and (figures_folder().parent / "settings.ini").exists()
    assert figures_folder("shared/manifest.jsonl") == figures_folder().parent / "runs" / "figures"
    assert figures_folder("simulated") == figures_folder()


def test_pictures_of_a_data_set_stay_out_of_the_committed_figures(tmp_path, monkeypatch):
    monkeypatch.delenv("FLUOGEN_FIGURES", raising=False)
    monkeypatch.setattr("fluogen.report.run.repository", lambda: tmp_path)
    run = open_run("fig0_demo", "smoke", {"seed": 1, "device": "cpu", "dataset": "pairs.jsonl"}, ALLOWED | {"dataset": str})
    assert run.folder == tmp_path / "runs" / "figures" / "fig0_demo" / "smoke"
