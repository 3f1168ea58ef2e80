"One rule language for intensities; scaling to [0, 1] and back."
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluogen.datasets.record import check_row
from fluogen.io.files import ImageReadError
from fluogen.preprocessing.normalize import IntensityWarning, NormError, parse_norm, scale_to_unit


def test_norms():
    assert parse_norm("range:-5,1e4") == ("range", -5, 1e4) and parse_norm("percentile:0,100")[0] == "percentile"
    for wrong in ("", "Percentile:1,2", "range:1,1", "range:1", "percentile:0,101", "range:1.2.3,4", None, 5):
        with pytest.raises(NormError):
            parse_norm(wrong)


def test_a_range_in_a_manifest_is_text_and_in_a_call_two_numbers():
    assert parse_norm((-5, 1e4)) == parse_norm([-5, 1e4]) == parse_norm("range:-5,1e4")
    assert [bool(check_row({"image": "a.tif", "text": "", "norm": norm})) for norm in ("range:0,9", [0, 9], "minmax")] == [False, True, False]
    for wrong in ((1, 1), (0, float("inf")), (1, 2, 3), "range:0,inf", "percentile:-1,50"):
        with pytest.raises(NormError):
            parse_norm(wrong)


def test_minmax_is_the_extreme_percentiles():
    for array in (np.arange(12, dtype=np.uint16), np.linspace(-3, 7, 12), np.array([True, False])):
        one, other = scale_to_unit(array, "minmax"), scale_to_unit(array, "percentile:0,100")
        assert (one[0] == other[0]).all() and one[1] == other[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 65535), min_size=2, max_size=40),
       st.sampled_from([None, (0, 4095), (100, 60000), "percentile:0.1,99.9", "percentile:2,98"]))
def test_scaling_there_and_back(values, rule):
    "R9: at most one count, monotone, idempotent."
    array = np.sort(np.array(values, np.uint16)).reshape(1, -1)
    with warnings.catch_warnings(action="ignore"):
        unit, scale = scale_to_unit(array, rule)
    assert np.isfinite(unit).all() and unit.shape == array.shape and unit.dtype == np.float32
    assert (np.diff(unit) >= 0).all()
    back = scale.to_counts(unit, np.uint16)
    assert np.abs(back.astype(int) - array).max() <= 1
    with warnings.catch_warnings(action="ignore"):
        again, _ = scale_to_unit(back, tuple(scale) if scale.low < scale.high else None)
    assert scale.low == scale.high or np.abs(again - unit).max() <= 1.01 / (scale.high - scale.low)


def test_scaling_of_degenerate_images():
    "R6: constant and saturated are warned about, NaN is refused with its number."
    for kind in ("uint8", "int16", "float32"):
        with pytest.warns(IntensityWarning, match="constant"):
            unit, scale = scale_to_unit(np.full((5, 5), 1, kind), "percentile:0.1,99.9")
        assert (unit == 0).all() and (scale.to_counts(unit) == 1).all()
    with pytest.warns(IntensityWarning, match="saturated"):
        scale_to_unit(np.where(np.arange(100) < 5, 255, np.arange(100)).astype(np.uint8))
    with pytest.warns(IntensityWarning, match="sparse"):
        assert scale_to_unit(np.eye(64, dtype=np.uint16)[:1], "percentile:2,98")[0].max() == 1
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ImageReadError, match="2 of 9"):
            scale_to_unit(np.array([bad, bad, *range(7)]), (0, 1))
    with warnings.catch_warnings(action="ignore"):
        unit, _ = scale_to_unit(np.array([[-100, 0, 32767]], np.int16))
        full = [np.array([0, np.iinfo(kind).max], kind) for kind in ("u1", "u2", "u4", "i2")]
        tops = [scale_to_unit(array)[0][1] for array in full]
    assert unit[0, 0] < 0 and unit[0, 2] == 1 and tops == [1] * 4          # by number type, whatever the name
