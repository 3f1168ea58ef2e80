"""Text made from notebooks: `docs.py readme` writes README.md, `docs.py site` writes the pages that mkdocs renders."""
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "docs"


def to_markdown(notebook: Path) -> tuple[str, dict]:
    "A notebook as markdown, and the pictures that it refers to by name."
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    remove = {"RegexRemovePreprocessor": {"enabled": True, "patterns": [r"\s*\Z", r"#\|\s*(hide|default_exp)"]}}
    text, resources = MarkdownExporter(config=Config(remove)).from_filename(str(notebook))
    return re.sub(r"^#\| ?\w+.*\n", "", text, flags=re.M), resources["outputs"]


def make_readme() -> str:
    "README.md as text: the tour, its links seen from the repository's top."
    text, pictures = to_markdown(ROOT / "nbs" / "index.ipynb")
    assert not pictures, "nbs/index.ipynb must show committed pictures by link: README.md has no place for outputs"
    head = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->\n\n"
    text = re.sub(r"\]\((?!\.\./|\w+:|#)", "](nbs/", text).replace("](../", "](")
    return head + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def make_site() -> None:
    "Every notebook as one page under build/docs, in the folders of nbs/, with the committed figures beside them."
    shutil.rmtree(PAGES, ignore_errors=True)
    for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in notebook.parts:
            continue
        page = (PAGES / notebook.relative_to(ROOT / "nbs")).with_suffix(".md")
        page.parent.mkdir(parents=True, exist_ok=True)
        text, pictures = to_markdown(notebook)
        for name, data in pictures.items():
            (page.parent / f"{page.stem}_{name}").write_bytes(data)
            text = text.replace(f"]({name})", f"]({page.stem}_{name})")
        text = re.sub(r"\]\(([^):]+)\.ipynb\)", r"](\1.md)", text).replace("](../figures/", "](figures/")
        page.write_text(text)
    for picture in (ROOT / "figures").glob("*/laptop/*.png"):
        there = PAGES / picture.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, there)


if __name__ == "__main__":
    if sys.argv[1:] == ["readme"]:
        (ROOT / "README.md").write_text(make_readme())
    elif sys.argv[1:] == ["site"]:
        make_site()
    else:
        sys.exit("usage: docs.py readme | site")
