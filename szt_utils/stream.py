"""The order of training samples: which picture, mirrored or not, with which caption.

Draws exactly what the Diffusers example draws through its DataLoader, from Python's and torch's global
generators, and can be stopped and continued at any batch: its whole state is a few numbers.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Batch", "SampleStream"]


@dataclass
class Batch:
    """`indices` of pictures, `flips` (mirror it?) and caption `templates` of one batch;
    is it the epoch's last?"""

    indices: list[int]
    flips: list[bool]
    templates: list[str]
    last: bool


class SampleStream:
    """Endless batches; every epoch shows each of `num_images` pictures `repeats` times in a new order.

    With several ranks, rank r gets every `num_ranks`-th batch of one common order; `agree` makes the order's
    seed common (it gets this rank's seed and returns rank 0's). The last batches are filled from the epoch's
    front, so all ranks see equally many.
    """

    def __init__(self, num_images: int, repeats: int, templates: tuple[str, ...], batch_size: int, *,
                 rank: int = 0, num_ranks: int = 1, agree: Callable[[int], int] = lambda seed: seed):
        self.num_images, self.length, self.templates = num_images, num_images * repeats, templates
        self.batch_size, self.rank, self.num_ranks, self.agree = batch_size, rank, num_ranks, agree
        self.total_batches = -(-self.length // batch_size)
        self.batches_per_epoch = -(-self.total_batches // num_ranks)
        self.seed, self.position, self.pending = 0, 0, None

    def _start_epoch(self) -> None:
        # A DataLoader's base seed for its workers, drawn and not needed.
        torch.empty((), dtype=torch.int64).random_()
        self.seed = self.agree(int(torch.empty((), dtype=torch.int64).random_()))
        self.position = 0
        self._shuffle()

    def _shuffle(self) -> None:
        self.order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed)).tolist()

    def _fetch(self, position: int) -> Batch:
        start = (position * self.num_ranks + self.rank) % self.total_batches * self.batch_size
        samples = [(i % self.num_images, random.choice(self.templates), bool(torch.rand(1) < 0.5))
                   for i in self.order[start:start + self.batch_size]]
        indices, templates, flips = map(list, zip(*samples, strict=True))
        return Batch(indices, flips, templates, last=position + 1 == self.batches_per_epoch)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        if self.pending is None:
            self._start_epoch()
            self.pending = self._fetch(0)
        batch, self.position = self.pending, self.position + 1
        # Accelerate fetches a batch ahead, before the training step draws its noise from the same generator.
        self.pending = None if batch.last else self._fetch(self.position)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What continues this stream after the last batch it gave, together with the global random states."""
        return {"seed": self.seed, "position": self.position,
                "pending": self.pending and asdict(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed, self.position = state["seed"], state["position"]
        self.pending = state["pending"] and Batch(**state["pending"])
        self._shuffle()
