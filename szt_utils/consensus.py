"""Masks without a prompt: the regions that all images of a set have in common.

Every image gives candidate masks, from a grid of clicks. The chosen combination has one mask per image. Its
regions look most alike by the model's own features, and the masks are stable, central and of a typical size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .segment import EmbeddedImage, Segmenter

__all__ = ["Candidates", "Choice", "SMALLEST_AREA", "LARGEST_AREA", "candidate_masks", "centrality",
           "choose_masks", "pairwise_iou"]

SMALLEST_AREA, LARGEST_AREA = 0.02, 0.8  # of a concept, as shares of its image
_STABILITY_OFFSET = 1.0  # in logits, as in Segment Anything's own automatic masks
_AGREEMENT_WEIGHT = 1.0


@dataclass(frozen=True)
class Candidates:
    """M possible masks of one image.

    `logits` (M, h, w) cover the square of the model's input, bool `masks` (M, h', w') the image only;
    `features` (M, C) are the mean of the image's features inside each mask minus that of the whole image;
    `merit` (M,) is the quality of each mask, whatever the other images show.
    """

    logits: torch.Tensor
    masks: torch.Tensor
    features: torch.Tensor
    merit: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """The chosen candidate and a confidence in [0, 1]: its lead over the best candidate that overlaps it by
    less than half."""

    index: int
    confidence: float


def pairwise_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of all pairs of masks, bool (M, h, w) and (N, h, w): float (M, N)."""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1)[None] - both).clamp(min=1)


def centrality(masks: torch.Tensor) -> torch.Tensor:
    """How far masks, bool (M, h, w), lie from the image's edge: float (M,) up to 1.

    It is the mean over a mask's pixels of a value that is 1 in the center and 0 at the edge, minus the share
    of the edge that the mask covers.
    """
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
    overlaps = pairwise_iou(masks, masks)
    for i in merit.argsort(descending=True).tolist():
        if not kept or overlaps[i, kept].max() < limit:
            kept.append(i)
    return torch.tensor(kept)


def _decode_grid(segmenter: Segmenter, embedded: EmbeddedImage, grid: int,
                 batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask logits (M, h, w) and scores (M,), three for each of `grid` x `grid` clicks."""
    width, height = embedded.image.size
    clicks = embedded.to_input([[(x + 0.5) * width / grid, (y + 0.5) * height / grid]
                                for y in range(grid) for x in range(grid)])
    logits, scores = [], []
    for points in clicks.split(batch_size):
        labels = torch.ones(len(points), 1, dtype=torch.long)
        three_logits, three_scores = segmenter.decode(embedded, points[:, None], labels, None, multimask=True)
        logits.append(three_logits.flatten(0, 1))
        scores.append(three_scores.flatten())
    return torch.cat(logits), torch.cat(scores).clamp(0, 1)


@torch.no_grad()
def candidate_masks(segmenter: Segmenter, embedded: EmbeddedImage, grid: int = 12,
                    batch_size: int = 48, most: int = 40) -> Candidates:
    """The masks of `grid` x `grid` clicks in one image, without repetitions, `most` at most.

    Masks of an untypical size are dropped, unless there are no others; a model that finds nothing gives the
    whole image.
    """
    logits, scores = _decode_grid(segmenter, embedded, grid, batch_size)
    h, w = (max(1, round(n * cells / embedded.input_side))
            for n, cells in zip(embedded.input_size, logits.shape[-2:], strict=True))
    inside = logits[:, :h, :w]
    masks = inside > 0
    area = masks.float().mean((1, 2))
    usable = (area >= SMALLEST_AREA) & (area <= LARGEST_AREA)
    usable = usable if usable.any() else masks.flatten(1).any(1)
    if not usable.any():
        usable, masks = torch.ones(1, dtype=torch.bool), torch.ones_like(masks[:1])
        logits, inside, scores = torch.ones_like(logits[:1]), torch.ones_like(inside[:1]), torch.zeros(1)
    logits, inside, masks, scores = (part[usable] for part in (logits, inside, masks, scores))
    strict, loose = ((inside > offset).sum((1, 2)) for offset in (_STABILITY_OFFSET, -_STABILITY_OFFSET))
    stability = strict / loose.clamp(min=1)
    merit = scores * stability + centrality(masks)
    kept = _distinct(masks, merit)[:most]
    masks, features = masks[kept], embedded.features.flatten(1)
    share = F.interpolate(masks[:, None].float(), embedded.features.shape[-2:], mode="area").flatten(1)
    inside_mean = share @ features.T / share.sum(1, keepdim=True).clamp(min=1e-6)
    return Candidates(logits[kept], masks, inside_mean - features.mean(1), merit[kept])


def choose_masks(images: list[Candidates]) -> list[Choice]:
    """One candidate per image, so that the sum of merits and of agreements between the images is highest.

    Coordinate ascent from every candidate as a seed: the images in turn take the candidate that goes best
    with the choices of the others, until nothing changes; the best end counts. All seeds climb at once.
    """
    features = [F.normalize(image.features, dim=1) for image in images]
    weight = _AGREEMENT_WEIGHT / max(1, len(images) - 1)

    def values(i: int, chosen: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """The value (S, M) of each candidate of image i, given S choices in all images, (S, N), and the sums
        of their features, (S, C)."""
        return images[i].merit + weight * ((total - features[i][chosen[:, i]]) @ features[i].T)

    def sums_of(chosen: torch.Tensor) -> torch.Tensor:
        return sum(f[own] for f, own in zip(features, chosen.T, strict=True))

    starts = []
    for i, seeds in enumerate(features):
        starts.append(torch.stack([(image.merit + _AGREEMENT_WEIGHT * (seeds @ f.T)).argmax(1)
                                   for image, f in zip(images, features, strict=True)], 1))
        starts[i][:, i] = torch.arange(len(seeds))
    chosen = torch.cat(starts)
    for _ in range(10):
        before, total = chosen.clone(), sums_of(chosen)
        for i, f in enumerate(features):
            best = values(i, chosen, total).argmax(1)
            total += f[best] - f[chosen[:, i]]
            chosen[:, i] = best
        if torch.equal(chosen, before):
            break
    total = sums_of(chosen)
    value = sum(values(i, chosen, total).gather(1, own[:, None]).double() for i, own in enumerate(chosen.T))
    best = chosen[(value[:, 0] >= value.max() - 1e-6).nonzero()[0]]
    total = sums_of(best)
    return [Choice(int(own), _confidence(image.masks, values(i, best, total)[0], int(own)))
            for i, (image, own) in enumerate(zip(images, best[0], strict=True))]


def _confidence(masks: torch.Tensor, values: torch.Tensor, index: int) -> float:
    """The lead of the candidate `index`, as in `Choice`; 1 without a different candidate."""
    different = pairwise_iou(masks[index:index + 1], masks)[0] < 0.5
    lead = (values[index] - values[different].max()).item() if different.any() else 1.0
    return min(1.0, max(0.0, lead))
