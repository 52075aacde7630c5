"""The one projected-gradient loop: move images uphill or downhill within a budget (paper Eq. 4 and 5).

    delta <- Project(delta +- step_size * direction(gradient(x + delta))),  0 <= x + delta <= 1,
                                                                            0 off the mask

    linf:  direction = sign(g)        |delta| <= eps everywhere
    l2:    direction = g / rms(g)     rms(delta) <= eps, the root mean square over the image's elements

Budgets count levels: 1 level = 1/255, one step of an 8-bit image. Both norms hold in whole levels, as an
8-bit file stores them. The `gradient` callable decides what is attacked.
"""

import warnings
from collections.abc import Callable

import torch

from .errors import InputError, check_choice

__all__ = ["NORMS", "SCHEDULES", "Gradient", "add_within_budget", "pgd", "project", "project_box",
           "project_l2", "project_linf", "random_start", "rms", "round_to_levels", "warn_if_unmoved"]

NORMS = ("linf", "l2")
SCHEDULES = ("constant", "linear")

# Images (B, 3, H, W) -> the objective's gradient with respect to them, same shape, and its value per image,
# (B,).
Gradient = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of each sample, (B, 1, 1, 1), in float64, so that rounding does not break a budget."""
    return x.double().square().mean((1, 2, 3), keepdim=True).sqrt()


def project_linf(delta: torch.Tensor, eps: float) -> torch.Tensor:
    """The nearest perturbation with every |element| <= eps levels; `delta` is in units of [0, 1]."""
    return delta.clamp(-eps / 255, eps / 255)


def project_l2(delta: torch.Tensor, eps: float) -> torch.Tensor:
    """The nearest perturbation with a root mean square of at most eps levels, per image."""
    return delta * (eps / 255 / rms(delta).clamp(min=1e-12)).clamp(max=1).to(delta)


def project(delta: torch.Tensor, eps: float, norm: str) -> torch.Tensor:
    """The nearest perturbation within eps levels of the norm, "linf" or "l2"."""
    return {"linf": project_linf, "l2": project_l2}[norm](delta, eps)


def project_box(delta: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The nearest perturbation for which images + delta stays in [0, 1]."""
    return delta.clamp(-images, 1 - images)


def round_to_levels(delta: torch.Tensor, eps: float | None = None) -> torch.Tensor:
    """The nearest perturbation of whole levels, so that an 8-bit file holds it exactly.

    With `eps`, each image's perturbation is first scaled down as little as its root mean square needs to be
    at most eps levels after rounding too.
    """
    rounded = (delta * 255).round() / 255
    if eps is None:
        return rounded
    low, high = torch.zeros_like(rms(delta)), torch.ones_like(rms(delta))
    for _ in range(30):  # |round(s x)| never falls as s grows: bisect s
        middle = (low + high) / 2
        fits = rms((delta * middle.to(delta) * 255).round()) <= eps
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    scaled = (delta * low.to(delta) * 255).round() / 255
    return torch.where(rms((delta * 255).round()) <= eps, rounded, scaled)


def add_within_budget(images: torch.Tensor, delta: torch.Tensor, eps: float, norm: str) -> torch.Tensor:
    """Images of whole levels plus a perturbation within the budget, rounded to whole levels within it."""
    # |k / 255| <= eps / 255 for whole k and eps, and a whole level + k stays in 0..255:
    # both bounds survive the rounding.
    return (images + round_to_levels(delta, eps if norm == "l2" else None)).clamp(0, 1)


def random_start(images: torch.Tensor, eps: float, generators: list[torch.Generator]) -> torch.Tensor:
    """Uniform in [-eps, eps] levels, from each image's own CPU generator; shape and device of `images`."""
    uniform = torch.stack([torch.rand(images.shape[1:], generator=generator) for generator in generators])
    return (2 * uniform - 1).to(images) * (eps / 255)


def warn_if_unmoved(before: torch.Tensor, after: torch.Tensor, ascend: bool = True) -> None:
    """Warn about images whose objective, (B,), did not move as it should between two measurements."""
    for first, last in zip(before.tolist(), after.tolist(), strict=True):
        if not (last > first if ascend else last < first):
            warnings.warn(f"The objective did not {'rise' if ascend else 'fall'}: "
                          f"it was {first:.6g} and is {last:.6g}.", stacklevel=2)


@torch.no_grad()
def pgd(images: torch.Tensor, gradient: Gradient, *, eps: int, step_size: float, steps: int,
        ascend: bool = True, norm: str = "linf", schedule: str = "constant",
        mask: torch.Tensor | None = None, generators: list[torch.Generator] | None = None,
        on_step: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
    """Perturb images by projected gradient steps; float32 (B, 3, H, W) in [0, 1], whole levels from `images`.

    `images` are float32 (B, 3, H, W), whole levels of 1/255, `mask` (B, 1, H, W) of 0 and 1, where 1 may
    change; pixels of 0 come back bit-identical. `eps` and `step_size` are in levels; the "linear" schedule
    reduces the step from `step_size` to a hundredth of it. One CPU generator per image gives a uniform
    random start, none gives a start at zero; with 0 steps the images come back bit-identical. `on_step` is
    called with the values of each step, (B,). InputError for an impossible budget or a gradient that is not
    finite; warns about a gradient of zero.
    """
    _check(images, eps, step_size, steps, norm, schedule, generators)
    if steps == 0:
        return images.clone()
    where = 1 if mask is None else mask

    def feasible(delta):
        return project_box(project(delta * where, eps, norm), images)

    # The perturbation stays float32 whatever the model's dtype: near 1, bfloat16 is spaced by a whole level.
    delta = torch.zeros_like(images) if generators is None else random_start(images, eps, generators)
    delta = feasible(delta)
    stride = step_size / 255 if ascend else -step_size / 255
    zero_steps = 0
    for step in range(1, steps + 1):
        slope, values = gradient(images + delta)
        if not slope.isfinite().all():
            raise InputError(f"The gradient is not finite at step {step} of {steps}; "
                             "use float32 or bfloat16 for the model.")
        slope = slope * where
        zero_steps += int((slope == 0).flatten(1).all(1).any())
        direction = slope.sign() if norm == "linf" else slope / rms(slope).clamp(min=1e-300)
        decay = 1 - 0.99 * (step - 1) / steps if schedule == "linear" else 1
        delta = feasible(delta + decay * stride * direction.float())
        if on_step is not None:
            on_step(values)
    if zero_steps:
        warnings.warn(f"The gradient of an image was zero in {zero_steps} of {steps} steps.", stacklevel=2)
    return add_within_budget(images, delta, eps, norm)


def _check(images: torch.Tensor, eps: int, step_size: float, steps: int, norm: str, schedule: str,
           generators: list | None) -> None:
    check_choice("norm", norm, NORMS)
    check_choice("step schedule", schedule, SCHEDULES)
    if images.dtype != torch.float32:
        raise InputError(f"The images must be float32, but are {images.dtype}.")
    if int(eps) != eps or not 0 <= eps <= 255:
        raise InputError("The budget eps must be a whole number of 1/255 levels from 0 to 255, "
                         f"but is {eps}.")
    if not step_size > 0:
        raise InputError(f"The step size must be above 0, but is {step_size}.")
    if steps < 0:
        raise InputError(f"The number of steps must not be negative, but is {steps}.")
    if generators is not None and len(generators) != len(images):
        raise InputError(f"Each of the {len(images)} images needs its own generator, "
                         f"but {len(generators)} were given.")
