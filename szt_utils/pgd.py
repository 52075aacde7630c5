"""The one projected-gradient loop:
move pictures uphill or downhill within an L-inf budget (paper Eq. 4 and 5).

    delta <- Project(delta +- step_size * sign(gradient(x + delta))),
    |delta| <= eps,  0 <= x + delta <= 1,  0 off the mask

Budgets count levels: 1 level = 1/255, one step of an 8-bit picture.
What is attacked is the `gradient` callable's business.
"""

import warnings
from collections.abc import Callable

import torch

from .errors import InputError

__all__ = ["Gradient", "pgd", "project_box", "project_linf", "random_start", "round_to_levels",
           "warn_if_unmoved"]

# Pictures (B, 3, H, W) -> the objective's gradient with respect to them, same shape,
# and its value per picture, (B,).
Gradient = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def project_linf(delta: torch.Tensor, eps: float) -> torch.Tensor:
    """The nearest perturbation with every |element| <= eps levels;
    `delta` in units of the picture, [0, 1]."""
    return delta.clamp(-eps / 255, eps / 255)


def project_box(delta: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The nearest perturbation for which images + delta stays in [0, 1]."""
    return delta.clamp(-images, 1 - images)


def round_to_levels(delta: torch.Tensor) -> torch.Tensor:
    """The nearest perturbation of whole levels, so that an 8-bit file holds it exactly."""
    return (delta * 255).round() / 255


def random_start(images: torch.Tensor, eps: float, generators: list[torch.Generator]) -> torch.Tensor:
    """Uniform in [-eps, eps] levels, drawn on the CPU from every picture's own generator;
    shape and device of `images`."""
    uniform = torch.stack([torch.rand(images.shape[1:], generator=generator) for generator in generators])
    return (2 * uniform - 1).to(images) * (eps / 255)


def warn_if_unmoved(before: torch.Tensor, after: torch.Tensor, ascend: bool = True) -> None:
    """Warn about pictures whose objective, (B,) each,
    went the wrong way or nowhere between two measurements."""
    for first, last in zip(before.tolist(), after.tolist(), strict=True):
        if not (last > first if ascend else last < first):
            warnings.warn(f"The objective did not {'rise' if ascend else 'fall'}: "
                          f"it was {first:.6g} and is {last:.6g}.", stacklevel=2)


@torch.no_grad()
def pgd(images: torch.Tensor, gradient: Gradient, *, eps: int, step_size: float, steps: int,
        ascend: bool = True, mask: torch.Tensor | None = None,
        generators: list[torch.Generator] | None = None,
        on_step: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
    """Perturb pictures by sign-gradient steps; float32 (B, 3, H, W) in [0, 1],
    whole levels away from `images`.

    `images` is float32 (B, 3, H, W), whole levels of 1/255, `mask` (B, 1, H, W) of 0 and 1, where 1 may
    change; pixels of 0 come back bit-identical. `eps` and `step_size` are in levels. One CPU generator per
    picture gives a uniform random start, none gives a start at zero; with 0 steps the pictures come back
    bit-identical. `on_step` sees the values of each step, (B,).
    Raises InputError for an impossible budget or a gradient that is not finite;
    warns about a gradient of zero.
    """
    _check(images, eps, step_size, steps, generators)
    if steps == 0:
        return images.clone()

    def project(delta):
        delta = project_box(project_linf(delta, eps), images)
        return delta if mask is None else delta * mask

    # The perturbation stays float32 whatever the model's dtype: near 1, bfloat16 is spaced by a whole level.
    delta = project(torch.zeros_like(images) if generators is None else random_start(images, eps, generators))
    stride = step_size / 255 if ascend else -step_size / 255
    zero_steps = 0
    for step in range(1, steps + 1):
        direction, values = gradient(images + delta)
        if not direction.isfinite().all():
            raise InputError(f"The gradient is not finite at step {step} of {steps}; "
                             "use float32 or bfloat16 for the model.")
        direction = direction.sign() if mask is None else direction.sign() * mask
        zero_steps += int((direction == 0).flatten(1).all(1).any())
        delta = project(delta + stride * direction.float())
        if on_step is not None:
            on_step(values)
    if zero_steps:
        warnings.warn(f"The gradient of a picture was zero in {zero_steps} of {steps} steps.", stacklevel=2)
    # |k / 255| <= eps / 255 for whole k and eps, and a whole level + k stays in 0..255:
    # both bounds outlive the rounding.
    return (images + round_to_levels(delta)).clamp(0, 1)


def _check(images: torch.Tensor, eps: int, step_size: float, steps: int, generators: list | None) -> None:
    if images.dtype != torch.float32:
        raise InputError(f"The pictures must be float32, but are {images.dtype}.")
    if int(eps) != eps or not 0 <= eps <= 255:
        raise InputError("The budget eps must be a whole number of 1/255 levels from 0 to 255, "
                         f"but is {eps}.")
    if not step_size > 0:
        raise InputError(f"The step size must be above 0, but is {step_size}.")
    if steps < 0:
        raise InputError(f"The number of steps must not be negative, but is {steps}.")
    if generators is not None and len(generators) != len(images):
        raise InputError(f"Each of the {len(images)} pictures needs its own generator, "
                         f"but {len(generators)} were given.")
