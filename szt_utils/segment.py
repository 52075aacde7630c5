"""Masks with Segment Anything: a click, a box or a word in, the concept's mask out.

Two kinds of models behind one small interface: checkpoints of the `segment-anything` package, and the SAM
family of transformers. `see` embeds a picture, once; `decode` answers any number of prompts about it; what
comes out is as large as the model makes it, and `enlarge` brings it to the picture's size.

Prompts are in pixels of the picture, (x, y) from its upper left corner.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .errors import InputError
from .prompts import Prompt

__all__ = ["SamCheckpoint", "SamModel", "Seen", "enlarge", "load_segmenter", "sam_from_state", "segment"]


@dataclass(frozen=True)
class Seen:
    """A picture as a model has seen it: `image`; `inside`, the height and width that it takes in the model's
    input, a square of `side` pixels; `embedding`, the model's own; `features` (C, h, w), its part that covers
    the picture."""

    image: Image.Image
    inside: tuple[int, int]
    side: int
    embedding: Any
    features: torch.Tensor

    def to_input(self, coordinates) -> torch.Tensor:
        """Pixels of the picture, (..., 2), as the model counts them."""
        scale = [self.inside[1] / self.image.width, self.inside[0] / self.image.height]
        return torch.tensor(coordinates, dtype=torch.float32) * torch.tensor(scale)


def _seen(image: Image.Image, inside, side: int, embedding, grid: torch.Tensor) -> Seen:
    """`grid` (1, C, h, w) covers the square; the padding at its right and bottom is cut off."""
    h, w = (-(-n * cells // side) for n, cells in zip(inside, grid.shape[-2:], strict=True))
    return Seen(image, tuple(inside), side, embedding, grid[0, :, :h, :w].float().cpu())


def enlarge(logits: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Mask logits (N, M, h, w) of the model's square as (N, M, H, W) of the picture; above 0 is inside."""
    height, width = seen.inside
    whole = F.interpolate(logits, (seen.side, seen.side), mode="bilinear")[..., :height, :width]
    return F.interpolate(whole, seen.image.size[::-1], mode="bilinear")


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many of the names pattern.format(0), pattern.format(1) and so on there are."""
    n = 0
    while pattern.format(n) in state:
        n += 1
    return n


def sam_from_state(state: Mapping[str, torch.Tensor]):
    """Build the `Sam` that a state dict is of, of whatever size, from the shapes in it; KeyError names a
    missing one.

    Only the number of heads of the mask decoder leaves no trace in shapes: it is 8, as in all published
    models.
    """
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    width, _, patch, _ = state["image_encoder.patch_embed.proj.weight"].shape
    grid = state["image_encoder.pos_embed"].shape[1]
    depth = _count(state, "image_encoder.blocks.{}.attn.rel_pos_h")
    # A relative position runs from -(n - 1) to n - 1, n the side of the window that attends to itself.
    reaches = [(state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
    channels = state["image_encoder.neck.0.weight"].shape[0]
    decoder = "mask_decoder.transformer.layers.0."
    encoder = ImageEncoderViT(
        img_size=grid * patch, patch_size=patch, embed_dim=width, depth=depth, out_chans=channels,
        num_heads=width // state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1],
        mlp_ratio=state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0] / width, use_rel_pos=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), window_size=min(reaches),
        global_attn_indexes=tuple(i for i, reach in enumerate(reaches) if reach == grid))
    prompts = PromptEncoder(embed_dim=channels, image_embedding_size=(grid, grid),
                            input_image_size=(grid * patch, grid * patch),
                            mask_in_chans=state["prompt_encoder.mask_downscaling.3.weight"].shape[0])
    masks = MaskDecoder(
        transformer_dim=channels, num_multimask_outputs=state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        transformer=TwoWayTransformer(
            depth=_count(state, "mask_decoder.transformer.layers.{}.mlp.lin1.weight"), embedding_dim=channels,
            mlp_dim=state[f"{decoder}mlp.lin1.weight"].shape[0], num_heads=8,
            attention_downsample_rate=channels
            // state[f"{decoder}cross_attn_token_to_image.q_proj.weight"].shape[0]),
        iou_head_depth=_count(state, "mask_decoder.iou_prediction_head.layers.{}.weight"),
        iou_head_hidden_dim=state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0])
    sam = Sam(encoder, prompts, masks)
    sam.load_state_dict(state)
    return sam.eval()


class SamCheckpoint:
    """A model of the `segment-anything` package from its .pth file, of any size; no code in the file is
    run."""

    takes_text = False

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        import pickle

        self.name, self.device = str(path), torch.device(device)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.sam = sam_from_state(state).float().to(device)
        except FileNotFoundError:
            raise InputError(f"The checkpoint '{path}' does not exist.") from None
        except KeyError as error:
            raise InputError(f"'{path}' is not a checkpoint of the segment-anything package: "
                             f"it has no {error}.") from None
        except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError,
                EOFError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"'{path}' cannot be used as a checkpoint of the segment-anything package: "
                             f"{why}") from None

    @torch.no_grad()
    def see(self, image: Image.Image) -> Seen:
        """Embed an RGB picture."""
        from segment_anything.utils.transforms import ResizeLongestSide

        side = self.sam.image_encoder.img_size
        resized = ResizeLongestSide(side).apply_image(np.asarray(image))
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].to(self.device)
        embedding = self.sam.image_encoder(self.sam.preprocess(pixels))
        return _seen(image, resized.shape[:2], side, embedding, embedding)

    @torch.no_grad()
    def decode(self, seen: Seen, points: torch.Tensor | None, labels: torch.Tensor | None,
               boxes: torch.Tensor | None, several: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits (N, M, h, w) and guessed overlaps with the truth (N, M) for N prompts of one kind; M is
        3 if `several`, else 1.

        points (N, P, 2) with labels (N, P), 1 inside and 0 outside, and boxes (N, 4), in the model's pixels.
        """
        def move(tensor):
            return None if tensor is None else tensor.to(self.device)

        sparse, dense = self.sam.prompt_encoder(
            points=None if points is None else (move(points), move(labels)), boxes=move(boxes), masks=None)
        logits, scores = self.sam.mask_decoder(
            image_embeddings=seen.embedding, image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=several)
        return logits.cpu(), scores.cpu()


class SamModel:
    """A model of transformers' SAM family, by folder or Hub id: SAM, SAM 2, SAM 3 and their kin."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForMaskGeneration

        self.name, self.device = name, torch.device(device)
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            # What finds words and what answers clicks are two models in one file.
            self.takes_text = kind in ("sam3", "sam3_video", "sam3_lite_text")
            self._finder = None
            self.model = None
            self.processor = AutoImageProcessor.from_pretrained(name)
            if kind not in ("sam3", "sam3_lite_text"):
                self.model = AutoModelForMaskGeneration.from_pretrained(name).eval().to(device)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"The model '{name}' cannot be loaded as one of the SAM family: "
                             f"{str(error).strip().splitlines()[0]}") from None

    @torch.no_grad()
    def see(self, image: Image.Image) -> Seen:
        """Embed an RGB picture."""
        inputs = self.processor(images=image, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device)
        side = pixels.shape[-1]
        inside = [side, side]
        if "reshaped_input_sizes" in inputs:  # SAM pads; its successors stretch
            inside = inputs["reshaped_input_sizes"][0].tolist()
        if self.model is None:  # it only takes words, and its finder embeds for itself
            return _seen(image, inside, side, None, torch.zeros(1, 1, 1, 1))
        embedding = self.model.get_image_embeddings(pixels)
        # SAM 2 and 3 give several sizes; the last is the coarsest and has the most meaning.
        grid = embedding[-1] if isinstance(embedding, list | tuple) else embedding
        return _seen(image, inside, side, embedding, grid)

    @torch.no_grad()
    def decode(self, seen: Seen, points: torch.Tensor | None, labels: torch.Tensor | None,
               boxes: torch.Tensor | None, several: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """As SamCheckpoint.decode."""
        if self.model is None:
            raise InputError(f"The model '{self.name}' finds words only; give --text.")

        def move(tensor):
            return None if tensor is None else tensor[None].to(self.device)

        done = self.model(input_points=move(points), input_boxes=move(boxes),
                          input_labels=None if labels is None else move(labels.int()),
                          image_embeddings=seen.embedding, multimask_output=several)
        return done.pred_masks[0].float().cpu(), done.iou_scores[0].float().cpu()

    @torch.no_grad()
    def find(self, image: Image.Image, text: str, threshold: float = 0.5) -> tuple[torch.Tensor, float]:
        """Everything in the picture that the words name, bool (H, W), and the surest one's score; InputError
        when nothing scores `threshold`."""
        from transformers import AutoProcessor, Sam3Model

        if self._finder is None:
            self._finder = (AutoProcessor.from_pretrained(self.name),
                            Sam3Model.from_pretrained(self.name).eval().to(self.device))
        processor, model = self._finder
        inputs = processor(images=image, text=text, return_tensors="pt").to(self.device)
        found = processor.post_process_instance_segmentation(
            model(**{name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}),
            threshold=threshold, target_sizes=[image.size[::-1]])[0]
        if not len(found["scores"]):
            raise InputError(f"found no '{text}'")
        return found["masks"].bool().any(0).cpu(), found["scores"].max().item()


def load_segmenter(checkpoint: str | Path | None = None, model: str | None = None,
                   device: torch.device | str = "cpu") -> SamCheckpoint | SamModel:
    """The model of a .pth file, or of a transformers folder or id, or else the bundled one of the pocket
    world."""
    if model is not None:
        return SamModel(model, device)
    if checkpoint is None:
        from .pocket import sam_path

        checkpoint = sam_path()
    return SamCheckpoint(checkpoint, device)


def segment(segmenter: SamCheckpoint | SamModel, seen: Seen, prompt: Prompt) -> tuple[torch.Tensor, float]:
    """The mask that a prompt means, bool (H, W), and the model's guess of its overlap with the truth.

    A single click may mean a thing or a part of it: the model gives three masks, and the one it is surest of
    counts.
    """
    if prompt.text is not None:
        if not segmenter.takes_text:
            raise InputError(f"The model '{segmenter.name}' takes no words; give points or a box, "
                             "or take a SAM 3 model.")
        return segmenter.find(seen.image, prompt.text)
    clicks = [*prompt.include, *prompt.exclude]
    if not clicks and prompt.box is None:
        raise InputError("nothing says what the concept is: give a point or a box")
    labels = torch.tensor([[1] * len(prompt.include) + [0] * len(prompt.exclude)])
    logits, scores = segmenter.decode(
        seen, seen.to_input([clicks]) if clicks else None, labels if clicks else None,
        None if prompt.box is None else seen.to_input([prompt.box[:2], prompt.box[2:]]).reshape(1, 4),
        several=len(clicks) == 1 and prompt.box is None)
    best = int(scores[0].argmax())
    return enlarge(logits[:, best:best + 1], seen)[0, 0] > 0, scores[0, best].item()
