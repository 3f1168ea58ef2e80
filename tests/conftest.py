"What every test file shares: no window opens, nothing is fetched, and the command line is one call away."
import os

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:         # several workers: one thread each, here and in what they start
    os.environ["OMP_NUM_THREADS"] = "1"

ITEM_BY_ITEM = ("test_notebooks.py", "test_tutorials.py")       # what these files run shares nothing but the tree


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "`-n 2 --dist loadfile`: a file stays together, so that its fixtures are made once; notebooks go one by one to whoever is free."
    from xdist.scheduler import LoadFileScheduling

    class FilesThenNotebooks(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return nodeid if file.endswith(ITEM_BY_ITEM) else file
    return FilesThenNotebooks(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture
def run(capsys):
    "main([...]) -> (exit code, output stream, lines of the error stream)"
    from fluogen.cli.main import main

    def call(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()
    return call
