"""Semantic sensitivity maps (SSM, paper Sec. 4.1, Eq. 6): where in an image a word of the prompt acts.

    SSM(x, t, e, n) = E_e' sum_channels (prediction(z_t, t, c(e)) - prediction(z_t, t, c(e')))^2

where e' is e with a random vector of the vocabulary in place of its n-th. Text encoders mix their tokens, so
the cross-attention of a token shows more than its own word; an SSM changes the word before it is mixed.
Cross-attention maps are here for comparison.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .errors import InputError
from .models import Condition, Model, check_length, tokenize

__all__ = ["TokenizedPrompt", "attention_recorded", "check_cross_attention", "cross_attention_maps",
           "draw_replacements", "prompt_conditions", "semantic_sensitivity", "tokenize_words"]


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a prompt, long (1, L) per tokenizer, and the sorted positions of each of its `words`.

    CLIP tokenizers have the same positions. T5's, the last, has positions of its own, and a vocabulary of
    `t5_size` tokens.
    """

    ids: list[torch.Tensor]
    words: list[str]
    positions: list[list[int]]
    t5_positions: list[list[int]] | None = None
    t5_size: int = 0


def tokenize_words(model: Model, prompt: str, words: Sequence[str] | None = None) -> TokenizedPrompt:
    """Tokenize a prompt and find words in it; without `words`, all words of the prompt.

    A word that occurs several times, or has several tokens, has several positions. The start token is a word
    too, by its own spelling. Several vectors of one embedding must be spelled out, `<c> <c>_1`, in prompt and
    word. InputError for a word that the prompt does not contain and for a prompt that is too long or empty.
    """
    tokenizer = model.tokenizers[0]
    check_length(model, prompt)
    ids = tokenize(model, prompt)
    words = list(dict.fromkeys(prompt.split()) if words is None else words)
    if not words:
        raise InputError(f"The prompt '{prompt}' has no word; describe the image.")
    positions = [_positions(tokenizer, ids[0], word) for word in words]
    if not all(positions):
        raise InputError(f"The word '{words[positions.index([])]}' is not in the prompt '{prompt}'.")
    if model.t5 is None:
        return TokenizedPrompt(ids, words, positions)
    special, other = tokenizer.all_special_tokens, model.t5.tokenizer  # which does not have these
    return TokenizedPrompt(ids, words, positions, [
        [] if word in special else _positions(other, ids[-1], word) for word in words], other.vocab_size)


def _positions(tokenizer: Any, ids: torch.Tensor, word: str) -> list[int]:
    """The sorted positions of a word's tokens in token ids (1, L)."""
    flat, own = ids[0].tolist(), tokenizer(word, add_special_tokens=False).input_ids
    starts = [i for i in range(len(flat)) if own and flat[i:i + len(own)] == own]
    return sorted({start + i for start in starts for i in range(len(own))})


def draw_replacements(prompt: TokenizedPrompt, count: int, vocabulary_size: int,
                      generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `count` random replacements per word, uniformly from the vocabulary.

    Returns `replaced` bool, the positions of the word, and `drawn` long, token ids: both (words * count, L).
    With T5 they are wider: its columns, drawn from its own vocabulary, follow those of CLIP.
    """
    drawn_from = [(prompt.positions, prompt.ids[0], vocabulary_size)]
    if prompt.t5_positions is not None:
        drawn_from.append((prompt.t5_positions, prompt.ids[-1], prompt.t5_size))
    all_replaced, all_drawn = [], []
    for positions, ids, size in drawn_from:
        replaced = torch.zeros(len(prompt.words), ids.shape[1], dtype=torch.bool)
        for row, places in zip(replaced, positions, strict=True):
            row[places] = True
        all_replaced.append(replaced.repeat_interleave(count, 0))
        all_drawn.append(torch.randint(size, (len(prompt.words) * count, ids.shape[1]), generator=generator))
    return torch.cat(all_replaced, dim=1), torch.cat(all_drawn, dim=1)


@torch.no_grad()
def prompt_conditions(model: Model, prompt: TokenizedPrompt, replaced: torch.Tensor | None = None,
                      drawn: torch.Tensor | None = None) -> Condition:
    """The model's condition for N variants of a prompt, or for the prompt alone.

    Where `replaced` bool (N, L), the token embedding is that of the id in `drawn` long (N, L).
    """
    count = 1 if replaced is None else len(replaced)
    with contextlib.ExitStack() as stack:
        if replaced is not None:
            length = prompt.ids[0].shape[1]
            for encoder in model.text_encoders:
                stack.enter_context(_embeddings_replaced(encoder, replaced[:, :length], drawn[:, :length]))
            if model.t5 is not None:  # whose forward pass goes to the embedding of its stack
                stack.enter_context(_embeddings_replaced(model.t5.encoder.encoder, replaced[:, length:],
                                                         drawn[:, length:]))
        return model.condition([ids.expand(count, -1) for ids in prompt.ids])


@contextlib.contextmanager
def _embeddings_replaced(encoder: torch.nn.Module, replaced: torch.Tensor,
                         drawn: torch.Tensor) -> Iterator[None]:
    """Inside the block, the encoder embeds the drawn ids where `replaced`.

    The ids that it is given stay the same: it finds the end of the text by them, which must not move.
    """
    def replace(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.where(replaced.to(output.device).unsqueeze(-1),
                           F.embedding(drawn.to(output.device), module.weight), output)
    handle = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _predict(model: Model, noised: torch.Tensor, timestep: torch.Tensor, condition: Condition,
             chunk: slice = slice(None)) -> torch.Tensor:
    """Predictions for one noised latent (1, C, h, w) under a chunk of the conditions, (N, C, h, w)."""
    part = {name: value[chunk] for name, value in condition.items()}
    count = len(next(iter(part.values())))
    return model.predict(noised.expand(count, -1, -1, -1), timestep.expand(count), part)


@torch.no_grad()
def semantic_sensitivity(model: Model, latents: torch.Tensor, prompt: TokenizedPrompt,
                         timesteps: Sequence[int], *, noise: torch.Tensor, replaced: torch.Tensor,
                         drawn: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """Semantic sensitivity maps of an image, float32 or wider (words, timesteps, h, w), Eq. 6.

    `latents` (1, C, h, w) are its scaled latents, `noise` (D, C, h, w) the draws to average over, the same at
    every timestep; `replaced` and `drawn` are from `draw_replacements`. The text is encoded once. For every
    draw and timestep, the unchanged prediction is made once, in the same network batch as the replacements of
    the first word; each further word is a batch. `batch_size` limits them.
    """
    words, count = len(prompt.words), len(replaced) // len(prompt.words)
    unchanged = torch.zeros(1, replaced.shape[1], dtype=torch.bool)
    replaced, drawn = torch.cat([unchanged, replaced]), torch.cat([torch.zeros_like(drawn[:1]), drawn])
    parts = [prompt_conditions(model, prompt, *part) for part in zip(
        replaced.split(batch_size or len(replaced)), drawn.split(batch_size or len(drawn)), strict=True)]
    conditions = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    chunks = [slice(0, count + 1), *(slice(1 + i * count, 1 + (i + 1) * count) for i in range(1, words))]
    if batch_size:
        chunks = [slice(start, min(start + batch_size, chunk.stop))
                  for chunk in chunks for start in range(chunk.start, chunk.stop, batch_size)]
    maps = 0
    for draw in noise.to(latents).split(1):
        of_draw = []
        for timestep in torch.tensor(timesteps, device=latents.device).split(1):
            noised = model.noised(latents, draw, timestep)
            predictions = torch.cat([_predict(model, noised, timestep, conditions, chunk)
                                     for chunk in chunks])
            predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
            change = (predictions[1:] - predictions[:1]).square().sum(1)
            of_draw.append(change.unflatten(0, (words, count)).mean(1))
        maps = maps + torch.stack(of_draw, dim=1) / len(noise)
    return maps


class _Recorder:
    """A Diffusers attention processor that records the attention to the text, and runs another processor."""

    def __init__(self, processor: Any, maps: list[torch.Tensor]):
        self.processor, self.maps = processor, maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        states = encoder_hidden_states
        if attn.norm_cross:
            states = attn.norm_encoder_hidden_states(states)
        query, key = (attn.head_to_batch_dim(part) for part in (attn.to_q(hidden_states), attn.to_k(states)))
        probabilities = attn.get_attention_scores(query, key, attention_mask)  # (B * heads, pixels, L)
        self.maps.append(probabilities.unflatten(0, (-1, attn.heads)).float().mean(1))
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


@contextlib.contextmanager
def attention_recorded(unet: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list to which every cross-attention layer appends its probabilities inside the block.

    They are averaged over heads, (B, pixels, L).
    """
    maps, before = [], unet.attn_processors
    unet.set_attn_processor({name: _Recorder(processor, maps) if ".attn2." in name else processor
                             for name, processor in before.items()})
    try:
        yield maps
    finally:
        unet.set_attn_processor(before)


def _grid(pixels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer of so many pixels: the latent's, halved and rounded up until they fit."""
    height, width = size
    while height * width > pixels:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return height, width


def check_cross_attention(model: Model | type[Model]) -> None:
    """InputError for a model, or a family, whose network has no cross-attention."""
    if model.network_name != "unet":
        raise InputError(f"Cross-attention maps need a U-Net, which {model.family} models do not have; leave "
                         "out --cross_attention.")


@torch.no_grad()
def cross_attention_maps(model: Model, latents: torch.Tensor, prompt: TokenizedPrompt,
                         timesteps: Sequence[int], *, noise: torch.Tensor) -> torch.Tensor:
    """Share of its attention that each location gives a word, float32 (words, timesteps, h, w) in [0, 1].

    Arguments as of `semantic_sensitivity`. Averaged over heads, layers (each resized to the latent grid) and
    draws; the positions of a word add up. InputError for models without a U-Net.
    """
    check_cross_attention(model)
    conditions, size, maps = prompt_conditions(model, prompt), tuple(latents.shape[-2:]), 0
    for draw in noise.to(latents).split(1):
        of_draw = []
        for timestep in torch.tensor(timesteps, device=latents.device).split(1):
            noised = model.noised(latents, draw, timestep)
            with attention_recorded(model.network) as layers:
                _predict(model, noised, timestep, conditions)
            of_words = [torch.stack([layer[0, :, positions].sum(1) for positions in prompt.positions])
                        for layer in layers]  # each (words, pixels)
            of_draw.append(sum(
                F.interpolate(layer.unflatten(1, _grid(layer.shape[1], size)).unsqueeze(0), size,
                              mode="bilinear")[0] for layer in of_words) / len(layers))
        maps = maps + torch.stack(of_draw, dim=1) / len(noise)
    return maps
