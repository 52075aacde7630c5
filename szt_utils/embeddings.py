"""Learned token embeddings: placeholder tokens, training of the new rows only, files that any tool loads."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F

from .errors import InputError
from .files import write_bytes, write_torch

__all__ = ["NewRows", "add_embedding", "add_placeholder", "add_tokens", "join_rows", "load_embedding",
           "ordinary_embedding", "ordinary_words_with", "placeholder_prompt", "safe_file_name",
           "save_embedding", "take_rows", "train_rows"]

# Words of ordinary prompts; a bare placeholder that occurs inside one of them
# would be replaced there as well.
_ORDINARY_WORDS = ("a photo picture painting rendering rendition cropped close-up style bright dark nice "
                   "good weird clean dirty small large cool risks asks desks masks tasks thanks children "
                   "background beach mountain flower person").split()


def _tokens(placeholder: str, num_vectors: int) -> list[str]:
    return [placeholder] + [f"{placeholder}_{i}" for i in range(1, num_vectors)]


def add_tokens(tokenizer: Any, placeholder: str, initializer: str,
               num_vectors: int = 1) -> tuple[list[int], int]:
    """Add `placeholder` (and `placeholder_1`, ... up to `num_vectors`) to the tokenizer;
    ids of the new tokens, and of the initializer.

    Raises InputError for tokens that would not work at inference: see the messages.
    """
    if num_vectors < 1:
        raise InputError(f"--num_vectors must be at least 1, but is {num_vectors}.")
    if not placeholder.strip() or re.search(r"\s", placeholder):
        raise InputError(f"The placeholder token '{placeholder}' must be one word without spaces, "
                         "such as '<my-concept>'.")
    if placeholder != placeholder.lower():
        raise InputError(f"The placeholder token '{placeholder}' has capital letters, but CLIP tokenizers "
                         "lower-case prompts, so it would not be found in them; "
                         f"use '{placeholder.lower()}'.")
    initializer_ids = tokenizer.encode(initializer, add_special_tokens=False)
    if (len(initializer_ids) != 1
            or initializer_ids[0] == tokenizer.unk_token_id != tokenizer.convert_tokens_to_ids(initializer)):
        known = f"{len(initializer_ids)} tokens" if len(initializer_ids) != 1 else "unknown"
        raise InputError(f"The initializer token '{initializer}' must be a single token of the model's "
                         f"vocabulary, but is {known}; choose a simpler word for the concept.")
    tokens = _tokens(placeholder, num_vectors)
    taken = [token for token in tokens
             if token in tokenizer.get_vocab() or f"{token}</w>" in tokenizer.get_vocab()]
    if taken or tokenizer.add_tokens(tokens) != num_vectors:
        raise InputError(f"The tokenizer already contains the token '{(taken or tokens)[0]}'; "
                         "choose another --placeholder_token.")
    return tokenizer.convert_tokens_to_ids(tokens), initializer_ids[0]


def add_placeholder(tokenizer: Any, text_encoder: torch.nn.Module, placeholder: str, initializer: str,
                    num_vectors: int = 1) -> list[int]:
    """`add_tokens`, and rows for them in the text encoder that copy the initializer's; ids of the new rows,
    which are the last of its embedding.

    Draws from torch's global generator as `resize_token_embeddings` does.
    """
    ids, initializer_id = add_tokens(tokenizer, placeholder, initializer, num_vectors)
    text_encoder.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        weight = text_encoder.get_input_embeddings().weight
        weight[ids] = weight[initializer_id].clone()
    return ids


def ordinary_words_with(placeholder: str, vocabulary: list[str]) -> list[str]:
    """Ordinary words that contain the placeholder, in which a tokenizer would find it too;
    empty for `<bracketed>` ones."""
    words = {word.removesuffix("</w>") for word in vocabulary} | set(_ORDINARY_WORDS)
    return sorted(word for word in words if placeholder in word and word != placeholder)


def placeholder_prompt(placeholder: str, num_vectors: int = 1) -> str:
    """What stands for the concept in a training prompt: all its tokens with spaces between."""
    return " ".join(_tokens(placeholder, num_vectors))


class NewRows(torch.nn.Module):
    """A token embedding that ends in `rows` (n, D), its only parameter; the rest, `frozen` (V, D), stays.

    Gives the same values and row gradients as the whole matrix, at the cost of the rows alone.
    """

    def __init__(self, frozen: torch.Tensor, rows: torch.Tensor):
        super().__init__()
        self.register_buffer("frozen", frozen.detach())
        self.rows = torch.nn.Parameter(rows.detach().clone())

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix (V + n, D), as a new tensor."""
        return torch.cat([self.frozen, self.rows.to(self.frozen)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        new = ids - len(self.frozen)
        frozen = F.embedding(ids.clamp(max=len(self.frozen) - 1), self.frozen)
        return torch.where(new.unsqueeze(-1) >= 0, F.embedding(new.clamp(min=0), self.rows), frozen)


def train_rows(text_encoder: torch.nn.Module, num_rows: int) -> NewRows:
    """Freeze the text encoder and make the last `num_rows` of its token embedding trainable;
    returns the new embedding."""
    text_encoder.requires_grad_(False)
    weight = text_encoder.get_input_embeddings().weight
    embedding = NewRows(weight[:-num_rows], weight[-num_rows:])
    text_encoder.set_input_embeddings(embedding)
    return embedding


@contextlib.contextmanager
def ordinary_embedding(text_encoder: torch.nn.Module, rows: torch.Tensor) -> Iterator[None]:
    """For a while the text encoder has an ordinary torch embedding that ends in `rows` (n, D),
    in place of its NewRows."""
    trained = text_encoder.get_input_embeddings()
    weight = torch.cat([trained.frozen, rows.detach().to(trained.frozen)])
    text_encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))
    try:
        yield
    finally:
        text_encoder.set_input_embeddings(trained)


def take_rows(optimizer_state: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The state_dict of an optimizer of one parameter (N, D), as if it had only these `rows` of it."""
    return {**optimizer_state, "state": {
        i: {name: value[rows].clone() if torch.is_tensor(value) and value.dim() == 2 else value
            for name, value in state.items()}
        for i, state in optimizer_state["state"].items()}}


def join_rows(optimizer_states: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `take_rows`, for states after equally many steps."""
    first = optimizer_states[0]
    return {**first, "state": {
        i: {name: torch.cat([other["state"][i][name] for other in optimizer_states])
            if torch.is_tensor(value) and value.dim() == 2 else value for name, value in state.items()}
        for i, state in first["state"].items()}}


def safe_file_name(token: str) -> str:
    """The token without what file systems dislike:
    A1111 and ComfyUI use the file's name as the trigger word."""
    return re.sub(r"[^\w.-]+", "", token).strip(".") or "concept"


def save_embedding(path: str | Path, token: str, rows: torch.Tensor,
                   metadata: dict[str, str] | None = None) -> None:
    """Write `{token: float32 (n, D)}` atomically, as safetensors or,
    when the suffix is `.bin`, with torch.save."""
    from safetensors.torch import save

    content = {token: rows.detach().float().cpu().clone().contiguous()}
    if str(path).endswith(".bin"):
        write_torch(path, content)
    else:
        write_bytes(path, save(content, metadata={"format": "pt", **(metadata or {})}))


def load_embedding(path: str | Path) -> tuple[str, torch.Tensor]:
    """Read a file of `save_embedding`: the token and its rows (n, D);
    InputError when it is something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = torch.load(path, weights_only=True) if str(path).endswith(".bin") else load_file(path)
    except (OSError, SafetensorError, RuntimeError, LookupError, EOFError, ValueError,
            UnpicklingError) as error:
        raise InputError(f"The embedding '{path}' cannot be read ({error}).") from None
    if not isinstance(content, dict) or len(content) != 1:
        held = len(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"The embedding '{path}' must hold exactly one token, but holds {held}.")
    return next(iter(content.items()))


def add_embedding(tokenizers: list, text_encoders: list[torch.nn.Module],
                  path: str | Path) -> tuple[str, int]:
    """Add a learned embedding to a model's tokenizers and text encoders; its token and number of vectors.

    A model with one text encoder takes a file of one token, (n, D). One with two (SDXL) takes rows `clip_l`
    (n, D) and `clip_g` (n, D2), and the token is the file's name in angle brackets. InputError for an
    embedding of another model.
    """
    token, rows = _rows_for(path, len(text_encoders))
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in text_encoders]
    if [part.dim() for part in rows] != [2] * len(widths) or [part.shape[1] for part in rows] != widths:
        raise InputError(f"The embedding '{path}' has vectors of shape "
                         f"{' and '.join(str(tuple(part.shape)) for part in rows)}, but the model's are "
                         f"{' and '.join(map(str, widths))} wide; it was learned with another model.")
    tokens = _tokens(token, len(rows[0]))
    for tokenizer, encoder, part in zip(tokenizers, text_encoders, rows, strict=True):
        if f"{token}</w>" in tokenizer.get_vocab() or tokenizer.add_tokens(tokens) != len(tokens):
            raise InputError(f"The token '{token}' of the embedding '{path}' is already in the model's "
                             "vocabulary.")
        ids = tokenizer.convert_tokens_to_ids(tokens)
        if ids[-1] >= len(encoder.get_input_embeddings().weight):
            encoder.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
        with torch.no_grad():
            weight = encoder.get_input_embeddings().weight
            weight[ids] = part.to(weight)
        encoder.requires_grad_(False)
    return token, len(tokens)


def _rows_for(path: str | Path, num_encoders: int) -> tuple[str, list[torch.Tensor]]:
    """The token of an embedding file and its rows for each text encoder."""
    if num_encoders == 1:
        token, rows = load_embedding(path)
        return token, [rows]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(path)
        return f"<{Path(path).stem.lower()}>", [content["clip_l"], content["clip_g"]]
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"The embedding '{path}' cannot be read as one of an SDXL model, "
                         f"with rows clip_l and clip_g ({error}).") from None
