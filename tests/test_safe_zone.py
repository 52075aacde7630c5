"""The method: its numbers, its three parts, and Eq. 7 by hand."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import (
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from szt_utils.errors import InputError
from szt_utils.images import read_image
from szt_utils.models.flux import pack
from szt_utils.notices import notice
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
    (dict(t_min=-1), "t_min is -1"), (dict(t_min=600, t_max=600), "t_min is 600 and t_max is 600"),
    (dict(t_distribution="normal"), "timestep distribution 'normal'")])
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        SafeZone(**wrong)
    with pytest.raises(InputError, match=message):
        SafeZone.paper(512, **wrong)


@pytest.mark.parametrize("wrong, message", [
    (dict(t_min=1000), "t_min is 1000 and t_max is 1000"), (dict(t_max=1001), "t_max is 1001"),
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


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDPM = DDPMScheduler(**BETAS)
SCHEDULERS = {
    "ddpm": DDPM, "euler": EulerDiscreteScheduler(**BETAS),
    "edm": EDMEulerScheduler(), "flow": FlowMatchEulerDiscreteScheduler(),
    "shifted flow": FlowMatchEulerDiscreteScheduler(shift=3.0)}


def snr_of(name, scheduler, timesteps):
    """The ratio of the variances of signal and noise, from the scheduler's own tables."""
    places = [(scheduler.timesteps == t).nonzero()[0].item() for t in timesteps]
    if name == "ddpm":
        signal = scheduler.alphas_cumprod[timesteps]
        return signal / (1 - signal)
    sigmas = scheduler.sigmas[places]
    if "flow" in name:
        return ((1 - sigmas) / sigmas) ** 2
    return ((0.5 if name == "edm" else 1.0) / sigmas) ** 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_timesteps_of_any_scheduler_are_its_own_and_below_the_papers_ratio(name):
    scheduler = SCHEDULERS[name]
    zone = SafeZone.paper(512, scheduler)
    drawn = zone.timesteps(scheduler, 3000, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == scheduler.timesteps.dtype and torch.isin(drawn, scheduler.timesteps).all()
    ratio = snr_of(name, scheduler, drawn)
    assert 0.37 < ratio.max() < 0.3825  # up to the ratio, and not above it
    assert {"ddpm": 500, "euler": 500, "flow": 618, "shifted flow": 618}.get(name) in (
        None, zone.t_min, zone.t_min + 1)  # flow counts from sigma 0.001


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_a_defence_the_draws_are_those_of_the_diffusers_examples(name):
    scheduler, seed = SCHEDULERS[name], torch.Generator().manual_seed
    drawn = SafeZone().timesteps(scheduler, 64, prior_preservation=True, generator=seed(0))
    indices = torch.randint(0, 1000, (64,), generator=seed(0))
    assert torch.equal(drawn, indices if name == "ddpm" else scheduler.timesteps[indices])
    u = torch.rand(64, generator=seed(0))
    assert torch.equal(SafeZone().timesteps(scheduler, 64, u), scheduler.timesteps[(u * 1000).long()])


def test_a_density_keeps_its_shape_inside_the_zone():
    """Rejection: the distribution of what is kept is that of the caller's draws that are inside."""
    scheduler, generator = SCHEDULERS["flow"], torch.Generator().manual_seed(0)
    zone = SafeZone.paper(512, scheduler)

    def draw(count):
        return torch.randn(count, generator=generator).sigmoid()

    kept = zone.timesteps(scheduler, 20000, draw) / 1000
    # u = 0 is pure noise in Diffusers' list, so that sigma is 1 - u, which has the same density.
    free = draw(60000)
    free = free[free >= kept.min()]
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert kept.quantile(share).item() == pytest.approx(free.quantile(share).item(), abs=6e-3)
    pool = zone.timesteps(scheduler, 500, draw(2000)) / 1000
    assert pool.min() >= kept.min() and pool.median().item() == pytest.approx(kept.median().item(), abs=0.02)


def test_what_replaces_the_numbers_of_a_density_depends_on_the_generator_alone():
    zone, u = SafeZone.paper(512, SCHEDULERS["flow"]), torch.linspace(0, 0.999, 200)
    first, again, other = (zone.restrict(SCHEDULERS["flow"], 100, u,
                                         generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_numbers_of_a_density_are_left_as_they_are():
    zone, u = SafeZone.paper(512, SCHEDULERS["flow"]), torch.linspace(0, 0.999, 200).flip(0)
    before = u.clone()
    assert not torch.equal(zone.restrict(SCHEDULERS["flow"], 100, u), before[:100])
    assert torch.equal(u, before)


def test_a_density_that_never_reaches_the_zone_is_refused():
    zone, scheduler = SafeZone.paper(512, SCHEDULERS["flow"]), SCHEDULERS["flow"]
    with pytest.raises(InputError, match="draws no timestep inside"):
        zone.timesteps(scheduler, 4, lambda count: torch.full((count,), 0.9))
    with pytest.raises(InputError, match="'power' cannot be used"):
        SafeZone(t_distribution="power").timesteps(scheduler, 4, torch.rand)
    with pytest.raises(InputError, match="DDPMWuerstchenScheduler is not known"):
        SafeZone().timesteps(DDPMWuerstchenScheduler(), 4)
    with pytest.raises(InputError, match="no timestep from 1000"):
        SafeZone(t_min=1000).timesteps(DDPM, 4)


def test_the_papers_zone_without_a_scheduler_says_that_it_is_stable_diffusions(capsys):
    notice.cache_clear()
    SafeZone.paper(512).timesteps(DDPM, 4)
    assert capsys.readouterr().err == ""
    SafeZone.paper(512).timesteps(SCHEDULERS["flow"], 4)
    assert "SafeZone.paper(resolution, scheduler) chooses" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCHEDULERS)
def test_class_images_get_all_timesteps(name):
    scheduler, zone = SCHEDULERS[name], SafeZone.paper(512, SCHEDULERS[name])
    for u in (None, torch.rand):
        ratio = snr_of(name, scheduler, zone.timesteps(scheduler, 2000, u, prior_preservation=True))
        assert ratio[:1000].max() < 0.3825 and ratio[1000:].max() > 1


def test_class_images_get_all_timesteps_whatever_the_distribution():
    zone = SafeZone(t_distribution="power", t_power=50.0)
    drawn = zone.timesteps(DDPM, 2000, prior_preservation=True, generator=torch.Generator().manual_seed(0))
    own, of_class = drawn.double().split(1000)
    assert own.mean() > 950 and of_class.mean().item() == pytest.approx(499.5, abs=40)


def test_a_scheduler_that_ends_before_the_papers_threshold_has_no_timestep_for_it():
    with pytest.raises(InputError, match="no timestep from 500 to below 500"):
        SafeZone(t_min=500).timesteps(DDPMScheduler(num_train_timesteps=500), 4)


def test_timesteps_are_drawn_from_the_zone_as_upstream_draws_them():
    zone = SafeZone(t_min=500)
    drawn = zone.timesteps(DDPM, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, torch.randint(500, 1000, (1000,), generator=torch.Generator().manual_seed(0)))
    everywhere = SafeZone().timesteps(DDPM, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(everywhere, torch.randint(0, 1000, (8,), generator=torch.Generator().manual_seed(0)))
    shaped = SafeZone(t_min=2, t_max=6, t_distribution="power", t_power=2.0)
    low, high, weights = shaped.timestep_distribution(1000)
    assert (low, high) == (2, 6)
    expected = torch.tensor([4, 9, 16, 25], dtype=torch.float64) / 54
    assert torch.allclose(weights, expected)
    assert set(shaped.timesteps(DDPM, 500).tolist()) == {2, 3, 4, 5}


@pytest.mark.parametrize("t_max", [600, 900])
def test_levels_between_whole_ones_get_the_weight_of_the_nearest_in_the_zone(t_max):
    """A shifted flow has levels such as 599.6."""
    scheduler = SCHEDULERS["shifted flow"]
    zone = SafeZone(t_min=t_max - 5, t_max=t_max, t_distribution="power", t_power=200.0)
    generator = torch.Generator().manual_seed(0)
    levels = scheduler.sigmas[:1000].double() * 1000 - 1
    drawn = zone.timesteps(scheduler, 20000, generator=generator).double() - 1
    inside = levels[(levels >= t_max - 5 - 1e-3) & (levels < t_max)]
    assert (inside.max() - t_max).abs() < 0.5  # the nearest whole level is not in the zone
    shares = torch.tensor([(drawn - level).abs().lt(1e-3).double().mean() for level in inside])
    weights = (inside.round().clamp(max=t_max - 1) / t_max) ** 200
    assert shares.sum() == 1 and torch.allclose(shares, weights / weights.sum(), atol=0.015)


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
    assert SafeZone().mean(error, mask).item() == pytest.approx(by_hand)
    assert SafeZone().mean(error).item() == pytest.approx(error.mean().item())
    inside = by_hand * error.numel() / (4 * mask.sum().item())
    assert SafeZone(mask_normalization="area").mean(error, mask).item() == pytest.approx(inside)
    for mode, masked in (("loss", True), ("image_and_loss", True), ("image", False), ("latent", False),
                         ("none", False)):
        expected = by_hand if masked else error.mean().item()
        assert SafeZone(mask_mode=mode).mean(error, mask).item() == pytest.approx(expected), mode


def test_the_loss_takes_masks_of_the_images_size_frames_and_packed_latents():
    prediction, target = torch.randn(2, 2, 4, 8, 6), torch.randn(2, 2, 4, 8, 6)  # (B, C, F, h, w)
    masks = torch.zeros(2, 1, 64, 48)
    masks[0, :, 16:40, 8:32] = masks[1, :, :20] = 1  # the second ends in the middle of a cell, which counts
    cells = torch.zeros(2, 1, 8, 6)
    cells[0, :, 2:5, 1:4] = cells[1, :, :3] = 1
    error = (prediction - target) ** 2
    expected = (error * cells[:, :, None]).mean()
    assert torch.allclose(SafeZone().loss(prediction, target, masks), expected)
    assert torch.allclose(SafeZone().loss(prediction, target, cells), expected)
    assert SafeZone().loss(prediction.half(), target.half(), masks).dtype == torch.float32

    image, noise = prediction[:, :, 0], target[:, :, 0]
    tokens = torch.nn.functional.avg_pool2d(masks, 16).ge(0.5).float()  # a token is 2 x 2 cells
    big = tokens.repeat_interleave(2, -1).repeat_interleave(2, -2)
    packed = SafeZone().loss(pack(image), pack(noise), masks)
    assert torch.allclose(packed, ((image - noise) ** 2 * big).mean())
    with pytest.raises(InputError, match="13 tokens does not match the aspect"):
        SafeZone().loss(torch.zeros(2, 13, 4), torch.zeros(2, 13, 4), masks)


def test_class_images_count_everywhere_and_by_their_weight():
    prediction, target, mask = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[..., :4, :] = 1
    error = (prediction - target) ** 2
    expected = (error[:2] * mask).mean() + 0.5 * error[2:].mean()
    loss = SafeZone().loss(prediction, target, mask, prior_preservation=True, prior_loss_weight=0.5)
    assert torch.allclose(loss, expected)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)  # as Diffusers has them
    both = SafeZone().loss(prediction, target, torch.cat([mask, 1 - mask]), weights, prior_preservation=True)
    weighted = error * weights
    assert torch.allclose(both, (weighted[:2] * mask).mean() + weighted[2:].mean())


@pytest.fixture
def photo(tmp_path):
    """An image of 90 x 60 pixels and its mask: a red square on noise, white where it is red."""
    pixels = np.random.default_rng(0).integers(0, 100, (60, 90, 3), np.uint8)
    mask = np.zeros((60, 90), np.uint8)
    mask[20:40, 10:30] = 255
    pixels[mask > 0] = (250, 0, 0)
    for folder, array in (("images", pixels), ("masks", mask)):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    return tmp_path / "images" / "a.png", tmp_path / "masks"


def test_open_reads_an_image_and_its_mask_as_the_training_sees_them(photo):
    path, masks = photo
    zone = SafeZone(jpeg_quality=25, mask_dilation=2)
    image, mask = zone.open(path, 30, masks)
    plain = read_image(path).resize((30, 30), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(image), np.asarray(zone.purify(plain)))
    assert mask.shape == (1, 30, 30) and mask[0, 10:20, 4:9].all() and mask.sum() == 14 * (7 + 4)
    assert torch.equal(zone.open(path, 30, masks / "a.png")[1], mask)
    assert torch.equal(zone.open(path, 30)[1], torch.ones(1, 30, 30))
    cropped, _ = zone.open(path, 30, masks, center_crop=True)
    assert not np.array_equal(np.asarray(cropped), np.asarray(image))
    (masks / "a.png").unlink()
    Image.new("L", (90, 60), 255).save(masks / "b.png")
    with pytest.raises(InputError, match="no mask in"):
        zone.open(path, 30, masks)


def test_an_image_and_its_mask_are_cropped_and_flipped_together(photo):
    from torchvision.transforms import v2

    path, masks = photo
    transform = v2.Compose([v2.Resize((45, 45)), v2.RandomCrop(40), v2.RandomHorizontalFlip()])
    mirrored = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, mask = SafeZone().transform(transform, read_image(path), Image.open(masks / "a.png"))
        red = torch.from_numpy(np.asarray(image)[None, ..., 0] > 175).float()
        assert image.size == (40, 40) and mask.shape == (1, 40, 40)
        assert (red != mask).float().mean() < 0.05  # but for the smoothed edge
        mirrored.add(bool(mask[..., 20:].sum() > mask[..., :20].sum()))
        torch.manual_seed(seed)
        grown, wide = SafeZone(jpeg_quality=5, mask_dilation=3).transform(
            transform, read_image(path), Image.open(masks / "a.png"))
        assert wide.sum() > mask.sum() and (wide >= mask).all() and grown.tobytes() != image.tobytes()
    assert mirrored == {True, False}


def test_the_example_of_the_readme_runs(photo):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"in your own loop.*?```python\n(.*?)```", text, re.DOTALL)[1]
    path, masks = photo
    names = {"path": path, "noise_scheduler": DDPM, "batch_size": 2, "device": "cpu",
             "masks": torch.ones(2, 1, 64, 64), "prediction": torch.ones(2, 4, 8, 8),
             "target": torch.zeros(2, 4, 8, 8)}
    code = code.replace('"masks"', f"{str(masks)!r}")
    exec(code, names)
    assert names["image"].size == (512, 512) and names["loss"] == 1 and names["timesteps"].min() >= 500


def test_samples_can_be_weighted_and_frames_share_the_mask_of_an_image():
    error, mask = torch.rand(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[..., 2:6] = 1
    weights = torch.tensor([0.5, 3.0])
    expected = (error * mask * weights.view(2, 1, 1, 1)).mean()
    residual, nothing = error.sqrt(), torch.zeros_like(error)
    assert torch.allclose(SafeZone().loss(residual, nothing, mask, weights), expected)
    frames = error.unsqueeze(2).expand(-1, -1, 3, -1, -1)
    assert torch.allclose(SafeZone().loss(frames.sqrt(), torch.zeros_like(frames), mask, weights), expected)


def test_gradients_vanish_outside_the_mask():
    error, mask = torch.rand(1, 4, 8, 8, requires_grad=True), torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    SafeZone().mean(error, mask).backward()
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
