"""The method: its numbers, its three parts, and Eq. 7 by hand."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from szt_utils.errors import InputError
from szt_utils.safe_zone import PAPER_LOG_SNR, SafeZone, paper_dilation


class Schedule:
    """The part of a model that a zone asks for: a schedule of noise, from its betas."""

    def __init__(self, betas):
        self.signal = torch.cumprod(1 - betas, 0)
        self.num_timesteps = len(betas)

    def log_snr(self, timesteps):
        signal = self.signal[timesteps]
        return signal.log() - (1 - signal).log()


def scaled_linear(steps=1000):
    return torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2


def zero_terminal(betas):
    """Betas of the schedule rescaled so that no signal is left at its end (Lin et al. 2024)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    signal = root**2
    return 1 - torch.cat([signal[:1], signal[1:] / signal[:-1]])


STABLE_DIFFUSION = Schedule(scaled_linear())


def test_the_papers_zone_at_the_papers_resolution():
    zone = SafeZone.paper(512)
    assert (zone.jpeg_quality, zone.t_min, zone.t_max, zone.mask_dilation) == (25, 500, None, 16)
    assert zone == SafeZone.paper(512, STABLE_DIFFUSION)
    assert (zone.mask_mode, zone.mask_normalization, zone.t_distribution) == ("loss", "none", "uniform")
    assert dataclasses.asdict(SafeZone()) == {
        "jpeg_quality": None, "t_min": 0, "t_max": None, "t_distribution": "uniform", "t_power": 1.0,
        "t_center": 500.0, "t_width": 100.0, "mask_dilation": 0, "mask_mode": "loss",
        "mask_normalization": "none"}


@pytest.mark.parametrize("resolution, pixels", [(512, 16), (256, 8), (128, 4), (768, 24), (1024, 32)])
def test_the_dilation_scales_with_the_resolution(resolution, pixels):
    assert paper_dilation(resolution) == SafeZone.paper(resolution).mask_dilation == pixels


def test_what_is_given_counts_and_none_is_not_given():
    zone = SafeZone.paper(512, jpeg_quality=None, t_min=0, mask_dilation=7, t_distribution="power")
    assert (zone.jpeg_quality, zone.t_min, zone.mask_dilation, zone.t_distribution) == (25, 0, 7, "power")


@pytest.mark.parametrize("betas, t_min", [
    (scaled_linear(), 500), (zero_terminal(scaled_linear()), 475),
    (torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 354)],  # that of PixArt
    ids=["stable diffusion", "zero terminal snr", "linear"])
def test_t_min_carries_over_by_the_signal_to_noise_ratio(betas, t_min):
    schedule = Schedule(betas)
    zone = SafeZone.paper(512, schedule)
    assert zone.t_min == t_min
    before, at = schedule.log_snr(torch.tensor([t_min - 1, t_min])).tolist()
    assert at <= PAPER_LOG_SNR < before


def test_the_papers_ratio_is_that_of_stable_diffusion_at_500():
    assert STABLE_DIFFUSION.log_snr(torch.tensor([500])).item() == pytest.approx(PAPER_LOG_SNR, abs=5e-4)
    assert math.exp(PAPER_LOG_SNR) == pytest.approx(0.382, abs=5e-4)


def test_the_help_of_the_flags_names_the_papers_numbers():
    """They stand there as text: to print the help must not import torch."""
    text = " ".join((ROOT / "szt_utils" / "arguments.py").read_text().split())
    zone = SafeZone.paper(512)
    assert f"--jpeg_quality {zone.jpeg_quality}," in text and f"--mask_dilation {zone.mask_dilation} " in text
    assert f"({zone.t_min} of 1000 for Stable Diffusion)" in text
    assert f"ratio {math.exp(PAPER_LOG_SNR):.3f}" in re.sub('" "', "", text)


@pytest.mark.parametrize("wrong, message", [
    (dict(jpeg_quality=0), "JPEG quality must be from 1 to 100"), (dict(jpeg_quality=101), "from 1 to 100"),
    (dict(mask_dilation=-1), "must not be negative"), (dict(mask_mode="all"), "mask mode 'all'; choose from"),
    (dict(mask_normalization="sum"), "mask normalization 'sum'"),
    (dict(t_distribution="normal"), "timestep distribution 'normal'")])
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        SafeZone(**wrong)
    with pytest.raises(InputError, match=message):
        SafeZone.paper(512, **wrong)


@pytest.mark.parametrize("wrong, message", [
    (dict(t_min=1000), "t_min is 1000 and t_max is 1000"), (dict(t_max=1001), "t_max is 1001"),
    (dict(t_min=600, t_max=500), "t_min is 600"), (dict(t_min=-1), "t_min is -1"),
    (dict(t_distribution="tanh", t_width=0), "width of the tanh"),
    (dict(t_distribution="tanh", t_center=1e9, t_width=1), "gives no timestep")])
def test_a_zone_that_does_not_fit_the_model_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        SafeZone(**wrong).fit(1000)
    assert SafeZone(t_min=3).fit(1000) == SafeZone(t_min=3, t_max=1000)


def test_purify_is_jpeg_or_nothing():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert SafeZone().purify(image) is image
    file = io.BytesIO()
    image.save(file, "JPEG", quality=25, subsampling="4:2:0")
    expected = np.asarray(Image.open(file))
    assert np.array_equal(np.asarray(SafeZone(jpeg_quality=25).purify(image)), expected)


def test_timesteps_are_drawn_from_the_zone_as_upstream_draws_them():
    zone = SafeZone(t_min=500)
    drawn = zone.timesteps(1000, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, torch.randint(500, 1000, (1000,), generator=torch.Generator().manual_seed(0)))
    everywhere = SafeZone().timesteps(8, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(everywhere, torch.randint(0, 1000, (8,), generator=torch.Generator().manual_seed(0)))
    shaped = SafeZone(t_min=2, t_max=6, t_distribution="power", t_power=2.0)
    low, high, weights = shaped.timestep_range(1000)
    assert (low, high) == (2, 6)
    expected = torch.tensor([4, 9, 16, 25], dtype=torch.float64) / 54
    assert torch.allclose(weights, expected)
    assert set(shaped.timesteps(500, 1000).tolist()) == {2, 3, 4, 5}


def test_a_mask_is_prepared_like_its_image_and_grown():
    mask = Image.new("L", (128, 128))
    mask.paste(255, (56, 56, 72, 72))
    grown = SafeZone.paper(64).prepare_mask(mask, 64)
    assert grown.shape == (1, 1, 64, 64) and grown.sum() == (8 + 2 * 2) ** 2


def test_the_loss_is_equation_7_by_hand():
    error = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    mask = (torch.rand(2, 1, 8, 8) < 0.5).double()
    by_hand = sum(error[b, c, y, x].item() for b in range(2) for c in range(4) for y in range(8)
                  for x in range(8) if mask[b, 0, y, x]) / error.numel()
    assert SafeZone().loss(error, mask).item() == pytest.approx(by_hand)
    assert SafeZone().loss(error).item() == pytest.approx(error.mean().item())
    inside = by_hand * error.numel() / (4 * mask.sum().item())
    assert SafeZone(mask_normalization="area").loss(error, mask).item() == pytest.approx(inside)
    for mode, masked in (("loss", True), ("image_and_loss", True), ("image", False), ("latent", False),
                         ("none", False)):
        expected = by_hand if masked else error.mean().item()
        assert SafeZone(mask_mode=mode).loss(error, mask).item() == pytest.approx(expected), mode


def test_samples_can_be_weighted_and_frames_share_the_mask_of_an_image():
    error, mask = torch.rand(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[..., 2:6] = 1
    weights = torch.tensor([0.5, 3.0])
    expected = (error * mask * weights.view(2, 1, 1, 1)).mean()
    assert torch.allclose(SafeZone().loss(error, mask, weights), expected)
    frames = error.unsqueeze(2).expand(-1, -1, 3, -1, -1)
    assert torch.allclose(SafeZone().loss(frames, mask, weights), expected)


def test_gradients_vanish_outside_the_mask():
    error, mask = torch.rand(1, 4, 8, 8, requires_grad=True), torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    SafeZone().loss(error, mask).backward()
    assert (error.grad[..., :3] > 0).all() and not error.grad[..., 3:].any()


def test_mask_modes_mask_images_and_latents():
    image, mask = torch.rand(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    for mode in ("image", "image_and_loss"):
        masked = SafeZone(mask_mode=mode).mask_image(image, mask)
        assert torch.equal(masked[..., :2], image[..., :2]) and (masked[..., 2:] == 0.5).all()
    for mode in ("loss", "latent", "none"):
        assert SafeZone(mask_mode=mode).mask_image(image, mask) is image
    assert SafeZone(mask_mode="image").mask_image(image, None) is image
    assert SafeZone(mask_mode="latent").mask_latents(mask) is mask
    assert SafeZone().mask_latents(mask) is None


def test_what_is_said_at_the_start_names_timesteps_and_signal_to_noise_ratio():
    masks = torch.zeros(5, 2, 1, 8, 8)
    masks[..., :4, :4] = 1
    jpeg, timesteps, where = SafeZone.paper(128, STABLE_DIFFUSION).describe(STABLE_DIFFUSION, masks)
    assert jpeg == "JPEG quality 25"
    assert timesteps == "timesteps 500 to 999 (uniform): noise level 0.851 to 0.998, logSNR -0.96 to -5.36"
    assert where == "5 masks, mode loss, dilated by 4 px: 25 % of the latent grid is trained on"
    assert SafeZone().describe(STABLE_DIFFUSION, None)[::2] == ["no JPEG",
                                                                "no masks: the loss counts everywhere"]
    assert "25 % of the latent grid is observed" in SafeZone(mask_mode="none").describe(STABLE_DIFFUSION,
                                                                                        masks)[2]
