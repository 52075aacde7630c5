"""The six data poisons: what each maximises or minimises, and how its gradient reaches the pixels.

    ADM+-  up or down:  E_{t, noise} mean(residual^2),  residual = prediction(z_t, t, c) - target     Eq. 4
    SDS+-  the same, but the gradient at z0 is the residual itself: the U-Net's Jacobian is left out
           (score distillation; Xue et al. 2024)
    EA     down:        mean((z0 - E(x_g))^2)                                                         Eq. 5
    DA     down:        E_noise mean((D(chain(z0)) - x_g)^2), chain: a few steps of guided image-to-image
           (Salman et al. 2023)

with z0 = scale * E(x + delta) and x_g a target picture. A poison is an objective, an estimator of its
gradient with respect to z0, a direction and a start. The way from z0 back to the pixels is common to all:
`through_encoder`, which holds the graphs of the U-Net and of the VAE one after the other. An adaptive
attack is one of them with what a defence does built in: `jpeg_qualities`, a timestep range, a `loss_mask`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.checkpoint import checkpoint

from .diffusion import LatentDiffusion
from .errors import InputError
from .jpeg import jpeg_straight_through
from .masks import to_latent_grid
from .pgd import Gradient
from .timesteps import sample_timesteps

__all__ = ["POISONS", "Attack", "Poison", "autograd_estimator", "denoising_objective", "diffusion_objective",
           "draw", "encoder_objective", "find_poison", "image_generator", "image_gradient", "image_to_image",
           "measure", "sds_estimator", "target_pattern", "through_encoder"]


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


@dataclass(frozen=True)
class Attack:
    """What is attacked and how: all that an objective may need besides the pictures and their generators.

    `text_states` (1 or B, L, D) is the prompt's, timesteps come from [t_min, t_max), `draws` draws of noise
    and timestep are averaged in every gradient. `target` (1, 3, H, W) in [0, 1] is for EA and DA; None is,
    for EA, the latent of zeros. `loss_mask` (B, 1, H, W) counts errors only where it is 1. `jpeg_qualities`
    (lowest, highest) compresses the pictures before the encoder, at a quality drawn anew for every gradient.
    `one_graph` saves an encoding for more memory (`through_encoder`). DA takes the last `chain_steps` steps
    of a schedule that begins at noise level `strength`, with `guidance_scale` against `empty_states`
    (1, L, D).
    """

    model: LatentDiffusion
    text_states: torch.Tensor
    t_min: int = 0
    t_max: int = 1000
    draws: int = 1
    target: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    jpeg_qualities: tuple[int, int] | None = None
    one_graph: bool = False
    empty_states: torch.Tensor | None = None
    chain_steps: int = 4
    strength: float = 0.8
    guidance_scale: float = 7.5

    @cached_property
    def target_latent(self) -> torch.Tensor | float:
        """The target's mean latent (1, C, h, w), or 0."""
        with torch.no_grad():
            return 0.0 if self.target is None else self.model.encode(self.target)

    def cells(self, like: torch.Tensor) -> torch.Tensor:
        """The loss mask on the grid of `like` (B, C, h, w), (B, 1, h, w); it must be given."""
        return to_latent_grid(self.loss_mask.to(like), like.shape[-2:])

    def mean(self, error: torch.Tensor) -> torch.Tensor:
        """Mean of an error (B, C, h, w) per picture, (B,), within the loss mask."""
        if self.loss_mask is None:
            return error.flatten(1).mean(1)
        mask = self.cells(error).expand(len(error), -1, -1, -1)
        return (error * mask).flatten(1).sum(1) / (mask.flatten(1).sum(1) * error.shape[1]).clamp(min=1)

    def encoder(self, generators: list[torch.Generator]) -> Callable[[torch.Tensor], torch.Tensor]:
        """How pictures become latents this time: the encoder, behind JPEG for an attack through it."""
        if self.jpeg_qualities is None:
            return self.model.encode
        low, high = self.jpeg_qualities
        qualities = [int(torch.randint(low, high + 1, (), generator=generator)) for generator in generators]

        def encode(images):
            return self.model.encode(torch.cat([
                jpeg_straight_through(image, quality)
                for image, quality in zip(images.split(1), qualities, strict=True)]))
        return encode


def draw(latents: torch.Tensor, generators: list[torch.Generator], t_min: int,
         t_max: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise like `latents` and timesteps (B,) from U[t_min, t_max),
    one of each from every picture's own CPU generator."""
    timesteps = torch.cat([sample_timesteps(1, t_min, t_max, generator=generator)
                           for generator in generators])
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    return noise.to(latents), timesteps.to(latents.device)


def _residual(attack: Attack, latents: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    noise, timesteps = draw(latents, generators, attack.t_min, attack.t_max)
    return attack.model.residual(latents, noise, timesteps, attack.text_states.expand(len(latents), -1, -1))


def denoising_objective(attack: Attack, latents: torch.Tensor,
                        generators: list[torch.Generator]) -> torch.Tensor:
    """Mean squared error of the U-Net's prediction at one draw per picture, float32 (B,), Eq. 4."""
    return attack.mean(_residual(attack, latents, generators).square())


def encoder_objective(attack: Attack, latents: torch.Tensor,
                      generators: list[torch.Generator]) -> torch.Tensor:
    """Mean squared distance of the latents to the target's, float32 (B,), Eq. 5; draws nothing."""
    return attack.mean((latents - attack.target_latent).float().square())


def image_to_image(attack: Attack, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The pictures that guided image-to-image makes of `latents` (B, C, h, w), float32 (B, 3, H, W),
    about [0, 1]; gradients flow.

    The timesteps are those of Diffusers' image-to-image pipeline with a DDIM scheduler. Every step and the
    decoder are checkpointed: memory does not grow with `chain_steps`.
    """
    from diffusers import DDIMScheduler

    model = attack.model
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    steps = round(attack.chain_steps / attack.strength)
    scheduler.set_timesteps(steps, device=latents.device)
    timesteps = scheduler.timesteps[steps - attack.chain_steps:]
    text_states = torch.cat([states.expand(len(latents), -1, -1)
                             for states in (attack.empty_states, attack.text_states)])

    def step(latents, t):
        empty, prompted = model.unet(torch.cat([latents] * 2), t, text_states).sample.chunk(2)
        prediction = empty + attack.guidance_scale * (prompted - empty)
        return scheduler.step(prediction, t, latents).prev_sample

    latents = scheduler.add_noise(latents, noise, timesteps[:1].expand(len(latents)))
    for t in timesteps:
        latents = checkpoint(step, latents, t, use_reentrant=False)
    return checkpoint(model.decode, latents, use_reentrant=False)


def diffusion_objective(attack: Attack, latents: torch.Tensor,
                        generators: list[torch.Generator]) -> torch.Tensor:
    """Mean squared distance of what image-to-image makes of the latents to the target, float32 (B,)."""
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    made = image_to_image(attack, latents, noise.to(latents))
    return attack.mean((made - attack.target.to(made)).square())


def autograd_estimator(objective: Callable, attack: Attack, latents: torch.Tensor,
                       generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact gradient of the objective with respect to `latents`, float32 or wider,
    and its values (B,)."""
    leaf = latents.detach().requires_grad_()
    # The gradient of a mean over n elements shrinks with n, out of the range of float16:
    # differentiate n times the mean.
    count = leaf[0].numel()
    with torch.enable_grad():
        values = objective(attack, leaf, generators)
        (gradient,) = torch.autograd.grad(values.sum() * count, leaf)
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / count, values.detach()


@torch.no_grad()
def sds_estimator(objective: Callable, attack: Attack, latents: torch.Tensor,
                  generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual in place of the gradient of the denoising objective, and that objective's values (B,):
    one pass of the U-Net forward, none backward."""
    residual = _residual(attack, latents, generators)
    values = attack.mean(residual.square())
    if attack.loss_mask is not None:
        residual = residual * attack.cells(residual)
    return residual / residual[0].numel(), values


@dataclass(frozen=True)
class Poison:
    """A data poison: `objective(attack, latents, generators)` gives values (B,),
    `estimator(objective, attack, latents, generators)` a gradient like `latents` and the values.

    `unet_graph` tells whether the estimator differentiates the U-Net.
    """

    objective: Callable[..., torch.Tensor]
    estimator: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    ascend: bool
    random_start: bool
    unet_graph: bool = True


POISONS = {
    "adm+": Poison(denoising_objective, autograd_estimator, ascend=True, random_start=True),
    "adm-": Poison(denoising_objective, autograd_estimator, ascend=False, random_start=True),
    "sds+": Poison(denoising_objective, sds_estimator, ascend=True, random_start=False, unet_graph=False),
    "sds-": Poison(denoising_objective, sds_estimator, ascend=False, random_start=False, unet_graph=False),
    "ea": Poison(encoder_objective, autograd_estimator, ascend=False, random_start=True, unet_graph=False),
    "da": Poison(diffusion_objective, autograd_estimator, ascend=False, random_start=False),
}


def find_poison(name: str) -> Poison:
    """The poison of a name; InputError lists the names there are."""
    if name not in POISONS:
        raise InputError(f"Unknown poison '{name}'; choose from: {', '.join(POISONS)}.")
    return POISONS[name]


def target_pattern(height: int, width: int) -> torch.Tensor:
    """A high-contrast target picture, float32 (1, 3, height, width) of 0 and 1:
    black and white rings, inverted in the squares of a checkerboard."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    rings = torch.sin(8 * torch.pi * torch.hypot(x, y)) > 0
    squares = (torch.sin(2 * torch.pi * x) > 0) ^ (torch.sin(2 * torch.pi * y) > 0)
    return (rings ^ squares).float().expand(1, 3, -1, -1)


def through_encoder(encode: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor,
                    latent_gradient: Gradient, one_graph: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry a gradient with respect to the mean latent z0 back to the pixels;
    gradient like `images`, and values (B,).

    `encode` maps pictures to z0, `latent_gradient` maps z0 (B, C, h, w) to its gradient and the values, and
    frees its own graph. Only then is the encoder run again, with a graph: peak memory is the larger of the
    two, not the sum, for the price of one encoding. With `one_graph` the encoder runs once, and its graph
    waits for `latent_gradient`.
    """
    leaf = images.detach().requires_grad_()
    with torch.set_grad_enabled(one_graph):
        latents = encode(leaf)
    cotangent, values = latent_gradient(latents.detach())
    # Backward is linear in the cotangent: at unit size it neither under- nor overflows in half precision.
    size = cotangent.flatten(1).abs().amax(1).clamp(min=torch.finfo(cotangent.dtype).tiny).view(-1, 1, 1, 1)
    with torch.enable_grad():
        latents = latents if one_graph else encode(leaf)
        (gradient,) = torch.autograd.grad(latents, leaf, (cotangent / size).to(latents.dtype))
    return gradient * size.to(gradient.dtype), values


def image_gradient(poison: Poison, attack: Attack, generators: list[torch.Generator]) -> Gradient:
    """The `gradient` that `pgd.pgd` asks for:
    every call averages `attack.draws` fresh draws of timestep and noise per picture.

    The draws go through the U-Net one after another, so that memory does not grow with them,
    and share one VAE backward.
    """
    def latent_gradient(latents):
        parts = [poison.estimator(poison.objective, attack, latents, generators)
                 for _ in range(attack.draws)]
        gradients, values = zip(*parts, strict=True)
        return sum(gradients) / attack.draws, sum(values) / attack.draws

    one_graph = attack.one_graph or not poison.unet_graph  # without the U-Net's there is no sum to avoid
    return lambda images: through_encoder(attack.encoder(generators), images, latent_gradient, one_graph)


@torch.no_grad()
def measure(poison: Poison, attack: Attack, images: torch.Tensor, generators: list[torch.Generator],
            draws: int = 8) -> torch.Tensor:
    """The objective of (B, 3, H, W) in [0, 1], averaged over `draws` draws, (B,);
    fresh equal generators, equal draws."""
    return sum(poison.objective(attack, attack.encoder(generators)(images), generators)
               for _ in range(draws)) / draws
