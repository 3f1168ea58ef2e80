"What every test file shares: no window opens, nothing is fetched, and the command line is one call away."
import os

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def run(capsys):
    "main([...]) -> (exit code, output stream, lines of the error stream)"
    from fluogen.cli import main

    def call(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()
    return call
