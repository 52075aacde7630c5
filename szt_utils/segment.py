"""Masks with Segment Anything: points, a box or words in, the concept's mask out.

Two kinds of models with one interface: checkpoints of the `segment-anything` package, and the SAM family of
transformers. `embed` embeds an image, once; `decode` answers any number of prompts about it with mask logits
at the model's own resolution; `resize_to_image` resizes these to the image's size.

Prompts are in pixels of the image, (x, y) from its upper left corner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .errors import InputError, first_line
from .models.parts import check_weights
from .sam_checkpoint import load_sam
from .sam_prompts import SamPrompt

__all__ = ["EmbeddedImage", "SamCheckpoint", "SamModel", "load_segmenter", "resize_to_image", "segment"]


@dataclass(frozen=True)
class EmbeddedImage:
    """An image of `size`, (width, height), and its embedding by a model, whose input is a square of
    `input_side` pixels.

    `input_size` is the height and width of the image within that square; `embedding` is in the model's own
    format; `features` (C, h, w) are the part of it that covers the image. Only words need the `image` itself.
    """

    image: Image.Image | None
    size: tuple[int, int]
    input_size: tuple[int, int]
    input_side: int
    embedding: Any
    features: torch.Tensor | None

    def to_input(self, coordinates: Sequence[Any]) -> torch.Tensor:
        """Pixels (..., 2) of the image as pixels of the model's input."""
        scale = [self.input_size[1] / self.size[0], self.input_size[0] / self.size[1]]
        return torch.tensor(coordinates, dtype=torch.float32) * torch.tensor(scale)


def _embedded(image: Image.Image, input_size: Sequence[int], side: int, embedding: Any,
              grid: torch.Tensor) -> EmbeddedImage:
    """`grid` (1, C, h, w) covers the square; the padding at its right and bottom is cut off."""
    h, w = (-(-n * cells // side) for n, cells in zip(input_size, grid.shape[-2:], strict=True))
    return EmbeddedImage(image, image.size, tuple(input_size), side, embedding,
                         grid[0, :, :h, :w].float().cpu())


def _check_aspect(image: Image.Image, side: int) -> None:
    """InputError for an image whose shorter side vanishes when its longer side becomes `side` pixels."""
    if 2 * side * min(image.size) < max(image.size):
        raise InputError(f"{image.width} x {image.height} pixels are too long and narrow for the model; "
                         "crop the image")


def resize_to_image(logits: torch.Tensor, embedded: EmbeddedImage) -> torch.Tensor:
    """Mask logits (N, M, h, w) of the model's square as (N, M, H, W) of the image; above 0 is inside."""
    height, width = embedded.input_size
    square = F.interpolate(logits, (embedded.input_side, embedded.input_side), mode="bilinear")
    return F.interpolate(square[..., :height, :width], embedded.size[::-1], mode="bilinear")


class SamCheckpoint:
    """A model of the `segment-anything` package from its .pth file, of any size.

    No code in the file is executed. InputError when it is no such checkpoint.
    """

    takes_text = False

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        self.name, self.device = str(path), torch.device(device)
        self.sam = load_sam(path).float().to(device)

    @torch.no_grad()
    def embed(self, image: Image.Image) -> EmbeddedImage:
        """Embed an RGB image; InputError when it is too long and narrow."""
        from segment_anything.utils.transforms import ResizeLongestSide

        side = self.sam.image_encoder.img_size
        _check_aspect(image, side)
        resized = ResizeLongestSide(side).apply_image(np.asarray(image))
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].to(self.device)
        embedding = self.sam.image_encoder(self.sam.preprocess(pixels))
        return _embedded(image, resized.shape[:2], side, embedding, embedding)

    @torch.no_grad()
    def decode(self, embedded: EmbeddedImage, points: torch.Tensor | None,
               labels: torch.Tensor | None, boxes: torch.Tensor | None, multimask: bool
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits (N, M, h, w) and predicted IoUs (N, M) for N prompts of one kind; M is 3 if
        `multimask`, else 1.

        points (N, P, 2) with labels (N, P), 1 inside and 0 outside, and boxes (N, 4), in pixels of the
        model's input.
        """
        def move(tensor):
            return None if tensor is None else tensor.to(self.device)

        sparse, dense = self.sam.prompt_encoder(
            points=None if points is None else (move(points), move(labels)), boxes=move(boxes), masks=None)
        logits, scores = self.sam.mask_decoder(
            image_embeddings=embedded.embedding, image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=multimask)
        return logits.cpu(), scores.cpu()


class SamModel:
    """A model of transformers' SAM family, by folder or Hub id: SAM, SAM 2, SAM 3 and their variants."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForMaskGeneration

        self.name, self.device = name, torch.device(device)
        try:
            kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
            if kind == "sam_hq":  # whose decoder needs the layers of the encoder as well
                raise InputError(f"The model '{name}' is SAM-HQ, which is not supported; give SAM, SAM 2 or "
                                 "SAM 3.")
            # SAM 3 is two models in one file: one for text, one for points and boxes.
            self.takes_text = kind in ("sam3", "sam3_video", "sam3_lite_text")
            self._text_model = None
            self.model = None
            self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            if kind not in ("sam3", "sam3_lite_text"):
                self.model = self._load(AutoModelForMaskGeneration, trust_remote_code=False)
        except InputError:
            raise
        except Exception as error:  # a folder's files make transformers raise almost anything
            raise InputError(f"The model '{name}' cannot be loaded as one of the SAM family: "
                             f"{first_line(error)}") from None

    def _load(self, cls: type, **options: Any) -> torch.nn.Module:
        """A model, unless weights of it are missing, of another shape or not finite; a file may have more."""
        model, report = cls.from_pretrained(self.name, output_loading_info=True, dtype=torch.float32,
                                            **options)
        check_weights(model, {**report, "unexpected_keys": []}, f"The model '{self.name}'")
        return model.eval().to(self.device)

    @torch.no_grad()
    def embed(self, image: Image.Image) -> EmbeddedImage:
        """As SamCheckpoint.embed."""
        if longest := getattr(self.processor.size, "longest_edge", None):
            _check_aspect(image, longest)
        inputs = self.processor(images=image, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device)
        side = pixels.shape[-1]
        input_size = [side, side]
        if "reshaped_input_sizes" in inputs:  # SAM pads; its successors stretch
            input_size = inputs["reshaped_input_sizes"][0].tolist()
        if self.model is None:  # the text model embeds the image itself
            return _embedded(image, input_size, side, None, torch.zeros(1, 1, 1, 1))
        embedding = self.model.get_image_embeddings(pixels)
        # SAM 2 and 3 embed at several resolutions; the last, the coarsest, is the most semantic.
        grid = embedding[-1] if isinstance(embedding, list | tuple) else embedding
        return _embedded(image, input_size, side, embedding, grid)

    @torch.no_grad()
    def decode(self, embedded: EmbeddedImage, points: torch.Tensor | None,
               labels: torch.Tensor | None, boxes: torch.Tensor | None, multimask: bool
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """As SamCheckpoint.decode."""
        if self.model is None:
            raise InputError(f"The model '{self.name}' takes only text; give --text.")

        def move(tensor):
            return None if tensor is None else tensor[None].to(self.device)

        output = self.model(input_points=move(points), input_boxes=move(boxes),
                            input_labels=None if labels is None else move(labels.int()),
                            image_embeddings=embedded.embedding, multimask_output=multimask)
        return output.pred_masks[0].float().cpu(), output.iou_scores[0].float().cpu()

    @torch.no_grad()
    def segment_text(self, image: Image.Image, text: str,
                     threshold: float = 0.5) -> tuple[torch.Tensor, float]:
        """The mask of all instances of `text` in an RGB image, bool (H, W), and the highest score.

        InputError when no instance has a score above `threshold`.
        """
        from transformers import AutoProcessor, Sam3Model

        if self._text_model is None:
            self._text_model = (AutoProcessor.from_pretrained(self.name, trust_remote_code=False),
                                self._load(Sam3Model))
        processor, model = self._text_model
        inputs = processor(images=image, text=text, return_tensors="pt").to(self.device)
        instances = processor.post_process_instance_segmentation(
            model(**{name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}),
            threshold=threshold, target_sizes=[image.size[::-1]])[0]
        if not len(instances["scores"]):
            raise InputError(f"found no '{text}'; try other words")
        return instances["masks"].bool().any(0).cpu(), instances["scores"].max().item()


Segmenter = SamCheckpoint | SamModel


def load_segmenter(checkpoint: str | Path | None = None, model: str | None = None,
                   device: torch.device | str = "cpu") -> Segmenter:
    """The model of a .pth file, or of a transformers folder or Hub id; by default the bundled one, which only
    works on pocket-world images."""
    if model is not None:
        return SamModel(model, device)
    if checkpoint is None:
        from .pocket import sam_path

        checkpoint = sam_path()
    return SamCheckpoint(checkpoint, device)


def segment(segmenter: Segmenter, embedded: EmbeddedImage,
            prompt: SamPrompt) -> tuple[torch.Tensor, float]:
    """The mask of a prompt, bool (H, W), and the model's own score of it: for points and boxes the predicted
    IoU.

    A single point is ambiguous (an object or a part of it): of the model's three masks the one with the
    highest score is returned. InputError for a prompt that the model does not take.
    """
    if prompt.text is not None:
        if not segmenter.takes_text:
            raise InputError(f"The model '{segmenter.name}' takes no text; give points or a box, "
                             "or use a SAM 3 model.")
        return segmenter.segment_text(embedded.image, prompt.text)
    points = [*prompt.include, *prompt.exclude]
    if not points and prompt.box is None:
        raise InputError("nothing marks the concept; give a point or a box")
    labels = torch.tensor([[1] * len(prompt.include) + [0] * len(prompt.exclude)])
    logits, scores = segmenter.decode(
        embedded, embedded.to_input([points]) if points else None, labels if points else None,
        None if prompt.box is None else embedded.to_input([prompt.box[:2], prompt.box[2:]]).reshape(1, 4),
        multimask=len(points) == 1 and prompt.box is None)
    best = int(scores[0].argmax())
    return resize_to_image(logits[:, best:best + 1], embedded)[0, 0] > 0, scores[0, best].item()
