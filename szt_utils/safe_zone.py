"""THE METHOD: Safe-Zone Training (paper Sec. 4.5, Eq. 7), the part of training that poisons do not reach.

    minimize over v   E_{x, t, noise} mean( Resize(M_x) * (prediction(z_t, t, c(v)) - target)^2 )
    z_t is JPEG_q(x), encoded and noised          (HOW: JPEG removes high-frequency perturbations)
    t_min <= t < t_max                            (WHEN: poisons act at low timesteps)
    M_x is the concept, dilated by a few pixels   (WHERE: poisons teach the rest of the image)

Training, adaptive poisons, the mask page, the table and the metadata of embeddings all take it from here.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from .errors import InputError
from .jpeg import check_quality, jpeg
from .masks import MASK_MODES, NORMALIZATIONS, masked_mean, prepare_mask
from .models import Model
from .timesteps import (
    DISTRIBUTIONS,
    check_range,
    first_timestep,
    noise_level,
    sample_timesteps,
    timestep_weights,
)

__all__ = ["PAPER_JPEG_QUALITY", "PAPER_LOG_SNR", "PAPER_T_MIN", "SafeZone", "paper_dilation"]

PAPER_JPEG_QUALITY = 25
PAPER_T_MIN = 500  # of Stable Diffusion's 1000 timesteps
PAPER_LOG_SNR = -0.9625  # ln(abar / (1 - abar)) of Stable Diffusion there: an SNR of 0.382


def paper_dilation(resolution: int) -> int:
    """The paper's mask dilation of 16 pixels at 512, in pixels at another training resolution."""
    return round(16 * resolution / 512)


@dataclass(frozen=True)
class SafeZone:
    """Where and when training is safe from poisons. By default everywhere and always: no defence.

    Timesteps are drawn from [t_min, t_max), where None is the model's last; the shapes "power" and "tanh" are
    those of Appendix H. Masks grow by `mask_dilation` pixels at the training resolution and multiply what
    `mask_mode` names (Sec. 5.2.3); "none" only records the loss inside and outside them. InputError for
    values out of range.
    """

    jpeg_quality: int | None = None
    t_min: int = 0
    t_max: int | None = None
    t_distribution: str = "uniform"
    t_power: float = 1.0
    t_center: float = 500.0
    t_width: float = 100.0
    mask_dilation: int = 0
    mask_mode: str = "loss"
    mask_normalization: str = "none"

    def __post_init__(self):
        if self.jpeg_quality is not None:
            check_quality(self.jpeg_quality)
        for name, value, known in (("timestep distribution", self.t_distribution, DISTRIBUTIONS),
                                   ("mask mode", self.mask_mode, MASK_MODES),
                                   ("mask normalization", self.mask_normalization, NORMALIZATIONS)):
            if value not in known:
                raise InputError(f"Unknown {name} '{value}'; choose from: {', '.join(known)}.")
        if self.mask_dilation < 0:
            raise InputError(f"The mask dilation must not be negative, but is {self.mask_dilation}.")

    @classmethod
    def paper(cls, resolution: int, model: Model | None = None, **given: Any) -> "SafeZone":
        """The paper's settings at a training resolution in pixels, but for those `given` that are not None.

        With a model, t_min is the first timestep with at most the signal-to-noise ratio that Stable Diffusion
        has at t = 500; without one it is 500.
        """
        t_min = PAPER_T_MIN if model is None else first_timestep(
            model.log_snr(torch.arange(model.num_timesteps)), PAPER_LOG_SNR)
        settings = {"jpeg_quality": PAPER_JPEG_QUALITY, "t_min": t_min,
                    "mask_dilation": paper_dilation(resolution)}
        return cls(**settings | {name: value for name, value in given.items() if value is not None})

    def fit(self, num_timesteps: int) -> "SafeZone":
        """The same zone with t_max filled in for a model; InputError when the model lacks these timesteps."""
        zone = replace(self, t_max=num_timesteps if self.t_max is None else self.t_max)
        check_range(zone.t_min, zone.t_max, num_timesteps)
        zone.weights(num_timesteps)
        return zone

    def purify(self, image: Image.Image) -> Image.Image:
        """An RGB image at the training resolution, JPEG-compressed (Sec. 4.4)."""
        return image if self.jpeg_quality is None else jpeg(image, self.jpeg_quality)

    def weights(self, num_timesteps: int) -> torch.Tensor | None:
        """Probability of every timestep of [t_min, t_max), float64; None is uniform."""
        return None if self.t_distribution == "uniform" else _weights(self, num_timesteps)

    def timestep_range(self, num_timesteps: int) -> tuple[int, int, torch.Tensor | None]:
        """t_min, t_max and the weights between them for a model that has `num_timesteps`."""
        t_max = num_timesteps if self.t_max is None else self.t_max
        return self.t_min, t_max, self.weights(num_timesteps)

    def timesteps(self, count: int, num_timesteps: int, *, device: torch.device | str | None = None,
                  generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw `count` timesteps of a model that has `num_timesteps`, long (count,): WHEN (Sec. 4.2)."""
        return sample_timesteps(count, *self.timestep_range(num_timesteps), device=device,
                                generator=generator)

    def prepare_mask(self, mask: Image.Image, resolution: int, center_crop: bool = False) -> torch.Tensor:
        """A mask cropped and resized like its image, then dilated, (1, 1, R, R): WHERE (Sec. 4.3)."""
        return prepare_mask(mask, resolution, center_crop, self.mask_dilation)

    def mask_image(self, image: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """An image (..., H, W) in [0, 1], mid-grey outside the mask if the mode masks images (IM, LIM)."""
        masks_images = mask is not None and self.mask_mode.startswith("image")
        return 0.5 + (image - 0.5) * mask if masks_images else image

    def mask_latents(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """What multiplies the noised latents: the mask (B, 1, h, w), if the mode masks them (ZM)."""
        return mask if self.mask_mode == "latent" else None

    def loss(self, error: torch.Tensor, mask: torch.Tensor | None = None,
             weights: torch.Tensor | None = None) -> torch.Tensor:
        """The scalar loss of Eq. 7 of squared errors (B, ..., h, w) and a mask (B, 1, h, w) on their grid.

        `weights` (B,) multiply the errors of each sample.
        """
        if weights is not None:
            error = error * weights.view(-1, *[1] * (error.dim() - 1))
        return masked_mean(error, mask if self.mask_mode.endswith("loss") else None, self.mask_normalization)

    def describe(self, model: Model, masks: torch.Tensor | None) -> list[str]:
        """The lines printed when a training starts; `masks` (N, 2, 1, h, w) are those on the latent grid."""
        _, t_max, _ = self.timestep_range(model.num_timesteps)
        log_snr = model.log_snr(torch.tensor([self.t_min, t_max - 1]))
        (low, high), (first, last) = noise_level(log_snr).tolist(), log_snr.tolist()
        return [
            f"JPEG quality {self.jpeg_quality}" if self.jpeg_quality else "no JPEG",
            f"timesteps {self.t_min} to {t_max - 1} ({self.t_distribution}): noise level {low:.3f} to "
            f"{high:.3f}, logSNR {first:.2f} to {last:.2f}",
            "no masks: the loss counts everywhere" if masks is None else
            f"{len(masks)} masks, mode {self.mask_mode}, dilated by {self.mask_dilation} px: "
            f"{100 * masks.mean().item():.0f} % of the latent grid is "
            + ("observed" if self.mask_mode == "none" else "trained on")]


@functools.lru_cache(maxsize=64)
def _weights(zone: SafeZone, num_timesteps: int) -> torch.Tensor:
    t_max = num_timesteps if zone.t_max is None else zone.t_max
    return timestep_weights(zone.t_distribution, zone.t_min, t_max, num_timesteps, power=zone.t_power,
                            center=zone.t_center, width=zone.t_width)
