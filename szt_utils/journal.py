"""The losses of a training: in stats.jsonl, in trackers, in the progress bar; and concepts that diverge."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from .concepts import Concept, Group
from .files import append_stats
from .masks import masked_mean
from .training_run import Run

__all__ = ["Journal"]

_NAMES = ("loss", "loss_inside", "loss_outside")


@dataclass
class _Losses:
    """A concept's last loss, with its plain mean inside and outside the masks, and those not yet read."""

    last: torch.Tensor | None = None  # (1,) or (3,)
    waiting: list[tuple[int, torch.Tensor, float]] = field(default_factory=list)  # step, last, learning rate


class Journal:
    """The records of a group's training; a context that shows its progress bar.

    Losses are read in blocks of steps: reading one makes the host wait for the device. A concept whose rows
    are not finite fails, and so does one whose loss is not; with fp16, whose loss scaler skips such steps,
    when no loss of a block is finite. The others continue.
    """

    def __init__(self, run: Run, group: Group):
        from tqdm.auto import tqdm

        self.run, self.group = run, group
        self.skips_steps = run.accelerator.scaler is not None  # which leaves out steps that are not finite
        self.losses = {id(concept): _Losses() for concept in group.concepts}
        steps, count = run.settings.max_train_steps, len(group.concepts)
        self.progress = tqdm(total=steps, initial=min(group.step, steps),
                             desc="Steps" if group.alone else f"Steps of {count} concepts",
                             disable=not run.accelerator.is_local_main_process)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.close()  # before an error is printed, so that the error has a line of its own

    def note(self, concept: Concept, loss: torch.Tensor, error: torch.Tensor,
             mask: torch.Tensor | None) -> None:
        """Note a micro-batch's loss, and its squared errors (B, C, h, w) inside and outside the mask."""
        parts = [] if mask is None else [masked_mean(error.detach(), part, "area")
                                         for part in (mask, 1 - mask)]
        self.losses[id(concept)].last = torch.stack([loss.detach(), *parts])

    def end_step(self, lr: float, read: bool) -> None:
        """Record the step that has just ended, at this learning rate.

        Losses are read every ten steps, and when `read` asks for it, as before files are written.
        """
        self.progress.update(1)
        for concept in self.group.concepts:
            losses = self.losses[id(concept)]
            losses.waiting.append((self.group.step, losses.last, lr))
        if read or self.group.step % 10 == 0:
            self._read(lr)

    def _read(self, lr: float) -> None:
        shown: list[float] = []
        tracked: dict[int, dict[str, float]] = {}  # by step: a tracker takes steps in their order
        for concept in self.group.concepts:
            waiting = self.losses[id(concept)].waiting
            values = torch.stack([losses for _, losses, _ in waiting]).tolist() if waiting else []
            records = [{"step": step, **dict(zip(_NAMES, losses, strict=False)), "lr": at}
                       for (step, _, at), losses in zip(waiting, values, strict=True)]
            waiting.clear()
            problem = self._problem(concept, records)
            if self.skips_steps:
                records = [record for record in records if math.isfinite(record["loss"])]
            else:
                records = list(itertools.takewhile(lambda record: math.isfinite(record["loss"]), records))
            if records and self.run.rank == 0:
                with self.run.surviving(concept.settings):
                    append_stats(concept.output_dir / "stats.jsonl", records)
                    shown.append(records[-1]["loss"])
                    tag = "loss" if self.run.one_concept else f"loss/{concept.name}"
                    for record in records:
                        tracked.setdefault(record["step"], {"lr": record["lr"]})[tag] = record["loss"]
            if problem:
                self.run.fail(concept.settings, problem)
        for step, values in sorted(tracked.items()):
            self.run.log(values, step)
        if shown:
            self.progress.set_postfix(loss=f"{sum(shown) / len(shown):.4f}", lr=lr)

    def _problem(self, concept: Concept, records: list[dict[str, float]]) -> str | None:
        """A sentence when the concept has failed, on all of its ranks at the same step."""
        problem = self._own_problem(concept, records)
        if self.run.any_rank(problem is not None):
            return problem or f"Another process has failed before step {self.group.step}."
        return None

    def _own_problem(self, concept: Concept, records: list[dict[str, float]]) -> str | None:
        bad = [record["step"] for record in records if not math.isfinite(record["loss"])]
        if bad and (len(bad) == len(records) or not self.skips_steps):
            return (f"The loss is not a number at step {bad[0]}; files written before are kept. "
                    "Lower --learning_rate, or use bf16 instead of fp16.")
        # The last step's update has no loss to show it yet, but may be about to be saved.
        if not all(rows.isfinite().all() for rows in self.group.rows_of(concept)):
            return (f"The embedding is not finite after step {self.group.step}; "
                    "files written before are kept. Lower --learning_rate.")
        return None
