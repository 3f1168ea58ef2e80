"Guards: what a reader may rely on in this repository. Each was seen to fail once."
import ast
import configparser
import importlib.metadata
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tree import (BY_HAND, LADDER, ROOT, copy_tree, figure_notebooks, imports_of, library_notebooks, load, modules, name_of, source, tracked,
                  under)

MIB = 2**20
each_module = pytest.mark.parametrize("path", modules(), ids=name_of)
each_figure = pytest.mark.parametrize("path", figure_notebooks(), ids=name_of)
each_notebook = pytest.mark.parametrize("path", under("nbs", ".ipynb"), ids=name_of)


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command, cwd=ROOT, **keys):
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, **keys)


# ---- package and notebooks are one thing

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the tree in which fluogen/ was written anew from the notebooks, and the notebooks were cleaned."
    top = copy_tree(tmp_path_factory.mktemp("tree"), "nbs", "fluogen", "settings.ini", "pyproject.toml")
    for path in top.glob("fluogen/**/*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            path.unlink()
    done = run("-c", "from nbdev.doclinks import nbdev_export as e; from nbdev.clean import nbdev_clean as c; e(); c()", cwd=top)
    assert done.returncode == 0, done.stderr
    return top


def differing(top, folder, suffix):
    "Names that are missing, new or different in the copy."
    here = {name_of(path): path.read_bytes() for path in under(folder, suffix)}
    there = {path.relative_to(top).as_posix(): path.read_bytes() for path in (top / folder).rglob("*" + suffix)}
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def test_package_is_what_the_notebooks_export(exported):
    assert differing(exported, "fluogen", ".py") == [], "run make export and commit"


def test_notebooks_are_clean(exported):
    assert differing(exported, "nbs", ".ipynb") == [], "run make export and commit"


def test_the_parameters_tag_survives_cleaning(tmp_path):
    copy_tree(tmp_path, "settings.ini", "pyproject.toml")
    (tmp_path / "nbs").mkdir()
    cell = {"cell_type": "code", "execution_count": 3, "id": "a1", "metadata": {"tags": ["parameters"], "x": 1},
            "outputs": [], "source": ["seed = 0"]}
    notebook = {"cells": [cell], "metadata": {"kernelspec": {"name": "python3", "display_name": "python3",
                "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "nbs" / "fig.ipynb").write_text(json.dumps(notebook))
    assert run("-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=tmp_path).returncode == 0
    cleaned = json.loads((tmp_path / "nbs" / "fig.ipynb").read_text())["cells"][0]
    assert cleaned["metadata"] == {"tags": ["parameters"]} and cleaned["id"] == "a1"


def exports_to(notebook) -> list[str]:
    found = [re.match(r"#\|\s*default_exp\s+(\S+)", source(cell)) for cell in load(notebook)["cells"]]
    return [match.group(1) for match in found if match]


def test_one_notebook_one_module_and_no_orphans():
    named = {name_of(notebook): exports_to(notebook) for notebook in library_notebooks()}
    assert not {name: target for name, target in named.items() if len(target) != 1}
    targets = ["fluogen/" + target[0].replace(".", "/") + ".py" for target in named.values()]
    assert sorted(targets) == sorted(set(targets)), "two notebooks write one module"
    assert sorted(targets) == [name_of(path) for path in modules()], "a module without its notebook, or the reverse"
    for name, (target,) in named.items():     # nbs/lib/room/10_topic.ipynb -> fluogen.room.topic
        assert re.sub(r"(^|/)\d+_", r"\1", name[len("nbs/lib/"):-len(".ipynb")]) == target.replace(".", "/")


def test_packages_have_their_init():
    folders = {path.parent for path in modules()}
    assert all((folder / "__init__.py") in tracked() for folder in folders)


def test_what_is_written_by_hand_defines_nothing():
    "`fluogen/__main__.py`, for `python -m fluogen`, and the packages' `__init__.py`."
    found = [path for path in under("fluogen", ".py") if path.name in BY_HAND and path.name != "_modidx.py"]
    assert [name_of(path) for path in found if path.name == "__main__.py"] == ["fluogen/__main__.py"]
    for path in found:
        assert len(path.read_text().splitlines()) <= 6
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]


# ---- notebooks

@each_notebook
def test_notebook_form(path):
    notebook = load(path)
    ids = [cell.get("id") for cell in notebook["cells"]]
    assert None not in ids and len(ids) == len(set(ids)), "cell ids must be there and differ"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out["output_type"] == "error"], "a committed cell ended in an error"
    assert path.stat().st_size <= (0.4 if "lib" in path.parts else 1.5) * MIB


@pytest.mark.parametrize("path", library_notebooks(), ids=name_of)
def test_lesson_form(path):
    cells = load(path)["cells"]
    text = [source(cell) for cell in cells]
    first = next(source(cell) for cell in cells if cell["cell_type"] == "code")
    assert first.startswith("#| default_exp"), "the first code cell names the module"
    assert any(re.match(r"# \S.*\n+> \S", cell) for cell in text[:2]), "title and one-line promise"
    assert any(re.search(r"(leaves?|left) out", cell) for cell in text[-4:]), "the last section says what this leaves out"
    prose = sum(cell["cell_type"] == "markdown" for cell in cells)
    assert prose >= len(cells) / 5, "a lesson has prose"
    assert any(cell["cell_type"] == "code" and "export" not in source(cell)[:12]
               and re.search(r"\bassert\b|\btest_(eq|fail|close)\(", source(cell)) for cell in cells)


MACHINE = re.compile(r"(?<![\w./~…])/(?:home|root|Users|data\d*|mnt|work|tmp|opt|var)/\w")
TEXT = (".py", ".ipynb", ".json", ".jsonl", ".md", ".yml", ".ini", ".toml", ".cff", ".sh")


def test_no_absolute_path_of_a_machine():
    guilty = []
    for path in tracked():
        if path.suffix in TEXT or path.suffix == "":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if MACHINE.search(re.sub(r'"image/png": ".*', "", line)):
                    guilty.append(f"{name_of(path)}:{number}: {line.strip()[:80]}")
    guilty = [line for line in guilty if not line.startswith("tests/test_repo.py")]
    assert guilty == []


@each_figure
def test_figure_notebook_skeleton(path):
    cells = load(path)["cells"]
    assert 12 <= len(cells) <= 25
    assert cells[0]["cell_type"] == "markdown" and source(cells[0]).startswith("# ")
    assert not any(re.match(r"#\|\s*(export|default_exp)", source(cell)) for cell in cells)
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and cells.index(tagged[0]) <= 2
    tree = ast.parse(source(tagged[0]))
    assert all(isinstance(node, ast.Assign) and isinstance(ast.literal_eval(node.value), str | int | float | bool)
               for node in tree.body), "parameters are flat scalars, nothing computed"
    assert {"profile", "seed", "device"} <= {node.targets[0].id for node in tree.body}
    assert all("#" in line for line in source(tagged[0]).splitlines() if "=" in line), "each parameter has its comment"
    code = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "code")
    code = "\n".join(line for line in code.splitlines() if not line.startswith("%"))
    assert "open_run(" in code and "assert " in code
    long = [node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno >= 8]
    assert long == [], "the mathematics belongs into fluogen.*"


# ---- modules

@each_module
def test_module_form(path):
    lines = path.read_text().splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("# %%") and "auto" not in line)
    assert max(map(len, lines[head:])) <= 140, "nbdev's own head apart, lines stay readable"
    long = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno >= 60]
    assert long == []


def test_pyflakes_is_content():
    done = run("-m", "pyflakes", *map(str, modules()), *map(str, under("tests", ".py")))
    assert done.stdout + done.stderr == ""


def test_report_renders_what_it_is_handed():
    "Neither of tasks and report imports the other: the command line, experiments and figures join them."
    for folder, other in (("report", "tasks"), ("tasks", "report")):
        found = {name_of(path): [need for need in imports_of(path) if need.split(".")[0] == other] for path in under(f"fluogen/{folder}", ".py")}
        assert len(found) >= 6 and not [name for name, needs in found.items() if needs]


LATE = {"cli.parser", "recipes.catalog", "experiments.run", "models.zoo", "datasets.check"}      # modules with a table of functions as text: the one exception to the ladder


def test_late_names_stand_in_the_tables_alone_and_lead_somewhere():
    from fluogen.cli.parser import COMMANDS
    from fluogen.core import resolve
    from fluogen.experiments.run import BENCHMARKS
    from fluogen.recipes.catalog import RECIPES
    named = [name for command in COMMANDS.values() for name in (command.run, command.options) if name]
    named += [entry.function for table in (RECIPES, BENCHMARKS) for entry in table.values()]
    assert len(named) >= 30 and all(callable(resolve(name)) for name in named)
    guilty = []
    for path in modules():
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        where = ".".join(path.relative_to(ROOT / "fluogen").with_suffix("").parts)
        guilty += [f"{where}: {text}" for text in texts if re.fullmatch(r"fluogen(\.\w+)+:\w*", text) and where not in LATE]
    assert guilty == [], "name functions as text in a table of this list, import them elsewhere"


@each_module
def test_nothing_executes_foreign_bytes(path):
    converter = path.stem.startswith("convert")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"} & {n.split(".")[0] for n in names}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {key.arg: ast.unparse(key.value) for key in node.keywords}
            assert called not in ("eval", "exec", "__import__", "os.system", "yaml.load"), f"line {node.lineno}"
            assert given.get("allow_pickle", "False") == "False" and given.get("shell", "False") == "False"
            if called == "torch.load":
                assert converter and given.get("weights_only") == "True", f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type).endswith("Exception")):
            assert not isinstance(node.body[0], ast.Pass), f"line {node.lineno}: an error is swallowed"


def test_import_is_light_and_leaves_torch_alone():
    code = "import sys; before = set(sys.modules); import fluogen; print(*sorted(set(sys.modules) - before), 'torch' in sys.modules)"
    *brought, torch_seen = run("-c", code).stdout.split()
    assert torch_seen == "False" and brought == ["fluogen"]


# ---- what is installed

def test_requirements_agree():
    "settings.ini, pyproject.toml and environment.yml name the same packages with the same versions."
    ini, toml = settings(), project()["project"]
    assert ini["requirements"].split() == toml["dependencies"]
    extras = {key.removesuffix("_requirements"): value.split() for key, value in ini.items() if key.endswith("_requirements")}
    assert extras == toml["optional-dependencies"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    names = {entry for entry in conda if isinstance(entry, str)}
    wanted = toml["dependencies"] + extras["notebooks"]
    assert {req.replace("torch>", "pytorch-gpu>") if req.startswith("torch>") else req for req in wanted} <= names
    assert conda[-1] == {"pip": ["-e .[notebooks,dev]"]}
    assert f"python>={ini['min_python']}" in " ".join(names) and toml["requires-python"] == f">={ini['min_python']}"
    pinned = Requirement((ROOT / "constraints.txt").read_text().splitlines()[-1])
    torch = next(Requirement(req) for req in toml["dependencies"] if req.startswith("torch>"))
    assert pinned.name == "torch" and next(iter(pinned.specifier)).version in torch.specifier


def test_the_two_nbdev_configurations_agree():
    import fluogen
    ini, toml = settings(), project()
    assert ini["version"] == fluogen.__version__ and ini["description"] == toml["project"]["description"]
    assert ini["lib_name"] == toml["project"]["name"] and ini["keywords"].split()[-1] == toml["project"]["keywords"][-1]
    for key, value in toml["tool"]["nbdev"].items():
        found = ini[key].split() if isinstance(value, list) else ini[key]
        assert found == (str(value) if isinstance(value, bool) else value), key
    script, = toml["project"]["scripts"].items()
    assert ini["console_scripts"] == "=".join(script)
    from fluogen.core import resolve
    assert callable(resolve(script[1])), "the installed command would not start"


def closure(*wanted: str) -> set[str]:
    "The installed packages that these requirements bring along, markers of this machine applied."
    todo, seen = [Requirement(text) for text in wanted], set()
    while todo:
        req = todo.pop()
        key = (canonicalize_name(req.name), *sorted(req.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in importlib.metadata.requires(req.name) or []:
            child = Requirement(text)
            if any(child.marker is None or child.marker.evaluate({"extra": extra}) for extra in ("", *req.extras)):
                todo.append(child)
    return {name for name, *_ in seen}


def test_the_core_pulls_nothing_large():
    import torch
    names = closure(*project()["project"]["dependencies"])
    assert "torch" in names and not names & {"torchvision", "jupyterlab", "transformers", "mlflow", "gradio", "pandas"}
    if torch.version.cuda is None:
        assert not [name for name in names if re.match(r"nvidia|cuda|triton", name)]


def test_what_is_installed_has_no_torchvision():
    import torch
    installed = {canonicalize_name(dist.metadata["Name"]) for dist in importlib.metadata.distributions()}
    assert "torchvision" not in installed
    assert torch.version.cuda or not [name for name in installed if name.startswith("nvidia-")]


def test_sizes():
    user, experiments = under("fluogen/weights"), under("figures/weights")
    assert sum(path.stat().st_size for path in user) <= 32 * MIB and 0 < sum(path.stat().st_size for path in experiments) <= 14 * MIB
    assert not [path.parent.name for path in user if path.parent.name.startswith(("bench", "brightness", "generation"))]
    size = lambda *starts: sum(path.stat().st_size for path in [*user, *experiments] if path.parent.name.startswith(starts))
    assert size("fluogen-nano", "nano-sr", "bench30") <= 14e6 and size("nano-denoise", "bench-denoise", "bench-pairs") <= 8e6
    assert sum(path.stat().st_size for path in tracked()) < 44 * MIB
    assert not [name_of(path) for path in under("figures", ".png") if path.stat().st_size > 300_000]
    assert not [name_of(path) for path in under("figures") if path.name == "run.json" or "smoke" in path.parts]


# ---- texts

def docs_tool():
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / ".ci" / "docs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_readme_is_made_from_the_tour():
    assert (ROOT / "README.md").read_text() == docs_tool().make_readme(), "run make readme and commit"


def test_the_tour_lists_the_commands_of_today_and_the_subpackages():
    from fluogen.cli.parser import list_commands
    text = "\n".join(source(cell) for cell in load(ROOT / "nbs" / "index.ipynb")["cells"])
    assert list_commands() in text and list_commands() in (ROOT / "README.md").read_text(), "run make readme and commit"
    folders = [name for name in LADDER if (ROOT / "nbs" / "lib" / name).is_dir()]
    assert ", ".join(f"`{name}`" for name in folders) in " ".join(text.split())


def test_the_site_follows_the_ladder():
    tool = docs_tool()
    assert [name for name in tool.LADDER if name in LADDER] == [name for name in LADDER if name in tool.LADDER]
    first, *parts = tool.make_navigation(under("nbs", ".ipynb"))
    names = [name for part in parts for name in part]
    assert first == "index.md" and names[2:] == [name for name in LADDER if name in names] and len(names) >= 17
    pages = [page for part in parts for found in part.values() for page in found]
    assert len(pages) + 1 == len(set(pages)) + 1 == len(under("nbs", ".ipynb"))
    for part in parts[2:]:
        assert (numbers := [int(Path(page).name.split("_")[0]) for page in next(iter(part.values()))]) == sorted(numbers)


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 3 and [link for link in links if not (ROOT / link).exists()] == []


def test_readme_commands_exist():
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.M)) <= targets
    notebooks = set(re.findall(r"papermill (\S+)", text))
    assert notebooks and [path for path in notebooks if path.endswith(".ipynb") and not (ROOT / path).exists()] == []
    folders = {Path(path).parent for path in re.findall(r"papermill \S+\.ipynb (\S+\.ipynb)", text)}           # papermill makes none
    assert folders and [folder for folder in folders if not any(path.parent == ROOT / folder for path in tracked())] == []
    said = run("-m", "fluogen", "--help").stdout
    commands = set(re.findall(r"(?:^|`|bin/)fluogen (\w+)", text, re.M))
    assert commands and [command for command in commands if not re.search(rf"\b{command}\b", said)] == []


def test_readme_commands_are_understood():
    "Every command line of the README that is not a line of a table of forms (`IN OUT`) is parsed, its options included."
    from fluogen.cli.parser import COMMANDS, make_parser
    forms = {f"fluogen {name} {command.usage}".strip() for name, command in COMMANDS.items()}
    lines = re.findall(r"(?:^|`)(fluogen [^`\n#]+)", (ROOT / "README.md").read_text(), re.M)
    lines = [line.strip() for line in lines if line.strip() not in forms]
    words = [shlex.split(line)[1:] for line in lines]
    words = [line for line in words if len(line) > 1 and line[-1] not in ("--help", "--list")]
    assert len(words) >= 10
    for line in words:
        assert make_parser("0").parse_args(line).command == line[0]


def test_recipes_and_benchmarks_that_texts_name_exist():
    from fluogen.experiments.run import BENCHMARKS
    from fluogen.recipes.catalog import RECIPES
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *under("nbs", ".ipynb"), *modules()]
    for verb, table in (("train", RECIPES), ("benchmark", BENCHMARKS)):
        named = {(name_of(path), name) for path in texts for name in re.findall(rf"fluogen {verb} ([a-z][\w-]*)", path.read_text())}
        assert len(named) >= 3 and [(where, name) for where, name in sorted(named) if name not in table] == []


def test_make_explains_itself():
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    makefile = (ROOT / "Makefile").read_text()
    hidden = {"help", "setup"}
    public = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()) - hidden
    assert done.returncode == 0 and [name for name in public if f"make {name}" not in done.stdout] == []


@pytest.mark.parametrize("path", under("data_manifests", ".toml"), ids=name_of)
def test_registry_files_are_whole(path):
    from fluogen.datasets.registry import read_entry
    entry = read_entry(path)
    assert path.stem.lower() in map(str.lower, entry.names) and entry.obtain and entry.licence and entry.source


def test_the_data_sets_of_the_paper_are_registered():
    from fluogen.datasets.registry import find_entry
    assert all(find_entry(name) for name in ("BioSR", "FMD", "DSB2018", "2D HeLa", "DynamicNuclearNet"))


def test_committed_manifests_validate():
    from fluogen.datasets.manifest import validate
    assert [error for path in under("data_manifests", ".jsonl") for error in validate(path)] == []


def test_make_weights_shows_the_tables():
    "What `make weights` prints is what the command knows."
    from fluogen.experiments.run import BENCHMARKS
    from fluogen.recipes.catalog import RECIPES
    rule = re.search(r"^weights:.*?\n\n", (ROOT / "Makefile").read_text(), re.M | re.S)[0]
    for verb, table in (("train", RECIPES), ("benchmark", BENCHMARKS)):
        assert f"bin/fluogen {verb} --list" in rule
        listed = re.findall(rf"^fluogen {verb} ([\w-]+)", run("-m", "fluogen", verb, "--list").stdout, re.M)
        assert listed and listed == list(table)
