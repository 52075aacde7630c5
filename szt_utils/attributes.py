"""What an image of the pocket world shows, read by linear heads on the features of the bundled image encoder.

Similarity does not see patterns: a plain teal star is .63 similar to a striped one. So beside it stands the
share of generated images whose shape, color and pattern are all those of the clean images.
"""

import functools
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from .pocket.scenes import BACKGROUNDS, COLORS, PATTERNS, SHAPES

__all__ = ["OF_CONCEPT", "WORDS", "attribute_scores", "can_read", "read_attributes"]

WORDS = {"shape": tuple(SHAPES), "color": tuple(COLORS), "pattern": tuple(PATTERNS),
         "background": tuple(BACKGROUNDS)}  # in the order of the heads' rows
OF_CONCEPT = ("shape", "color", "pattern")


def can_read(network: str | Path) -> bool:
    """Whether an image encoder's folder holds heads that read attributes, as the bundled one does."""
    return _heads_file(network).is_file()


def _heads_file(network: str | Path) -> Path:
    return Path(network) / "attributes.safetensors"


@functools.lru_cache(maxsize=2)
def _heads(network: str) -> torch.nn.Linear:
    state = load_file(_heads_file(network))
    heads = torch.nn.Linear(*reversed(state["weight"].shape)).requires_grad_(False)
    heads.load_state_dict(state)
    return heads


def read_attributes(features: torch.Tensor, network: str | Path) -> list[dict[str, str]]:
    """The most likely word of each kind of WORDS for features (N, D), not normalized, of the encoder."""
    logits = _heads(str(network))(features).split([len(words) for words in WORDS.values()], dim=1)
    columns = [[words[i] for i in values.argmax(1).tolist()]
               for words, values in zip(WORDS.values(), logits, strict=True)]
    return [dict(zip(WORDS, row, strict=True)) for row in zip(*columns, strict=True)]


def attribute_scores(generated: torch.Tensor, real: torch.Tensor, network: str | Path) -> dict[str, float]:
    """Shares of generated images whose "shape", "color" and "pattern" are the concept's, and of those in
    which all three are, "attributes".

    `generated` and `real` are features (N, D) and (M, D), not normalized; the concept has the words that most
    real images are read to have.
    """
    seen = read_attributes(real, network)
    concept = {kind: Counter(words[kind] for words in seen).most_common(1)[0][0] for kind in OF_CONCEPT}
    right = [[words[kind] == concept[kind] for kind in OF_CONCEPT]
             for words in read_attributes(generated, network)]
    alone = {kind: sum(column) / len(right)
             for kind, column in zip(OF_CONCEPT, zip(*right, strict=True), strict=True)}
    return {"attributes": sum(map(all, right)) / len(right), **alone}
