"""Random numbers that belong to an image: neither the device nor other images nor their order change them."""

import hashlib

import torch

__all__ = ["image_generator"]


def image_generator(image: torch.Tensor, seed: int, purpose: str = "attack") -> torch.Generator:
    """A CPU generator seeded by (seed, purpose, SHA-256 of the image), for an image (3, H, W) in [0, 1]."""
    levels = (image.detach().float().cpu() * 255).round().to(torch.uint8).contiguous()
    digest = hashlib.sha256(levels.numpy().tobytes()).hexdigest()
    key = hashlib.sha256(f"{seed} {purpose} {digest}".encode()).digest()
    # A CPU generator reads 32 bits of its seed.
    return torch.Generator().manual_seed(int.from_bytes(key[:4], "little"))
