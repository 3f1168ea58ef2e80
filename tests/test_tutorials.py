"Every tutorial runs through papermill from a foreign folder, with other parameters, and says nothing on the way."
import json
import os
import subprocess
import sys

import nbformat
import pytest
from tree import ROOT, git_status, name_of, under

TUTORIALS = under("nbs/tutorials", ".ipynb")
QUICK = {"00_prompt_to_image": {"steps": 2, "size_px": 32, "prompt": "Lysosomes of HeLa"},      # parameters of a quick run
         "10_your_thirty_images": {"n_pairs": 5, "steps": 2},
         "20_trust_an_interval": {"n_own": 24, "n_test": 8, "size_px": 64, "alpha": 0.2}}
PICTURES = {"00_prompt_to_image": 5, "10_your_thirty_images": 5, "20_trust_an_interval": 5}     # static figures at least


@pytest.mark.figures
@pytest.mark.parametrize("path", [path for path in TUTORIALS if path.stem in QUICK], ids=name_of)
def test_a_tutorial_runs_unattended_and_silently(path, tmp_path):
    before = git_status("nbs", "figures", "fluogen")
    given = [word for name, value in QUICK[path.stem].items() for word in ("-p", name, str(value))]
    environment = {k: v for k, v in os.environ.items() if k != "JPY_SESSION_NAME"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "papermill", str(path), str(tmp_path / "out.ipynb"), *given], cwd=tmp_path,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert git_status("nbs", "figures", "fluogen") == before, "the run changed the tree"
    outputs = [out for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells for out in cell.get("outputs", [])]
    assert [out for out in outputs if out.output_type == "stream" and out.name == "stderr"] == [], "silent: no warning, no progress"
    assert not [out for out in outputs if "application/vnd.jupyter.widget-view+json" in out.get("data", {})], "no widget without a reader"
    assert len([out for out in outputs if "image/png" in out.get("data", {})]) >= PICTURES[path.stem]


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_tutorial_form(path):
    cells = json.loads(path.read_text())["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    assert text[0].startswith("# ") and sum(cell["cell_type"] == "markdown" for cell in cells) >= len(cells) / 4
    assert [cell["metadata"].get("tags") for cell in cells if cell["metadata"].get("tags")] == [["parameters"]]
    for number, source in enumerate(text):
        if "explore(" in source and "import" not in source:
            near = [out for cell in cells[max(number - 1, 0):number + 2] for out in cell.get("outputs", [])]
            assert any("image/png" in out.get("data", {}) for out in near), f"cell {number}: a widget without a static figure beside it"
    assert (ROOT / "nbs" / "fig3_synthesis.ipynb").is_file()
