"The recipes behind figures 3 and 3b: options handed on, small runs that go on where they stopped, records that refuse what they are not."
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
    assert calls.pop() == ("train_encoder", tmp_path / "encoder-nano", tmp_path / "w" / "encoder", (), {"minutes": 2.0, "seed": 3, "steps": 7,
                                                                                                  "start": None})
    assert main(["train", "score-prior", "--base", "mine", "--per-prompt", "8", *common]) == 0
    name, out, work, rest, more = calls.pop()
    assert (name, out, work, rest) == ("grade_prior", tmp_path, tmp_path / "w" / "score-prior", ("mine", 8)) and set(more) == {"say"}
    assert main(["train", "brightness", "--seeds", "0", "4", *common]) == 0
    assert calls.pop() == ("run_brightness", tmp_path, tmp_path / "w" / "brightness", ([0, 4], 2.0), {})
    said = capsys.readouterr()
    assert "restore" not in said.err and said.out.splitlines()[-1] == str(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "score-prior", "--per-prompt", "many"])
