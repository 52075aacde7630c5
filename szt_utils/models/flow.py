"""What models of rectified flow share: a straight line from latents to noise, whose direction is the target.

    z_t = (1 - sigma) z0 + sigma noise      target = noise - z0      sigma = (t + 1) / T

Timesteps count noise, as everywhere here. Training and attacks use this sigma as it is: the shift of sigmas
with the resolution, a matter of sampling, is that of the pipeline's scheduler. The signal-to-noise ratio is
((1 - sigma) / sigma)^2, so that of Stable Diffusion's t = 500, 0.382, is reached at sigma 0.618.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..schedules import flow_log_snr
from .parts import Step, absent_parts, load_index, load_part
from .stable_diffusion import StableDiffusion

__all__ = ["T5", "Flow"]


@dataclass
class T5:
    """A frozen T5 text encoder: new tokens get no rows in it, and reach it in the pieces of their spelling.

    It is given `length` tokens; `suffix` is that of its parts' names in the pipeline, and `known` has the
    states of the texts of `remember`.
    """

    tokenizer: Any
    encoder: torch.nn.Module | None
    length: int
    suffix: str
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str, suffix: str, length: int, dtype: torch.dtype, device: torch.device | str,
             revision: str | None, variant: str | None) -> "T5":
        """The T5 of a Diffusers folder or repository."""
        from transformers import T5EncoderModel, T5TokenizerFast

        # With this dtype, not cast to it: in float16, transformers keeps the layers that would overflow.
        encoder = load_part(T5EncoderModel, path, f"text_encoder{suffix}", dtype=dtype, revision=revision,
                            variant=variant)
        return cls(load_part(T5TokenizerFast, path, f"tokenizer{suffix}", revision=revision),
                   encoder.requires_grad_(False).eval().to(device), length, suffix)

    def tokenize(self, prompts: str | list[str]) -> torch.Tensor:
        """Token ids, long (B, length)."""
        prompts = prompts if isinstance(prompts, list) else [prompts]
        return self.tokenizer(prompts, padding="max_length", truncation=True, max_length=self.length,
                              return_tensors="pt").input_ids

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states of token ids (B, length), (B, length, D)."""
        if self.encoder is None:
            return torch.cat([self.known[tuple(row)] for row in ids.tolist()]).to(ids.device)
        return self.encoder(ids.to(self.encoder.device))[0]

    @torch.no_grad()
    def remember(self, prompts: set[str], device: torch.device) -> None:
        """Compute the states of all texts that will come on a device, keep them on the CPU, and let go of the
        encoder.

        One text at a time, as their states may differ in the last bit between batch sizes.
        """
        self.encoder.to(device)
        for row in self.tokenize(sorted(prompts)):
            self.known[tuple(row.tolist())] = self.states(row[None]).cpu()
        self.encoder = None


@dataclass
class Flow(StableDiffusion):
    """A model of rectified flow with a transformer; see `szt_utils.models.Model` for its methods."""

    t5: T5 | None = None

    t5_parts = ("", 0)  # suffix and length of its T5
    t5_is_optional = False
    network_name = "transformer"
    patch = 2

    @classmethod
    def load(cls, path: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
             revision: str | None = None, variant: str | None = None, **options: Any) -> "Flow":
        """`szt_utils.models.load_model` of this family; T5, which is not trained, has `dtype`."""
        model = super().load(path, dtype=dtype, device=device, revision=revision, variant=variant, **options)
        suffix, length = cls.t5_parts
        is_there = load_index(path, revision).get(f"text_encoder{suffix}", (None,))[0] is not None
        if is_there or not cls.t5_is_optional:
            model.t5 = T5.load(path, suffix, length, dtype, device, revision, variant)
        return model

    def _check_scheduler(self) -> None:
        pass  # flow models have one kind of prediction

    def sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The share of noise, in (0, 1], at timesteps (B,), which may lie between whole ones."""
        precise = torch.promote_types(self.dtype, torch.float32)
        return (timesteps.to(precise) + 1) / self.num_timesteps

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigmas = self.sigmas(timesteps).to(latents).view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def log_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        return flow_log_snr(self.num_timesteps, timesteps)

    def sampler(self, steps: int, latents: torch.Tensor) -> tuple[torch.Tensor, Step]:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=latents.device, sigmas=self._unshifted(steps),
                                mu=self._mu(latents.shape[-2:]))
        sigmas = scheduler.sigmas

        def step(prediction: torch.Tensor, i: int, latents: torch.Tensor) -> torch.Tensor:
            return latents + (sigmas[i + 1] - sigmas[i]) * prediction
        return sigmas[:-1] * self.num_timesteps - 1, step

    def _pipeline(self, cls: type, tokenizers: list | None, from_files: bool, **options: Any) -> Any:
        options |= absent_parts(load_index(self.path, self.revision))
        if self.t5 is not None and self.t5.encoder is not None and not from_files:
            options |= {f"tokenizer{self.t5.suffix}": self.t5.tokenizer,
                        f"text_encoder{self.t5.suffix}": self.t5.encoder}
        return super()._pipeline(cls, tokenizers, from_files, **options)

    def _unshifted(self, steps: int) -> list[float] | None:
        """The sigmas that the family's pipeline hands to its scheduler, None for the scheduler's own."""
        return None

    def _mu(self, size: tuple[int, int]) -> float | None:
        """The shift of sampling at a latent size, linear in the number of patches; None without one."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return None
        patches = size[0] * size[1] / self.patch**2
        share = (patches - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + share * (config.max_shift - config.base_shift)
