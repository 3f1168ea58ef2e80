"The command line: quick to answer, one line for a mistake, results on one stream and talk on the other."
import inspect
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from counts import Operations, files_opened
from toys import save_toy

from fluogen.cli import console as say, doctor, main as cli
from fluogen.io.image import read_image, write_image
from fluogen.models import zoo


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_toy(tmp_path_factory.mktemp("weights") / "toy"))


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_image(folder / f"{name}.tif", rng.poisson(200, (20, 24)).astype(np.uint16),
                    pixel_um={"Y": 0.06, "X": 0.06})
    return folder


# ---- quick

def test_help_answers_at_once_and_without_torch():
    "What takes time is importing: 234 modules when this was written, six of them ours."
    code = ("import sys; from fluogen.cli.main import main\ntry: main(['--help'])\n"
            "finally: print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)
    imported = done.stdout.splitlines()[-1].split()
    assert all(name in done.stdout for name in ("restore", "train", "check", "doctor", "weights"))
    assert not {"torch", "scipy", "skimage", "matplotlib", "tifffile", "zarr", "accelerate"} & set(imported)
    assert len(imported) <= 300 and sum(name.startswith("fluogen") for name in imported) <= 12


def test_every_command_explains_itself(run):
    for command in ("restore", "weights", "train", "doctor"):
        code, out, err = run(command, "--help")
        assert code == 0 and out.startswith(f"usage: fluogen {command}") and err == []
    assert run("--version")[:2] == (0, f"fluogen {cli.__version__}\n")


# ---- restore

def test_a_file(run, raw, tmp_path, model):
    target = tmp_path / "out.tif"
    code, out, err = run("restore", raw / "a.tif", target, "--task", "sr", "--model", model, "--tile", 32,
                         "--prompt", "ER of COS-7")
    assert code == 0 and out == f"{target}\n"
    assert re.fullmatch(r"toy@\w{12} on cpu \(auto: no GPU found\), 1 image", err[0]) or "(auto)" in err[0]
    assert err[-1] == "a.tif: restored"
    assert read_image(target).metadata["fluogen"]["prompt"] == "ER of COS-7"


def test_a_folder_goes_on_after_a_bad_file(run, raw, tmp_path, model):
    (raw / "c.tif").write_bytes((raw / "a.tif").read_bytes()[:300])
    go = ("restore", raw, tmp_path / "out", "--model", model, "--device", "cpu", "--dtype", "uint16")
    code, out, err = run(*go)
    assert code == 2 and out.splitlines() == [str(tmp_path / "out" / n) for n in ("a.tif", "b.tif")]
    assert re.fullmatch(r"toy@\w{12} on cpu, 3 images", err[0])
    assert err[3].startswith("fluogen: ") and "c.tif: truncated" in err[3]
    assert err[4].startswith("2 of 3 done (0 were there already), 1 left out") and len(err) == 5
    (raw / "c.tif").unlink()
    code, again, err = run(*go)
    assert code == 0 and again == out and "a.tif: kept, it was there already" in err
    assert read_image(tmp_path / "out" / "a.tif").array.dtype == np.uint16


def bad_image(name, folder):
    "One wrong input of each kind."
    path, rng = folder / f"{name}.tif", np.random.default_rng(0)
    make = {"colour": lambda: write_image(path, rng.integers(0, 255, (8, 9, 3), np.uint8), axes="YXS"),
            "stack": lambda: write_image(path, rng.integers(0, 255, (4, 8, 9), np.uint16), axes="ZYX"),
            "nan": lambda: write_image(path, np.where(np.eye(9) > 0, np.nan, 1).astype(np.float32)),
            "constant": lambda: write_image(path, np.full((9, 9), 3, np.uint16)),
            "empty": lambda: path.write_bytes(b""), "text": lambda: path.write_text("hello"),
            "missing": lambda: None,
            "cut": lambda: path.write_bytes((folder / "raw" / "a.tif").read_bytes()[:500])}
    make[name]()
    return path


@pytest.mark.parametrize(("name", "says"), [
    ("colour", "channel=0..2"), ("stack", "--planewise"), ("nan", "9 of 81 NaN"),
    ("constant", "constant image"),
    ("empty", "empty"), ("text", "no known image format"), ("missing", "no such file"), ("cut", "truncated")])
def test_a_wrong_image_is_one_line_and_nothing_is_written(run, raw, tmp_path, model, name, says):
    path = bad_image(name, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = run("restore", path, tmp_path / "out" / "x.tif", "--model", model, "--device", "cpu")
    wrong = [line for line in err if line.startswith("fluogen: ")]
    assert code == 2 and out == "" and len(wrong) == 1 and says in wrong[0] and name in wrong[0]
    assert len(err) <= 2 and sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("options", "says"), [
    (["--prompt", "zebra"], "unknown prompt (found zebra). Nearest known"),
    (["--task", "sharpen"], "no such task"),
    (["--model", "no-such"], "no-such: no such weights"), (["--device", "tpu"], "no such device"),
    (["--samples", "2"], "not samples"), (["--samples", "-1"], "samples: setting out of range"),
    (["--tile", "8"], "tile_px: setting out of range"), (["--axes", "ABC"], "axes"),
    (["--memory", "0.001"], "not enough memory"), (["--channel", "0"], "no such colour"),
    (["--memory", "nan"], "memory: setting out of range"), (["--memory", "0"], "memory: setting out of range"),
    (["--camera", "1,0,3"], "only denoising asks for the camera"), (["--task", "denoise"], "weights of another task")])
def test_a_wrong_wish_is_one_line(run, raw, tmp_path, model, options, says):
    model = [] if "--model" in options else ["--model", model]
    code, out, err = run("restore", raw / "a.tif", tmp_path / "out.tif", *model, *options)
    wrong = [line for line in err if line.startswith("fluogen: ")]
    assert code == 2 and out == "" and len(wrong) == 1 and says in wrong[0]
    assert not (tmp_path / "out.tif").exists()


@pytest.mark.parametrize("arguments", [
    [], ["sharpen"], ["restore"], ["restore", "a.tif"], ["restore", "a.tif", "b.tif", "--prmpt", "x"],
    ["restore", "a.tif", "b.tif", "--seed", "one"], ["restore", "a.tif", "b.tif", "--dtype", "int7"],
    ["restore", "a.tif", "b.tif", "--intensity", "max"], ["train", "all"], ["doctor", "--now"],
    ["restore", "a.tif", "b.tif", "--camera", "a,b,c"], ["train", "nano", "--steps", "0"], ["train", "nano", "--minutes", "nan"],
    ["finetune", "m", "--name", "x", "--minutes", "0"], ["finetune", "m", "--name", "x", "--profile", "cluster"]])
def test_a_wrong_option_is_one_line(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and len(err) == 1 and "--help" in err[0] and err[0].startswith("fluogen")


def test_an_image_that_is_no_result_is_not_overwritten(run, raw, tmp_path, model):
    "`fluogen restore *.tif` in a folder of two."
    before = (raw / "b.tif").read_bytes()
    code, out, err = run("restore", raw / "a.tif", raw / "b.tif", "--model", model)
    assert code == 2 and "not restored lies there" in err[-1] and (raw / "b.tif").read_bytes() == before
    for _ in range(2):
        assert run("restore", raw / "a.tif", tmp_path / "own.tif", "--model", model)[0] == 0
    assert run("restore", raw / "b.tif", tmp_path / "own.tif", "--model", model)[0] == 0      # a result may be


def test_other_formats_of_a_folder_are_named(run, raw, tmp_path, model):
    (raw / "c.jpg").write_bytes(b"x")
    (raw / "d.czi").write_bytes(b"x")
    code, out, err = run("restore", raw, tmp_path / "out", "--model", model)
    assert code == 0 and any("2 images of other formats left out (c.jpg)" in line for line in err)
    (raw / "only").mkdir()
    (raw / "c.jpg").rename(raw / "only" / "c.jpg")
    code, out, err = run("restore", raw / "only", tmp_path / "out2", "--model", model)
    assert code == 2 and "c.jpg" in err[-1] and "Export them as TIFF" in err[-1]


def test_places_are_tried_before_the_work(run, raw, tmp_path, model):
    for arguments in (["restore", raw / "a.tif", raw / "b.tif" / "x.tif", "--model", model],
                      ["generate", "ER of COS-7", "--out", raw / "b.tif", "--model", model],
                      ["calibrate", "none.jsonl", "--out", raw / "b.tif" / "c.json"],
                      ["calibrate", "none.jsonl", "--out", raw / "b.tif"]):
        before = (raw / "b.tif").read_bytes()
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and ("a file, so nothing" in err[-1] or "ends in .json" in err[-1]), err
        assert (raw / "b.tif").read_bytes() == before


def test_weights_that_are_not_installed(run, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "weight_folders", lambda: [tmp_path / "none", tmp_path / "cache"])
    code, out, err = run("restore", raw / "a.tif", tmp_path / "out.tif")
    assert (code, out) == (2, "") and len(err) == 1
    assert err[0].startswith("fluogen: nano-sr-direct: the weights of this task are not installed. Make them")
    code, out, err = run("weights")
    assert (code, out) == (0, "")
    assert err == ["no weights on this machine; make them with: fluogen train nano"]
    assert run("weights", "nano-sr")[0] == 2
    assert run("train", "nano-sr", "--work", tmp_path / "w")[::2] == (2, [
        "fluogen: fluogen-nano: no such weights (expected none installed). fluogen weights lists all; "
        "or give a folder with config.json and weights.safetensors."])


def test_notes_are_lines_and_stay_inside_the_command(run, raw, tmp_path, model, monkeypatch):
    film = np.stack([read_image(raw / "a.tif").array, np.full((20, 24), 7, np.uint16)])
    write_image(tmp_path / "film.tif", film, axes="TYX")
    shown = warnings.showwarning
    code, out, err = run("restore", tmp_path / "film.tif", tmp_path / "out.tif", "--model", model)
    assert code == 0 and [line for line in err if line.startswith("note: ")] == [
        f"note: {tmp_path / 'film.tif'}: a constant plane, kept as it is"]
    assert warnings.showwarning is shown


def test_interrupted_and_full(run, raw, tmp_path, model, monkeypatch):
    from fluogen.tasks import restore_files as folders
    for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)):
        def fail(*a, error=error, **k):
            raise error
        monkeypatch.setattr(folders, "_restore_file", fail)
        found, out, err = run("restore", raw, tmp_path / "out", "--model", model)
        assert found == code and len(err) == 2 and err[1].startswith("fluogen: ")


# ---- support

def test_light_that_was_not_recorded_is_marked(run, tmp_path):
    rng = np.random.default_rng(0)
    light = 100 + 40 * np.add.outer(np.sin(np.arange(2 * 96) / 9) + 1, np.cos(np.arange(96) / 7) + 1).reshape(2, 96, 96)
    write_image(tmp_path / "film.tif", (rng.poisson((light - 100) * 2) / 2 + 100).astype(np.float32), axes="TYX")
    lie = light.copy()
    lie[1, 40:43, 20:60] += 30
    for name, array in (("true.tif", light), ("lie.tif", lie)):
        write_image(tmp_path / name, array.astype(np.float32), axes="TYX", metadata={"fluogen": {"camera": [0.5, 100, 0.1]}})
    shares = []
    for name in ("true.tif", "lie.tif"):
        code, out, err = run("support", tmp_path / "film.tif", tmp_path / name, tmp_path / "map.tif")
        assert code == 0 and err == [] and (lines := out.splitlines())[-1] == str(tmp_path / "map.tif")
        shares.append([float(re.search(r"([\d.]+)%", line)[1]) for line in lines[:2]])
    assert sum(shares[0]) < 7 and shares[1][0] > shares[0][0] + 1
    marks = read_image(tmp_path / "map.tif")
    assert marks.axes == "TYX" and (marks.array[1, 41, 24:56] == 1).mean() > 0.9 and (marks.array[0, 41, 24:56] == 1).mean() < 0.3
    write_image(tmp_path / "twice.tif", np.kron(light, np.ones((1, 2, 2))).astype(np.float32), axes="TYX")
    write_image(tmp_path / "unit.tif", light.astype(np.float32), axes="TYX", metadata={"fluogen": {"intensity": "unit"}})
    write_image(tmp_path / "scaled.tif", (8 * light).astype(np.float32), axes="TYX")
    write_image(tmp_path / "made.tif", light.astype(np.float32), axes="TYX", metadata={"fluogen": {"computed": True}})
    code, out, err = run("support", tmp_path / "made.tif", tmp_path / "film.tif")                   # the wrong way round
    assert code == 2 and out == "" and "computed, not recorded" in err[0]
    for name, words in (("twice.tif", "not of one size"), ("unit.tif", "not a restored image in counts"), ("no.tif", "no"),
                        ("scaled.tif", "not in the same counts")):
        code, out, err = run("support", tmp_path / "film.tif", tmp_path / name)
        assert code == 2 and out == "" and len(err) == 1 and words in err[0]
    assert run("support", tmp_path / "film.tif", tmp_path / "true.tif", "--element", "40")[0] == 2


# ---- progress

def test_progress_on_a_terminal_and_in_a_log(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(say.time, "monotonic", lambda: clock[0])
    for live in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda live=live: live
        monkeypatch.setattr(sys, "stderr", stream)
        progress = say.ProgressLine(2)
        for source in ("a.tif", "b.tif"):
            for done in range(1, 101):
                progress(Path(source), done, 100)
                clock[0] += 1
        said = stream.getvalue()
        assert "a.tif (1/2): 31 %, 67 s left" in said or live and "b.tif (2/2): 100 %, 0 s left" in said
        assert said.count("\n") == (0 if live else 6) and ("\r" in said) is live


# ---- doctor, weights, train

def test_doctor(run, monkeypatch, tmp_path):
    with files_opened(".safetensors") as read, Operations() as done:
        code, out, err = run("doctor")
    assert len(read) <= 2 * len([line for line in out.splitlines() if line.startswith("weights ")])     # each with what it stands on
    assert done.names and not [name for name in done.names if "convolution" in name], "a network is evaluated"
    assert err == []
    assert code == (1 if "→ fluogen train" in out else 0)
    for name in ("fluogen", "python", "torch", "device", "memory", "weights", "in short"):
        assert re.search(rf"^{name} ", out, re.M), name
    monkeypatch.setattr(zoo, "weight_folders", lambda: [tmp_path])
    (save_toy(tmp_path / "nano-sr") / "weights.safetensors").write_bytes(b"damaged")
    code, out, err = run("doctor")
    assert code == 1 and "nano-sr-direct absent   → fluogen train nano-sr-direct" in out
    assert "hash differs" in out
    assert out.splitlines()[-1].startswith("in short") and "6 missing" in out


def test_doctor_without_torch(run, monkeypatch):
    real = doctor.version

    def version(name):
        if name in ("torch", "imagecodecs"):
            raise doctor.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", version)
    code, out, err = run("doctor")
    assert code == 1 and re.search(r"torch +absent   → pip install", out) and "1 missing" in out
    assert 'pip install "fluogen[codecs]"' in out


def test_weights(run, monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "weight_folders", lambda: [tmp_path])
    save_toy(tmp_path / "one")
    (save_toy(tmp_path / "two") / "weights.safetensors").unlink()
    code, out, err = run("weights")
    assert code == 0 and err == []
    assert re.search(r"^one +\d\.\d\d MiB", out) and re.search(r"^two +missing", out, re.M)
    code, out, err = run("weights", "one")
    assert code == 0 and out.startswith("# one\n") and err == []
    (tmp_path / "one" / "card.md").unlink()
    assert run("weights", "one")[0] == 2


def test_train_hands_its_options_on(run, monkeypatch, tmp_path):
    from fluogen.recipes import prior, super_resolution as recipes
    calls = []
    for module, name in ((prior, "train_prior"), (recipes, "train_sr")):
        own = {key: about.default for key, about in inspect.signature(getattr(module, name)).parameters.items()}
        monkeypatch.setattr(module, name, lambda out, work, own=own, **more: calls.append((out, work, own | more, more)) or out)
    options = ["--out", tmp_path, "--work", tmp_path / "w", "--minutes", "2.5", "--seed", "3",
               "--device", "cpu"]
    code, out, err = run("train", "nano", *options)
    assert code == 0 and out == f"{tmp_path / 'fluogen-nano'}\n" and f"--model {out.strip()}" in err[0]
    out, work, all_of_it, given = calls.pop()
    assert (out, work) == (tmp_path / "fluogen-nano", tmp_path / "w" / "nano")
    assert given == {"device": "cpu", "seed": 3, "minutes": 2.5, "recipe": "nano"}             # the rest is the function's own default
    expected = {"device": "cpu", "seed": 3, "minutes": 2.5, "start": None, "steps": None, "lr": 5e-4, "real": (), "recipe": "nano"}
    assert expected.items() <= all_of_it.items()
    run("train", "nano", *options, "--steps", "9", "--rate", "0.1", "--start", "mine", "--real", "a", "b")
    assert calls.pop()[3] == given | {"steps": 9, "lr": 0.1, "start": "mine", "real": ["a", "b"]}
    run("train", "nano-generate", *options)
    out, work, more, _ = calls.pop()
    assert (out, work, more["start"]) == (tmp_path / "nano-generate", tmp_path / "w" / "nano-generate", "fluogen-nano")
    run("train", "nano-generate", *options, "--start", "mine")
    assert calls.pop()[2]["start"] == "mine"
    for recipe in ("nano-sr", "nano-sr-direct", "nano-sr-simulated"):
        run("train", recipe, *options)
        out, work, more, _ = calls.pop()
        assert (out, work) == (tmp_path / recipe, tmp_path / "w" / recipe)
        assert more["adaptation"] == ("control" if recipe == "nano-sr" else "direct")
        assert more["base"] == "fluogen-nano" and more["generative"] is (recipe != "nano-sr-simulated")


# ---- the tables of commands, recipes and benchmarks

def test_every_recipe_and_benchmark_explains_its_own_options(run):
    from fluogen.experiments.run import BENCHMARKS
    from fluogen.recipes.catalog import RECIPES
    for verb, table in (("train", RECIPES), ("benchmark", BENCHMARKS)):
        listed = run(verb, "--list")[1]
        for name, entry in table.items():
            assert re.search(rf"^fluogen {verb} {name} .*{re.escape(entry.help)}$", listed, re.M)
            code, out, err = run(verb, name, "--help")
            assert code == 0 and err == [] and out.startswith(f"usage: fluogen {verb} {name} ")
            assert set(re.findall(r"^  (?:-h, )?--([\w-]+)", out, re.M)) == {"help", "out", "work", *entry.options}


@pytest.mark.parametrize(("arguments", "says"), [
    (["train", "nano-sr", "--per-prompt", "8"], "no such option: --per-prompt 8 (known to fluogen benchmark generation)"),
    (["train", "encoder", "--device=cpu"], "known to fluogen train nano, fluogen train nano-generate,"),
    (["train", "nano-sr", "--real", "x"], "(known to fluogen train nano, fluogen train nano-generate)"),
    (["benchmark", "sample-size", "--dataset", "x"], "(known to fluogen benchmark sr, fluogen benchmark denoise)"),
    (["train", "nano", "--nonsense"], "fluogen train nano: no such option: --nonsense. See"),
    (["train", "--minutes", "5", "nano"], "the RECIPE comes first, then its options (found --minutes)"),
    (["benchmark", "--seeds", "5", "sr"], "the NAME comes first"), (["benchmark"], "NAME"), (["benchmark", "bench30"], "invalid choice"),
    (["train", "bench30", "--methods", "x"], "bench30 is now: fluogen benchmark sr."), (["train", "bench-denoise"], "fluogen benchmark denoise."),
    (["train", "bench-pairs"], "fluogen benchmark sample-size."), (["train", "score-prior"], "fluogen benchmark generation."),
    (["train", "brightness"], "fluogen benchmark brightness."), (["benchmark", "sr", "--workers", "0"], "1 or more")])
def test_an_option_of_another_recipe_is_refused_with_its_owners(run, arguments, says):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and len(err) == 1 and says in err[0] and "--help" in err[0]


def test_older_flags_are_accepted_and_not_shown(run):
    from fluogen.cli.parser import make_parser
    parse = make_parser("0").parse_args
    for old, new, name in ((["restore", "a", "b", "--passes", "3"], ["restore", "a", "b", "--steps", "3"], "passes"),
                           (["calibrate", "m", "--passes", "3"], ["calibrate", "m", "--steps", "3"], "passes"),
                           (["check", "m", "--mend", "o"], ["check", "m", "--align", "o"], "mend"),
                           (["finetune", "m", "--name", "x", "--free", "lora"], ["finetune", "m", "--name", "x", "--peft", "lora"], "free")):
        assert parse(old) == parse(new) and f"--{name}" not in run(old[0], "--help")[1]
    assert parse(["restore", "a", "b"]).steps == parse(["calibrate", "m"]).steps == 4 and parse(["check", "m"]).align is None
    assert parse(["finetune", "m", "--name", "x"]).peft == "all"


def test_a_new_subpackage_adds_a_command_by_one_entry(run, monkeypatch):
    "Its functions are named as text: nothing of it is imported before it is called."
    from types import ModuleType
    from fluogen.cli import parser
    new = ModuleType("new_system")
    new.add = lambda command: command.add_argument("--depth", type="count", default=2)
    new.run = lambda args, log: log(f"depth {args.depth}") or 0
    monkeypatch.setitem(parser.COMMANDS, "dive", parser.Command("", "look below", "nothing", "new_system:run", "new_system:add"))
    assert "look below" in run("--help")[1] and run("dive")[0] == 2             # no such module yet: one line
    monkeypatch.setitem(sys.modules, "new_system", new)
    assert run("dive", "--depth", "3") == (0, "", ["depth 3"])


@pytest.mark.parametrize("module", ["fluogen", "fluogen.cli.main"])
def test_python_m(module):
    for arguments, code in ((["--version"], 0), (["restore"], 2), (["weights", "no-such"], 2)):
        done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == code and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == (code > 0)
        assert done.stdout == (f"fluogen {cli.__version__}\n" if not code else "")
