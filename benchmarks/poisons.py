"""A step of each poison against a plain forward and backward of the networks that it goes through: time, and
peak memory in a process of its own.

    python benchmarks/poisons.py
    python benchmarks/poisons.py --size sd15 --precision bf16

The plain step of ADM is one forward and backward of VAE encoder and U-Net in one graph; that of SDS the U-Net
forward and the encoder; that of EA the encoder alone. `ours` is one step of the PGD loop, `one graph` the
same with --one_graph. DA has no plain side: its chain and its decoder are checkpointed.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace

import torch
from models import DEVICE, DTYPES, model_folder
from timing import HONEST_MALLOC, added_memory, alternate, medians, ratio, report, seconds

from szt_utils.diffusion import LatentDiffusion
from szt_utils.objectives import POISONS, Attack, image_generator, image_gradient, target_pattern
from szt_utils.pgd import pgd


def ours(attack: Attack, images: torch.Tensor, name: str):
    """A PGD step of the poison."""
    generators = [image_generator(image, 0) for image in images]
    gradient = image_gradient(POISONS[name], attack, generators)
    return lambda: pgd(images, gradient, eps=16, step_size=1, steps=1)


def one_graph(attack: Attack, images: torch.Tensor, name: str):
    return ours(replace(attack, one_graph=True), images, name)


def plain(attack: Attack, images: torch.Tensor, name: str):
    """The networks of the poison, forward and backward as far as it needs them, on one graph."""
    model = attack.model
    noise = torch.randn(len(images), 4, images.shape[-2] // 8, images.shape[-1] // 8,
                        device=DEVICE).to(model.dtype)
    timesteps = torch.full((len(images),), 300, device=DEVICE)
    states = attack.text_states.expand(len(images), -1, -1)

    def adm():
        leaf = images.clone().requires_grad_()
        model.loss(model.encode(leaf), noise, timesteps, states).mean().backward()

    def sds():
        leaf = images.clone().requires_grad_()
        latents = model.encode(leaf)
        with torch.no_grad():
            residual = model.residual(latents, noise, timesteps, states)
        (latents * residual).mean().backward()

    def ea():
        leaf = images.clone().requires_grad_()
        model.encode(leaf).square().mean().backward()

    return {"adm": adm, "sds": sds, "ea": ea}[name.rstrip("+-")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["pocket", "sd15"], default="pocket")
    parser.add_argument("--precision", choices=DTYPES, default="no")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="PGD steps of a round")
    parser.add_argument("--rounds", type=int, default=7, help="0: memory only")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)  # the process that is measured
    options = parser.parse_args()

    path, resolution = model_folder(options.size)
    model = LatentDiffusion.load(path, dtype=DTYPES[options.precision], device=DEVICE)
    images = (torch.rand(options.batch_size, 3, resolution, resolution) * 255).round() / 255
    attack = Attack(model, model.embed_text("a photo"), target=target_pattern(resolution, resolution),
                    empty_states=model.embed_text(""))
    images = images.to(DEVICE)
    sides = {"ours": ours, "one graph": one_graph, "plain": plain}
    if options.memory_of:
        side, name = options.memory_of
        work = sides[side](attack, images, name)
        work()
        print(json.dumps(added_memory(work)))
        return

    results = {}
    for name in ("adm+", "sds+", "ea", "da"):  # downhill costs the same
        own = {side: make(attack, images, name) for side, make in sides.items()
               if side == "ours" or name != "da" and (side == "plain" or POISONS[name].unet_graph)}
        result = {}
        if options.rounds:
            durations = alternate({side: lambda work=work: seconds(work, options.steps)
                                   for side, work in own.items()}, options.rounds)
            result["seconds per step"] = medians(durations)
            if "plain" in own:
                result["over plain"] = {side: ratio(durations, side, "plain") for side in own}
        result["bytes a step adds"] = {side: memory_of(options, side, name) for side in own}
        results[name] = result
        print(name, json.dumps(result), flush=True)
    report(f"poisons_{options.size}_batch{options.batch_size}_{options.precision}",
           {"options": vars(options), "poisons": results})


def memory_of(options, side: str, name: str) -> int:
    done = subprocess.run([sys.executable, __file__, "--size", options.size, "--precision", options.precision,
                           "--batch_size", str(options.batch_size), "--memory_of", side, name],
                          capture_output=True, text=True, check=True, env={**os.environ, **HONEST_MALLOC})
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
