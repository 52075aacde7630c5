"""Statistics against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import nhypergeom

from szt_utils.statistics import (
    bimodality,
    bootstrap,
    chance,
    excess_kurtosis,
    high_frequency_share,
    mass_inside,
    radial_spectrum,
    rank_chance,
    roc_auc,
)


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap(values)
    half = 1.96 * values.std() / 400**0.5
    assert found["value"] == values.mean() and found["n"] == 400
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_bootstrap_resamples_groups_as_one():
    """Three copies of a value say no more than one: the interval is that of the values alone."""
    values = np.random.default_rng(1).normal(size=40)
    groups = [str(i) for i in range(40)] * 3
    alone, copied = bootstrap(values), bootstrap(np.tile(values, 3), groups=groups)
    assert copied["n"] == 40 and copied["high"] - copied["low"] == pytest.approx(
        alone["high"] - alone["low"], rel=0.1)
    blind = bootstrap(np.tile(values, 3))
    assert blind["high"] - blind["low"] < 0.7 * (alone["high"] - alone["low"])


def test_chance_is_the_tail_of_a_binomial_of_any_size():
    assert chance(0, 7) == pytest.approx(1) and chance(1, 1) == pytest.approx(0.05)
    assert chance(2, 3, 0.5) == pytest.approx(0.5)
    assert chance(500, 5000, 0.1) == pytest.approx(0.5, abs=0.02) and chance(5000, 5000) < 1e-300


def test_the_chance_of_a_rank_is_the_tail_of_a_negative_hypergeometric():
    for total, count, rank in ((1, 10, 10), (20, 12, 10), (300, 40, 38)):
        for found in (0, 1, total // 2, total):
            below = nhypergeom(total + count, total, rank).cdf(total - found)
            assert rank_chance(found, total, count, rank) == pytest.approx(below, rel=1e-6)
    # Of one new value and nine others, each of the ten is the largest equally often.
    assert rank_chance(1, 1, 9, 9) == pytest.approx(0.1)


def test_the_bootstrap_resamples_whole_rows():
    """Pairs that belong together: their ratio has no spread though each half has."""
    first = np.random.default_rng(0).uniform(1, 9, 50)
    found = bootstrap(np.stack([first, 2 * first], 1), lambda rows: rows[:, 1].sum() / rows[:, 0].sum())
    assert found["low"] == pytest.approx(2) and found["high"] == pytest.approx(2)


def test_draws_of_a_bootstrap_without_a_value_do_not_count():
    found = bootstrap(np.arange(4.0), lambda values: values.mean() if values.mean() >= 0.5 else math.nan)
    assert 0.5 <= found["low"] < found["value"] == 1.5 < found["high"] <= 3


def test_shape_statistics_have_their_closed_forms():
    rng = np.random.default_rng(0)
    gauss, uniform, two = rng.normal(size=400_000), rng.uniform(size=400_000), np.tile([-3.0, 3.0], 50)
    for values, kurtosis, coefficient in ((gauss, 0, 1 / 3), (uniform, -1.2, 5 / 9), (two, -2, 1)):
        assert excess_kurtosis(values) == pytest.approx(kurtosis, abs=0.03)
        assert bimodality(values) == pytest.approx(coefficient, abs=0.01)
    skewed = 3 * rng.exponential(size=400_000)  # skewness 2, kurtosis 9, at any scale
    assert bimodality(skewed) == pytest.approx(5 / 9, abs=0.05)


def test_roc_auc_counts_pairs():
    assert roc_auc([1, 2], [3, 4]) == 1 and roc_auc([3, 4], [1, 2]) == 0
    assert roc_auc([0, 1, 2], [1]) == pytest.approx(0.5)
    assert roc_auc([0, 1, 2, 3], [1.5, 9]) == pytest.approx(6 / 8)


def test_mass_inside_a_mask():
    maps = torch.ones(2, 3, 4, 4)
    maps[1] *= torch.arange(1, 4).view(3, 1, 1)
    maps[1, 2, 0] = 7
    mask = torch.zeros(4, 4)
    mask[0] = 1
    share = mass_inside(maps, mask)
    assert share.shape == (2, 3)
    assert torch.allclose(share, torch.tensor([[0.25, 0.25, 0.25], [0.25, 0.25, 28 / 64]]))


@pytest.mark.parametrize("cycles, down, band", [(1, 0, 0), (3, 0, 2), (4, 0, 3), (8, 0, 7), (2, 1, 2)])
def test_a_wave_has_its_power_in_its_own_band(cycles, down, band):
    """A band ends at whole cycles: the 2.2 of a slanted wave are in the third."""
    y, x = torch.meshgrid(torch.arange(16) / 16, torch.arange(16) / 16, indexing="ij")
    wave = torch.cos(2 * torch.pi * (cycles * x + down * y)).expand(2, 4, 16, 16) + 7
    spectrum = radial_spectrum(wave)
    assert spectrum.shape == (2, 8)
    assert (spectrum.argmax(1) == band).all() and (spectrum > 1e-9).sum() == 2
    assert torch.allclose(high_frequency_share(wave), torch.full((2,), float(cycles > 4)).double(), atol=1e-9)


def test_white_noise_has_a_flat_spectrum_of_its_variance():
    noise = 3 * torch.randn(400, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(radial_spectrum(noise).mean(0), torch.full((8,), 9.0).double(), rtol=0.06)
