"""Masks without a prompt: what do all the pictures of a set show?

Every picture gives candidate masks, from a grid of clicks. Chosen is the combination, one mask in each
picture, whose regions look most alike, by the model's own features, and which are stable, sure, central and
of a sensible size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .segment import SamCheckpoint, SamModel, Seen

__all__ = ["Candidates", "Choice", "candidates", "choose"]

# Shares of the picture that a concept has; what is smaller or larger is passed over if possible.
_SIZES = (0.02, 0.8)
_STABILITY_OFFSET = 1.0  # in logits, as in Segment Anything's own automatic masks
_AGREEMENT_WEIGHT = 1.0


@dataclass(frozen=True)
class Candidates:
    """M possible masks of one picture: `logits` (M, h, w) of the model's square, what is inside the picture
    of them, bool `masks` (M, h', w'), unit `features` (M, C), and each one's own `merit` (M,)."""

    logits: torch.Tensor
    masks: torch.Tensor
    features: torch.Tensor
    merit: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """Which candidate, and how sure that is, from 0 to 1: whether its like is in the other pictures, and how
    far the best different candidate is behind."""

    index: int
    confidence: float


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of all pairs of masks, bool (M, h, w) and (N, h, w): float (M, N)."""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1)[None] - both).clamp(min=1)


def centrality(masks: torch.Tensor) -> torch.Tensor:
    """How far from the picture's edge the masks lie: 1 in the centre, 0 at the edge, mean over a mask's
    pixels; less the share of the edge itself that it covers; float (M,)."""
    h, w = masks.shape[-2:]
    y, x = torch.linspace(-1, 1, h).abs(), torch.linspace(-1, 1, w).abs()
    inner = 1 - torch.maximum(y[:, None], x[None])
    edge = torch.ones(h, w, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    pixels = masks.flatten(1).float()
    return ((pixels @ inner.flatten()) / pixels.sum(1).clamp(min=1)
            - (pixels @ edge.flatten().float()) / edge.sum())


def _distinct(masks: torch.Tensor, merit: torch.Tensor, limit: float = 0.85) -> torch.Tensor:
    """Indices of masks, best first, without those that repeat a better one."""
    kept: list[int] = []
    overlaps = overlap(masks, masks)
    for i in merit.argsort(descending=True).tolist():
        if not kept or overlaps[i, kept].max() < limit:
            kept.append(i)
    return torch.tensor(kept)


@torch.no_grad()
def candidates(segmenter: SamCheckpoint | SamModel, seen: Seen, grid: int = 12, batch_size: int = 48,
               most: int = 40) -> Candidates:
    """The masks that `grid` x `grid` clicks give in one picture, without repetitions, `most` at most."""
    width, height = seen.image.size
    clicks = seen.to_input([[(x + 0.5) * width / grid, (y + 0.5) * height / grid]
                            for y in range(grid) for x in range(grid)])
    logits, scores = [], []
    for points in clicks.split(batch_size):
        labels = torch.ones(len(points), 1, dtype=torch.long)
        found, guessed = segmenter.decode(seen, points[:, None], labels, None, several=True)
        logits.append(found.flatten(0, 1))
        scores.append(guessed.flatten())
    logits, scores = torch.cat(logits), torch.cat(scores).clamp(0, 1)
    h, w = (max(1, round(n * cells / seen.side))
            for n, cells in zip(seen.inside, logits.shape[-2:], strict=True))
    inside = logits[:, :h, :w]
    masks = inside > 0
    area = masks.float().mean((1, 2))
    sensible = (area >= _SIZES[0]) & (area <= _SIZES[1])
    sensible = sensible if sensible.any() else masks.flatten(1).any(1)
    if not sensible.any():  # a model that finds nothing anywhere: the whole picture
        sensible, masks = torch.ones(1, dtype=torch.bool), torch.ones_like(masks[:1])
        logits, inside, scores = torch.ones_like(logits[:1]), torch.ones_like(inside[:1]), torch.zeros(1)
    logits, inside, masks, scores = (part[sensible] for part in (logits, inside, masks, scores))
    surely, perhaps = ((inside > offset).sum((1, 2)) for offset in (_STABILITY_OFFSET, -_STABILITY_OFFSET))
    stability = surely / perhaps.clamp(min=1)
    merit = scores * stability + centrality(masks)
    kept = _distinct(masks, merit)[:most]
    masks = masks[kept]
    share = F.interpolate(masks[:, None].float(), seen.features.shape[-2:], mode="area").flatten(1)
    features = share @ seen.features.flatten(1).T / share.sum(1, keepdim=True).clamp(min=1e-6)
    return Candidates(logits[kept], masks, features - seen.features.flatten(1).mean(1), merit[kept])


def choose(pictures: list[Candidates]) -> list[Choice]:
    """One candidate in every picture, so that the merits and the agreement among the pictures are highest.

    From every candidate as a seed, the pictures take turns to choose what goes best with the others, until
    none changes its mind; the best end counts.
    """
    features = [F.normalize(picture.features, dim=1) for picture in pictures]

    def values(i: int, chosen: list[int]) -> torch.Tensor:
        """Of picture i's candidates, given the other pictures' choices."""
        others = [features[j][chosen[j]] for j in range(len(pictures)) if j != i]
        agreement = features[i] @ torch.stack(others).T if others else torch.zeros(len(features[i]), 1)
        return pictures[i].merit + _AGREEMENT_WEIGHT * agreement.mean(1)

    best, best_total = [0] * len(pictures), float("-inf")
    for i, of_seed in enumerate(features):
        for seed in range(len(of_seed)):
            chosen = [int((p.merit + _AGREEMENT_WEIGHT * (f @ of_seed[seed])).argmax())
                      for p, f in zip(pictures, features, strict=True)]
            chosen[i] = seed
            for _ in range(10):
                before = list(chosen)
                for j in range(len(pictures)):
                    chosen[j] = int(values(j, chosen).argmax())
                if chosen == before:
                    break
            total = sum(values(j, chosen)[c].item() for j, c in enumerate(chosen))
            if total > best_total + 1e-6:
                best, best_total = chosen, total
    return [_sureness(i, pictures[i], values(i, best), best[i]) for i in range(len(pictures))]


def _sureness(i: int, picture: Candidates, values: torch.Tensor, index: int) -> Choice:
    other = overlap(picture.masks[index:index + 1], picture.masks)[0] < 0.5
    lead = (values[index] - values[other].max()).item() if other.any() else 1.0
    return Choice(index, min(1.0, max(0.0, lead)))
