"""What each poison maximises or minimises, and how its gradient reaches the pixels (paper Eq. 4).

    ADM+ (AdvDM): maximise over delta  E_{t, noise} mean((prediction(z_t, t, c) - target)^2),
                  z0 = scale * E(x + delta)

A poison is an objective, an estimator of its gradient with respect to z0, a direction and a start. The way
from z0 back to the pixels is common to all: `through_encoder`, which never holds the graphs of the U-Net and
of the VAE at the same time.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .diffusion import LatentDiffusion
from .errors import InputError
from .pgd import Gradient
from .timesteps import sample_timesteps

__all__ = ["POISONS", "Poison", "autograd_estimator", "denoising_objective", "draw", "find_poison",
           "image_generator", "image_gradient", "measure", "through_encoder"]


def image_generator(image: torch.Tensor, seed: int, purpose: str = "attack") -> torch.Generator:
    """A CPU generator seeded by (seed, purpose, sha256 of the picture),
    so that a picture's randomness is its own.

    `image` is (3, H, W) in [0, 1]. Neither the device, nor the other pictures,
    nor their order can change what it draws.
    """
    levels = (image.detach().float().cpu() * 255).round().to(torch.uint8).contiguous()
    digest = hashlib.sha256(levels.numpy().tobytes()).hexdigest()
    key = hashlib.sha256(f"{seed} {purpose} {digest}".encode()).digest()
    # A CPU generator reads 32 bits of its seed.
    return torch.Generator().manual_seed(int.from_bytes(key[:4], "little"))


def draw(latents: torch.Tensor, generators: list[torch.Generator], t_min: int,
         t_max: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise like `latents` and timesteps (B,) from U[t_min, t_max),
    one of each from every picture's own CPU generator."""
    timesteps = torch.cat([sample_timesteps(1, t_min, t_max, generator=generator)
                           for generator in generators])
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    return noise.to(latents), timesteps.to(latents.device)


def denoising_objective(model: LatentDiffusion, latents: torch.Tensor, noise: torch.Tensor,
                        timesteps: torch.Tensor, text_states: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the U-Net's prediction per picture, float32 (B,), Eq. 4;
    `text_states` (1 or B, L, D)."""
    text_states = text_states.expand(len(latents), -1, -1)
    return model.loss(latents, noise, timesteps, text_states).flatten(1).mean(1)


def autograd_estimator(objective: Callable, model: LatentDiffusion, latents: torch.Tensor,
                       *condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact gradient of the objective with respect to `latents`, float32 or wider,
    and its values (B,)."""
    leaf = latents.detach().requires_grad_()
    # The gradient of a mean over n elements shrinks with n, out of the range of float16:
    # differentiate n times the mean.
    count = leaf[0].numel()
    with torch.enable_grad():
        values = objective(model, leaf, *condition)
        (gradient,) = torch.autograd.grad(values.sum() * count, leaf)
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / count, values.detach()


@dataclass(frozen=True)
class Poison:
    """A data poison:
    `estimator(objective, model, latents, noise, timesteps, text_states)` gives gradient and values."""

    objective: Callable[..., torch.Tensor]
    estimator: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    ascend: bool
    random_start: bool


POISONS = {
    "adm+": Poison(denoising_objective, autograd_estimator, ascend=True, random_start=True),
}


def find_poison(name: str) -> Poison:
    """The poison of a name; InputError lists the names there are."""
    if name not in POISONS:
        raise InputError(f"Unknown poison '{name}'; choose from: {', '.join(POISONS)}.")
    return POISONS[name]


def through_encoder(model: LatentDiffusion, images: torch.Tensor,
                    latent_gradient: Gradient) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry a gradient with respect to the mean latent z0 back to the pixels;
    gradient like `images`, and values (B,).

    `latent_gradient` maps z0 (B, C, h, w) to its gradient and the values, and frees its own graph. Only
    then is the encoder run again, with a graph: peak memory is the larger of the two, not the sum, for the
    price of one encoding.
    """
    with torch.no_grad():
        latents = model.encode(images)
    cotangent, values = latent_gradient(latents)
    # Backward is linear in the cotangent: at unit size it neither under- nor overflows in half precision.
    size = cotangent.flatten(1).abs().amax(1).clamp(min=torch.finfo(cotangent.dtype).tiny).view(-1, 1, 1, 1)
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        latents = model.encode(leaf)
        (gradient,) = torch.autograd.grad(latents, leaf, (cotangent / size).to(latents.dtype))
    return gradient * size.to(gradient.dtype), values


def image_gradient(poison: Poison, model: LatentDiffusion, text_states: torch.Tensor,
                   generators: list[torch.Generator], *, t_min: int, t_max: int, draws: int = 1) -> Gradient:
    """The `gradient` that `pgd.pgd` asks for:
    every call averages `draws` fresh draws of timestep and noise per picture.

    The draws go through the U-Net one after another, so that memory does not grow with them,
    and share one VAE backward.
    """
    def latent_gradient(latents):
        parts = [poison.estimator(poison.objective, model, latents, *draw(latents, generators, t_min, t_max),
                                  text_states) for _ in range(draws)]
        gradients, values = zip(*parts, strict=True)
        return sum(gradients) / draws, sum(values) / draws

    return lambda images: through_encoder(model, images, latent_gradient)


@torch.no_grad()
def measure(poison: Poison, model: LatentDiffusion, images: torch.Tensor, text_states: torch.Tensor,
            generators: list[torch.Generator], *, t_min: int, t_max: int, draws: int = 8) -> torch.Tensor:
    """The objective of (B, 3, H, W) in [0, 1], averaged over `draws` draws, (B,);
    fresh equal generators, equal draws."""
    latents = model.encode(images)
    return sum(poison.objective(model, latents, *draw(latents, generators, t_min, t_max), text_states)
               for _ in range(draws)) / draws
