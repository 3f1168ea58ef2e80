"The recipes behind figures 3 and 3b: options handed on, small runs that go on where they stopped, records that refuse what they are not."
import inspect
from dataclasses import replace

import pytest

from fluogen.cli.main import main
from fluogen.experiments import brightness, generation as grading
from fluogen.recipes import image_encoder as encoder


def test_the_command_hands_its_options_on(monkeypatch, tmp_path, capsys):
    calls = []
    for module, name in ((encoder, "train_encoder"), (grading, "grade_prior"), (brightness, "run_brightness")):
        monkeypatch.setattr(module, name, lambda out, work, *rest, name=name, **more: calls.append((name, out, work, rest, more)) or out)
    common = ["--out", str(tmp_path), "--work", str(tmp_path / "w"), "--minutes", "2"]
    assert main(["train", "encoder", "--seed", "3", "--steps", "7", *common]) == 0
    assert calls.pop() == ("train_encoder", tmp_path / "encoder-nano", tmp_path / "w" / "encoder", (), {"minutes": 2.0, "seed": 3, "steps": 7})
    assert main(["benchmark", "generation", "--model", "mine", "--per-prompt", "8", *common[:4]]) == 0
    name, out, work, rest, more = calls.pop()
    assert (name, out, work, rest) == ("grade_prior", tmp_path, tmp_path / "w" / "score-prior", ())
    assert callable(more.pop("log")) and more == {"model": "mine", "per_prompt": 8}
    assert main(["benchmark", "brightness", "--seeds", "0", "4", *common]) == 0
    assert calls.pop() == ("run_brightness", tmp_path, tmp_path / "w" / "brightness", (), {"seeds": [0, 4], "minutes": 2.0})
    assert main(["benchmark", "brightness", *common]) == 0 and calls.pop()[4] == {"seeds": (0, 1, 2), "minutes": 2.0}
    said = capsys.readouterr()
    assert "restore" not in said.err and said.out.splitlines()[-1] == str(tmp_path)
    with pytest.raises(SystemExit):
        main(["benchmark", "generation", "--per-prompt", "many"])


@pytest.mark.parametrize(("name", "dataset", "work", "expected"), [
    ("sr", None, "bench30", {"seeds": [0, 1, 2], "dataset": "simulated", "record": None, "n_fields": None}),
    ("sr", "mine", "bench30", {"seeds": [0, 1, 2, 3, 4, 5], "dataset": "mine", "record": "real", "n_fields": 25}),
    ("denoise", None, "bench-denoise", {"seeds": [0, 1, 2], "dataset": "simulated"}),
    ("denoise", "fmd", "bench-denoise", {"seeds": list(range(9)), "dataset": "fmd"}),
    ("sample-size", None, "bench-pairs", {"seeds": list(range(5))})])
def test_a_benchmark_of_real_images_takes_more_draws_and_a_record_of_its_own(monkeypatch, tmp_path, capsys, name, dataset, work, expected):
    from fluogen.experiments import denoising, harness, sample_size
    module, function = (sample_size, "run_curve") if name == "sample-size" else (harness, "run_benchmark")
    monkeypatch.setattr(denoising, "DENOISE_BENCH", replace(denoising.DENOISE_BENCH, list_folds=lambda source: [{"cell"}] * 9))
    calls, own = [], inspect.signature(getattr(module, function))

    def record(*given, **more):
        call = own.bind(*given, **more)
        call.apply_defaults()
        calls.append(call.arguments | call.arguments["options"])
        return tmp_path / "there"
    monkeypatch.setattr(module, function, record)
    go = ["benchmark", name, "--out", str(tmp_path), "--work", str(tmp_path / "w"), "--seconds", "7"]
    assert main(go + (["--dataset", dataset] if dataset else [])) == 0 and capsys.readouterr().out == f"{tmp_path / 'there'}\n"
    found = calls.pop()
    assert name == "sample-size" or found["bench"].command == name
    assert found["out"] == tmp_path and found["work"] == tmp_path / "w" / work and found["seconds"] == 7 and found["methods"] is None
    assert {key: list(found[key]) if key == "seeds" else found[key] for key in expected} == expected
    assert main([*go, "--seeds", "4", "--methods", "a", "b", "--workers", "2"]) == 0
    found = calls.pop()
    assert (found["seeds"], found["methods"], found["workers"]) == ([4], ["a", "b"], 2)
