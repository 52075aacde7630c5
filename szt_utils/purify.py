"""Purifiers, the other defences of the paper's Table 1: images in, images of the same size out.

AdvClean filters, JPEG compresses (szt_utils.jpeg), Regen passes an image through a latent diffusion model at
low noise, PDMPure through a pixel-space diffusion model, which poisons made for latent ones do not fool.
Images are float32 (B, 3, H, W) in [0, 1].

The filters are written here because no light library has them: those of OpenCV's contrib build weigh 70 MB
and exclude its other builds, and scikit-image's bilateral filter measures color in another way. The test
holds OpenCV's figures.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .errors import InputError
from .images import max_pixels
from .jpeg import jpeg_tensor

__all__ = ["DEFAULTS", "PURIFIERS", "advclean", "bilateral_filter", "check_strength", "guided_filter",
           "pdmpure", "pdmpure_if", "regen"]

_STRIP = 2**20  # pixels that the guided filter holds at once, of which it needs 1 kB each
_MODEL_SHARE = 16  # a network needs more memory than a filter: 2048 x 2048 pixels by default

# As in the sources: AdverseCleaner; Zhao et al. 2024 (Regen) with t = 60 of 1000, where it begins with Stable
# Diffusion 1.5's scheduler (PNDM), but at 41 with the pocket model's (DDIM); Xue et al. 2024 (PDM-Pure),
# whose 50 steps below t = 500 begin 5 steps late. A small pixel-space model has no text and no
# second stage: it starts at t = 100, the lowest of DiffPure's range (Nie et al. 2022).
DEFAULTS = {
    "advclean": dict(iterations=64, diameter=5, sigma_color=8.0, sigma_space=8.0,
                     guided_iterations=4, radius=4, regularization=16.0),
    "jpeg": dict(quality=25),
    "regen": dict(strength=0.06, steps=50, guidance_scale=7.5, prompt=""),
    "pdmpure": dict(strength=0.12, steps=50),
    "pdmpure_if": dict(strength=0.45, steps=110, guidance_scale=7.0, noise_level=250, prompt="a picture",
                       upscale_steps=50, upscale_guidance_scale=4.0, upscale_noise_level=20),
}


def bilateral_filter(images: torch.Tensor, diameter: int = 5, sigma_color: float = 8.0,
                     sigma_space: float = 8.0) -> torch.Tensor:
    """Mean of the pixels in a disc, weighted by nearness in place and color, as OpenCV's bilateralFilter.

    `images` (B, C, H, W) are in levels of 255, `sigma_color` in levels of the channels' summed absolute
    difference, `diameter` (odd) and `sigma_space` in pixels; borders are mirrored.
    """
    radius, (height, width) = diameter // 2, images.shape[-2:]
    padded = F.pad(images, [radius] * 4, mode="reflect")
    total, weights = torch.zeros_like(images), torch.zeros_like(images[:, :1])
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if (squared := dx * dx + dy * dy) > radius * radius:
                continue
            shifted = padded[..., radius + dy:radius + dy + height, radius + dx:radius + dx + width]
            distance = (shifted - images).abs().sum(1, keepdim=True)
            weight = (-squared / (2 * sigma_space**2) - distance.square() / (2 * sigma_color**2)).exp()
            total.addcmul_(shifted, weight)
            weights.add_(weight)
    return total / weights


def guided_filter(guide: torch.Tensor, images: torch.Tensor, radius: int = 4,
                  regularization: float = 16.0) -> torch.Tensor:
    """The color guided filter (He et al. 2013).

    In each window of 2 radius + 1 pixels, `images` is fitted by an affine function of `guide`; the fits are
    averaged over the windows of a pixel.

    Both are (B, 3, H, W) in levels of 255, `regularization` in squared levels; borders are mirrored with the
    last pixel twice, as in OpenCV's. Strips of rows are filtered one after the other, to save memory.
    """
    strips, halo, rows = [], 2 * radius, max(1, _STRIP // guide.shape[-1])
    for top in range(0, guide.shape[-2], rows):
        first = max(0, top - halo)
        strip = slice(first, top + rows + halo)
        filtered = _guided_strip(guide[..., strip, :], images[..., strip, :], radius, regularization)
        strips.append(filtered[..., top - first:top - first + rows, :])
    return torch.cat(strips, -2)


def _guided_strip(guide: torch.Tensor, images: torch.Tensor, radius: int,
                  regularization: float) -> torch.Tensor:
    rows, columns = (_mirrored(n, radius).to(images.device) for n in images.shape[-2:])

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x[..., rows[:, None], columns], 2 * radius + 1, 1)

    def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """All products of a channel of `a` and one of `b`, averaged over windows, (B, 3, 3, H, W)."""
        return mean((a[:, :, None] * b[:, None]).flatten(1, 2)).unflatten(1, (3, 3))

    # Variances are small differences of large squares: in float32 they would lose what they measure.
    guide, images, dtype = guide.double(), images.double(), images.dtype
    guide_mean, images_mean = mean(guide), mean(images)
    variance = products(guide, guide) - guide_mean[:, :, None] * guide_mean[:, None]
    covariance = products(guide, images) - guide_mean[:, :, None] * images_mean[:, None]
    variance, covariance = (x.permute(0, 3, 4, 1, 2) for x in (variance, covariance))
    slope = torch.linalg.solve(variance + regularization * torch.eye(3).to(variance), covariance)
    slope = slope.permute(0, 3, 4, 1, 2)  # (B, 3 of the guide, 3 of the result, H, W)
    offset = images_mean - (slope * guide_mean[:, :, None]).sum(1)
    slope = mean(slope.flatten(1, 2)).unflatten(1, (3, 3))
    return ((slope * guide[:, :, None]).sum(1) + mean(offset)).to(dtype)


def advclean(images: torch.Tensor, *, iterations: int = 64, diameter: int = 5, sigma_color: float = 8.0,
             sigma_space: float = 8.0, guided_iterations: int = 4, radius: int = 4,
             regularization: float = 16.0) -> torch.Tensor:
    """Smooth with many bilateral filters, then restore edges with guided ones (AdverseCleaner).

    The guide is the input. InputError for images that are smaller than the filters.
    """
    guide = images.float() * 255
    if min(guide.shape[-2:]) <= max(diameter // 2, radius):
        raise InputError(f"An image of {guide.shape[-1]} x {guide.shape[-2]} pixels "
                         "is too small for AdvClean.")
    cleaned = guide
    for _ in range(iterations):
        cleaned = bilateral_filter(cleaned, diameter, sigma_color, sigma_space)
    for _ in range(guided_iterations):
        cleaned = guided_filter(guide, cleaned, radius, regularization)
    return (cleaned / 255).clamp(0, 1)


@torch.no_grad()
def regen(images: torch.Tensor, pipeline: Any, *, generators: Sequence[torch.Generator],
          strength: float = 0.06, steps: int = 50, guidance_scale: float = 7.5,
          prompt: str = "") -> torch.Tensor:
    """Noise each latent to `strength` of the schedule and denoise it again (Zhao et al. 2024).

    `pipeline` is any image-to-image pipeline of Diffusers; there is one CPU generator per image.
    """
    check_strength(strength, steps)
    _check_pixels(images)
    height, width = images.shape[-2:]
    # A transformer takes latent cells two by two, and its pipeline resizes to a size of its own.
    transformer = hasattr(pipeline, "transformer")
    padded = _padded(images, pipeline.vae_scale_factor * (2 if transformer else 1))
    size = {"height": padded.shape[-2], "width": padded.shape[-1]} if transformer else {}
    result = pipeline([prompt] * len(images), image=padded, strength=strength, num_inference_steps=steps,
                      guidance_scale=guidance_scale, generator=list(generators), output_type="pt",
                      **size).images
    return result.float().cpu()[..., :height, :width].clamp(0, 1)


@torch.no_grad()
def pdmpure(images: torch.Tensor, pipeline: Any, *, generators: Sequence[torch.Generator],
            strength: float = 0.12, steps: int = 50) -> torch.Tensor:
    """Noise each image to `strength` of the schedule and denoise it again in pixel space.

    Xue et al. 2024, with a DDPMPipeline, which has no text; there is one CPU generator per image. A U-Net of
    3 k^2 channels sees blocks of k x k pixels. InputError for other channels.
    """
    from diffusers import DDPMScheduler

    check_strength(strength, steps)
    _check_pixels(images)
    unet, scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    channels = unet.config.in_channels
    block = round((channels / 3) ** 0.5)
    if 3 * block * block != channels:
        raise InputError(f"The model takes {channels} channels; "
                         "PDMPure needs one of RGB pixels or of square blocks of them.")
    height, width = images.shape[-2:]
    padded = _padded(images, block * 2 ** (len(unet.config.block_out_channels) - 1))
    x = F.pixel_unshuffle(2 * padded - 1, block)
    noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators])
    x, noise = x.to(unet.device, unet.dtype), noise.to(unet.device, unet.dtype)
    scheduler.set_timesteps(steps, device=unet.device)
    timesteps = scheduler.timesteps[-int(strength * steps):]
    x = scheduler.add_noise(x, noise, timesteps[:1].expand(len(x)))
    for t in timesteps:
        x = scheduler.step(unet(x, t).sample, t, x, generator=list(generators)).prev_sample
    return (F.pixel_shuffle(x.float().cpu(), block)[..., :height, :width] / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def pdmpure_if(images: torch.Tensor, pipeline: Any, upscaler: Any, *, generators: Sequence[torch.Generator],
               strength: float = 0.45, steps: int = 110, guidance_scale: float = 7.0, noise_level: int = 250,
               prompt: str = "a picture", upscale_steps: int = 50, upscale_guidance_scale: float = 4.0,
               upscale_noise_level: int = 20, prompt_embeds: torch.Tensor | None = None,
               negative_prompt_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """PDM-Pure as published (Xue et al. 2024), with DeepFloyd IF's second stage and an upscaler.

    The image at the second stage's size passes IFImg2ImgSuperResolutionPipeline, conditioned on itself, then
    StableDiffusionUpscalePipeline, and is resized to its own size; there is one CPU generator per image.
    Embeddings of the prompts, (1, L, D), replace the text encoder.
    """
    check_strength(strength, steps)
    count, size, side = len(images), images.shape[-2:], pipeline.unet.config.sample_size
    small = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    text = dict(prompt=[prompt] * count) if prompt_embeds is None else dict(
        prompt_embeds=prompt_embeds.expand(count, -1, -1),
        negative_prompt_embeds=negative_prompt_embeds.expand(count, -1, -1))
    generators = list(generators)
    second = pipeline(image=2 * small - 1, original_image=2 * small - 1, strength=strength,
                      num_inference_steps=steps, guidance_scale=guidance_scale, noise_level=noise_level,
                      generator=generators, output_type="pt", **text).images
    third = upscaler(prompt=[prompt] * count, image=(second.float() / 2 + 0.5).clamp(0, 1),
                     num_inference_steps=upscale_steps, guidance_scale=upscale_guidance_scale,
                     noise_level=upscale_noise_level, generator=generators, output_type="pt").images
    return F.interpolate(third.float().cpu(), size, mode="bicubic", antialias=True).clamp(0, 1)


# Functions of (images, **settings), or of (images, *pipelines, generators=..., **settings), with settings as
# in DEFAULTS.
PURIFIERS = {"advclean": advclean, "jpeg": jpeg_tensor, "regen": regen, "pdmpure": pdmpure,
             "pdmpure_if": pdmpure_if}


def check_strength(strength: float, steps: int) -> None:
    """Raise InputError unless `strength` of `steps` is at least one step."""
    if not 0 < strength <= 1 or int(strength * steps) < 1:
        raise InputError(f"--strength {strength} of --steps {steps} leaves no denoising step; raise --steps "
                         "or --strength, which is at most 1.")


def _check_pixels(images: torch.Tensor) -> None:
    height, width = images.shape[-2:]
    if height * width > (limit := max_pixels() // _MODEL_SHARE):
        raise InputError(f"An image of {width} x {height} pixels is too large for a model, which takes "
                         f"{limit:,} pixels; give --resolution, or raise --max_image_pixels.")


def _padded(images: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad right and bottom to multiples of `multiple`, repeating the edge."""
    height, width = images.shape[-2:]
    return F.pad(images, [0, -width % multiple, 0, -height % multiple], mode="replicate")


def _mirrored(n: int, radius: int) -> torch.Tensor:
    """Indices from `radius` before to `radius` after 0 .. n - 1, mirrored with both ends twice."""
    index = torch.arange(-radius, n + radius)
    index = torch.where(index < 0, -1 - index, index)
    return torch.where(index >= n, 2 * n - 1 - index, index)
