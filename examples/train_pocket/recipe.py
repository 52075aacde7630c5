"""What the pocket training scripts share: flags, the drawn training set, an optimizer, a resumable loop.

Every script takes `--work_dir` and `--minutes`. It trains until its steps are done or the minutes are over,
and saves its state; started again, it continues from there.
"""

import argparse
import json
import math
import time
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
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, betas=(0.9, 0.98),
                 weight_decay: float = 0.01):
        super().__init__(list(parameters),
                         dict(lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay))

    @staticmethod
    def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
        """Five Newton-Schulz iterations towards U V^T of the singular value decomposition.

        Every iterate is a polynomial of the Gram matrix times the start, so the long side is multiplied only
        twice.
        """
        x = matrix / (matrix.norm() + 1e-7)
        if tall := x.shape[0] > x.shape[1]:
            x = x.T
        gram, product = x @ x.T, torch.eye(len(x), device=x.device)
        for _ in range(5):
            factor = 3.4445 * torch.eye(len(x), device=x.device) - 4.7750 * gram + 2.0315 * gram @ gram
            gram, product = factor @ gram @ factor, factor @ product
        x = product @ x
        return x.T if tall else x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, (beta1, beta2) = self.state[p], group["betas"]
                is_matrix = p.ndim > 1 and not group.get("adam")
                if not state:
                    state["step"], state["mean"] = 0, torch.zeros_like(p)
                    if not is_matrix:
                        state["square"] = torch.zeros_like(p)
                state["step"] += 1
                if is_matrix:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    state["mean"].mul_(group["momentum"]).add_(p.grad)
                    matrix = p.grad.add(state["mean"], alpha=group["momentum"]).reshape(len(p), -1)
                    update = self.orthogonalize(matrix).reshape(p.shape) * (0.2 * max(matrix.shape) ** 0.5)
                else:
                    state["mean"].lerp_(p.grad, 1 - beta1)
                    state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                    mean = state["mean"] / (1 - beta1 ** state["step"])
                    update = mean / ((state["square"] / (1 - beta2 ** state["step"])).sqrt() + 1e-8)
                p.add_(update, alpha=-group["lr"])


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
