"""The pocket model's words: captions of scenes, and a CLIP tokenizer in which every word of the world is one
token."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np

from ..captions import OBJECT_TEMPLATES, STYLE_TEMPLATES
from .scenes import BACKGROUNDS, COLORS, PATTERNS, SHAPES, Attributes

__all__ = ["CONTEXT_LENGTH", "pocket_tokenizer", "training_caption", "words"]

CONTEXT_LENGTH = 24  # tokens
OBJECT_WORD = "object"  # names a shape without saying which
END_OF_WORD = "</w>"  # ends the token of a whole word


def words() -> list[str]:
    """Every word of the caption templates and of the world, sorted."""
    text = " ".join(OBJECT_TEMPLATES + STYLE_TEMPLATES).replace("{}", " ").replace("-", " - ")
    return sorted({*text.split(), *COLORS, *PATTERNS, *SHAPES, *BACKGROUNDS, OBJECT_WORD,
                   "on", "with", "and", "background"})


def training_caption(attributes: Attributes, rng: np.random.Generator) -> str:
    """A random caption of a scene for training: any template, each attribute sometimes left out, one in ten
    empty."""
    if rng.random() < 0.1:
        return ""
    parts = [word for word, keep in ((attributes.color, 0.85), (attributes.pattern, 0.85))
             if rng.random() < keep]
    parts.append(attributes.shape if rng.random() < 0.9 else OBJECT_WORD)
    text = str(rng.choice(OBJECT_TEMPLATES)).format(" ".join(parts))
    return f"{text} on {attributes.background}" if rng.random() < 0.8 else text


def pocket_tokenizer(folder: Path) -> Any:
    """Build the CLIPTokenizer of the word list, and write its vocab.json and merges.txt to `folder`.

    Byte-pair encoding learns merges until every word is one token; other words split into known pieces.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    single = [*characters, *(c + END_OF_WORD for c in characters)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The trainer breaks ties by number: number the ends of words too, or it does so in the order of a hash.
    bpe.train_from_iterator(words(), trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, show_progress=False, end_of_word_suffix=END_OF_WORD,
        special_tokens=single))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = single + [a + b for a, b in merges]
    vocabulary = {token: i for i, token in enumerate(
        dict.fromkeys(tokens + ["<|startoftext|>", "<|endoftext|>"]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH)
