"Samplers where the answer is known: a Gaussian, a point, and the formulas as printed."
import numpy as np
import pytest
import torch

from fluogen.diffusion.samplers import BLOCK_PX, SAMPLERS, NoiseField, guide, sample_ddim, sample_ddpm, sample_dpmpp_2m
from fluogen.diffusion.schedule import GRIDS, Schedule, ScheduleConfig, ScheduleError, trailing_grid

SCHEDULE = Schedule()


def perfect(schedule, mean, spread):
    "The best possible network for images that are Gaussian with this mean and spread."
    def predict(x, t):
        signal, noise = schedule.signal(t), schedule.noise(t)
        x0 = mean + spread**2 * signal / (spread**2 * signal**2 + noise**2) * (x - signal * mean)
        eps = (x - signal * x0) / noise if spread else (x - signal * mean) / noise
        return signal * eps - noise * x0
    return predict


def run(name, predict, x, schedule, times, seed=0):
    generator = torch.Generator().manual_seed(seed)
    extra = {"draw": lambda step: torch.randn(x.shape, generator=generator)} if name == "ddpm" else {}
    return SAMPLERS[name](predict, x, schedule, times, clip=None, **extra)


# ---- a Gaussian

def even_times(schedule, n, first, last):
    "n + 1 whole times, even in log SNR."
    log_snr = 0.5 * (schedule.abar[:-1].log() - (1 - schedule.abar[:-1]).log()).numpy()
    levels = np.linspace(log_snr[first], log_snr[last], n + 1)
    return [int(np.abs(log_snr - level).argmin()) for level in levels]


def solver_error(name, n, spread=0.5):
    "Relative error of the gain between two noise levels; the known jump to the clean image is divided out."
    schedule = Schedule(ScheduleConfig(n_steps=60_000, beta_start=1e-4 / 60, beta_end=0.02 / 60))
    times = even_times(schedule, n, 42_000, 3_000)
    width = lambda t: float((spread**2 * schedule.abar[t] + 1 - schedule.abar[t]) ** 0.5)
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    x0 = run(name, perfect(schedule, 0.0, spread), start, schedule, times)
    last = spread**2 * float(schedule.abar[times[-1]]) ** 0.5 / width(times[-1]) ** 2
    return abs(float(x0) / last / (width(times[-1]) / width(times[0])) - 1)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    counts = [40, 80, 160]
    slope = np.polyfit(np.log(counts), np.log([solver_error(name, n) for n in counts]), 1)[0]
    assert -slope == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_count_is_finite_and_keeps_the_mean(name, grid):
    x = torch.tensor([-2.0, -0.5, 0.5, 2.0]).reshape(4, 1, 1, 1)                # mean 0
    for n in range(1, 51):
        times = GRIDS[grid](SCHEDULE, n)
        out = run(name, perfect(SCHEDULE, 0.2, 0.3), x, SCHEDULE, times)
        assert out.isfinite().all()
        if name != "ddpm":  # fresh noise has a mean of its own
            assert abs(float(out.mean()) - 0.2) < 1e-3


@pytest.mark.parametrize("plain", [False, True], ids=["zero snr", "plain"])
def test_ddpm_finds_the_spread(plain):
    schedule = Schedule(ScheduleConfig(zero_snr=not plain))
    x = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    out = run("ddpm", perfect(schedule, 0.2, 0.5), x, schedule, trailing_grid(schedule, 500))
    assert abs(float(out.mean()) - 0.2) < 4 * 0.5 / 4000**0.5
    assert float(out.std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_noise_is_left_at_the_end(name, grid):
    "If there is one image only, every count of steps ends there, also where it does not divide 1000."
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    for n in (1, 2, 3, 7, 10, 13, 33, 50):
        out = run(name, perfect(SCHEDULE, -0.4, 0.0), x, SCHEDULE, GRIDS[grid](SCHEDULE, n))
        assert torch.allclose(out, torch.full_like(out, -0.4), atol=1e-4), n


# ---- the formulas as printed

def curved(x, t):
    return torch.sin(3 * x) * 0.5 + 0.1 * t / 1000


def test_ddim_is_equation_12():
    x = start = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(5)).double()
    times, abar = trailing_grid(SCHEDULE, 7), SCHEDULE.abar
    for t, n in zip(times, [*times[1:], None]):
        a, a_next = float(abar[t]), float(abar[n]) if n is not None else 1.0
        v = curved(x, t)
        x0 = (a**0.5 * x - (1 - a) ** 0.5 * v).clamp(-1, 1)
        eps = (1 - a) ** 0.5 * x + a**0.5 * v
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps
    assert torch.allclose(sample_ddim(curved, start, SCHEDULE, times), x, atol=1e-5)


def test_ddpm_is_the_posterior_of_single_steps():
    schedule = Schedule(ScheduleConfig(n_steps=50, beta_end=0.2, zero_snr=False))
    times, steps = list(range(49, -1, -1)), []

    def draw(step):
        steps.append(step)
        return torch.full((1, 1, 2, 2), 0.3 * (-1) ** step)

    x = start = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(6)).double()
    betas = torch.linspace(1e-4, 0.2, 50, dtype=torch.float64)
    for i, t in enumerate(times):                                               # Ho et al. 2020, eqs. 6-7
        beta, a = float(betas[t]), float(schedule.abar[t])
        a_prev = float(schedule.abar[t - 1]) if t else 1.0
        x0 = a**0.5 * x - (1 - a) ** 0.5 * curved(x, t)
        mean = a_prev**0.5 * beta / (1 - a) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a) * x
        x = mean + ((1 - a_prev) / (1 - a) * beta) ** 0.5 * 0.3 * (-1) ** i
    out = sample_ddpm(curved, start, schedule, times, draw=draw, clip=None)
    assert torch.allclose(out, x, atol=1e-4) and steps == list(range(49))       # no noise in the last step


def test_the_solver_without_a_past_is_ddim():
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    for times in ([999], [600], [999, 300]):
        assert torch.allclose(sample_dpmpp_2m(curved, x, SCHEDULE, times),
                              sample_ddim(curved, x, SCHEDULE, times),
                              atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_picture_of_a_batch_for_itself_and_every_step_reported(name):
    x, seen = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(8)), []
    extra = {"draw": lambda step: torch.full((1, 1, 4, 4), 0.5)} if name == "ddpm" else {}
    sampler, times = SAMPLERS[name], trailing_grid(SCHEDULE, 4)
    whole = sampler(curved, x, SCHEDULE, times, callback=lambda *news: seen.append(news), **extra)
    assert [(step, n) for step, n, _ in seen] == [(i, 4) for i in range(4)]
    assert all(x0.abs().max() <= 1 for *_, x0 in seen) and whole.shape == x.shape
    assert torch.allclose(whole[1:2], sampler(curved, x[1:2], SCHEDULE, times, **extra), atol=1e-6)


@pytest.mark.parametrize("times", [[], [10, 10], [10, 20], [10, -1], [-1]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_times_that_do_not_fall(name, times):
    with pytest.raises(ScheduleError, match="must fall"):
        run(name, curved, torch.zeros(1, 1, 1, 1), SCHEDULE, times)


def test_guidance():
    one, two = (lambda x, t: x + 1), (lambda x, t: x + 2)
    x = torch.zeros(2)
    assert guide(two, one) is two and torch.equal(guide(two, one, 0.0)(x, 5), x + 1)
    assert torch.allclose(guide(two, one, 7.5)(x, 5), x + 1 + 7.5)


# ---- noise

def test_the_field_does_not_depend_on_who_asks():
    whole = NoiseField(7, "image", (2, 150, 200)).draw()
    assert torch.equal(NoiseField(7, "image", (2, 70, 65)).draw(), whole[..., :70, :65])
    before = torch.get_rng_state()
    torch.manual_seed(99)
    again = NoiseField(7, "image", (2, 150, 200)).draw()
    torch.set_rng_state(before)
    NoiseField(7, "image", (1, 10, 10)).draw()
    assert torch.equal(again, whole) and torch.equal(torch.get_rng_state(), before)


def test_seed_key_step_and_place_decide():
    field = NoiseField(7, "image", (1, 128, 128))
    draws = [field.draw(), field.draw(0), field.draw(1), NoiseField(8, "image", (1, 128, 128)).draw(),
             NoiseField(7, "image2", (1, 128, 128)).draw()]
    blocks = [draw[..., y:y + BLOCK_PX, x:x + BLOCK_PX].flatten()
              for draw in draws for y in (0, 64) for x in (0, 64)]
    close = torch.corrcoef(torch.stack(blocks)) - torch.eye(len(blocks))
    assert close.abs().max() < 5 / BLOCK_PX  # twenty streams, none like another
    assert abs(float(torch.stack(blocks).mean())) < 0.02 and abs(float(torch.stack(blocks).std()) - 1) < 0.02


def test_the_field_is_the_one_that_pictures_were_made_with():
    "Another block size, hash or generator changes every picture: then change the version, too."
    first = NoiseField(0, "image-a", (1, 2, 3)).draw().flatten()
    assert torch.allclose(first, torch.tensor(PINNED), atol=1e-4)


PINNED = [0.6091, 0.3083, -2.0237, -0.0514, 0.5079, 1.5170]
