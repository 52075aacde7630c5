"""A .pth checkpoint of the segment-anything package: its tensors, and the model that they belong to."""

import pickle
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .notices import notice

__all__ = ["load_sam", "sam_from_state"]

_ANY = "image_encoder.pos_embed"  # a tensor that every checkpoint has
_WRAPPERS = ("model", "state_dict", "model_state_dict", "sam")  # of the tensors in training checkpoints


def load_sam(path: str | Path) -> torch.nn.Module:
    """The model of a .pth file, of any size; no code in the file is executed.

    InputError when the file is no such checkpoint, or when its tensors claim more memory than it has bytes.
    """
    def refuse(reason: str) -> InputError:
        return InputError(f"'{path}' cannot be used as a checkpoint of the segment-anything package: "
                          f"{reason}; download it again, or give another.")

    try:
        _check_size(Path(path))
        sam = sam_from_state(_unwrap(torch.load(path, map_location="cpu", weights_only=True), path))
    except FileNotFoundError:
        raise InputError(f"The checkpoint '{path}' does not exist.") from None
    except pickle.UnpicklingError:
        raise refuse("it is damaged or holds more than tensors, and code in it is not run") from None
    except KeyError as error:
        raise refuse(f"it has no {error}") from None
    except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, ArithmeticError, LookupError,
            zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split(": copying")[0].split())[:200]
        raise refuse(reason.rstrip(".") or type(error).__name__) from None
    if bad := [name for name, weight in sam.named_parameters() if not weight.isfinite().all()]:
        raise refuse(f"'{bad[0]}' is not finite")
    return sam


def _check_size(path: Path) -> None:
    """ValueError for a compressed archive, which may unpack to any size: torch.save compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")


def _unwrap(state: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, without wrappers such as "model" and prefixes such as "module."."""
    under = []
    for _ in range(3):
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise ValueError("it does not hold tensors by name")
        inner = next((name for name in _WRAPPERS if isinstance(state.get(name), Mapping)), None)
        if inner:
            state, under = state[inner], [*under, inner]
    prefix = next((name.removesuffix(_ANY) for name in state if name.endswith(_ANY)), "")
    if under or prefix:
        notice(f"'{path}': the model is read from {'/'.join([*under, prefix + '*'])}.")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"'{name}' is no tensor")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"'{name}' claims more numbers than the file has")
    return state


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """The number of consecutive names pattern.format(0), pattern.format(1), ... in a state dict."""
    n = 0
    while pattern.format(n) in state:
        n += 1
    return n


def sam_from_state(state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The `Sam` of the segment-anything package that a state dict belongs to, of any size.

    Its sizes are inferred from the shapes, except for the mask decoder's number of heads: 8, as in all
    published models. The model takes the tensors as they are: no memory is used for weights of its own,
    however large the shapes. KeyError names a missing tensor, RuntimeError one of another shape.
    """
    from segment_anything.modeling import Sam

    with torch.device("meta"):
        parts = _parts_of_shapes(state)
    sam = Sam(*parts)
    sam.load_state_dict(state, assign=True)
    return sam.eval()


def _parts_of_shapes(state: Mapping[str, torch.Tensor]) -> tuple[torch.nn.Module, ...]:
    """Image encoder, prompt encoder and mask decoder."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

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
        transformer_dim=channels,
        num_multimask_outputs=_count(state, "mask_decoder.output_hypernetworks_mlps.{}.layers.0.weight") - 1,
        transformer=TwoWayTransformer(
            depth=_count(state, "mask_decoder.transformer.layers.{}.mlp.lin1.weight"), embedding_dim=channels,
            mlp_dim=state[f"{decoder}mlp.lin1.weight"].shape[0], num_heads=8,
            attention_downsample_rate=channels
            // state[f"{decoder}cross_attn_token_to_image.q_proj.weight"].shape[0]),
        iou_head_depth=_count(state, "mask_decoder.iou_prediction_head.layers.{}.weight"),
        iou_head_hidden_dim=state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0])
    return encoder, prompts, masks
