"""What the pocket training scripts share: flags, the drawn training set, an optimizer, a resumable loop.

Every script takes `--work_dir` and `--minutes`. It trains until its steps are done or the minutes are over,
and saves its state; started again, it continues from there.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from szt_utils.arguments import local_path, script_parser
from szt_utils.pocket.scenes import SIZE, Attributes, Scene, attributes_of, draw_scene

TRAINING_SEEDS = 1_000_000  # scene seeds from here on are for training
HELD_OUT_SEEDS = 9_000_000  # and from here on for checks


def training_parser(doc: str, steps: int, batch_size: int, lr: float) -> argparse.ArgumentParser:
    """A parser with the flags that all training scripts share."""
    parser = script_parser(doc)
    add = parser.add_argument
    add("--work_dir", type=local_path, default=Path("pocket_training"))
    add("--scenes", type=int, default=20_000, help="number of training scenes")
    add("--steps", type=int, default=steps)
    add("--batch_size", type=int, default=batch_size)
    add("--lr", type=float, default=lr)
    add("--minutes", type=float, default=20, help="stop and save after this long; start again to continue")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true")
    return parser


def draw(seed: int) -> Scene:
    """The scene of a seed."""
    return draw_scene(seed, attributes_of(seed))


def scenes(count: int, first_seed: int, work_dir: Path) -> tuple[np.ndarray, list[Attributes]]:
    """Images, uint8 (count, 128, 128, 3), and their attributes; drawn once, later read from `work_dir`."""
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"scenes-{first_seed}-{count}.npy"
    seeds = range(first_seed, first_seed + count)
    if not path.exists():
        images = np.lib.format.open_memmap(path.with_suffix(".part"), "w+", np.uint8,
                                             (count, SIZE, SIZE, 3))
        with ProcessPoolExecutor() as pool:
            for i, scene in enumerate(pool.map(draw, seeds, chunksize=64)):
                images[i] = scene.image
        images.flush()
        path.with_suffix(".part").rename(path)
    return np.load(path, mmap_mode="r"), [attributes_of(seed) for seed in seeds]


def pixels(images: np.ndarray | list[np.ndarray], device) -> torch.Tensor:
    """Drawn images, uint8 (N, H, W, 3), as float32 (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(device).float() / 255


def cosine_lr(optimizer, step: int, steps: int, lr: float) -> None:
    factor = (min(1, (step + 1) / min(200, max(1, steps / 8)))
              * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))))
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized matrices (Jordan et al. 2024); Adam for vectors and for groups with
    `adam=True`.

    Convolutions count as matrices (out, in * kh * kw). The update is scaled to Adam's usual size, 0.2 per
    element (Liu et al. 2025, "Muon is scalable for LLM training"), so that one learning rate serves both.
    Matrices of one shape are updated together, which takes a GPU a fifth of the calls.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, betas=(0.9, 0.98),
                 weight_decay: float = 0.01):
        super().__init__(list(parameters),
                         dict(lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay))

    @staticmethod
    def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
        """Five Newton-Schulz iterations of matrices (N, out, in) towards U V^T of the singular value
        decomposition.

        Every iterate is a polynomial of the Gram matrix times the start, so the long side is multiplied only
        twice.
        """
        x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
        if tall := x.shape[1] > x.shape[2]:
            x = x.mT
        identity = torch.eye(x.shape[1], device=x.device)
        gram, product = x @ x.mT, identity
        for _ in range(5):
            factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
            gram, product = factor @ gram @ factor, factor @ product
        x = product @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[None if p.ndim < 2 or group.get("adam") else p.shape].append(p)
            for shape, same in by_shape.items():
                (self._step_adam if shape is None else self._step_matrices)(group, same)

    def _states(self, parameters: list, *names: str) -> tuple[list, ...]:
        """The number of the step of every parameter, and its states of these names, zeros at first."""
        for p in parameters:
            state = self.state[p]
            if not state:
                state.update({"step": 0, **{name: torch.zeros_like(p) for name in names}})
            state["step"] += 1
        return tuple([self.state[p][name] for p in parameters] for name in ("step", *names))

    def _step_matrices(self, group: dict, parameters: list) -> None:
        gradients = [p.grad for p in parameters]
        _, means = self._states(parameters, "mean")
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(means, group["momentum"])
        torch._foreach_add_(means, gradients)
        ahead = torch._foreach_add(gradients, means, alpha=group["momentum"])
        updates = self.orthogonalize(torch.stack(ahead).flatten(2))
        updates *= 0.2 * max(updates.shape[1:]) ** 0.5
        torch._foreach_add_(parameters, [update.view(p.shape) for update, p in
                                         zip(updates, parameters, strict=True)], alpha=-group["lr"])

    def _step_adam(self, group: dict, parameters: list) -> None:
        gradients, (beta1, beta2) = [p.grad for p in parameters], group["betas"]
        steps, means, squares = self._states(parameters, "mean", "square")
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        sizes = torch._foreach_div(squares, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, 1e-8)
        updates = torch._foreach_div(means, [1 - beta1**step for step in steps])
        torch._foreach_div_(updates, sizes)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module, decay: float):
        self.module, self.decay = module, decay
        self.shadow = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        for parameter, shadow in zip(self.module.parameters(), self.shadow, strict=True):
            parameter.copy_(shadow)


def train(name: str, args, modules: dict, optimizer, step_loss, averages: dict | None = None) -> bool:
    """Minimize the 'loss' of `step_loss(step)`, a dict of losses to log; returns whether all steps are done.

    The state (modules, optimizer, averages, step, minutes spent) is in `work_dir/<name>.pt`, the log in
    `<name>.jsonl`.
    """
    averages = averages or {}
    path = args.work_dir / f"{name}.pt"
    step, minutes = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        step, minutes = state["step"], state["minutes"]
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimizer.load_state_dict(state["optimizer"])
        for key, average in averages.items():
            average.shadow = state["averages"][key]

    def save():
        state = {"modules": {k: m.state_dict() for k, m in modules.items()},
                 "optimizer": optimizer.state_dict(), "averages": {k: a.shadow for k, a in averages.items()},
                 "step": step, "minutes": minutes + (time.time() - start) / 60}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    start, saved = time.time(), time.time()
    while step < args.steps and time.time() - start < args.minutes * 60:
        torch.manual_seed(step)  # a resumed run draws what the uninterrupted one would have drawn
        cosine_lr(optimizer, step, args.steps, args.lr)
        losses = step_loss(step)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        for average in averages.values():
            average.update(step)
        step += 1
        if step % 50 == 0:
            record = {"step": step, "seconds": round(time.time() - start, 1),
                      **{k: round(float(v.detach()), 5) for k, v in losses.items()}}
            print(json.dumps(record), flush=True)
            with open(args.work_dir / f"{name}.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
        if time.time() - saved > 120:
            save()
            saved = time.time()
    save()
    print(f"{name}: {step} of {args.steps} steps, "
          f"{minutes + (time.time() - start) / 60:.1f} minutes in all")
    return step >= args.steps
