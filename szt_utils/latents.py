"""Latents for training: encoded once and cached as posterior moments, or encoded anew at every step."""

from collections.abc import Callable

import torch

from .images import to_vae_range

__all__ = ["LatentCache", "LiveLatents"]


def _posterior(vae, images: torch.Tensor):
    return vae.encode(to_vae_range(images).to(vae.device, vae.dtype)).latent_dist


class LiveLatents:
    """Reads and encodes the pictures at every step, as the Diffusers example does.

    `picture(i)` gives the i-th picture, (3, H, W) in [0, 1].
    """

    def __init__(self, vae, picture: Callable[[int], torch.Tensor]):
        self.vae, self.picture = vae, picture

    @torch.no_grad()
    def sample(self, indices: list[int], flips: list[bool]) -> torch.Tensor:
        """Draw one unscaled latent per index, (B, C, h, w),
        from torch's global generator on the VAE's device."""
        pictures = [self.picture(i).flip(-1) if flip else self.picture(i)
                    for i, flip in zip(indices, flips, strict=True)]
        return _posterior(self.vae, torch.stack(pictures)).sample()


class LatentCache:
    """Posterior moments of `count` pictures and of their mirror images, (N, 2, 2 C, h, w),
    sampled anew at every step.

    Equals LiveLatents bit for bit, at the price of a lookup, and leaves the VAE free to be deleted. Give the
    training's `batch_size`: convolutions may differ in the last bit between batch sizes.
    """

    @torch.no_grad()
    def __init__(self, vae, picture: Callable[[int], torch.Tensor], count: int, batch_size: int = 1):
        # The last batch is filled up from the front, so that all have one size.
        slots = torch.arange(-(-2 * count // batch_size) * batch_size) % (2 * count)
        batches = []
        for chunk in slots.split(batch_size):
            pictures = [picture(int(i) // 2).flip(-1) if i % 2 else picture(int(i) // 2) for i in chunk]
            batches.append(_posterior(vae, torch.stack(pictures)).parameters)
        # The memory layout of the VAE's answer decides in which order a random draw of its shape is filled.
        self.channels_last = batch_size > 1 and batches[0].is_contiguous(memory_format=torch.channels_last)
        self.moments = torch.cat(batches)[:2 * count].unflatten(0, (count, 2)).contiguous()

    def sample(self, indices: list[int], flips: list[bool]) -> torch.Tensor:
        """Draw one unscaled latent per index, (B, C, h, w),
        from torch's global generator on the cache's device."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        moments = self.moments[indices, [int(flip) for flip in flips]]
        if self.channels_last and len(indices) > 1:
            moments = moments.contiguous(memory_format=torch.channels_last)
        return DiagonalGaussianDistribution(moments).sample()
