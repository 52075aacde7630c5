"""Pixel signals: their values on images whose residual is known, and images that have none."""

import math

import numpy as np
import pytest

from szt_utils.pixel_signals import SIGNALS, pixel_signals


def surface(side: int = 192) -> np.ndarray:
    """A smooth image (side, side, 3) that is quadratic in its coordinates, channel by channel."""
    y, x = np.mgrid[:side, :side] / side
    return np.stack([90 + 60 * x, 110 + 40 * y * y, 130 - 30 * x * y], -1)


def signals(levels: np.ndarray) -> dict[str, float]:
    return dict(zip(SIGNALS, pixel_signals(levels), strict=True))


def test_white_noise_has_its_level_a_level_spectrum_and_the_kurtosis_of_a_gaussian():
    noise = np.random.default_rng(0).normal(0, 5, (192, 192, 3))
    found = signals(surface() + noise)
    # The weakest of three sample directions of 250 degrees of freedom lies a little below the level.
    assert math.exp(found["floor"]) - 0.3 == pytest.approx(5 * 0.9, rel=0.05)
    assert math.exp(found["strongest_floor"]) - 0.3 == pytest.approx(5 * 1.03, rel=0.05)
    assert found["kurtosis"] == pytest.approx(math.log(3), abs=0.06)
    assert [found["tilt_mid"], found["tilt_high"]] == pytest.approx([0, 0], abs=0.06)


def test_two_levels_have_a_lower_kurtosis_than_uniform_noise_and_that_a_lower_one_than_gaussian():
    rng = np.random.default_rng(0)
    two, uniform, gaussian = (signals(surface() + noise)["kurtosis"] for noise in (
        rng.choice([-8, 8], (192, 192, 3)), rng.uniform(-8, 8, (192, 192, 3)),
        rng.normal(0, 8, (192, 192, 3))))
    assert two == pytest.approx(0, abs=0.15) and uniform == pytest.approx(math.log(1.8), abs=0.1)
    assert two < uniform < gaussian


def test_the_weakest_direction_is_found_whatever_the_others_hold():
    """Strong noise along two directions of color leaves the level of the third as it is."""
    rng, third = np.random.default_rng(0), np.array([1, 1, 1]) / math.sqrt(3)
    others = rng.normal(0, 20, (192, 192, 3))
    others -= (others @ third)[..., None] * third
    weak = rng.normal(0, 3, (192, 192, 1)) * third
    assert math.exp(signals(surface() + others + weak)["floor"]) - 0.3 == pytest.approx(3, rel=0.08)


def test_smooth_noise_tilts_the_spectrum_down():
    noise = np.random.default_rng(0).normal(0, 8, (192, 192, 3))
    smooth = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (1, 1), (0, 1))) / 4
    assert signals(surface() + smooth)["tilt_high"] < signals(surface() + noise)["tilt_high"] - 0.5


def test_an_even_level_follows_nothing_and_a_proportional_one_does():
    rng = np.random.default_rng(0)
    gain = np.kron(2 ** rng.uniform(0, 4, (12, 12)), np.ones((16, 16)))[..., None]
    texture = rng.normal(0, 1, (192, 192, 1)) * gain
    even, following = (signals(surface() + texture + noise)["following"] for noise in (
        rng.normal(0, 3, (192, 192, 3)), rng.normal(0, 0.3, (192, 192, 3)) * gain))
    assert abs(even) < 0.1 and following > 0.7


def test_signals_are_blind_to_smooth_content_and_to_the_order_of_channels():
    noise = np.random.default_rng(0).normal(0, 4, (192, 192, 3))
    found = pixel_signals(surface() + noise)
    assert pixel_signals(100 + noise) == pytest.approx(found, abs=1e-3)
    assert pixel_signals((surface() + noise)[..., ::-1]) == pytest.approx(found, abs=1e-3)


def test_images_without_a_weakest_direction_have_no_signals():
    noise = np.random.default_rng(0).normal(0, 4, (192, 192, 3))
    assert pixel_signals(surface()) is None  # flat but for its surface
    assert pixel_signals(100 + noise[..., :1].repeat(3, 2)) is None  # grey
    assert pixel_signals(100 + noise[:80, :80]) is None  # 25 blocks
    assert pixel_signals((255 + noise).clip(0, 255)) is None  # overexposed


def test_a_large_image_is_sampled():
    noise = np.random.default_rng(0).normal(0, 4, (1200, 1200, 3)).astype(np.float32)
    found = signals(100 + noise)
    assert math.exp(found["floor"]) - 0.3 == pytest.approx(4 * 0.9, rel=0.05)


def test_the_sampled_blocks_are_of_the_whole_image():
    noise = np.random.default_rng(0).normal(0, 8, (1200, 1200, 3)).astype(np.float32)
    noise[900:] /= 4  # the last quarter is quiet
    assert math.exp(signals(100 + noise)["floor"]) - 0.3 == pytest.approx(2 * 0.9, rel=0.1)


@pytest.mark.parametrize("level", [0, 2, 253, 255])
def test_blocks_of_which_more_than_a_quarter_is_clipped_are_left_out(level):
    image = surface() + np.random.default_rng(0).normal(0, 4, (192, 192, 3))
    image[:, np.arange(192) % 16 < 4] = level
    assert pixel_signals(image) is not None
    image[0::16, 4::16] = level
    assert pixel_signals(image) is None


def test_quiet_signals_are_of_the_quiet_blocks_and_the_others_of_all():
    """A quiet part of even noise of two levels, and a loud one of smooth noise."""
    rng = np.random.default_rng(0)
    quiet, loud = rng.choice([-4.0, 4.0], (256, 256, 3)), rng.normal(0, 60, (256, 256, 3))
    loud = (loud + np.roll(loud, 1, 0) + np.roll(loud, 1, 1) + np.roll(loud, (1, 1), (0, 1))) / 4
    quiet[:, 96:] = loud[:, 96:]
    found = signals(128 + quiet.clip(-120, 120))
    assert found["kurtosis"] == pytest.approx(0, abs=0.15)
    assert [found["quiet_tilt_mid"], found["quiet_tilt_high"]] == pytest.approx([0, 0], abs=0.2)
    assert found["tilt_mid"] < -0.3 and found["tilt_high"] < -0.7


def test_the_spectrum_is_that_of_the_weakest_direction():
    """Even noise in one direction of color, and stronger smooth noise in the others."""
    rng, third = np.random.default_rng(0), np.array([1, 1, 1]) / math.sqrt(3)
    others = rng.normal(0, 60, (192, 192, 3))
    others = (others + np.roll(others, 1, 0) + np.roll(others, 1, 1) + np.roll(others, (1, 1), (0, 1))) / 4
    others -= (others @ third)[..., None] * third
    found = signals(128 + others + rng.normal(0, 3, (192, 192, 1)) * third)
    even = [found[name] for name in ("quiet_tilt_mid", "quiet_tilt_high", "tilt_mid", "tilt_high")]
    assert even == pytest.approx([0] * 4, abs=0.2)
