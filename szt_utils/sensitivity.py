"""Where in a picture a word of the prompt acts: semantic sensitivity maps (SSM, paper Sec. 4.1, Eq. 6),
and cross-attention maps to compare them with.

    SSM(x, t, e, n) = E_e' sum_channels (prediction(z_t, t, c(e)) - prediction(z_t, t, c(e')))^2

where e' is e with a random vector of the vocabulary in place of its n-th. Text encoders mix their tokens, so
that the cross-attention of a token shows more than its own word; an SSM changes the word before it is mixed.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .diffusion import LatentDiffusion, load_part
from .embeddings import load_embedding, placeholder_prompt
from .errors import InputError

__all__ = ["Conditions", "Prompt", "PromptedModel", "attention_recorded", "cross_attention_maps",
           "draw_replacements", "semantic_sensitivity"]


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt: `ids` long (1, L) per text encoder,
    and the positions of each word asked for, `positions[k]` sorted."""

    ids: list[torch.Tensor]
    words: list[str]
    positions: list[list[int]]


@dataclass(frozen=True)
class Conditions:
    """What the U-Net is told, for N prompts: text states (N, L, D); for SDXL also the pooled text (N, P)."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None

    def __getitem__(self, which: slice) -> "Conditions":
        return Conditions(self.states[which], None if self.pooled is None else self.pooled[which])


@dataclass
class PromptedModel:
    """A Stable Diffusion model, or an SDXL model with its second tokenizer and text encoder."""

    base: LatentDiffusion
    second_tokenizer: Any = None
    second_text_encoder: torch.nn.Module | None = None

    @classmethod
    def load(cls, path: str, *, revision: str | None = None, variant: str | None = None,
             dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "PromptedModel":
        """Load a Diffusers folder or repository of either shape, frozen and in evaluation mode;
        InputError when a part is missing or the U-Net wants something else than text."""
        base = LatentDiffusion.load(path, revision=revision, variant=variant, dtype=dtype, device=device)
        if dtype == torch.float16 and base.vae.config.force_upcast:
            base.vae.float()  # SDXL's overflows in float16; it is used once per picture
        if base.unet.config.addition_embed_type is None:
            return cls(base)
        if base.unet.config.addition_embed_type != "text_time":
            raise InputError(f"The U-Net of '{path}' wants '{base.unet.config.addition_embed_type}'; "
                             "only Stable Diffusion and SDXL models can be used.")
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        encoder = load_part(CLIPTextModelWithProjection, path, "text_encoder_2", revision=revision,
                            variant=variant)
        return cls(base, load_part(CLIPTokenizer, path, "tokenizer_2", revision=revision),
                   encoder.to(device, dtype).requires_grad_(False).eval())

    @property
    def tokenizers(self) -> list:
        return [self.base.tokenizer, *([self.second_tokenizer] if self.second_tokenizer else [])]

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        return [self.base.text_encoder, *([self.second_text_encoder] if self.second_text_encoder else [])]

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding dictionary that come with the model, without learned ones."""
        return self.base.tokenizer.vocab_size

    def add_embedding(self, path: str | Path) -> tuple[str, int]:
        """Load a learned embedding; its token and number of vectors.

        Stable Diffusion: a file of one token, (n, D). SDXL: rows `clip_l` (n, D) and `clip_g` (n, D2), and
        the token is the file's name in angle brackets. InputError for what does not fit the model.
        """
        if self.second_text_encoder is None:
            token, rows = load_embedding(path)
            per_encoder = [rows]
        else:
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                content = load_file(path)
                token, per_encoder = f"<{Path(path).stem.lower()}>", [content["clip_l"], content["clip_g"]]
            except (OSError, KeyError, SafetensorError) as error:
                raise InputError(f"The embedding '{path}' cannot be read as one of an SDXL model, "
                                 f"with rows clip_l and clip_g ({error}).") from None
        widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in self.text_encoders]
        if [rows.dim() for rows in per_encoder] != [2] * len(widths) or [
                rows.shape[1] for rows in per_encoder] != widths:
            raise InputError(f"The embedding '{path}' has vectors of shape "
                             f"{' and '.join(str(tuple(rows.shape)) for rows in per_encoder)}, but the "
                             f"model's are {' and '.join(map(str, widths))} wide; "
                             "it was learned with another model.")
        tokens = placeholder_prompt(token, len(per_encoder[0])).split()
        for tokenizer, encoder, rows in zip(self.tokenizers, self.text_encoders, per_encoder, strict=True):
            if f"{token}</w>" in tokenizer.get_vocab() or tokenizer.add_tokens(tokens) != len(tokens):
                raise InputError(f"The token '{token}' of the embedding '{path}' is in the model's "
                                 "vocabulary already.")
            weight = encoder.get_input_embeddings().weight
            ids = tokenizer.convert_tokens_to_ids(tokens)
            if ids[-1] >= len(weight):
                encoder.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
            with torch.no_grad():
                encoder.get_input_embeddings().weight[ids] = rows.to(weight)
            encoder.requires_grad_(False)
        return token, len(tokens)

    def tokenize(self, prompt: str, words: list[str] | None = None) -> Prompt:
        """Token ids of a prompt, and where its words are; all words of the prompt when none are named.

        A word that occurs several times, or has several tokens, has several positions. The start token is a
        word too, by its own spelling. InputError for a word that is not there and for a prompt that is too
        long. Several vectors of one embedding must be spelled out, `<c> <c>_1`, in prompt and word.
        """
        tokenizer = self.base.tokenizer
        length = tokenizer.model_max_length
        if len(tokenizer(prompt, verbose=False).input_ids) > length:
            raise InputError(f"The prompt '{prompt}' has more than the {length} tokens that the model takes; "
                             "shorten it.")
        ids = [tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt").input_ids
               for tokenizer in self.tokenizers]
        flat = ids[0][0].tolist()
        words = list(dict.fromkeys(prompt.split())) if words is None else words
        positions = []
        for word in words:
            own = tokenizer(word, add_special_tokens=False).input_ids
            starts = [i for i in range(len(flat)) if own and flat[i:i + len(own)] == own]
            if not starts:
                raise InputError(f"The word '{word}' is not in the prompt '{prompt}'.")
            positions.append(sorted({start + i for start in starts for i in range(len(own))}))
        return Prompt(ids, list(words), positions)

    @torch.no_grad()
    def conditions(self, prompt: Prompt, replaced: torch.Tensor | None = None,
                   drawn: torch.Tensor | None = None) -> Conditions:
        """The text encoders' output for N variants of a prompt:
        where `replaced` bool (N, L), the embedding is that of the id in `drawn` long (N, L)."""
        count = 1 if replaced is None else len(replaced)
        outputs = []
        for encoder, ids in zip(self.text_encoders, prompt.ids, strict=True):
            with _embeddings_replaced(encoder, replaced, drawn):
                outputs.append(encoder(ids.to(self.base.device).expand(count, -1),
                                       output_hidden_states=self.second_text_encoder is not None))
        if self.second_text_encoder is None:
            return Conditions(outputs[0][0].to(self.base.dtype))
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Conditions(states.to(self.base.dtype), outputs[1].text_embeds.to(self.base.dtype))

    def predict(self, noised: torch.Tensor, timestep: int, conditions: Conditions) -> torch.Tensor:
        """The U-Net's prediction for one noised latent (1, C, h, w) under N conditions, (N, C, h, w)."""
        count, more = len(conditions.states), {}
        if conditions.pooled is not None:
            cell = 2 ** (len(self.base.vae.config.block_out_channels) - 1)
            size = [side * cell for side in noised.shape[-2:]]  # of a picture that was never cropped
            time_ids = torch.tensor([[*size, 0, 0, *size]], device=noised.device, dtype=noised.dtype)
            more["added_cond_kwargs"] = {"text_embeds": conditions.pooled,
                                         "time_ids": time_ids.expand(count, -1)}
        return self.base.unet(noised.expand(count, -1, -1, -1), timestep, conditions.states, **more).sample


@contextlib.contextmanager
def _embeddings_replaced(encoder, replaced: torch.Tensor | None,
                         drawn: torch.Tensor | None) -> Iterator[None]:
    """For a while, rows of the encoder's token embedding give way to those of other ids.

    The ids themselves stay: from them the encoder finds the end of the text, which must not move.
    """
    if replaced is None:
        yield
        return

    def replace(module, args, output):
        return torch.where(replaced.to(output.device).unsqueeze(-1),
                           F.embedding(drawn.to(output.device), module.weight), output)
    handle = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def draw_replacements(prompt: Prompt, count: int, vocabulary_size: int,
                      generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` random replacements per word; `replaced` bool and `drawn` long,
    both (words * count, L), drawn uniformly from the vocabulary on the generator's device."""
    length = prompt.ids[0].shape[1]
    replaced = torch.zeros(len(prompt.words), length, dtype=torch.bool)
    for row, positions in zip(replaced, prompt.positions, strict=True):
        row[positions] = True
    drawn = torch.randint(vocabulary_size, (len(prompt.words) * count, length), generator=generator)
    return replaced.repeat_interleave(count, 0), drawn


@torch.no_grad()
def semantic_sensitivity(model: PromptedModel, latents: torch.Tensor, prompt: Prompt, timesteps: list[int], *,
                         noise: torch.Tensor, replaced: torch.Tensor, drawn: torch.Tensor,
                         batch_size: int | None = None) -> torch.Tensor:
    """Semantic sensitivity maps of a picture, float32 or wider (words, timesteps, h, w), Eq. 6.

    `latents` (1, C, h, w) is its scaled latent, `noise` (D, C, h, w) the draws to average over, the same at
    every timestep; `replaced` and `drawn` are from `draw_replacements`. The text is encoded once. For every
    draw and timestep the unchanged prediction is made once, in the same U-Net batch as the replacements of
    the first word; each further word is a batch. `batch_size` limits them.
    """
    words, count = len(prompt.words), len(replaced) // len(prompt.words)
    unchanged = torch.zeros(1, replaced.shape[1], dtype=torch.bool)
    conditions = model.conditions(prompt, torch.cat([unchanged, replaced]),
                                  torch.cat([torch.zeros_like(drawn[:1]), drawn]))
    chunks = [slice(0, count + 1), *(slice(1 + i * count, 1 + (i + 1) * count) for i in range(1, words))]
    if batch_size:
        chunks = [slice(start, min(start + batch_size, chunk.stop))
                  for chunk in chunks for start in range(chunk.start, chunk.stop, batch_size)]
    maps = 0
    for draw in noise.to(latents).split(1):
        of_draw = []
        for t in timesteps:
            noised = model.base.scheduler.add_noise(latents, draw, torch.tensor([t], device=latents.device))
            predictions = torch.cat([model.predict(noised, t, conditions[chunk]) for chunk in chunks])
            predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
            change = (predictions[1:] - predictions[:1]).square().sum(1)
            of_draw.append(change.unflatten(0, (words, count)).mean(1))
        maps = maps + torch.stack(of_draw, dim=1) / len(noise)
    return maps


class _Recorder:
    """A Diffusers attention processor that notes where the text is attended to, and lets another work."""

    def __init__(self, processor, maps: list[torch.Tensor]):
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
def attention_recorded(unet) -> Iterator[list[torch.Tensor]]:
    """For a while, every cross-attention layer appends its probabilities, averaged over heads,
    (B, pixels, L), to the list that is yielded."""
    maps, before = [], unet.attn_processors
    unet.set_attn_processor({name: _Recorder(processor, maps) if ".attn2." in name else processor
                             for name, processor in before.items()})
    try:
        yield maps
    finally:
        unet.set_attn_processor(before)


def _grid(pixels: int, size: tuple[int, int]) -> tuple[int, int]:
    """The layer's height and width, given their product and the latent's: halved, rounded up, some times."""
    height, width = size
    while height * width > pixels:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return height, width


@torch.no_grad()
def cross_attention_maps(model: PromptedModel, latents: torch.Tensor, prompt: Prompt, timesteps: list[int], *,
                         noise: torch.Tensor) -> torch.Tensor:
    """Share of its attention that each location gives a word, float32 (words, timesteps, h, w) in [0, 1];
    arguments of `semantic_sensitivity`.

    Averaged over heads, layers (each brought to the latent grid) and draws; the positions of a word add up.
    """
    conditions, size, maps = model.conditions(prompt), tuple(latents.shape[-2:]), 0
    for draw in noise.to(latents).split(1):
        of_draw = []
        for t in timesteps:
            noised = model.base.scheduler.add_noise(latents, draw, torch.tensor([t], device=latents.device))
            with attention_recorded(model.base.unet) as layers:
                model.predict(noised, t, conditions)
            of_words = [torch.stack([layer[0, :, positions].sum(1) for positions in prompt.positions])
                        for layer in layers]  # each (words, pixels)
            of_draw.append(sum(
                F.interpolate(layer.unflatten(1, _grid(layer.shape[1], size)).unsqueeze(0), size,
                              mode="bilinear")[0] for layer in of_words) / len(layers))
        maps = maps + torch.stack(of_draw, dim=1) / len(noise)
    return maps
