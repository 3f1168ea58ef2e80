"""Text made from notebooks: `docs.py readme` writes README.md, `docs.py site` writes the pages that mkdocs renders."""
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "docs"
LADDER = ("core", "io", "preprocessing", "datasets", "simulation", "metrics", "diffusion", "models", "training", "uncertainty", "tasks",
          "recipes", "report", "sted", "fusion", "saft", "cellgen", "scale", "experiments", "figures", "cli", "app")      # reading order


def to_markdown(notebook: Path) -> tuple[str, dict]:
    "A notebook as markdown, and the images that it refers to by name."
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    remove = {"RegexRemovePreprocessor": {"enabled": True, "patterns": [r"\s*\Z", r"#\|\s*(hide|default_exp)"]}}
    text, resources = MarkdownExporter(config=Config(remove)).from_filename(str(notebook))
    return re.sub(r"^#\| ?\w+.*\n", "", text, flags=re.M), resources["outputs"]


def fill_commands(text: str) -> str:
    "The text with the list of commands of today between its two marks."
    from fluogen.cli.parser import list_commands
    return re.sub(r"(<!-- commands[^>]*-->\n).*?(<!-- end of commands -->)", lambda marks: f"{marks[1]}{list_commands()}\n{marks[2]}", text,
                  flags=re.S)


def refresh_tour() -> None:
    "The list of commands in nbs/index.ipynb, written anew from the table."
    path = ROOT / "nbs" / "index.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = fill_commands("".join(cell["source"])).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_readme() -> str:
    "README.md as text: the tour, its links seen from the repository's top."
    text, images = to_markdown(ROOT / "nbs" / "index.ipynb")
    assert not images, "nbs/index.ipynb must show committed images by link: README.md has no place for outputs"
    head = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->\n\n"
    text = re.sub(r"<!-- .*? -->\n?", "", fill_commands(text))
    text = re.sub(r"\]\((?!\.\./|\w+:|#)", "](nbs/", text).replace("](../", "](")
    return head + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def rank(notebook: Path) -> tuple:
    "Where a notebook of nbs/lib stands in the reading order: its subpackage in the ladder, then its number."
    parts = notebook.relative_to(ROOT / "nbs" / "lib").with_suffix("").parts
    number, name = re.match(r"(\d+)_(.*)", parts[-1]).groups()
    return LADDER.index(parts[0] if len(parts) > 1 else name), int(number)


def make_navigation(notebooks: list[Path]) -> list:
    "What mkdocs calls `nav`: the tour, the figures, the tutorials, then the lessons in reading order."
    def pages(found):
        return [notebook.relative_to(ROOT / "nbs").with_suffix(".md").as_posix() for notebook in found]
    top = [notebook for notebook in notebooks if notebook.parent == ROOT / "nbs"]
    lessons = sorted((notebook for notebook in notebooks if ROOT / "nbs" / "lib" in notebook.parents), key=rank)
    folders = dict.fromkeys(notebook.parent.name for notebook in lessons)
    return [*pages(n for n in top if n.stem == "index"), {"figures of the paper": pages(n for n in top if n.stem != "index")},
            {"tutorials": pages(n for n in notebooks if n.parent.name == "tutorials")},
            *({"core" if name == "lib" else name: pages(n for n in lessons if n.parent.name == name)} for name in folders)]


def make_site() -> None:
    "Every notebook as one page under build/docs, the committed figures beside them, and build/mkdocs.yml with the reading order."
    shutil.rmtree(PAGES, ignore_errors=True)
    notebooks = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    for notebook in notebooks:
        page = (PAGES / notebook.relative_to(ROOT / "nbs")).with_suffix(".md")
        page.parent.mkdir(parents=True, exist_ok=True)
        text, images = to_markdown(notebook)
        for name, data in images.items():
            (page.parent / f"{page.stem}_{name}").write_bytes(data)
            text = text.replace(f"]({name})", f"]({page.stem}_{name})")
        text = re.sub(r"\]\(([^):]+)\.ipynb\)", r"](\1.md)", text).replace("](../figures/", "](figures/")
        page.write_text(text, encoding="utf-8")
    for image in (ROOT / "figures").glob("*/laptop/*.png"):
        there = PAGES / image.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, there)
    settings = {"INHERIT": "../mkdocs.yml", "docs_dir": "docs", "site_dir": "../site", "nav": make_navigation(notebooks)}
    (ROOT / "build" / "mkdocs.yml").write_text(json.dumps(settings, indent=1))          # JSON is YAML


if __name__ == "__main__":
    if sys.argv[1:] == ["readme"]:
        refresh_tour()
        (ROOT / "README.md").write_text(make_readme())
    elif sys.argv[1:] == ["site"]:
        make_site()
    else:
        sys.exit("usage: docs.py readme | site")
