"""Ways to run the U-Net forward and backward, each against eager execution as Diffusers loads it.

    python benchmarks/modes.py
    python benchmarks/modes.py --size sd15 --precision bf16

channels_last: the weights, and so the pictures, with their channels innermost; unfused: attention without
scaled_dot_product_attention, by which Diffusers attends unless told otherwise; compile: torch.compile;
compile_channels_last: both; cuda_graph (GPU only): torch.compile with mode="reduce-overhead".
"""

import argparse
from functools import partial

import torch
from models import DEVICE, DTYPES, model_folder
from timing import alternate, medians, ratio, report, seconds


def unet_in(mode: str, options):
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel.from_pretrained(model_folder(options.size)[0], subfolder="unet",
                                                torch_dtype=DTYPES[options.precision])
    unet = unet.requires_grad_(False).eval().to(DEVICE)
    if mode.endswith("channels_last"):
        unet.to(memory_format=torch.channels_last)
    if mode == "unfused":
        unet.set_attn_processor(AttnProcessor())
    if mode.startswith("compile") or mode == "cuda_graph":
        unet.compile(mode="reduce-overhead" if mode == "cuda_graph" else None)
    return unet


def step(unet, batch_size: int, options):
    dtype, side = DTYPES[options.precision], model_folder(options.size)[1] // 8
    noised = torch.randn(batch_size, 4, side, side, device=DEVICE, dtype=dtype)
    states = torch.randn(batch_size, 77, unet.config.cross_attention_dim, device=DEVICE, dtype=dtype,
                         requires_grad=True)
    timesteps = torch.randint(0, 1000, (batch_size,), device=DEVICE)
    return lambda: unet(noised, timesteps, states).sample.float().square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ["eager", "channels_last", "unfused", "compile", "compile_channels_last"]
    modes += ["cuda_graph"] * (DEVICE == "cuda")
    parser.add_argument("--size", choices=["pocket", "sd15"], default="pocket")
    parser.add_argument("--precision", choices=DTYPES, default="no")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    unets, results = {mode: unet_in(mode, options) for mode in options.modes}, {}
    for batch_size in options.batch_sizes:
        repeats = max(2, 16 // batch_size)
        steps = {mode: step(unet, batch_size, options) for mode, unet in unets.items()}
        durations = alternate({mode: partial(seconds, work, repeats) for mode, work in steps.items()},
                              options.rounds)
        results[batch_size] = {"seconds": medians(durations),
                               "eager / mode": {mode: ratio(durations, "eager", mode) for mode in unets}}
        print(batch_size, results[batch_size], flush=True)
    report(f"modes_{options.size}_{options.precision}", {"options": vars(options), "batch sizes": results})


if __name__ == "__main__":
    main()
