"What a command brings along: few modules of the package, none of the simulation, the experiments or the figures."
import ast
import json
import subprocess
import sys

import pytest
from tree import ROOT

FOREIGN = ("fluogen.simulation", "fluogen.experiments", "fluogen.figures")


def needs(module: str) -> set[str]:
    "Modules of the package that one names in an import, wherever it stands."
    path, found = ROOT.joinpath(*module.split(".")).with_suffix(".py"), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = [*module.split(".")[:-node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("fluogen.") and ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file()}


def closure(start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += needs(module)
    return seen


@pytest.mark.parametrize("module, most", [("fluogen.tasks.restore_files", 30), ("fluogen.tasks.finetune", 45)])
def test_few_modules_and_nothing_foreign_can_be_reached(module, most):
    found = closure(module)
    assert len(found) <= most, sorted(found)
    assert not [name for name in found if name.startswith(FOREIGN)]


RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from dataclasses import replace
{code}
print(json.dumps(sorted(name for name in sys.modules if name.startswith("fluogen.") and name.count(".") == 2)))
"""


@pytest.mark.parametrize("most, code", [
    (30, "from fluogen.tasks.restore_files import restore_file; from fluogen.tasks.restore import load_for_task; "
         "restore_file(sys.argv[1] + '/noisy0.tif', sys.argv[1] + '/out.tif', load_for_task('sr'))"),
    (45, "from fluogen.tasks.finetune import TUNE_CONFIG, finetune; "
         "finetune(sys.argv[1] + '/pairs.jsonl', 'mine', task='denoise', work=sys.argv[1] + '/work', out=sys.argv[1], device='cpu', "
         "config=replace(TUNE_CONFIG, steps=1, batch=1, crop_px=32, validate_every=1, precision='fp32'), log=lambda line: None, progress=False)")])
def test_few_modules_are_there_after_the_work(tmp_path, most, code):
    from test_denoise import noisy_files
    noisy_files(tmp_path, 3).rename(tmp_path / "pairs.jsonl")
    done = subprocess.run([sys.executable, "-c", RUN.format(code=code), str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 10 < len(found) <= most, found
    assert not [name for name in found if name.startswith(FOREIGN)]
