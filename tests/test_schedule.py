"The noise schedule: identities, the zero at the end, grids, and what is refused."
from dataclasses import replace

import numpy as np
import pytest
import torch

from fluogen.diffusion.schedule import (GRIDS, Schedule, ScheduleConfig, ScheduleError, logsnr_grid,
                                        make_abar, trailing_grid)

CONFIGS = [ScheduleConfig(), ScheduleConfig(zero_snr=False), ScheduleConfig(objective="x0"),
           ScheduleConfig(objective="eps", zero_snr=False), ScheduleConfig(n_steps=37, beta_end=0.3)]
IDS = [f"{c.objective}-{c.n_steps}-{'zero' if c.zero_snr else 'plain'}" for c in CONFIGS]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_table_is_the_published_product(config):
    betas = np.linspace(config.beta_start, config.beta_end, config.n_steps)
    root, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        root.append(product ** 0.5)
    if config.zero_snr:                                     # Lin et al. 2023, algorithm 1
        first, last = root[0], root[-1]
        root = [(r - last) * first / (first - last) for r in root]
    abar = make_abar(config)
    assert abar.dtype == torch.float64 and np.allclose(abar, np.square(root), rtol=1e-12, atol=1e-15)
    assert (abar.diff() < 0).all() and abar[0] == pytest.approx(1 - config.beta_start)
    assert (abar[-1] == 0) == config.zero_snr


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_way_back_returns_image_and_noise(config):
    s, generator = Schedule(config), torch.Generator().manual_seed(1)
    t = torch.arange(0, config.n_steps, max(1, config.n_steps // 60))
    x0, eps = torch.randn(2, len(t), 1, 4, 4, generator=generator)
    back_x0, back_eps = s.split(s.mix(x0, eps, t), s.target(x0, eps, t), t)
    signal, noise = s.signal(t), s.noise(t)
    # an answer divided by an amplitude cannot be more exact than rounding over that amplitude
    x0_room = 1e-5 / signal.clamp_min(1e-2) if config.objective == "eps" else 1e-5
    eps_room = 1e-5 / noise.clamp_min(1e-2) if config.objective == "x0" else 1e-5
    assert ((back_x0 - x0).abs() < x0_room).all() and ((back_eps - eps).abs() < eps_room).all()


def test_amplitudes():
    s, t = Schedule(), torch.arange(-1, 1000)
    assert torch.allclose(s.signal(t) ** 2 + s.noise(t) ** 2, torch.ones(()), atol=1e-6)
    assert s.signal(-1) == 1 and s.noise(-1) == 0 and s.signal(999) == 0 and s.noise(999) == 1
    assert s.signal(t).shape == (1001, 1, 1, 1) and s.signal(5).shape == (1, 1, 1, 1)
    assert s.signal(t).dtype == s.noise(t).dtype == torch.float32


def test_targets_are_what_they_are_called():
    x0, eps, t = torch.full((1, 1, 1, 1), 0.7), torch.full((1, 1, 1, 1), -0.2), 400
    abar = float(make_abar(ScheduleConfig())[t])
    v = abar**0.5 * -0.2 - (1 - abar) ** 0.5 * 0.7
    assert float(Schedule().target(x0, eps, t)) == pytest.approx(v, abs=1e-6)
    assert Schedule(ScheduleConfig(objective="x0")).target(x0, eps, t) is x0
    assert Schedule(ScheduleConfig(objective="eps", zero_snr=False)).target(x0, eps, t) is eps


def test_loss_weight():
    t = torch.tensor([0, 500, 999])
    assert torch.equal(Schedule().loss_weight(t), torch.ones(3, 1, 1, 1))
    s = Schedule(ScheduleConfig(objective="x0"))
    weight = s.loss_weight(t).flatten()
    snr = (s.abar / (1 - s.abar))[t]
    assert weight[0] == 5 and weight[1] == pytest.approx(float(snr[1]), rel=1e-5) and weight[2] == 0


# ---- grids

def test_trailing_grid_for_every_count():
    s = Schedule()
    for n in range(1, 1001):
        times = trailing_grid(s, n)
        expected = [round(1000 - i * 1000 / n) - 1 for i in range(n)]
        assert len(times) == n and times[0] == 999 and times[-1] >= 0 and len(set(times)) == n
        assert max(abs(a - b) for a, b in zip(times, expected)) <= 1 and times == sorted(times, reverse=True)
    assert trailing_grid(s, 4) == [999, 749, 499, 249]


def test_logsnr_grid_is_even_and_falls():
    s = Schedule()
    log_snr = 0.5 * (s.abar[:-1].log() - (1 - s.abar[:-1]).log())
    for n in range(1, 101):
        times = logsnr_grid(s, n)
        assert len(times) == n and times[0] == 999 and times[-1] >= 0
        assert all(a > b for a, b in zip(times, times[1:]))
    for n in (5, 10, 20):
        steps = log_snr[logsnr_grid(s, n)[1:]].diff()
        assert steps.max() / steps.min() < 1.5              # times are whole numbers, steps nearly equal


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("n", [0, -3, 1001])
def test_impossible_counts(grid, n):
    with pytest.raises(ScheduleError, match="1..1000"):
        grid(Schedule(), n)


def test_a_grid_finer_than_the_table_is_refused_in_words():
    for n in (400, 999, 1000):
        try:
            times = logsnr_grid(Schedule(), n)
            assert all(a > b for a, b in zip(times, times[1:])) and times[-1] >= 0
        except ScheduleError as error:
            assert "trailing" in str(error)


# ---- what is refused

@pytest.mark.parametrize(("change", "says"), [
    ({"objective": "noise"}, "unknown objective"), ({"objective": "eps"}, "cannot be inverted"),
    ({"beta_start": 0.0}, "betas"), ({"beta_end": 1.0}, "betas"), ({"beta_start": 0.03}, "betas"),
    ({"n_steps": 1}, "n_steps"), ({"n_steps": 0}, "n_steps"), ({"n_steps": 10.5}, "n_steps")])
def test_refused_configs(change, says):
    with pytest.raises(ScheduleError, match=says):
        ScheduleConfig(**change)


@pytest.mark.parametrize(("key", "value"), [("n_steps", 500), ("beta_start", 2e-4), ("beta_end", 0.03),
                                            ("zero_snr", False), ("objective", "x0")])
def test_another_process_is_refused_by_name(key, value):
    trained = ScheduleConfig()
    trained.check_same(ScheduleConfig())
    with pytest.raises(ScheduleError, match=f"{key} differs"):
        trained.check_same(replace(trained, **{key: value}))
