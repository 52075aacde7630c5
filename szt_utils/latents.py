"""Latents for training: encoded once and cached as posterior moments, or encoded anew at every step."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .images import to_vae_range

__all__ = ["LatentCache", "LiveLatents", "to_device"]


def to_device(values: list[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor, or a list as one, on a device, without making the host wait for the device."""
    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _posterior(vae, images: torch.Tensor):
    return vae.encode(to_vae_range(images).to(vae.device, vae.dtype)).latent_dist


class LiveLatents:
    """Reads and encodes the pictures at every step, as the Diffusers example does.

    `picture(i)` gives the i-th picture, (3, H, W) in [0, 1].
    """

    def __init__(self, vae, picture: Callable[[int], torch.Tensor]):
        self.vae, self.picture = vae, picture

    @torch.no_grad()
    def sample(self, indices: list[int], flips: list[bool],
               generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw one unscaled latent per index, (B, C, h, w), on the VAE's device,
        from a generator there or torch's global one."""
        pictures = [self.picture(i).flip(-1) if flip else self.picture(i)
                    for i, flip in zip(indices, flips, strict=True)]
        return _posterior(self.vae, torch.stack(pictures)).sample(generator)


class LatentCache:
    """Posterior moments of `count` pictures and of their mirror images, (N, 2, 2 C, h, w),
    sampled anew at every step.

    Equals LiveLatents bit for bit, at the price of a lookup, and leaves the VAE free to be deleted. Give the
    training's `batch_size`: convolutions may differ in the last bit between batch sizes. A cache of more than
    `memory_limit` bytes lives in a temporary file of `folder` (by default the system's), mapped into memory.
    """

    @torch.no_grad()
    def __init__(self, vae, picture: Callable[[int], torch.Tensor], count: int, batch_size: int = 1, *,
                 memory_limit: int | None = None, folder: str | Path | None = None):
        self.device, self.moments = vae.device, None
        for start in range(0, 2 * count, batch_size):
            # The last batch is filled up from the front, so that all have one size.
            slots = [i % (2 * count) for i in range(start, start + batch_size)]
            moments = _posterior(vae, torch.stack([picture(i // 2).flip(-1) if i % 2 else picture(i // 2)
                                                   for i in slots])).parameters
            if self.moments is None:
                # The VAE's memory layout decides in which order a random draw of its shape is filled.
                self.channels_last = (batch_size > 1
                                      and moments.is_contiguous(memory_format=torch.channels_last))
                self.moments = self._allocate((2 * count, *moments.shape[1:]), moments, memory_limit, folder)
            new = min(batch_size, 2 * count - start)
            self.moments[start:start + new] = moments[:new].to(self.moments.device)
        self.moments = self.moments.unflatten(0, (count, 2))

    def _allocate(self, shape: tuple[int, ...], like: torch.Tensor, memory_limit: int | None,
                  folder: str | Path | None) -> torch.Tensor:
        elements = torch.Size(shape).numel()
        if memory_limit is None or elements * like.element_size() <= memory_limit:
            return like.new_empty(shape)
        self._file = tempfile.NamedTemporaryFile(prefix=".latents-", dir=folder)  # goes with the cache
        return torch.from_file(self._file.name, shared=True, size=elements, dtype=like.dtype).view(shape)

    def sample(self, indices: list[int], flips: list[bool],
               generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw one unscaled latent per index, (B, C, h, w), on the VAE's device,
        from a generator there or torch's global one."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        where = tuple(to_device(list(map(int, places)), self.moments.device) for places in (indices, flips))
        moments = self.moments[where]
        if moments.device != self.device:  # the cache is in a file
            moments = to_device(moments, self.device)
        if self.channels_last and len(indices) > 1:
            moments = moments.contiguous(memory_format=torch.channels_last)
        return DiagonalGaussianDistribution(moments).sample(generator)
