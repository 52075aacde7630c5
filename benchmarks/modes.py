"""Ways to run the U-Net forward and backward, each against eager execution as Diffusers loads it.

    python benchmarks/modes.py
    python benchmarks/modes.py --size sd15 --precision bf16

channels_last: weights, and so activations, with their channels innermost; unfused: attention without
scaled_dot_product_attention, which Diffusers uses by default; compile: torch.compile; compile_channels_last:
both; cuda_graph (GPU only): torch.compile with mode="reduce-overhead".
"""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from models import DEVICE, DTYPES, model_folder
from timing import alternate, medians, ratio, report, seconds

from szt_utils.arguments import script_parser


def unet_in(mode: str, size: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """A frozen U-Net that runs in a mode."""
    unet = UNet2DConditionModel.from_pretrained(model_folder(size)[0], subfolder="unet", torch_dtype=dtype)
    unet = unet.requires_grad_(False).eval().to(DEVICE)
    if mode.endswith("channels_last"):
        unet.to(memory_format=torch.channels_last)
    if mode == "unfused":
        unet.set_attn_processor(AttnProcessor())
    if mode.startswith("compile") or mode == "cuda_graph":
        unet.compile(mode="reduce-overhead" if mode == "cuda_graph" else None)
    return unet


def step(unet: UNet2DConditionModel, batch_size: int, side: int) -> Callable[[], None]:
    """A forward and backward pass on a latent grid of `side` cells."""
    noised = torch.randn(batch_size, 4, side, side, device=DEVICE, dtype=unet.dtype)
    states = torch.randn(batch_size, 77, unet.config.cross_attention_dim, device=DEVICE, dtype=unet.dtype,
                         requires_grad=True)
    timesteps = torch.randint(0, 1000, (batch_size,), device=DEVICE)
    return lambda: unet(noised, timesteps, states).sample.float().square().mean().backward()


def main() -> None:
    parser = script_parser(__doc__)
    modes = ["eager", "channels_last", "unfused", "compile", "compile_channels_last"]
    modes += ["cuda_graph"] * (DEVICE.type == "cuda")
    parser.add_argument("--size", choices=["pocket", "sd15"], default="pocket")
    parser.add_argument("--precision", choices=DTYPES, default="no")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    side, results = model_folder(args.size)[1] // 8, {}
    unets = {mode: unet_in(mode, args.size, DTYPES[args.precision]) for mode in args.modes}
    for batch_size in args.batch_sizes:
        repeats = max(2, 16 // batch_size)
        durations = alternate({mode: partial(seconds, step(unet, batch_size, side), repeats)
                               for mode, unet in unets.items()}, args.rounds)
        results[batch_size] = {"seconds": medians(durations),
                               "eager / mode": {mode: ratio(durations, "eager", mode) for mode in unets}}
        print(batch_size, results[batch_size], flush=True)
    report(f"modes_{args.size}_{args.precision}", {"options": vars(args), "batch sizes": results})


if __name__ == "__main__":
    main()
