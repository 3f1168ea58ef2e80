"""Ranges of simulated microscopes: bands respected, held-out disjoint, scaling to other magnifications."""
import numpy as np
import pytest

from fluogen.simulation.microscopes import (
    HELD_OUT, OUT_OF_RANGE, REFERENCE_PIXEL_UM, TRAIN, OpticsRange, draw_setups, list_overlaps)
from fluogen.simulation.optics import OpticsError


def inside(value, bands):
    return any(low <= value <= high for low, high in bands)


@pytest.mark.parametrize("one", [TRAIN, HELD_OUT, OUT_OF_RANGE], ids=lambda one: one.name)
def test_draws_stay_in_their_bands_and_reach_all(one):
    setups = draw_setups(400, REFERENCE_PIXEL_UM, one, np.random.default_rng(0))
    values = dict(na=[s.optics.na for s in setups], wavelength_nm=[s.optics.wavelength_nm for s in setups],
                  photons=[s.photons for s in setups], haze=[s.optics.haze_fraction for s in setups],
                  read_noise=[s.camera.read_noise for s in setups],
                  background=[s.background_photons / s.photons for s in setups])
    for name, drawn in values.items():
        bands = [(low - 1e-9 * abs(low), high + 1e-9 * abs(high)) for low, high in getattr(one, name)]
        assert all(inside(value, bands) for value in drawn), name
        assert all(any(inside(value, [band]) for value in drawn) for band in bands), name


def test_held_out_and_out_of_range_share_nothing_with_training():
    assert list_overlaps(TRAIN, TRAIN) == ["na", "wavelength_nm", "photons"]
    for one in (HELD_OUT, OUT_OF_RANGE):
        assert list_overlaps(TRAIN, one) == [] and one.reserved
    assert list_overlaps(HELD_OUT, OUT_OF_RANGE) == []
    train, held = ({round(setup.optics.na, 3) for setup in draw_setups(2000, REFERENCE_PIXEL_UM, one,
                                                                       np.random.default_rng(1))}
                   for one in (TRAIN, HELD_OUT))
    assert not train & held


def test_out_of_range_lies_beyond():
    assert OUT_OF_RANGE.na[-1][1] < TRAIN.na[0][0] and OUT_OF_RANGE.photons[-1][1] < TRAIN.photons[0][0]
    assert OUT_OF_RANGE.wavelength_nm[0][0] > TRAIN.wavelength_nm[-1][1]


@pytest.mark.parametrize("pixel_um", [REFERENCE_PIXEL_UM, 0.05, 0.2, 0.65])
def test_blur_in_fine_pixels_is_the_same_at_every_magnification(pixel_um):
    setups = draw_setups(100, pixel_um, TRAIN, np.random.default_rng(0))
    reference = draw_setups(100, REFERENCE_PIXEL_UM, TRAIN, np.random.default_rng(0))
    for one, other in zip(setups, reference):
        blur = one.optics.fwhm_um / one.optics.fine_pixel_um
        assert 5 < blur < 8 and blur == pytest.approx(other.optics.fwhm_um / other.optics.fine_pixel_um)
        assert one.optics.fine_pixel_um == pytest.approx(pixel_um)


def test_bad_ranges_are_refused():
    for options in (dict(na=((1.4, 1.3),)), dict(na=()), dict(na=((1.3, 1.4), (1.35, 1.45))),
                    dict(photons=((0, 10),)), dict(na=((1.3, 1.7),))):
        with pytest.raises(OpticsError):
            OpticsRange("odd", **options)


def test_single_values_are_allowed():
    mine = OpticsRange("mine", na=((1.4, 1.4),), photons=((200, 200),))
    setups = draw_setups(5, REFERENCE_PIXEL_UM, mine, np.random.default_rng(0))
    assert {s.optics.na for s in setups} == {1.4} and all(s.photons == pytest.approx(200) for s in setups)
