"""The order of training samples: which image, mirrored or not, with which caption.

Draws exactly what the Diffusers example draws through its DataLoader, from generators of the run's own, and
can be stopped and continued at any batch: its whole state is a few numbers.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Generators", "SampleIndices", "SampleStream"]


class Generators:
    """The generators of one run: `python_rng`, and torch's `cpu_rng` and `device_rng`.

    They go on where the global ones stand when this is made, so that a run draws what it would draw from
    those, and several runs in one process do not meet. On a CPU, both of torch are the same.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self.python_rng, self.cpu_rng = random.Random(), torch.Generator()
        self.python_rng.setstate(random.getstate())
        self.cpu_rng.set_state(torch.get_rng_state())
        self.device_rng = self.cpu_rng
        if device.type != "cpu":
            self.device_rng = torch.Generator(device)
            self.device_rng.set_state(torch.get_device_module(device).get_rng_state(device))

    def state_dict(self) -> dict[str, Any]:
        """What continues these random numbers."""
        return {"python": self.python_rng.getstate(), "cpu": self.cpu_rng.get_state(),
                "device": self.device_rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.python_rng.setstate(state["python"])
        self.cpu_rng.set_state(state["cpu"])
        self.device_rng.set_state(state["device"])


@dataclass
class SampleIndices:
    """`indices` of images, `flips` (mirror it?) and caption `templates` of one batch;
    is it the epoch's last?"""

    indices: list[int]
    flips: list[bool]
    templates: list[str]
    last: bool


class SampleStream:
    """Endless batches; every epoch shows each image `repeats` times in a new order.

    `templates` are those of every image, among which each sample draws its own. With several ranks, rank r
    gets every `num_ranks`-th batch of one common order; `broadcast` gets this rank's seed of the order and
    returns rank 0's. The last batches are filled from the epoch's front, so all ranks see equally many.
    """

    def __init__(self, templates: Sequence[tuple[str, ...]], repeats: int, batch_size: int,
                 generators: Generators, *, rank: int = 0, num_ranks: int = 1,
                 broadcast: Callable[[int], int] = lambda seed: seed):
        self.generators = generators
        self.templates, self.length = templates, len(templates) * repeats
        self.batch_size, self.rank, self.num_ranks, self.broadcast = batch_size, rank, num_ranks, broadcast
        self.total_batches = -(-self.length // batch_size)
        self.batches_per_epoch = -(-self.total_batches // num_ranks)
        self.seed, self.position, self.pending = 0, 0, None

    def _start_epoch(self) -> None:
        # A DataLoader's base seed for its workers, drawn and not needed.
        self._random_seed()
        self.seed = self.broadcast(self._random_seed())
        self.position = 0
        self._shuffle()

    def _random_seed(self) -> int:
        return int(torch.empty((), dtype=torch.int64).random_(generator=self.generators.cpu_rng))

    def _shuffle(self) -> None:
        self.order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed)).tolist()

    def _fetch(self, position: int) -> SampleIndices:
        start = (position * self.num_ranks + self.rank) % self.total_batches * self.batch_size
        draws = self.generators
        images = [i % len(self.templates) for i in self.order[start:start + self.batch_size]]
        samples = [(image, draws.python_rng.choice(self.templates[image]),
                    bool(torch.rand(1, generator=draws.cpu_rng) < 0.5)) for image in images]
        indices, templates, flips = map(list, zip(*samples, strict=True))
        return SampleIndices(indices, flips, templates, last=position + 1 == self.batches_per_epoch)

    def __iter__(self):
        return self

    def __next__(self) -> SampleIndices:
        if self.pending is None:
            self._start_epoch()
            self.pending = self._fetch(0)
        batch, self.position = self.pending, self.position + 1
        # Accelerate fetches a batch ahead, before the training step draws its noise from the same generator.
        self.pending = None if batch.last else self._fetch(self.position)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What continues this stream after the last batch it gave, with the states of its generators."""
        return {"seed": self.seed, "position": self.position,
                "pending": self.pending and asdict(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed, self.position = state["seed"], state["position"]
        self.pending = state["pending"] and SampleIndices(**state["pending"])
        self._shuffle()
