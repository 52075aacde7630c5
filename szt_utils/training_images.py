"""A concept's images and masks at the training resolution."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from .caption_files import caption_templates
from .errors import InputError
from .images import from_pil, list_images
from .masks import find_masks, to_latent_grid
from .safe_zone import SafeZone
from .settings import ConceptSettings

__all__ = ["TrainingImages"]

_KEPT_BYTES = 2**30  # of a concept's images in memory; further ones are read again when they are needed

# The image's path and the mask's or None -> RGB image (R, R), mask (1, 1, R, R) or None, and the original
# (width, height).
Prepared = tuple[Image.Image, torch.Tensor | None, tuple[int, int]]
Prepare = Callable[[Path, Path | None], Prepared]


class TrainingImages:
    """The images of a folder and their masks, as `prepare` makes them, and the templates of their captions.

    All are read once, so that whatever is wrong with one shows before a model is loaded.
    """

    def __init__(self, settings: ConceptSettings, zone: SafeZone, prepare: Prepare):
        self.zone, self.prepare, self.center_crop = zone, prepare, settings.center_crop
        self.paths = list_images(settings.train_data_dir)
        self.mask_paths = find_masks(settings.loss_mask_dir, self.paths) if settings.loss_mask_dir else None
        self.templates = caption_templates(settings, self.paths)
        self.kept, self.original_sizes, kept_bytes = {}, [], 0
        for i in range(len(self.paths)):
            image, mask, size = self.read(i)
            self.original_sizes.append(size)
            kept_bytes += 3 * image.width * image.height + (0 if mask is None else mask.nbytes)
            if kept_bytes < _KEPT_BYTES:
                self.kept[i] = image, mask, size

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> Prepared:
        """The i-th image as it is encoded, its mask or None, and its original (width, height)."""
        if i in self.kept:
            return self.kept[i]
        image, mask, size = self.prepare(self.paths[i], self.mask_paths[i] if self.mask_paths else None)
        if mask is not None and not mask.any():
            raise InputError(f"The mask '{self.mask_paths[i]}' is all black after cropping "
                             "to the training resolution.")
        return image, mask, size

    def pixels(self, i: int) -> torch.Tensor:
        """The i-th image as the VAE sees it, float32 (3, R, R) in [0, 1]."""
        image, mask, _ = self.read(i)
        return self.zone.mask_image(from_pil(image), mask)[0]

    def latent_masks(self, grid: tuple[int, int]) -> torch.Tensor | None:
        """All masks and their mirror images on the latent grid, (N, 2, 1, h, w); None without masks."""
        masks = []
        for i, path in enumerate(self.paths):
            _, mask, _ = self.read(i)
            if mask is None:
                return None
            masks.append(to_latent_grid(torch.cat([mask, mask.flip(-1)]), grid))
            if not masks[-1].any():
                raise InputError(f"The mask of '{path}' is smaller than a cell of the latent grid "
                                 f"({grid[0]} x {grid[1]}), so nothing would be trained on; "
                                 "give it a --mask_dilation.")
        return torch.stack(masks)

    def sizes(self, resolution: int, conditioning: str = "crop") -> torch.Tensor:
        """SDXL's size conditioning: height, width, and top and left of the crop, long (N, 4).

        The crop is counted in pixels after the resizing. With `conditioning` "upstream" it is (0, 0), as in
        the Diffusers example, which never crops.
        """
        rows = []
        for width, height in self.original_sizes:
            scale = resolution / min(width, height) if self.center_crop and conditioning == "crop" else 0
            side = min(width, height)
            rows.append([height, width, round((height - side) // 2 * scale),
                         round((width - side) // 2 * scale)])
        return torch.tensor(rows)
