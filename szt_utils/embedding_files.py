"""Files of learned embeddings: what the training writes, and what other tools write."""

import re
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, first_line
from .files import read_json, read_torch, write_bytes, write_torch

__all__ = ["ANY_ENCODER", "embedding_paths", "load_embedding", "read_embedding", "safe_file_name",
           "save_embedding", "save_rows", "trained_with"]

MEGABYTES = 256  # the largest file that is read as an embedding
MOST_NUMBERS = 10**7  # of one text encoder; 75 vectors of T5 are 0.3 million
ANY_ENCODER = "any"  # names the rows of a model's only text encoder
_ENCODER_KEYS = ("clip_l", "clip_g", "t5xxl")
_NAMELESS = {"emb_params": ANY_ENCODER, "emp_params": ANY_ENCODER, "t5": "t5xxl"}  # kohya, OneTrainer


def safe_file_name(token: str) -> str:
    """The token without what file systems dislike; A1111 and ComfyUI take the file's name for the word."""
    return re.sub(r"[^\w.-]+", "", token).strip(".") or "concept"


def save_embedding(path: str | Path, token: str, rows: torch.Tensor,
                   metadata: dict[str, str] | None = None) -> None:
    """Write `{token: float32 (n, D)}` by `save_rows`."""
    save_rows(path, {token: rows}, metadata)


def save_rows(path: str | Path, rows: dict[str, torch.Tensor],
              metadata: dict[str, str] | None = None) -> None:
    """Write rows by name, float32 (n, D), atomically: as safetensors, or with torch.save as `.bin`."""
    from safetensors.torch import save

    content = {name: part.detach().float().cpu().clone().contiguous() for name, part in rows.items()}
    if str(path).endswith(".bin"):
        write_torch(path, content)
    else:
        write_bytes(path, save(content, metadata={"format": "pt", **(metadata or {})}))


def load_embedding(path: str | Path) -> tuple[str, torch.Tensor]:
    """The token and the rows (n, D) of a file of one text encoder; InputError when it is something else."""
    token, rows = _read_file(Path(path))
    if list(rows) != [ANY_ENCODER]:
        raise InputError(f"The embedding '{path}' must hold exactly one token, but holds {len(rows)}.")
    return token, rows[ANY_ENCODER]


def embedding_paths(path: str | Path) -> list[Path]:
    """The files of an embedding that is given as its file or as a training's folder.

    The first need not exist; a second is the `learned_embeds_2` beside a `learned_embeds`.
    """
    path = Path(path)
    if path.is_dir():
        path = next((file for suffix in ("safetensors", "bin")
                     if (file := path / f"learned_embeds.{suffix}").is_file()),
                    path / "learned_embeds.safetensors")
    second = path.with_name(path.name.replace("learned_embeds", "learned_embeds_2", 1))
    return [path, second] if second != path and second.is_file() else [path]


def read_embedding(path: str | Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The token of an embedding and its rows (n, D) by text encoder: "clip_l", "clip_g", "t5xxl", or "any"
    where the file does not say.

    Takes what Diffusers, A1111, ComfyUI, kohya and OneTrainer write: `{token: rows}`, `emb_params`,
    `string_to_param`, `clip_l` and `clip_g`; a training's folder, or its `learned_embeds` beside
    `learned_embeds_2`. The token is in lower case, as CLIP's tokenizers read prompts; that of a file without
    one is its name in angle brackets. Runs no code of the file; InputError for others.
    """
    path, *second = embedding_paths(path)
    token, rows = _read_file(path)
    if list(rows) == [ANY_ENCODER] and second:
        rows = {"clip_l": rows[ANY_ENCODER], "clip_g": load_embedding(second[0])[1]}
    return token, rows


def trained_with(path: str | Path) -> tuple[int, str]:
    """The --clip_skip and --pooled_token that an embedding was trained with, by its metadata.

    A file without metadata, as a .bin file, was trained with the defaults, unless the training's options.json
    beside it says otherwise.
    """
    from safetensors import safe_open

    path = embedding_paths(path)[0]
    options = path.with_name("options.json")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            found = file.metadata()
    else:
        found = read_json(options) if options.is_file() else None
    found = found if isinstance(found, dict) else {}
    skipped = str(found.get("clip_skip", ""))
    return int(skipped) if skipped.isdecimal() else 0, str(found.get("pooled_token", "upstream"))


def _read_file(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    content, token = _read_tensors(path), f"<{path.stem}>"
    if isinstance(content.get("string_to_param"), dict):  # A1111
        token, content = str(content.get("name") or token), dict(content["string_to_param"])
        content = {ANY_ENCODER: next(iter(content.values()))} if len(content) == 1 else content
    elif len(content) == 1 and not set(content) & {*_ENCODER_KEYS, *_NAMELESS}:  # Diffusers
        (token, rows), = content.items()
        content = {ANY_ENCODER: rows}
    content = {_NAMELESS.get(name, name): rows for name, rows in content.items()
               if not str(name).endswith("_out")}
    known = set(content) <= {ANY_ENCODER, *_ENCODER_KEYS} and all(map(torch.is_tensor, content.values()))
    if not content or not known:
        held = len(content) if content else "none"
        raise InputError(f"The embedding '{path}' must hold exactly one token, but holds {held}.")
    if not str(token).strip() or not str(token).isprintable():
        raise InputError(f"The embedding '{path}' names its token '{token}', which cannot be written in a "
                         "prompt.")
    if not all(_is_plain(rows) for rows in content.values()):
        raise InputError(f"The embedding '{path}' must hold one vector, or rows of them, of at most "
                         f"{MOST_NUMBERS:,} floating-point numbers; it is not an embedding.")
    rows = {name: content[name].detach().reshape(-1, content[name].shape[-1])
            for name in (ANY_ENCODER, *_ENCODER_KEYS) if name in content}
    if not all(part.float().isfinite().all() for part in rows.values()):
        raise InputError(f"The embedding '{path}' holds values that are not finite; it cannot be used.")
    return str(token).lower(), rows


def _is_plain(rows: torch.Tensor) -> bool:
    """Whether a tensor holds one or more rows of floats, not too many: an expanded one may hold billions."""
    return (rows.dim() in (1, 2) and rows.layout is torch.strided and rows.device.type == "cpu"
            and rows.is_floating_point() and 0 < rows.numel() <= MOST_NUMBERS)


def _read_tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"The embedding '{path}' cannot be read ({error.strerror}).") from None
    if size > MEGABYTES << 20:
        raise InputError(f"The embedding '{path}' has more than {MEGABYTES} MB; it is not an embedding.")
    if path.suffix != ".safetensors":
        content = read_torch(path, "embedding")
    else:
        try:
            content = load_file(path)
        except Exception as error:  # safetensors has no common type for what a damaged file raises
            raise InputError(f"The embedding '{path}' cannot be read ({first_line(error)}).") from None
    if not isinstance(content, dict):
        raise InputError(f"The embedding '{path}' must hold exactly one token, but holds a "
                         f"{type(content).__name__}.")
    return content
