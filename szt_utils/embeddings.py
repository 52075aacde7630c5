"""The learned token embeddings: placeholder tokens, training of the new rows only,
files that any tool loads."""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F

from .errors import InputError
from .records import write_bytes, write_torch

__all__ = ["NewRows", "add_placeholder", "load_embedding", "ordinary_words_with", "placeholder_prompt",
           "safe_file_name", "save_embedding", "train_rows", "write_rows_back"]

# Words of ordinary prompts; a bare placeholder that occurs inside one of them
# would be replaced there as well.
_ORDINARY_WORDS = ("a photo picture painting rendering rendition cropped close-up style bright dark nice "
                   "good weird clean dirty small large cool risks asks desks masks tasks thanks children "
                   "background beach mountain flower person").split()


def _tokens(placeholder: str, num_vectors: int) -> list[str]:
    return [placeholder] + [f"{placeholder}_{i}" for i in range(1, num_vectors)]


def add_placeholder(tokenizer, text_encoder, placeholder: str, initializer: str,
                    num_vectors: int = 1) -> list[int]:
    """Add `placeholder` (and `placeholder_1`, ... up to `num_vectors`) to the tokenizer,
    with rows that copy the initializer's.

    Returns the ids of the new rows, which are the last of the text encoder's embedding. Draws from torch's
    global generator as `resize_token_embeddings` does. Raises InputError for tokens that would not work at
    inference: see the messages.
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
    text_encoder.resize_token_embeddings(len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(tokens)
    with torch.no_grad():
        weight = text_encoder.get_input_embeddings().weight
        weight[ids] = weight[initializer_ids[0]].clone()
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
    """A token embedding whose last rows are the only trainable parameter, `rows` (n, D); the rest is frozen.

    Gives the same values and row gradients as the whole matrix, at the cost of the rows alone.
    """

    def __init__(self, weight: torch.Tensor, num_rows: int):
        super().__init__()
        self.register_buffer("frozen", weight[:-num_rows].detach().clone())
        self.rows = torch.nn.Parameter(weight[-num_rows:].detach().clone())

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix (V + n, D), as a new tensor."""
        return torch.cat([self.frozen, self.rows.to(self.frozen)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        new = ids - len(self.frozen)
        frozen = F.embedding(ids.clamp(max=len(self.frozen) - 1), self.frozen)
        return torch.where(new.unsqueeze(-1) >= 0, F.embedding(new.clamp(min=0), self.rows), frozen)


def train_rows(text_encoder, num_rows: int) -> NewRows:
    """Freeze the text encoder and make the last `num_rows` of its token embedding trainable;
    returns the new embedding."""
    text_encoder.requires_grad_(False)
    embedding = NewRows(text_encoder.get_input_embeddings().weight, num_rows)
    text_encoder.set_input_embeddings(embedding)
    return embedding


def write_rows_back(text_encoder) -> None:
    """Undo `train_rows`: an ordinary torch embedding again, with the learned rows in it."""
    weight = text_encoder.get_input_embeddings().weight.detach()
    text_encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))


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
