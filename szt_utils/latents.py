"""Latent moments for training: encoded once and cached, or encoded anew at every step.

Moments are the mean and log-variance (B, 2 C, h, w) of an image's latents, from which every step draws anew.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .errors import InputError

__all__ = ["LiveMoments", "MomentCache", "randn_like", "to_device"]

# Images (B, 3, H, W) in [0, 1] -> their moments.
Encode = Callable[[torch.Tensor], torch.Tensor]


def to_device(values: list[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor, or a list as one, on a device, without making the host wait for the device."""
    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def randn_like(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gaussian noise in the shape, memory layout, dtype and device of `like`, from a generator there."""
    return torch.empty_like(like).normal_(generator=generator)


class LiveMoments:
    """Reads and encodes the images at every step, as the Diffusers example does.

    `image(i)` gives the i-th image, (3, H, W) in [0, 1].
    """

    def __init__(self, encode: Encode, image: Callable[[int], torch.Tensor]):
        self.encode, self.image = encode, image

    @torch.no_grad()
    def take(self, indices: list[int], flips: list[bool]) -> torch.Tensor:
        """The moments of these images, each mirrored or not, (B, 2 C, h, w)."""
        images = [self.image(i).flip(-1) if flip else self.image(i)
                  for i, flip in zip(indices, flips, strict=True)]
        return self.encode(torch.stack(images))


class MomentCache:
    """The moments of `count` images and of their mirror images, (N, 2, 2 C, h, w).

    Equals LiveMoments bit for bit, at the price of a lookup, and leaves the VAE free to be deleted. Give the
    training's `batch_size`: convolutions may differ in the last bit between batch sizes. A cache of more than
    `memory_limit` bytes lives in a temporary file of `folder` (by default the system's), mapped into memory.
    """

    @torch.no_grad()
    def __init__(self, encode: Encode, image: Callable[[int], torch.Tensor], count: int, batch_size: int = 1,
                 *, memory_limit: int | None = None, folder: str | Path | None = None):
        self.moments = None
        for start in range(0, 2 * count, batch_size):
            # The last batch is filled up from the front, so that all have one size.
            slots = [i % (2 * count) for i in range(start, start + batch_size)]
            moments = encode(torch.stack([image(i // 2).flip(-1) if i % 2 else image(i // 2)
                                          for i in slots]))
            if self.moments is None:
                self.device = moments.device
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
        # It is deleted with the cache, on Windows, which maps no open file, by the next run in the folder.
        self._file = tempfile.NamedTemporaryFile(prefix=".latents-", dir=folder, delete=os.name != "nt")
        if os.name == "nt":
            self._file.close()
        if hasattr(os, "posix_fallocate"):  # writing to a mapped file without room would kill the process
            try:
                os.posix_fallocate(self._file.fileno(), 0, elements * like.element_size())
            except OSError as error:
                raise InputError(
                    f"The file of the latents needs {elements * like.element_size() / 2**30:.1f} GB in "
                    f"'{folder or tempfile.gettempdir()}' ({error.strerror}); make room, or give "
                    "--no_cache_latents.") from None
        return torch.from_file(self._file.name, shared=True, size=elements, dtype=like.dtype).view(shape)

    def take(self, indices: list[int], flips: list[bool]) -> torch.Tensor:
        """The moments of these images, each mirrored or not, (B, 2 C, h, w)."""
        where = tuple(to_device(list(map(int, places)), self.moments.device) for places in (indices, flips))
        moments = self.moments[where]
        if moments.device != self.device:  # the cache is in a file
            moments = to_device(moments, self.device)
        if self.channels_last and len(indices) > 1:
            moments = moments.contiguous(memory_format=torch.channels_last)
        return moments
