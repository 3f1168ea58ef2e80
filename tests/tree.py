"The repository as the guards see it: its root, its tracked files, its notebooks."
import ast
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LADDER = ("core", "io", "preprocessing", "datasets", "simulation", "metrics", "diffusion", "models", "training", "uncertainty", "tasks",
          "recipes", "report", "sted", "fusion", "saft", "cellgen", "scale", "experiments", "figures", "cli", "app")     # imports go up this list only
BY_HAND = ("__init__.py", "__main__.py", "_modidx.py")      # no notebook exports them; the first two define nothing (test_repo.py)


@cache
def tracked() -> list[Path]:
    "Files that git tracks and that are there; without git, all that are not hidden."
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
        found = [ROOT / name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = [path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.parts)]
    return [path for path in found if path.is_file()]


def under(folder: str, suffix: str = "") -> list[Path]:
    "Tracked files in a folder of the repository, sorted."
    return sorted(path for path in tracked() if path.is_relative_to(ROOT / folder) and path.name.endswith(suffix))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def library_notebooks() -> list[Path]:
    return under("nbs/lib", ".ipynb")


def figure_notebooks() -> list[Path]:
    return [path for path in under("nbs", ".ipynb") if path.parent == ROOT / "nbs" and path.name.startswith("fig")]


def modules() -> list[Path]:
    return [path for path in under("fluogen", ".py") if path.name not in BY_HAND]


def load(notebook: Path) -> dict:
    return json.loads(notebook.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def copy_tree(to: Path, *folders: str) -> Path:
    "The tracked files of the named folders and files (all without names), copied to an empty place."
    for path in tracked():
        if not folders or name_of(path).split("/")[0] in folders:
            there = to / path.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)
    return to


def git_status(*folders: str) -> str:
    "What git sees changed, untracked files included; empty outside a repository."
    return subprocess.run(["git", "status", "--porcelain", "--", *folders], cwd=ROOT, capture_output=True, text=True).stdout


def dotted(path) -> str:
    return ".".join(path.relative_to(ROOT / "fluogen").with_suffix("").parts)


def imports_of(path) -> set[str]:
    "Modules of fluogen that a module imports, as `subpackage.module`, also inside functions."
    here, found = ["fluogen", *dotted(path).split(".")], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fluogen.") for alias in node.names if alias.name.startswith("fluogen.")}
        if isinstance(node, ast.ImportFrom):
            base = here[:-node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base[:1] == ["fluogen"]:
                found |= {".".join(part[1:]) for part in [base, *(base + [alias.name] for alias in node.names)]}
    return found & {dotted(one) for one in modules()}
