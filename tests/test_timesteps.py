"""Timesteps: closed forms of the distributions, upstream's draw when nothing is asked, fair histograms."""

import math

import pytest
import torch

from szt_utils.errors import InputError
from szt_utils.timesteps import (
    DISTRIBUTIONS,
    check_range,
    first_timestep,
    noise_level,
    sample_timesteps,
    timestep_weights,
)


def test_the_uniform_draw_is_upstreams_call():
    torch.manual_seed(0)
    expected, after = torch.randint(0, 1000, (7,)), torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(sample_timesteps(7), expected) and torch.equal(torch.rand(1), after)


def test_a_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first = sample_timesteps(5, 500, 1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, sample_timesteps(5, 500, 1000, generator=torch.Generator().manual_seed(1)))
    sample_timesteps(5, 500, 1000, timestep_weights("tanh", 500, 1000), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_the_formulas():
    t = torch.arange(300, 900, dtype=torch.float64)
    closed = {"uniform": torch.ones(600, dtype=torch.float64), "power": (t / 1000) ** 3,
              "tanh": 1 + torch.tanh((t - 450) / 60)}
    assert set(closed) == set(DISTRIBUTIONS)
    for name, values in closed.items():
        weights = timestep_weights(name, 300, 900, power=3, center=450, width=60)
        assert weights.dtype == torch.float64 and weights.shape == (600,)
        assert torch.allclose(weights, values / values.sum(), rtol=1e-12, atol=0)


def test_limits_of_the_shapes():
    uniform = timestep_weights("uniform", 0, 1000)
    assert torch.allclose(timestep_weights("power", 0, 1000, power=0), uniform)
    assert torch.allclose(timestep_weights("tanh", 0, 1000, width=1e9), uniform)
    step = timestep_weights("tanh", 0, 1000, center=499.5, width=1e-3)  # a narrow tanh is a threshold
    assert torch.allclose(step[500:], torch.full((500,), 1 / 500, dtype=torch.float64))
    assert step[:500].sum() < 1e-12
    mean = (timestep_weights("power", 0, 1000, power=1) * torch.arange(1000)).sum().item()
    assert mean == pytest.approx((2 * 999 + 1) / 3)  # sum t^2 / sum t


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("t_min, t_max", [(0, 1000), (500, 1000), (200, 203)])
def test_histograms_follow_the_weights(distribution, t_min, t_max):
    weights = timestep_weights(distribution, t_min, t_max, power=2, center=500, width=100)
    count, generator = 200_000, torch.Generator().manual_seed(0)
    drawn = sample_timesteps(count, t_min, t_max, None if distribution == "uniform" else weights,
                             generator=generator)
    assert drawn.dtype == torch.long and t_min <= drawn.min() and drawn.max() < t_max
    bins = min(20, t_max - t_min)
    seen = torch.bincount((drawn - t_min) * bins // (t_max - t_min), minlength=bins).double()
    expected = torch.zeros(bins, dtype=torch.float64).index_add(
        0, torch.arange(t_max - t_min) * bins // (t_max - t_min), weights) * count
    kept = expected > 5
    assert seen[~kept].sum() <= 50
    chi_square, freedom = ((seen - expected)[kept] ** 2 / expected[kept]).sum().item(), kept.sum().item() - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_both_ends_are_drawn():
    for weights in (None, timestep_weights("power", 10, 13)):
        assert set(sample_timesteps(500, 10, 13, weights).tolist()) == {10, 11, 12}


@pytest.mark.parametrize("t_min, t_max", [(500, 500), (600, 500), (-1, 10), (0, 1001), (1000, 1000)])
def test_a_range_without_timesteps_is_refused(t_min, t_max):
    with pytest.raises(InputError, match=f"t_min is {t_min} and t_max is {t_max}"):
        check_range(t_min, t_max, 1000)


def test_shapes_that_mean_nothing_are_refused():
    check_range(0, 1000, 1000)
    with pytest.raises(InputError, match="'normal'; choose from: uniform, power, tanh"):
        timestep_weights("normal", 0, 1000)
    for bad in (dict(distribution="tanh", width=0), dict(distribution="tanh", center=math.nan),
                dict(distribution="power", power=-1), dict(distribution="tanh", center=1e9, width=1)):
        with pytest.raises(InputError, match="timestep distribution"):
            timestep_weights(bad.pop("distribution"), 0, 1000, **bad)


def test_noise_level_matches_the_published_figures_of_stable_diffusion():
    """Stable Diffusion 1.5's schedule from its definition, and the noise shares known of it."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    log_snr = abar.log() - (1 - abar).log()
    for t, share in ((100, 0.325), (500, 0.851), (900, 0.993)):
        assert noise_level(log_snr[t]).item() == pytest.approx(share, abs=1.5e-3)
        assert noise_level(log_snr[t]).item() == pytest.approx((1 - abar[t]).sqrt().item())
    assert noise_level(torch.tensor(-math.inf)) == 1


def test_the_first_timestep_has_at_most_that_ratio():
    log_snr = torch.tensor([5.0, 3.0, 0.5, -2.0])
    assert [first_timestep(log_snr, value) for value in (9, 3, 2.9, 0.5, -1)] == [0, 1, 2, 2, 3]
