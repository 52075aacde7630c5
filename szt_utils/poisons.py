"""The six data poisons: the objective of each, and how its gradient reaches the pixels.

    ADM+-  up or down:  E_{t, noise} mean(residual^2),  residual = prediction(z_t, t, c) - target     Eq. 4
    SDS+-  the same, but the gradient at z0 is the residual itself, without the network's Jacobian
           (score distillation; Xue et al. 2024)
    EA     down:        mean((z0 - E(x_g))^2)                                                         Eq. 5
    DA     down:        E_noise mean((D(chain(z0)) - x_g)^2), chain: a few steps of guided image-to-image
           (Salman et al. 2023)

with z0 = scale * E(x + delta) and x_g a target image. A `Victim` is what is attacked, a `Poison` an attack.
The victim of a plain attack trains in `SafeZone()`; that of an adaptive attack in the zone of a defence that
the attacker knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.checkpoint import checkpoint

from .errors import InputError, check_choice
from .jpeg import jpeg_straight_through
from .masks import to_latent_grid
from .models import Condition, Model, expand, residual
from .pgd import Gradient
from .safe_zone import SafeZone
from .timesteps import sample_timesteps

__all__ = ["POISONS", "LatentGradient", "Objective", "Poison", "Victim", "check_chain",
           "denoising_objective", "differentiate", "diffusion_objective", "encoder_objective", "find_poison",
           "image_gradient", "image_to_image", "measure_objective", "pull_back", "sample_noise_and_timesteps",
           "score_distillation", "target_pattern"]


@dataclass(frozen=True)
class Victim:
    """What is attacked: a model, and the training that it is used for.

    `condition` is the attacked prompt's, of batch 1. The images pass the JPEG of `zone`, or one of a quality
    in `random_jpeg` (lowest, highest) that is drawn for every gradient; timesteps are the zone's. `loss_mask`
    (B, 1, H, W), dilated already, counts errors only where it is 1. `target` (1, 3, H, W) in [0, 1] is for EA
    and DA; None is, for EA, the latent of zeros. Every gradient averages `draws` draws of noise and timestep.
    `one_graph` holds the graphs of the encoder and the network together, which saves an encoding
    (`image_gradient`). DA takes the last `chain_steps` of chain_steps / strength denoising steps, with
    `guidance_scale` against the condition `empty`, of batch 1.
    """

    model: Model
    condition: Condition
    zone: SafeZone = SafeZone()
    random_jpeg: tuple[int, int] | None = None
    loss_mask: torch.Tensor | None = None
    target: torch.Tensor | None = None
    draws: int = 1
    one_graph: bool = False
    empty: Condition | None = None
    chain_steps: int = 4
    strength: float = 0.8
    guidance_scale: float = 7.5

    @cached_property
    def target_latent(self) -> torch.Tensor | float:
        """The target's mean latent (1, C, h, w), or 0."""
        with torch.no_grad():
            return 0.0 if self.target is None else self.model.encode(self.target)

    def mask_on_grid(self, like: torch.Tensor) -> torch.Tensor:
        """The loss mask, which must be given, on the grid of `like` (B, C, h, w), (B, 1, h, w)."""
        return to_latent_grid(self.loss_mask.to(like), like.shape[-2:])

    def mean(self, error: torch.Tensor) -> torch.Tensor:
        """Mean of an error (B, C, h, w) per image, (B,), within the loss mask."""
        if self.loss_mask is None:
            return error.flatten(1).mean(1)
        mask = self.mask_on_grid(error).expand(len(error), -1, -1, -1)
        return (error * mask).flatten(1).sum(1) / (mask.flatten(1).sum(1) * error.shape[1]).clamp(min=1)

    def encoder(self, generators: list[torch.Generator]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from images to latents: the encoder, behind JPEG if the victim compresses.

        Every call of `encoder` draws one JPEG quality per image.
        """
        quality = self.zone.jpeg_quality
        low, high = self.random_jpeg or (quality, quality)
        if low is None:
            return self.model.encode
        qualities = [int(torch.randint(low, high + 1, (), generator=generator)) for generator in generators]

        def encode(images: torch.Tensor) -> torch.Tensor:
            return self.model.encode(torch.cat([
                jpeg_straight_through(image, quality)
                for image, quality in zip(images.split(1), qualities, strict=True)]))
        return encode


_CLEAN = 5.0  # log-SNR above which the noise is less than a twelfth of the signal

# Latents (B, C, h, w) and a CPU generator per image -> values (B,), and the gradient like the latents.
Objective = Callable[[Victim, torch.Tensor, list[torch.Generator]], torch.Tensor]
LatentGradient = Callable[[Victim, torch.Tensor, list[torch.Generator]], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Poison:
    """An attack: it moves `objective` up if `ascend`, else down, along `gradient`, by default the exact one.

    `random_start` begins within the budget, not at the image. `network_graph` says whether `gradient`
    differentiates the network. `uses` names the settings of poison_images.py that not every attack uses.
    """

    objective: Objective
    gradient: LatentGradient | None = None
    ascend: bool = False
    random_start: bool = True
    network_graph: bool = False
    uses: tuple[str, ...] = ()


def sample_noise_and_timesteps(latents: torch.Tensor, generators: list[torch.Generator], zone: SafeZone,
                               num_timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise like `latents` and the zone's timesteps, long (B,), of each image's own CPU generator."""
    distribution = zone.timestep_distribution(num_timesteps)
    timesteps = torch.cat([sample_timesteps(1, *distribution, generator=generator)
                           for generator in generators])
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    return noise.to(latents), timesteps.to(latents.device)


def denoising_objective(victim: Victim, latents: torch.Tensor,
                        generators: list[torch.Generator]) -> torch.Tensor:
    """Mean squared prediction error at one draw per image, float32 (B,), Eq. 4."""
    model = victim.model
    drawn = sample_noise_and_timesteps(latents, generators, victim.zone, model.num_timesteps)
    return victim.mean(residual(model, latents, *drawn, expand(victim.condition, len(latents))).square())


@torch.no_grad()
def score_distillation(victim: Victim, latents: torch.Tensor,
                       generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction error in place of the gradient of the denoising objective, and the objective (B,).

    One forward pass of the network, none backward.
    """
    model = victim.model
    drawn = sample_noise_and_timesteps(latents, generators, victim.zone, model.num_timesteps)
    error = residual(model, latents, *drawn, expand(victim.condition, len(latents)))
    values = victim.mean(error.square())
    if victim.loss_mask is not None:
        error = error * victim.mask_on_grid(error)
    return error / error[0].numel(), values


def encoder_objective(victim: Victim, latents: torch.Tensor,
                      generators: list[torch.Generator]) -> torch.Tensor:
    """Mean squared distance of the latents to the target's, float32 (B,), Eq. 5; draws nothing."""
    return victim.mean((latents - victim.target_latent).float().square())


def diffusion_objective(victim: Victim, latents: torch.Tensor,
                        generators: list[torch.Generator]) -> torch.Tensor:
    """Mean squared distance of the output of image-to-image to the target, float32 (B,)."""
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    generated = image_to_image(victim, latents, noise.to(latents))
    return victim.mean((generated - victim.target.to(generated)).square())


def image_to_image(victim: Victim, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The output of guided image-to-image on `latents` (B, C, h, w), float32 (B, 3, H, W); gradients flow.

    Images are about [0, 1] and not clipped. The timesteps are those of Diffusers' image-to-image pipeline
    with a DDIM scheduler, of flow models with their own. Every step and the decoder are checkpointed: memory
    does not grow with `chain_steps`.
    """
    model, count = victim.model, len(latents)
    steps = round(victim.chain_steps / victim.strength)
    first = steps - victim.chain_steps
    timesteps, advance = model.sampler(steps, latents)
    prompted, empty = (expand(condition, count) for condition in (victim.condition, victim.empty))

    def step(latents: torch.Tensor, i: int) -> torch.Tensor:
        prediction = model.guide(latents, timesteps[i].expand(count), prompted, empty, victim.guidance_scale)
        return advance(prediction, i, latents)

    latents = model.noised(latents, noise, timesteps[first].expand(count))
    for i in range(first, steps):
        latents = checkpoint(step, latents, i, use_reentrant=False)
    return checkpoint(model.decode, latents, use_reentrant=False)


def check_chain(model: Model | type[Model], chain_steps: int, strength: float) -> None:
    """InputError when a chain begins at pure noise, where no gradient reaches the image, or is too fine.

    The family is enough to refuse flow models at pure noise, where their first step always is.
    """
    steps = round(chain_steps / strength)
    counted = "1 step" if chain_steps == 1 else f"{chain_steps} steps"
    chain = f"A chain of {counted} at strength {chain_steps / steps:.3g}"
    if isinstance(model, type):
        at_noise = model.network_name == "transformer" and steps == chain_steps
    elif steps >= model.num_timesteps:
        raise InputError(f"{chain} needs a schedule of {steps} steps, which must be fewer than the "
                         f"model's {model.num_timesteps} timesteps; raise --strength or lower --chain_steps.")
    else:
        timesteps, _ = model.sampler(steps, torch.zeros(1, 1, 8, 8))
        log_snr = model.log_snr(timesteps[[steps - chain_steps]])
        if log_snr > _CLEAN:
            raise InputError(f"{chain} begins almost without noise, where it changes nothing; raise "
                             "--chain_steps.")
        at_noise = log_snr == -torch.inf
    if at_noise:
        raise InputError(f"{chain} begins at pure noise, where {model.family} sees nothing of the image; "
                         "lower --strength or raise --chain_steps.")


def differentiate(objective: Objective) -> LatentGradient:
    """The exact gradient of an objective with respect to the latents, float32 or wider."""
    def gradient(victim: Victim, latents: torch.Tensor,
                 generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = latents.detach().requires_grad_()
        # The gradient of a mean over n elements shrinks with n, out of the range of float16:
        # differentiate n times the mean.
        count = leaf[0].numel()
        with torch.enable_grad():
            values = objective(victim, leaf, generators)
            (slope,) = torch.autograd.grad(values.sum() * count, leaf)
        return slope.to(torch.promote_types(slope.dtype, torch.float32)) / count, values.detach()
    return gradient


_ADM = dict(objective=denoising_objective, network_graph=True,
            uses=("draws", "one_graph", "prompt", "t_max", "t_min"))
_SDS = dict(objective=denoising_objective, gradient=score_distillation, random_start=False,
            uses=("draws", "prompt", "t_max", "t_min"))

POISONS = {
    "adm+": Poison(ascend=True, **_ADM),
    "adm-": Poison(**_ADM),
    "sds+": Poison(ascend=True, **_SDS),
    "sds-": Poison(**_SDS),
    "ea": Poison(encoder_objective, uses=("target_image",)),
    "da": Poison(diffusion_objective, random_start=False, network_graph=True,
                 uses=("chain_steps", "draws", "guidance_scale", "one_graph", "prompt", "strength",
                       "target_image")),
}


def find_poison(name: str) -> Poison:
    """The poison of a name; InputError lists the names there are."""
    check_choice("poison", name, POISONS)
    return POISONS[name]


def target_pattern(height: int, width: int) -> torch.Tensor:
    """A high-contrast target image, float32 (1, 3, height, width) of 0 and 1.

    Black and white rings, inverted in the squares of a checkerboard.
    """
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    rings = torch.sin(8 * torch.pi * torch.hypot(x, y)) > 0
    squares = (torch.sin(2 * torch.pi * x) > 0) ^ (torch.sin(2 * torch.pi * y) > 0)
    return (rings ^ squares).float().expand(1, 3, -1, -1)


def image_gradient(poison: Poison, victim: Victim, generators: list[torch.Generator]) -> Gradient:
    """The gradient that `pgd.pgd` asks for: every call averages `victim.draws` fresh draws per image.

    The draws pass the network one after another, so that memory does not grow with them, and share one
    backward pass of the encoder. The encoder is run again, with a graph, only after the network's graph is
    freed: peak memory is the larger of the two, not the sum, for the price of one encoding. With
    `victim.one_graph`, or without a graph of the network, the encoder runs once.
    """
    one_graph = victim.one_graph or not poison.network_graph
    latent_gradient = poison.gradient or differentiate(poison.objective)

    def gradient(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encode, leaf = victim.encoder(generators), images.detach().requires_grad_()
        with torch.set_grad_enabled(one_graph):
            latents = encode(leaf)
        slope = values = 0
        for _ in range(victim.draws):
            drawn = latent_gradient(victim, latents.detach(), generators)
            slope, values = slope + drawn[0], values + drawn[1]
        with torch.enable_grad():
            latents = latents if one_graph else encode(leaf)
        return pull_back(latents, leaf, slope / victim.draws), values / victim.draws
    return gradient


def pull_back(latents: torch.Tensor, images: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to `images` of one with respect to `latents`, through their graph."""
    # Backward is linear in the cotangent: at unit size it neither under- nor overflows in half precision.
    size = cotangent.flatten(1).abs().amax(1).clamp(min=torch.finfo(cotangent.dtype).tiny).view(-1, 1, 1, 1)
    (gradient,) = torch.autograd.grad(latents, images, (cotangent / size).to(latents.dtype))
    return gradient * size.to(gradient.dtype)


@torch.no_grad()
def measure_objective(poison: Poison, victim: Victim, images: torch.Tensor,
                      generators: list[torch.Generator], draws: int = 8) -> torch.Tensor:
    """The objective of images (B, 3, H, W) in [0, 1], averaged over `draws` draws, (B,).

    Fresh generators of equal seeds give equal draws.
    """
    return sum(poison.objective(victim, victim.encoder(generators)(images), generators)
               for _ in range(draws)) / draws
