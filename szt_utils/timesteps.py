"""When to train: timestep sampling above a threshold (paper Sec. 4.2, Eq. 7)
and its soft shapes (Appendix H).

A diffusion timestep t counts noise: t = 0 is almost the clean latent, t = T - 1 almost pure noise. Data
poisons act at low t. `t_min` is inclusive, `t_max` exclusive.
"""

from collections.abc import Callable

import torch

from .errors import InputError, check_choice

__all__ = ["DISTRIBUTIONS", "check_range", "first_timestep", "noise_level", "redraw_outside",
           "sample_timesteps", "timestep_weights"]

DISTRIBUTIONS = ("uniform", "power", "tanh")


def check_range(t_min: int, t_max: int, num_train_timesteps: int) -> None:
    """Raise InputError unless 0 <= t_min < t_max <= num_train_timesteps."""
    if not 0 <= t_min < t_max <= num_train_timesteps:
        raise InputError(f"The timestep range needs 0 <= t_min < t_max <= {num_train_timesteps}, "
                         f"but t_min is {t_min} and t_max is {t_max}.")


def timestep_weights(distribution: str, t_min: int, t_max: int, num_train_timesteps: int = 1000, *,
                     power: float = 1.0, center: float = 500.0, width: float = 100.0) -> torch.Tensor:
    """Probability of every timestep of [t_min, t_max), float64 (t_max - t_min,), sum 1.

    uniform: constant. power: p(t) ~ (t / T)^power. tanh: p(t) ~ 1 + tanh((t - center) / width). Appendix H.
    InputError for an unknown distribution, a range outside the model's, a width of 0, and weights of sum 0.
    """
    check_range(t_min, t_max, num_train_timesteps)
    t = torch.arange(t_min, t_max, dtype=torch.float64)
    check_choice("timestep distribution", distribution, DISTRIBUTIONS)
    if distribution == "uniform":
        weights = torch.ones_like(t)
    elif distribution == "power":
        weights = (t / num_train_timesteps) ** power
    else:
        if width <= 0:
            raise InputError(f"The width of the tanh timestep distribution must be above 0, but is {width}.")
        weights = 1 + torch.tanh((t - center) / width)
    if not (weights.sum() > 0 and weights.isfinite().all()):
        raise InputError(f"The {distribution} timestep distribution gives no timestep "
                         f"in [{t_min}, {t_max}) a chance.")
    return weights / weights.sum()


def sample_timesteps(batch_size: int, t_min: int = 0, t_max: int = 1000,
                     weights: torch.Tensor | None = None, *, device: torch.device | str | None = None,
                     generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw `batch_size` timesteps from [t_min, t_max), long (B,):
    uniform, or by the `weights` of `timestep_weights`.

    The uniform draw is one `torch.randint`, the call that the Diffusers examples make,
    so that t_min = 0 changes nothing.
    """
    if weights is None:
        return torch.randint(t_min, t_max, (batch_size,), device=device, generator=generator)
    if device is not None and torch.device(device).type == "mps":
        weights = weights.float()  # which has no float64
    return t_min + torch.multinomial(weights.to(device), batch_size, replacement=True, generator=generator)


def redraw_outside(values: torch.Tensor, draw: Callable[[int], torch.Tensor],
                   is_inside: Callable[[torch.Tensor], torch.Tensor], own: int) -> torch.Tensor:
    """Rejection sampling in place: the first `own` of `values` (B,) are drawn again until all are inside.

    `draw` draws as many as it is asked for. InputError after 1000 vain draws.
    """
    for _ in range(1000):
        outside = ~is_inside(values)
        outside[own:] = False
        if not outside.any():
            return values
        values[outside] = draw(int(outside.sum())).to(values)
    raise InputError("The density draws no timestep inside the safe zone; change t_min or the density.")


def noise_level(log_snr: torch.Tensor) -> torch.Tensor:
    """The share of noise sqrt(1 - abar), in [0, 1], at a log signal-to-noise ratio ln(abar / (1 - abar))."""
    return (-log_snr).sigmoid().sqrt()


def first_timestep(log_snr: torch.Tensor, value: float) -> int:
    """The first timestep whose log signal-to-noise ratio is at most `value`; `log_snr` (T,) falls with t."""
    return int((log_snr > value).sum())
