"""How noisy the timesteps of a Diffusers scheduler are: of DDPM, EDM and rectified flow.

For all of them, t counts noise from 0, almost clean, to T - 1, almost noise:

    DDPM   z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) noise   SNR abar / (1 - abar)         t is the timestep
    flow   z_t = (1 - sigma) z0 + sigma noise               SNR ((1 - sigma) / sigma)^2   t = sigma T - 1
    EDM    z_t = z0 + sigma noise                           SNR (sigma_data / sigma)^2    t is sigma's rank

where sigma_data is the scale of z0.
"""

from typing import Any

import torch

from .errors import InputError

__all__ = ["Schedule", "ddpm_log_snr", "flow_log_snr", "kind_of"]


def kind_of(scheduler: Any) -> str:
    """The kind of a Diffusers scheduler's noise: "DDPM", "EDM" or "flow"."""
    config = scheduler.config  # also has what is another scheduler's alone
    if "sigma_data" in config:
        return "EDM"
    return "flow" if "shift" in config or config.get("use_flow_sigmas") else "DDPM"


def ddpm_log_snr(signal: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """ln(signal / noise) of the variances at timesteps, long (B,) -> float64 (B,), from all abar (T,)."""
    abar = signal.cpu().double()[timesteps.cpu()]
    return abar.log() - (1 - abar).log()


def flow_log_snr(num_timesteps: int, timesteps: torch.Tensor) -> torch.Tensor:
    """The same of rectified flow with T timesteps; -inf at the last, pure noise."""
    sigmas = (timesteps.cpu().double() + 1) / num_timesteps
    return 2 * ((1 - sigmas).log() - sigmas.log())


class Schedule:
    """The schedule of noise of a Diffusers scheduler, with the part of a `Model` that a `SafeZone` asks for.

    `timesteps` (N,) are the scheduler's own, in its list's order from the noisiest, and `t` (N,) count their
    noise. `discrete` says that timesteps are t itself, long, as of DDPM. InputError for a scheduler of
    another kind, and for one whose list is that of a sampler's few steps.
    """

    def __init__(self, scheduler: Any):
        config, listed = scheduler.config, getattr(scheduler, "timesteps", None)
        sigmas, scale = getattr(scheduler, "sigmas", None), config.get("sigma_data")
        self.num_timesteps = config.get("num_train_timesteps")
        self._signal, self._edm = getattr(scheduler, "alphas_cumprod", None), None
        if self._signal is not None and not config.get("use_flow_sigmas"):
            self.discrete = (listed is None or not listed.is_floating_point()
                             or len(listed) > self.num_timesteps)
            self.timesteps = torch.arange(self.num_timesteps - 1, -1, -1) if self.discrete else listed.cpu()
            self.t = self.timesteps.double()
            self._check_length(scheduler)
            return
        known = self.num_timesteps is not None and listed is not None and sigmas is not None
        if not known or self._signal is not None or (scale is None and sigmas.max() > 1):
            raise InputError(f"The noise schedule of this {type(scheduler).__name__} is not known; use a "
                             "scheduler of DDPM, EDM or rectified flow.")
        self.discrete, self.timesteps = False, listed[:self.num_timesteps].cpu()
        sigmas = sigmas[:len(self.timesteps)].cpu().double()
        if scale is None:
            self.t = (sigmas * self.num_timesteps - 1).round(decimals=3)  # sigmas are float32
        else:
            self.t = torch.arange(len(sigmas) - 1, -1, -1).double()
            self._edm = 2 * (scale / sigmas.flip(0)).log()
        self._check_length(scheduler)

    def _check_length(self, scheduler: Any) -> None:
        if len(self.timesteps) < self.num_timesteps:
            raise InputError(f"This {type(scheduler).__name__} has been set to {len(self.timesteps)} "
                             "sampling steps; train with a copy of its own, of all "
                             f"{self.num_timesteps} timesteps.")

    def log_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """ln(signal / noise) of the variances at t, long (B,) -> float64 (B,)."""
        if self._edm is not None:
            return self._edm[timesteps]
        if self._signal is not None:
            return ddpm_log_snr(self._signal, timesteps)
        return flow_log_snr(self.num_timesteps, timesteps)
