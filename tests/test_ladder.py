"The subpackages are a ladder: each imports only from those above it in one list. Each rule was seen to fail once."
import ast
import importlib
import re
from collections import defaultdict

import pytest
from tree import LADDER, dotted, imports_of, modules, name_of

SYSTEMS = {"sted", "fusion", "saft", "cellgen", "scale"}            # they never import one another
BESIDE = {"experiments", "figures"}                                 # measurements and figures: no product code imports them
TABLES = {"cli.parser", "recipes.catalog", "experiments.run", "models.zoo", "datasets.check"}
# The only exception: tables that name functions as text, "fluogen.package.module:function", resolved when called.
LATE = re.compile(r"fluogen((?:\.\w+)+):(\w+)")


def place(module: str) -> str:
    return module.split(".")[0]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {dotted(path): imports_of(path) for path in modules()}


def test_two_levels_and_every_subpackage_in_the_list(graph):
    assert [name for name in graph if name.count(".") > 1 or place(name) not in LADDER] == []
    assert len(graph) > 80 and sum(map(len, graph.values())) > 300, "the imports were not found"


def test_imports_go_down_the_ladder_only(graph):
    rank = {name: LADDER.index(place(name)) for name in graph}
    assert [f"{name} <- {other}" for name in graph for other in graph[name] if rank[other] > rank[name]] == []
    assert graph["core"] == set()


def test_no_circle(graph):
    left = dict(graph)                        # take away what needs nothing that is left: a circle remains
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_no_product_code_imports_measurements_or_figures(graph):
    assert [f"{name} <- {other}" for name in graph for other in graph[name]
            if place(other) in BESIDE and place(name) not in BESIDE] == []
    assert [f"{name} <- {other}" for name in graph for other in graph[name] if place(other) == "figures"] == [], "no figure is imported"


def test_systems_do_not_import_one_another(graph):
    assert [f"{name} <- {other}" for name in graph for other in graph[name]
            if {place(name), place(other)} <= SYSTEMS and place(name) != place(other)] == []


def test_at_most_fifteen_modules_a_subpackage(graph):
    count = defaultdict(int)
    for name in graph:
        count[place(name)] += 1
    assert {name: n for name, n in count.items() if n > 15 and name not in BESIDE} == {}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_has_at_most_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500, "would a reader still find the idea in it?"


def test_each_public_name_is_defined_once():
    where = defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    where[name].append(dotted(path))
    assert {name: found for name, found in where.items() if len(found) > 1} == {}
    assert len(where) > 500


def test_late_names_stand_in_tables_only_and_lead_somewhere(graph):
    found = {}
    for path in modules():
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        for module, name in {match.groups() for text in texts for match in [LATE.fullmatch(text)] if match}:
            found.setdefault(dotted(path), set()).add((module[1:], name))
    assert found and [name for name in found if name not in TABLES] == []
    lost = [f"{table}: {module}:{name}" for table, names in found.items() for module, name in names
            if module not in graph or not hasattr(importlib.import_module(f"fluogen.{module}"), name)]
    assert lost == []
