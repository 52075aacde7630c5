"""Learned token embeddings: placeholder tokens, training of the new rows only, loading into models."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .embedding_files import ANY_ENCODER, read_embedding
from .errors import InputError
from .notices import notice

__all__ = ["NewRows", "add_embedding", "add_placeholder", "add_tokens", "check_room", "join_rows",
           "load_into", "ordinary_embeddings", "ordinary_words_with", "placeholder_prompt", "take_rows",
           "train_rows", "with_all_vectors"]

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
    if num_vectors > tokenizer.model_max_length:
        raise InputError(f"--num_vectors is {num_vectors}, but a caption has room for "
                         f"{tokenizer.model_max_length} tokens.")
    if not placeholder.isprintable() or re.search(r"\s", placeholder) or not placeholder:
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


def check_room(tokenizers: list, placeholder: str, num_vectors: int,
               templates: dict[Path, tuple[str, ...]]) -> None:
    """InputError when the last vectors of a placeholder stand in no caption, since all are cut off before.

    `templates` are those of every image, with a {} for the placeholder, whose tokens the tokenizers know
    already. The first image with a caption that is cut off is named in a notice.
    """
    words, tokens = placeholder_prompt(placeholder, num_vectors), _tokens(placeholder, num_vectors)
    for tokenizer in tokenizers:
        length, seen = tokenizer.model_max_length, set()
        ids = {each: tokenizer([template.replace("{}", words) for template in each]).input_ids
               for each in set(templates.values())}
        for captions in ids.values():
            seen.update(*(caption[:length - 1] for caption in captions))
        room = sum(tokenizer.convert_tokens_to_ids(token) in seen for token in tokens)
        if room < num_vectors:
            raise InputError(f"--num_vectors is {num_vectors}, but a caption of {length} tokens has room for "
                             f"{room} at most.")
        long = [path.name for path, each in templates.items() if max(map(len, ids[each])) > length]
        if long:
            notice(f"Captions are cut off after the {length} tokens that the text encoder takes "
                   f"({len(long)}, such as that of '{long[0]}').")


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


def with_all_vectors(tokenizer: Any, text: str, within: str | None = None) -> str:
    """A text in which a learned token is followed by those of its further vectors, as in
    `placeholder_prompt`.

    A token stays as it is if `within`, by default the text itself, names its further vectors already.
    Pipelines with `TextualInversionLoaderMixin` do this by themselves; that of SD3 does not.
    """
    added = tokenizer.get_added_vocab()
    for token in added:
        count = next(i for i in itertools.count(1) if f"{token}_{i}" not in added)
        if f"{token}_1" not in (within or text):
            text = text.replace(token, placeholder_prompt(token, count))
    return text


class NewRows(torch.nn.Module):
    """A token embedding that ends in `rows` (n, D), its only parameter; the rest, `frozen` (V, D), stays.

    Ids, long (B, L), become vectors (B, L, D), with the same values and row gradients as those of the whole
    matrix, at the cost of the rows alone.
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
def ordinary_embeddings(text_encoders: list[torch.nn.Module], rows: list[torch.Tensor]) -> Iterator[None]:
    """For a while, text encoders have ordinary torch embeddings that end in `rows`, (n, D) each, in place of
    their NewRows."""
    trained = [encoder.get_input_embeddings() for encoder in text_encoders]
    for encoder, before, new in zip(text_encoders, trained, rows, strict=True):
        weight = torch.cat([before.frozen, new.detach().to(before.frozen)])
        encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))
    try:
        yield
    finally:
        for encoder, before in zip(text_encoders, trained, strict=True):
            encoder.set_input_embeddings(before)


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


def load_into(pipeline: Any, path: str | Path) -> str:
    """Load a learned embedding into a Diffusers pipeline, in one call whatever its family; returns its token.

    `path` is any file of `read_embedding`, or a training's output folder. InputError for an embedding of
    another model.
    """
    parts = [(getattr(pipeline, f"tokenizer{suffix}", None), getattr(pipeline, f"text_encoder{suffix}", None))
             for suffix in ("", "_2", "_3")]
    parts = [part for part in parts if None not in part]
    if not parts:
        raise InputError(f"A {type(pipeline).__name__} has no text encoder for the embedding '{path}'.")
    return add_embedding(*map(list, zip(*parts, strict=True)), path)[0]


def add_embedding(tokenizers: list, text_encoders: list[torch.nn.Module],
                  path: str | Path) -> tuple[str, int]:
    """Add a learned embedding to a model's tokenizers and text encoders; its token and number of vectors.

    `path` is any file of `read_embedding`. Every CLIP text encoder must have its rows in it; a T5 encoder has
    them if the file does. InputError for an embedding of another model.
    """
    token, rows = read_embedding(path)
    keys = _keys_of(text_encoders)
    if ANY_ENCODER in rows and len([key for key in keys if key.startswith("clip")]) == 1:
        rows = {"clip_l": rows[ANY_ENCODER]}
    widths = {key: encoder.get_input_embeddings().weight.shape[1]
              for key, encoder in zip(keys, text_encoders, strict=True)}
    needed = [key for key in keys if key in rows or key.startswith("clip")]
    if any(key not in rows or rows[key].shape[1] != widths[key] for key in needed) or not needed:
        raise InputError(f"The embedding '{path}' has vectors of width "
                         f"{' and '.join(str(part.shape[1]) for part in rows.values())}, but the model's are "
                         f"{' and '.join(str(widths[key]) for key in keys)} wide; it was learned with "
                         "another model.")
    tokens = _tokens(token, len(rows[needed[0]]))
    room = min(tokenizer.model_max_length for tokenizer in tokenizers) - 2  # start and end of the text
    if len(tokens) > room:
        raise InputError(f"The embedding '{path}' has {len(tokens)} vectors, but a prompt has room for "
                         f"{room} tokens.")
    if any(len(rows[key]) != len(tokens) for key in needed):
        raise InputError(f"The embedding '{path}' has another number of vectors for each text encoder; it is "
                         "damaged.")
    # A T5 encoder that the embedding was learned without keeps its tokenizer.
    used = [part for part in zip(keys, tokenizers, text_encoders, strict=True) if part[0] in rows]
    for _, tokenizer, _ in used:
        known = tokenizer.get_vocab()
        if any(name in known or f"{name}</w>" in known for name in tokens):
            raise InputError(f"The token '{token}' of the embedding '{path}' is already in the model's "
                             "vocabulary.")
    for key, tokenizer, encoder in used:
        if tokenizer.add_tokens(tokens) != len(tokens):
            raise InputError(f"The token '{token}' of the embedding '{path}' is not one that the tokenizer "
                             "takes.")
        ids = tokenizer.convert_tokens_to_ids(tokens)
        if ids[-1] >= len(encoder.get_input_embeddings().weight):
            encoder.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
        with torch.no_grad():
            weight = encoder.get_input_embeddings().weight
            weight[ids] = rows[key].to(weight)
        encoder.requires_grad_(False)
    return token, len(tokens)


def _keys_of(text_encoders: list[torch.nn.Module]) -> list[str]:
    """The names of text encoders in embedding files: CLIP-L, then CLIP-G, and T5."""
    clip = iter(("clip_l", "clip_g"))
    return ["t5xxl" if "t5" in encoder.config.model_type else next(clip) for encoder in text_encoders]
