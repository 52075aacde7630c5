"""THE METHOD: Safe-Zone Training (paper Sec. 4.5, Eq. 7), the part of training that poisons do not reach.

    minimize over v   E_{x, t, noise} mean( Resize(M_x) * (prediction(z_t, t, c(v)) - target)^2 )
    z_t is JPEG_q(x), encoded and noised          (HOW: JPEG removes high-frequency perturbations)
    t_min <= t < t_max                            (WHEN: poisons act at low timesteps)
    M_x is the concept, dilated by a few pixels   (WHERE: poisons teach the rest of the image)

Training, adaptive poisons, the mask page, the table and the metadata of embeddings use it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .errors import InputError, check_choice
from .images import crop_and_resize, read_image
from .joint_transform import transform_together
from .jpeg import check_quality, jpeg
from .masks import (
    MASK_MODES,
    NORMALIZATIONS,
    dilate,
    find_mask,
    masked_mean,
    prepare_mask,
    read_mask,
    to_grid_of,
)
from .notices import notice
from .schedules import Schedule
from .timesteps import (
    DISTRIBUTIONS,
    check_range,
    first_timestep,
    noise_level,
    redraw_outside,
    sample_timesteps,
    timestep_weights,
)

__all__ = ["PAPER_JPEG_QUALITY", "PAPER_LOG_SNR", "PAPER_T_MIN", "Density", "SafeZone", "count_instances",
           "paper_dilation"]

# Random numbers in [0, 1): a function of their count, or a tensor.
Density = Callable[[int], torch.Tensor] | torch.Tensor

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
            check_choice(name, value, known)
        if self.t_min < 0 or (self.t_max is not None and self.t_max <= self.t_min):
            raise InputError(f"The timestep range needs 0 <= t_min < t_max, but t_min is {self.t_min} and "
                             f"t_max is {self.t_max}.")
        if self.mask_dilation < 0:
            raise InputError(f"The mask dilation must not be negative, but is {self.mask_dilation}.")

    @classmethod
    def paper(cls, resolution: int, model: Any = None, **given: Any) -> "SafeZone":
        """The paper's settings at a resolution in pixels; `given` settings that are not None replace them.

        With a `Model` or a Diffusers scheduler, t_min is the first timestep with at most the signal-to-noise
        ratio that Stable Diffusion has at t = 500; without one it is 500.
        """
        schedule = model if model is None or hasattr(model, "log_snr") else Schedule(model)
        t_min = PAPER_T_MIN if schedule is None else first_timestep(
            schedule.log_snr(torch.arange(schedule.num_timesteps)), PAPER_LOG_SNR)
        settings = {"jpeg_quality": PAPER_JPEG_QUALITY, "t_min": t_min,
                    "mask_dilation": paper_dilation(resolution)}
        return cls(**settings | {name: value for name, value in given.items() if value is not None})

    def fit(self, num_timesteps: int) -> "SafeZone":
        """The same zone with t_max filled in for a model; InputError when the model lacks these timesteps."""
        zone = replace(self, t_max=self._end(num_timesteps))
        check_range(zone.t_min, zone.t_max, num_timesteps)
        zone.weights(num_timesteps)  # which refuses a distribution that gives no timestep a chance
        return zone

    def purify(self, image: Image.Image) -> Image.Image:
        """An RGB image at the training resolution, JPEG-compressed (Sec. 4.4)."""
        return image if self.jpeg_quality is None else jpeg(image, self.jpeg_quality)

    def weights(self, num_timesteps: int) -> torch.Tensor | None:
        """Probability of every timestep of [t_min, t_max), float64, of sum 1; None is uniform."""
        return None if self.t_distribution == "uniform" else _weights(self, num_timesteps)

    def timestep_distribution(self, num_timesteps: int) -> tuple[int, int, torch.Tensor | None]:
        """t_min, t_max and the weights between them for a model that has `num_timesteps`."""
        return self.t_min, self._end(num_timesteps), self.weights(num_timesteps)

    def _end(self, num_timesteps: int) -> int:
        return num_timesteps if self.t_max is None else self.t_max

    def timesteps(self, scheduler: Any, count: int, u: Density | None = None, *,
                  prior_preservation: bool = False, device: torch.device | str | None = None,
                  generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw `count` timesteps of a Diffusers scheduler inside the zone: WHEN (Sec. 4.2).

        DDPM schedulers give long integers, those of flow and EDM values of `scheduler.timesteps`. `u` is a
        density such as `compute_density_for_timestep_sampling`, which keeps its shape inside: see `restrict`.
        With `prior_preservation`, the second half of the batch are class images, which get all timesteps.
        """
        schedule = Schedule(scheduler)
        if u is None:
            indices = self.indices(scheduler, count, prior_preservation=prior_preservation, device=device,
                                   generator=generator)
        else:
            u = self.restrict(scheduler, count, u, prior_preservation=prior_preservation, generator=generator)
            indices = (u * len(schedule.timesteps)).long()
        return schedule.timesteps.to(indices.device)[indices].to(device or indices.device)

    def indices(self, scheduler: Any, count: int, *, prior_preservation: bool = False,
                device: torch.device | str | None = None,
                generator: torch.Generator | None = None) -> torch.Tensor:
        """Indices into `scheduler.timesteps`, long (count,), as `timesteps` draws them.

        They are on the `device` for a DDPM scheduler, else where the generator is.
        """
        schedule = Schedule(scheduler)
        indices = self._inside(schedule).nonzero().flatten()
        if schedule.discrete:
            indices = indices.flip(0)  # rising timesteps: what torch.randint would draw
        else:
            device = None if generator is None else generator.device
        weights = self.weights(schedule.num_timesteps)
        if weights is not None:
            nearest = schedule.t[indices].round().long() - self.t_min  # t_max itself is not one of them
            weights = weights[nearest.clamp(max=len(weights) - 1)]
        everywhere = len(indices) == len(schedule.timesteps) and weights is None
        own = count if everywhere else count_instances(count, prior_preservation)
        drawn = indices.to(device)[sample_timesteps(own, 0, len(indices), weights, device=device,
                                                    generator=generator)]
        rest = sample_timesteps(count - own, 0, len(schedule.timesteps), device=device, generator=generator)
        return torch.cat([drawn, rest]) if own < count else drawn

    def restrict(self, scheduler: Any, count: int, u: Density, *, prior_preservation: bool = False,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw `count` numbers in [0, 1) by a density, float (count,), whose timesteps are in the zone.

        As in Diffusers' examples, the timestep of u is `scheduler.timesteps[int(u T)]`. Draws outside the
        zone are rejected: a function `u` is asked for others, of a tensor `u` of at least `count` numbers
        others are taken. InputError when all are outside.
        """
        if self.t_distribution != "uniform":
            raise InputError(f"Timesteps come from a density, so the timestep distribution "
                             f"'{self.t_distribution}' cannot be used; leave it out.")
        inside = self._inside(Schedule(scheduler))
        if isinstance(u, torch.Tensor):
            device = None if generator is None else generator.device
            first, draw = u[:count].clone(), lambda n: u[torch.randint(
                len(u), (n,), generator=generator, device=device).to(u.device)]
        else:
            first, draw = u(count), u
        return redraw_outside(first, draw, lambda u: inside.to(u.device)[(u * len(inside)).long()],
                              count_instances(count, prior_preservation))

    def _inside(self, schedule: Schedule) -> torch.Tensor:
        """Which timesteps of a schedule's list are in the zone, bool (N,)."""
        t_max = self._end(schedule.num_timesteps)
        at = torch.tensor([PAPER_T_MIN])
        if self.t_min == PAPER_T_MIN < schedule.num_timesteps and (
                schedule.log_snr(at) > PAPER_LOG_SNR + 0.01):
            notice("t_min 500 is that of Stable Diffusion; SafeZone.paper(resolution, scheduler) chooses "
                   "the scheduler's by its signal-to-noise ratio.")
        inside = (schedule.t >= self.t_min) & (schedule.t < t_max)
        if not inside.any():
            raise InputError(f"The scheduler has no timestep from {self.t_min} to below {t_max}.")
        return inside

    def open(self, path: str | Path, resolution: int, masks: str | Path | None = None, *,
             center_crop: bool = False) -> tuple[Image.Image, torch.Tensor]:
        """Read an image as the training sees it: RGB (R, R), JPEG-compressed, and its mask (1, R, R).

        `masks` is the mask's file, or a folder of masks (`find_masks`); without it the mask is all ones.
        """
        image, mask = read_image(path), torch.ones(1, resolution, resolution)
        if masks is not None:
            mask_image = read_mask(find_mask(masks, path), image.size)
            mask = self.prepare_mask(mask_image, resolution, center_crop)[0]
        return self.purify(crop_and_resize(image, resolution, center_crop)), mask

    def transform(self, transform: Callable, image: Image.Image,
                  mask: Image.Image) -> tuple[Image.Image, torch.Tensor]:
        """An image and its mask after the same random crops and flips, as `open` gives them.

        `transform` is made of torchvision.transforms.v2, and leaves images Pillow images.
        """
        image, mask = transform_together(transform, image, mask)
        return self.purify(image), dilate(mask[None], self.mask_dilation)[0]

    def prepare_mask(self, mask: Image.Image, resolution: int, center_crop: bool = False) -> torch.Tensor:
        """A mask cropped and resized like its image, then dilated, (1, 1, R, R): WHERE (Sec. 4.3)."""
        return prepare_mask(mask, resolution, center_crop, self.mask_dilation)

    def mask_image(self, image: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """An image (..., H, W) in [0, 1], mid-grey outside the mask (..., 1, H, W) with IM and LIM."""
        masks_images = mask is not None and self.mask_mode.startswith("image")
        return 0.5 + (image - 0.5) * mask if masks_images else image

    def mask_latents(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """What multiplies the noised latents: the mask (B, 1, h, w), if the mode masks them (ZM)."""
        return mask if self.mask_mode == "latent" else None

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, masks: torch.Tensor | None = None,
             weights: torch.Tensor | None = None, *, prior_preservation: bool = False,
             prior_loss_weight: float = 1.0) -> torch.Tensor:
        """The scalar loss of Eq. 7 of a prediction and its target, in float32: WHERE (Sec. 4.3).

        Both are (B, C, h, w), with frames (B, C, F, h, w), or packed into tokens (B, L, C). `masks`
        (B, 1, H, W) may be of the images' size. `weights`, of B elements, multiply the error of each sample.
        With `prior_preservation`, the second half of the batch are class images: their unmasked mean is
        added, times `prior_loss_weight`.
        """
        error = (prediction.float() - target.float()).square()
        if weights is not None:
            error = error * weights.to(error).view(-1, *[1] * (error.dim() - 1))
        count = count_instances(len(error), prior_preservation)
        own, of_class = error[:count], error[count:]
        if masks is not None:
            own, masks = to_grid_of(own, masks[:len(own)].to(own))
        loss = self.mean(own, masks)
        return loss + prior_loss_weight * of_class.mean() if prior_preservation else loss

    def mean(self, error: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean of Eq. 7 of any error (B, C, ..., h, w) and a mask (B, 1, h, w) on its grid, a scalar."""
        return masked_mean(error, mask if self.mask_mode.endswith("loss") else None, self.mask_normalization)

    def describe(self, schedule: Any, masks: torch.Tensor | None) -> list[str]:
        """The lines printed when a training starts, with a `Model` or a `Schedule`.

        `masks` (N, 2, 1, h, w) are those on the latent grid.
        """
        t_max = self._end(schedule.num_timesteps)
        log_snr = schedule.log_snr(torch.tensor([self.t_min, t_max - 1]))
        (low, high), (first, last) = noise_level(log_snr).tolist(), log_snr.tolist()
        return [
            f"JPEG quality {self.jpeg_quality}" if self.jpeg_quality else "no JPEG",
            f"timesteps {self.t_min} to {t_max - 1} ({self.t_distribution}): noise level {low:.3f} to "
            f"{high:.3f}, logSNR {first:.2f} to {last:.2f}",
            "no masks: the loss counts everywhere" if masks is None else
            f"{len(masks)} masks, mode {self.mask_mode}, dilated by {self.mask_dilation} px: "
            f"{100 * masks.mean().item():.0f} % of the latent grid is "
            + ("observed" if self.mask_mode == "none" else "trained on")]


def count_instances(count: int, prior_preservation: bool) -> int:
    """How many images of a batch are of the concept, and not of its class."""
    return count // 2 if prior_preservation else count


@functools.lru_cache(maxsize=64)
def _weights(zone: SafeZone, num_timesteps: int) -> torch.Tensor:
    return timestep_weights(zone.t_distribution, zone.t_min, zone._end(num_timesteps), num_timesteps,
                            power=zone.t_power, center=zone.t_center, width=zone.t_width)
