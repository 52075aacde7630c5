"""How images and an image encoder answer attacks and JPEG: train_encoder.py trains it, check.py measures it.

The attack moves the latents away from those of the clean image, by 16 levels. JPEG compresses both images,
and what is left of their distance, in latents or in pixels, is the response.
"""

from collections.abc import Callable

import torch

from szt_utils.jpeg import jpeg_tensor
from szt_utils.pgd import pgd
from szt_utils.poisons import pull_back

EPS = 16  # levels
# Quality -> share of the shift that JPEG leaves, of an encoder trained on photographs (FLUX.2, distilled).
LEFT = {75: 0.59, 50: 0.49, 25: 0.42, 10: 0.33}

Encode = Callable[[torch.Tensor], torch.Tensor]  # images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w)


def attack(encode: Encode, images: torch.Tensor, steps: int, step_size: float,
           generators: list[torch.Generator]) -> torch.Tensor:
    """Images (B, 3, H, W) of whole levels, moved by at most EPS levels so that their latents move far."""
    with torch.no_grad():
        clean = encode(images)

    @torch.enable_grad()
    def gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        latents = encode(leaf)
        change = (latents - clean).detach()
        return pull_back(latents, leaf, change), change.square().flatten(1).sum(1)
    return pgd(images, gradient, eps=EPS, step_size=step_size, steps=steps, generators=generators)


def shift(encode: Encode, attacked: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Root mean square of the latents' distance, (B,)."""
    moved, clean = encode(torch.cat([attacked, images])).chunk(2)
    return (moved - clean).square().mean((1, 2, 3)).sqrt()


def left(encode: Encode, attacked: torch.Tensor, images: torch.Tensor, quality: int,
         before: torch.Tensor) -> torch.Tensor:
    """Share of the shift `before` (B,) that is left when JPEG compresses both images, (B,)."""
    return shift(encode, jpeg_tensor(attacked, quality), jpeg_tensor(images, quality)) / before


def left_in_pixels(attacked: torch.Tensor, images: torch.Tensor, quality: int,
                   view: Callable[[torch.Tensor], torch.Tensor] = lambda change: change) -> torch.Tensor:
    """Share of the perturbation d, along itself, that JPEG leaves, (B,): <J(x + d) - J(x), d> / <d, d>.

    `view` selects what is compared of a change, (B, 3, H, W).
    """
    change = view(attacked - images)
    kept = view(jpeg_tensor(attacked, quality) - jpeg_tensor(images, quality))
    return (kept * change).flatten(1).sum(1) / change.square().flatten(1).sum(1)


def luminance(change: torch.Tensor) -> torch.Tensor:
    """The luminance of JPEG (Rec. 601) of (B, 3, H, W), (B, H, W)."""
    return torch.einsum("bchw,c->bhw", change, change.new_tensor([0.299, 0.587, 0.114]))


def random_signs(images: torch.Tensor, levels: int, generator: torch.Generator) -> torch.Tensor:
    """Images (B, 3, H, W), each value changed up or down by `levels`, and clipped."""
    signs = torch.randint(0, 2, images.shape, generator=generator) * 2 - 1
    return (images + signs * (levels / 255)).clamp(0, 1)
