"""What a Diffusers training script calls once `szt_utils.patch` has put Safe-Zone Training into it.

With the flags off, each call gives back what it was given, and nothing is drawn. The masks take the same way
as the images: the script's data set is made a second time, with masks in the place of images, and its
random crops and flips are drawn again. JPEG comes last, at the training resolution.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .arguments import add_safe_zone_flags as add_flags
from .arguments import unmet_needs
from .errors import InputError, exit_on_input_error
from .images import hash_pixels, list_images, read_upright
from .joint_transform import random_states, replay
from .masks import dilate, find_masks, read_mask, to_latent_grid
from .notices import notice
from .safe_zone import SafeZone, count_instances
from .schedules import Schedule

__all__ = ["SafeZoneTraining", "add_flags", "image_or_mask"]

_MASK = "szt_mask"  # of an example and, stacked, of a batch
_reader: Callable | None = None  # what `image_or_mask` does, while an example is made


def image_or_mask(image: Image.Image) -> Image.Image:
    """An instance image that the script's data set has opened; while masks are read, its mask, RGB."""
    return image if _reader is None else _reader(image)


@contextlib.contextmanager
def _reading(reader: Callable) -> Iterator[None]:
    global _reader
    _reader = reader
    try:
        yield
    finally:
        _reader = None


def _upright(image: Image.Image) -> Image.Image:
    rotated = image.getexif().get(Image.ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if rotated else image


class SafeZoneTraining:
    """Safe-Zone Training by the flags of `add_flags`, for a script's `args` and its noise scheduler.

    A mistake in the flags or masks ends the script with one sentence, before it trains.
    """

    def __init__(self, args: Any, scheduler: Any):
        self.args = args
        self.prior = bool(getattr(args, "with_prior_preservation", False))
        self.masks, self._cached = {}, []
        given = {each.name: getattr(args, each.name) for each in fields(SafeZone)
                 if getattr(args, each.name) is not None}
        self.active = bool(given or args.szt or args.loss_mask_dir)
        if not self.active:
            return
        with exit_on_input_error():
            for name, needed in unmet_needs(args):
                raise InputError(f"--{name} needs {needed}.")
            schedule = Schedule(scheduler)
            zone = SafeZone.paper(args.resolution, schedule, **given) if args.szt else SafeZone(**given)
            self.zone = zone.fit(schedule.num_timesteps)
            if zone.mask_mode not in ("loss", "image", "image_and_loss"):
                raise InputError(f"--mask_mode {zone.mask_mode} is not offered in a patched script.")
            if args.loss_mask_dir:
                self.masks = _find_all_masks(args)
        if os.environ.get("RANK", "0") == "0":
            count = len(set(self.masks.values()))
            lines = zone.describe(schedule, None)[:2] + [
                f"{count} masks, mode {zone.mask_mode}, dilated by {zone.mask_dilation} px"
                if self.masks else "no masks: the loss counts everywhere"]
            print("\n".join(f"Safe-Zone Training: {line}" for line in lines), flush=True)

    # The data.

    def dataset(self, kind: type) -> Callable:
        """The script's class of data sets, whose examples are JPEG-compressed and have masks."""
        return (lambda *args, **options: _Dataset(self, kind, args, options)) if self.active else kind

    def transform(self, transform: Callable, column: str) -> Callable:
        """The script's transform of a batch of a `datasets` data set, whose images are in `column`."""
        if not self.active:
            return transform

        def with_masks(examples: dict) -> dict:
            states = random_states()
            done = transform({**examples, column: [_upright(image) for image in examples[column]]})
            masks = [None] * len(done["pixel_values"])
            if self.masks:
                with replay(states):
                    masks = transform({**examples, column: list(map(self.mask_of, examples[column]))})
                masks = masks["pixel_values"]
            pairs = [self.prepare(*pair) for pair in zip(done["pixel_values"], masks, strict=True)]
            done["pixel_values"] = [pixels for pixels, _ in pairs]
            return {**done, _MASK: [mask for _, mask in pairs]} if self.masks else done
        return with_masks

    def collate(self, collate: Callable) -> Callable:
        """The script's function that makes a batch of examples, whose batch has their masks, too."""
        def with_masks(examples: list) -> Any:
            return {**collate(examples), _MASK: torch.stack([example[_MASK] for example in examples])}
        return with_masks if self.active and self.masks else collate

    # The loop.

    def timesteps(self, scheduler: Any, count: int, device: Any) -> torch.Tensor:
        """In the place of torch.randint: WHEN."""
        if not self.active:
            return torch.randint(0, scheduler.config.num_train_timesteps, (count,), device=device)
        return self.zone.timesteps(scheduler, count, prior_preservation=self.prior, device=device)

    def indices(self, scheduler: Any, count: int) -> torch.Tensor:
        """The same for indices into the scheduler's list of timesteps."""
        if not self.active:
            return torch.randint(0, scheduler.config.num_train_timesteps, (count,))
        return self.zone.indices(scheduler, count, prior_preservation=self.prior)

    def density(self, density: Callable, scheduler: Any) -> Callable:
        """The script's density of timesteps, which draws those outside the safe zone again."""
        def inside(*, batch_size: int, **options: Any) -> torch.Tensor:
            with exit_on_input_error():
                return self.zone.restrict(scheduler, batch_size, prior_preservation=self.prior,
                                          u=lambda count: density(batch_size=count, **options))
        return inside if self.active else density

    def mask(self, prediction: torch.Tensor, target: torch.Tensor, batch: Mapping,
             step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, 0 outside the masks: whatever loss the script takes of them, nothing is learned there: WHERE.

        The class images of prior preservation, the second half of a batch, stay as they are.
        """
        if not self.active or not self.masks or not self.zone.mask_mode.endswith("loss"):
            return prediction, target
        if prediction.dim() < 4:
            raise InputError("The script packs its prediction into tokens before the loss, where masks "
                             "cannot be applied; leave out --loss_mask_dir.")
        masks = (self._cached[step] if self._cached else batch[_MASK]).to(prediction.device)
        mask = to_latent_grid(masks, prediction.shape[-2:]).to(prediction)
        if not mask.any():
            notice("Nothing is learned from a batch whose masks are cropped away, or smaller than a cell of "
                   "the latent grid; --center_crop or a --mask_dilation may help.")
        if self.zone.mask_normalization == "area":
            mask = mask / mask.mean().clamp(min=1e-6).sqrt()  # what the script squares
        own = count_instances(len(prediction), self.prior)
        mask = mask.view(own, 1, *[1] * (prediction.dim() - 4), *mask.shape[-2:])
        return tuple(torch.cat([each[:own] * mask, each[own:]]) for each in (prediction, target))

    def remember(self, batch: Mapping) -> None:
        """Keep the masks of a batch whose latents the script caches by step: each epoch shuffles anew."""
        if self.active and self.masks:
            self._cached.append(batch[_MASK].cpu())

    def instances(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The timesteps of the instance images, which min-SNR weights."""
        return timesteps[:count_instances(len(timesteps), self.prior)] if self.active else timesteps

    # What these are made of.

    def mask_of(self, image: Image.Image) -> Image.Image:
        """The mask of an image that came from a file, RGB, of the image's upright size."""
        name, image = getattr(image, "filename", ""), _upright(image)
        mask = self.masks.get(Path(name).resolve()) if name else self.masks.get(hash_pixels(image))
        if mask is None:
            raise InputError(f"The image '{name or 'without a file'}' has no mask in "
                             f"'{self.args.loss_mask_dir}'.")
        return read_mask(mask, image.size).convert("RGB")

    def prepare(self, pixels: torch.Tensor,
                mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """An image (3, H, W) in [-1, 1], JPEG-compressed, and its mask (1, H, W), dilated.

        `mask` (3, H, W) is what the script's transforms have made of the mask's file.
        """
        levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        image = self.zone.purify(Image.fromarray(levels.permute(1, 2, 0).numpy()))
        if self.zone.jpeg_quality is not None:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(pixels) / 127.5 - 1
        if mask is None:
            return pixels, None
        mask = dilate((mask.mean(0, keepdim=True)[None] > 0).float(), self.zone.mask_dilation)[0]
        return self.zone.mask_image(pixels / 2 + 0.5, mask) * 2 - 1, mask


class _Dataset(torch.utils.data.Dataset):
    """The script's data set and, with masks, the same once more, made of the masks."""

    def __init__(self, szt: SafeZoneTraining, kind: type, args: tuple, options: dict):
        self.szt, self.masks, states = szt, None, random_states()
        with exit_on_input_error():
            with _reading(_upright):
                self.images = kind(*args, **options)
            if szt.masks:
                with _reading(szt.mask_of), replay(states):
                    self.masks = kind(*args, **options)

    def __len__(self) -> int:
        return len(self.images)

    def __getattr__(self, name: str) -> Any:
        if name == "images":
            raise AttributeError(name)
        return getattr(self.images, name)

    def __getitem__(self, index: Any) -> dict:
        states, mask = random_states(), None
        with _reading(_upright):
            example = self.images[index]
        key = "instance_images" if "instance_images" in example else "pixel_values"
        if self.masks is not None:
            with _reading(self.szt.mask_of), replay(states):
                mask = self.masks[index][key]
        example[key], mask = self.szt.prepare(example[key], mask)
        return example if mask is None else {**example, _MASK: mask}


def _find_all_masks(args: Any) -> dict[Path | str, Path]:
    """The masks of all instance images, by the images' paths and, where these are the same, their pixels.

    `datasets` hides the path of an image that has an EXIF orientation. All are read, to find what is wrong.
    """
    concepts = getattr(args, "concepts_list", None)
    folders = [each["instance_data_dir"] for each in concepts] if isinstance(concepts, list) else [
        getattr(args, name) for name in ("instance_data_dir", "train_data_dir") if getattr(args, name, None)]
    dataset = getattr(args, "dataset_name", None)
    if not folders and dataset and Path(dataset).is_dir():
        folders = [dataset]
    if not folders:
        raise InputError("--loss_mask_dir needs images in a local folder, whose names the masks have.")
    paths = [path for folder in folders for path in list_images(folder, recursive=True)]
    found: dict[Path | str, Path] = {}
    for path, mask in zip(paths, find_masks(args.loss_mask_dir, paths), strict=True):
        image = read_upright(path)
        read_mask(mask, image.size)
        found[path.resolve()] = mask
        found.setdefault(hash_pixels(image), mask)
    return found
