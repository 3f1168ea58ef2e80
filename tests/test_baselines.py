"""Baselines: the right grid and size, conserved light, losses as published, nets that can learn."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fluogen.models.classical import deconvolve

from fluogen.models.classical import tune_deconvolution

from fluogen.models.classical import BaselineError

from fluogen.models.classical import Bicubic

from fluogen.simulation.optics import make_psf

from fluogen.simulation.optics import Optics, widefield
from fluogen.metrics.restoration import ssim
from fluogen.experiments import baselines as B
from fluogen.models.baselines import DFCAN, RCAN, CareUNet, amplitude, count_cost, upsample_bicubic

LEARNED = ("care", "dfcan", "rcan")
TINY = {"care": lambda: CareUNet(first=6, depth=2, kernel=3),
        "rcan": lambda: RCAN(channels=8, groups=1, blocks=2),
        "dfcan": lambda: DFCAN(channels=8, groups=1, blocks=2)}


def draw_spots(places, shape, sigma=0.8):
    yy, xx = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    return sum(torch.exp(-((yy - y) ** 2 + (xx - x) ** 2) / (2 * sigma**2)) for y, x in places)[None, None]


def draw_pairs(n, size=96, optics=Optics()):
    rng = np.random.default_rng(0)
    targets = torch.cat([draw_spots(rng.uniform(4, size - 4, (14, 2)), (size, size), 1.4) for _ in range(n)])
    return F.avg_pool2d(widefield(targets, optics), 2), targets


@pytest.mark.parametrize("name", ("bicubic",) + LEARNED)
@pytest.mark.parametrize("channels, shape", [(1, (16, 16)), (9, (16, 24)), (1, (13, 19)), (9, (21, 8))])
def test_shapes_of_any_size(name, channels, shape):
    torch.manual_seed(0)
    out = B.build_baseline(name, channels)(torch.rand(2, channels, *shape))
    assert out.shape == (2, 1, 2 * shape[0], 2 * shape[1])
    assert out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("name", LEARNED)
def test_size_and_cost(name):
    for channels in (1, 9):
        n, cost = count_cost(B.build_baseline(name, channels), channels)
        assert 3e5 < n <= 5e5 and 2 < cost <= 3.3


def test_cost_is_counted_right():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert count_cost(layer, 3, 10) == (3 * 5 * 9 + 5, pytest.approx(2 * 3 * 5 * 9 * 100 / 1e9))


def test_published_shapes_have_the_published_size():
    "15.4 M parameters are what is quoted for RCAN at x2 (with colour)."
    assert count_cost(RCAN(channels=64, groups=10, blocks=20), size=8)[0] == pytest.approx(15.4e6, rel=0.01)
    dfcan = sum(p.numel() for p in DFCAN(channels=64).parameters())
    block = 3 * (64 * 64 * 9 + 64) + 64 * 4 + 4 + 4 * 64 + 64
    assert dfcan == 64 * 9 + 64 + 16 * block + 64 * 256 * 9 + 256 + 64 * 9 + 1


def test_batch_and_single_agree():
    for name in LEARNED:
        torch.manual_seed(1)
        network, x = B.build_baseline(name).eval(), torch.rand(3, 1, 20, 16)
        with torch.no_grad():
            torch.testing.assert_close(network(x)[1:2], network(x[1:2]), atol=1e-5, rtol=1e-4)


# ---- bicubic

@pytest.mark.parametrize("scale", (2, 3))
def test_bicubic_is_exact_on_a_ramp(scale):
    y, x = torch.meshgrid(torch.arange(14.0), torch.arange(17.0), indexing="ij")
    fine_y, fine_x = ((torch.arange(scale * n) + 0.5) / scale - 0.5 for n in (14, 17))
    expected = 3 * fine_y[:, None] - 2 * fine_x + 1
    inside = (slice(2 * scale, -2 * scale),) * 2
    found = upsample_bicubic((3 * y - 2 * x + 1)[None, None], scale)[0, 0]
    torch.testing.assert_close(found[inside], expected[inside])


@pytest.mark.parametrize("centre", [(31.5, 32.5), (30.2, 35.9), (33.0, 28.0)])
def test_bicubic_keeps_the_centroid_of_a_spot(centre):
    camera = F.avg_pool2d(draw_spots([centre], (64, 64), 4.0), 2)
    image, n = Bicubic()(camera)[0, 0], torch.arange(64)
    found = (image.sum(1) * n).sum() / image.sum(), (image.sum(0) * n).sum() / image.sum()
    assert torch.tensor(found).sub(torch.tensor(centre)).abs().max() < 0.01
    assert image.sum() == pytest.approx(4 * float(camera.sum()), rel=1e-4)


def test_bicubic_fit_is_least_squares_and_nine_frames_are_averaged():
    condition, target = draw_pairs(3)
    plain, fitted = Bicubic()(condition), Bicubic().fit(condition, target)
    gain, offset = np.polyfit(plain.numpy().ravel(), target.numpy().ravel(), 1)
    assert float(fitted.gain) == pytest.approx(gain, rel=1e-4)
    assert float(fitted.offset) == pytest.approx(offset, abs=1e-5)
    again = fitted.fit(condition, target)                           # a second fit starts afresh
    assert float(again.gain) == pytest.approx(gain, rel=1e-4)
    frames = torch.rand(1, 9, 8, 8)
    torch.testing.assert_close(Bicubic(9)(frames), Bicubic()(frames.mean(1, keepdim=True)))


# ---- Richardson-Lucy

def test_psf_is_the_blur_of_lens_and_pixel():
    optics = Optics()
    psf = make_psf(optics)
    point = torch.zeros(1, 1, 65, 65)
    point[..., 32, 32] = 1
    lens = widefield(point, optics)[0, 0]
    box = torch.tensor([0.25, 0.5, 0.25])
    both = F.conv2d(lens[None, None], (box[:, None] * box)[None, None])[0, 0, 15:48, 15:48]
    assert psf.shape == (33, 33) and psf.sum() == pytest.approx(1)
    assert np.unravel_index(psf.argmax(), psf.shape) == (16, 16)
    np.testing.assert_allclose(psf, both / both.sum(), atol=2e-4)


def test_richardson_lucy_sharpens_keeps_light_and_place():
    optics, places = Optics(), [(40.0, 31.0), (40.0, 42.0), (20.3, 60.7)]
    density = draw_spots(places, (80, 96))
    condition = F.avg_pool2d(widefield(density, optics), 2)
    before = upsample_bicubic(condition)
    psf = make_psf(optics)
    sharpness = lambda image: float((image**2).sum() / image.sum() ** 2)
    measured = [sharpness(before)] + [sharpness(deconvolve(condition, psf, n)) for n in (5, 20, 60)]
    assert measured == sorted(measured) and measured[-1] > 1.8 * measured[0]
    after = deconvolve(condition, psf, 60)
    assert after.shape == density.shape and float(after.min()) >= 0
    assert float(after.sum()) == pytest.approx(float(before.clamp(min=0).sum()), rel=0.01)
    for y, x in places:
        top, left = round(y) - 4, round(x) - 4
        patch = after[0, 0, top : top + 9, left : left + 9]
        peak = np.unravel_index(int(patch.argmax()), (9, 9))
        assert abs(peak[0] + top - y) <= 1 and abs(peak[1] + left - x) <= 1


def test_richardson_lucy_leaves_a_flat_field_flat():
    flat = deconvolve(torch.full((1, 1, 15, 22), 0.4), make_psf(Optics()), 30)
    assert flat.shape == (1, 1, 30, 44)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.4), atol=0.004, rtol=0)


def test_tuning_picks_the_smallest_error_and_the_scale():
    condition, target = draw_pairs(2, 64)
    rng = torch.Generator().manual_seed(0)
    noisy = condition + 0.03 * torch.randn(condition.shape, generator=rng)
    psf = make_psf(Optics())
    tuned = tune_deconvolution(noisy, target, [psf, psf], candidates=(2, 10, 100))
    errors = dict(tuned.errors)
    assert set(errors) == {2, 10, 100} and errors[tuned.iterations] == min(errors.values())
    error = float((tuned.restore(noisy, psf) - target).square().mean().sqrt())
    assert error == pytest.approx(errors[tuned.iterations], rel=1e-3)
    doubled = tune_deconvolution(noisy, 2 * target, psf, candidates=(tuned.iterations,))
    assert doubled.gain == pytest.approx(2 * tuned.gain, rel=1e-3)


# ---- losses and learning

def test_losses():
    rng = torch.Generator().manual_seed(0)
    target, other = torch.rand(1, 1, 32, 40, generator=rng), torch.rand(1, 1, 32, 40, generator=rng)
    similarity = ssim(target[0, 0].numpy(), other[0, 0].numpy(), 1)
    assert float(B.measure_ssim(other.double(), target.double())) == pytest.approx(similarity, abs=1e-6)
    expected = float((other - target).square().mean()) + 0.1 * (1 - similarity)
    assert float(B.loss_mse_ssim(other, target)) == pytest.approx(expected, abs=1e-5)
    assert float(B.loss_l1(other, target)) == pytest.approx(float((other - target).abs().mean()))
    assert {name: one.loss for name, one in B.BASELINES.items()} == {
        "bicubic": None, "richardson_lucy": None,
        "care": B.loss_l1, "dfcan": B.loss_mse_ssim, "rcan": B.loss_l1}


@pytest.mark.parametrize("name", LEARNED)
def test_two_pairs_can_be_learned_by_heart(name):
    condition, target = draw_pairs(2, 32)
    torch.manual_seed(0)
    network, loss = TINY[name](), B.BASELINES[name].loss
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    start = None
    for step in range(150):
        value = loss(network(condition), target)
        start = value.item() if start is None else start
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    blurred = loss(Bicubic().fit(condition, target)(condition), target).item()
    assert value.item() < 0.5 * start and value.item() < 0.9 * blurred, (start, value.item(), blurred)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_fourier_attention_sees_what_a_mean_does_not():
    wave = torch.cos(2 * torch.pi * torch.arange(32) / 4).expand(1, 1, 32, 32)
    spectrum = amplitude(torch.cat([wave, 0 * wave], 1))[0, 0]
    assert sorted(torch.topk(spectrum[16], 2).indices.tolist()) == [8, 24] and spectrum[15].max() < 1e-3


# ---- what is refused

def test_refusals_are_one_line():
    psf = make_psf(Optics())
    good = torch.rand(2, 1, 8, 8)
    for wrong in (lambda: B.build_baseline("unet"), lambda: B.build_baseline("richardson_lucy"),
                  lambda: B.build_baseline("care", 0), lambda: B.build_baseline("care", 1, 1.5),
                  lambda: Bicubic()(good[0]), lambda: Bicubic()(good * float("nan")),
                  lambda: deconvolve(good, psf[:-1], 3), lambda: deconvolve(good, 2 * psf, 3),
                  lambda: deconvolve(good, [psf], 3), lambda: deconvolve(good.int(), psf, 3)):
        with pytest.raises(BaselineError) as error:
            wrong()
        assert "\n" not in str(error.value)
