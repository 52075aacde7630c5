"""A step of each poison against a plain forward and backward pass of its networks: time and peak memory.

    python benchmarks/poisons.py
    python benchmarks/poisons.py --size sd15 --precision bf16

The plain step of ADM is one forward and backward pass of VAE encoder and U-Net in one graph; that of SDS the
U-Net's forward pass and the encoder; that of EA the encoder alone. `ours` is one step of the PGD loop,
`one graph` the same with --one_graph. DA has no plain side: its chain and its decoder are checkpointed. Each
peak is measured in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from models import DEVICE, DTYPES, model_folder
from timing import HONEST_MALLOC, added_memory, alternate, medians, ratio, report, seconds

from szt_utils.arguments import script_parser
from szt_utils.image_rng import image_generator
from szt_utils.models import expand, load_model, residual, tokenize
from szt_utils.pgd import pgd
from szt_utils.poisons import POISONS, Victim, image_gradient, target_pattern


def ours(victim: Victim, images: torch.Tensor, name: str) -> Callable[[], object]:
    """A PGD step of the poison."""
    generators = [image_generator(image, 0) for image in images]
    gradient = image_gradient(POISONS[name], victim, generators)
    return lambda: pgd(images, gradient, eps=16, step_size=1, steps=1)


def one_graph(victim: Victim, images: torch.Tensor, name: str) -> Callable[[], object]:
    """The same with the graphs of encoder and U-Net held together."""
    return ours(replace(victim, one_graph=True), images, name)


def plain(victim: Victim, images: torch.Tensor, name: str) -> Callable[[], object]:
    """The networks of the poison, forward and backward as far as it needs them, on one graph."""
    model = victim.model
    noise = torch.randn(len(images), 4, images.shape[-2] // 8, images.shape[-1] // 8,
                        device=DEVICE).to(model.dtype)
    timesteps = torch.full((len(images),), 300, device=DEVICE)
    condition = expand(victim.condition, len(images))

    def adm():
        leaf = images.clone().requires_grad_()
        residual(model, model.encode(leaf), noise, timesteps, condition).square().mean().backward()

    def sds():
        leaf = images.clone().requires_grad_()
        latents = model.encode(leaf)
        with torch.no_grad():
            error = residual(model, latents, noise, timesteps, condition)
        (latents * error).mean().backward()

    def ea():
        leaf = images.clone().requires_grad_()
        model.encode(leaf).square().mean().backward()

    return {"adm": adm, "sds": sds, "ea": ea}[name.rstrip("+-")]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--size", choices=["pocket", "sd15"], default="pocket")
    parser.add_argument("--precision", choices=DTYPES, default="no")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="PGD steps of a round")
    parser.add_argument("--rounds", type=int, default=7, help="0: memory only")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)  # the process that is measured
    args = parser.parse_args()

    path, resolution = model_folder(args.size)
    model = load_model(path, dtype=DTYPES[args.precision], device=DEVICE)
    images = (torch.rand(args.batch_size, 3, resolution, resolution) * 255).round() / 255
    condition, empty = (model.condition(tokenize(model, prompt)) for prompt in ("a photo", ""))
    victim = Victim(model, condition, target=target_pattern(resolution, resolution), empty=empty)
    images = images.to(DEVICE)
    sides = {"ours": ours, "one graph": one_graph, "plain": plain}
    if args.memory_of:
        side, name = args.memory_of
        work = sides[side](victim, images, name)
        work()
        print(json.dumps(added_memory(work)))
        return

    results = {}
    for name in ("adm+", "sds+", "ea", "da"):  # the other direction costs the same
        own = {side: make(victim, images, name) for side, make in sides.items()
               if side == "ours" or name != "da" and (side == "plain" or POISONS[name].network_graph)}
        result = {}
        if args.rounds:
            durations = alternate({side: lambda work=work: seconds(work, args.steps)
                                   for side, work in own.items()}, args.rounds)
            result["seconds per step"] = medians(durations)
            if "plain" in own:
                result["over plain"] = {side: ratio(durations, side, "plain") for side in own}
        result["bytes a step adds"] = {side: memory_of(args, side, name) for side in own}
        results[name] = result
        print(name, json.dumps(result), flush=True)
    report(f"poisons_{args.size}_batch{args.batch_size}_{args.precision}",
           {"options": vars(args), "poisons": results})


def memory_of(args: argparse.Namespace, side: str, name: str) -> int:
    """Bytes that one step adds at its peak."""
    done = subprocess.run([sys.executable, __file__, "--size", args.size, "--precision", args.precision,
                           "--batch_size", str(args.batch_size), "--memory_of", side, name],
                          capture_output=True, text=True, check=True, env={**os.environ, **HONEST_MALLOC})
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
