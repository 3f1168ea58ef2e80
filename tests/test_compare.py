"report.compare: numbers that moved, vanished or appeared are named; times are not judged."
import json

import pytest

from fluogen.report.compare import CompareError, compare_folders, compare_metrics, read_numbers, tolerance_of

KEY = ("ER", "m", "psnr")


@pytest.mark.parametrize(("metric", "allowed"), [("psnr", 0.05), ("ms_ssim", 0.005), ("seconds", None), ("frc_um", 0.005)])
def test_tolerances(metric, allowed):
    assert tolerance_of(metric) == allowed


@pytest.mark.parametrize(("before", "now", "verdict"), [(20, 20.05, "same"), (20, 20.06, "moved"), (20, 19.94, "moved"),
                                                        (None, None, "same"), (20, None, "moved"), (None, 20, "moved")])
def test_verdicts(before, now, verdict):
    assert compare_metrics({KEY: before}, {KEY: now}) == [(KEY, before, now, verdict)]


def test_missing_and_new():
    other = ("ER", "m", "seconds")
    assert [row[3] for row in compare_metrics({KEY: 1}, {other: 1})] == ["missing", "new"]
    assert compare_metrics({other: 1}, {other: 99})[0][3] == "not judged"


def write(folder, value):
    folder.mkdir(parents=True)
    row = dict(zip(("group", "method", "metric"), KEY, strict=True), value=value)
    (folder / "metrics.json").write_text(json.dumps({"rows": [row]}))


def test_command(tmp_path, capsys):
    for name, value in (("old", 20.0), ("near", 20.01), ("far", 21.0)):
        write(tmp_path / name / "fig0" / "laptop", value)
    assert compare_folders([str(tmp_path / "old"), str(tmp_path / "near")]) == 0
    assert compare_folders([str(tmp_path / "old"), str(tmp_path / "far")]) == 1
    assert "moved: ER, m, psnr: committed 20.0, measured 21.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing was measured"):
        compare_folders([str(tmp_path / "old"), str(tmp_path / "empty")])


def test_foreign_files(tmp_path):
    for text in ("", "[]", '{"rows": [{}]}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CompareError):
            read_numbers(tmp_path / "x.json")
