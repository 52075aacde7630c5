"""Make the pocket VAE's encoder sensitive to high frequencies, as Stable Diffusion's is:

    python examples/train_pocket/train_encoder.py

JPEG heals poisoned images because it removes the high frequencies that a poison uses. An encoder as small as
the pocket world's is attacked through low frequencies instead. So a copy of it is trained for three aims: the
same latents as before for images that are unchanged, compressed or softly shaded; latents at a distance for
images with high-frequency noise; and the latents of the clean image for an attacked one that is compressed.
Decoder, U-Net and scaling factor do not change. `--gain 0 --no-heal` only copies the encoder, with
`--layers_per_block` and `--channels` into another architecture, to see what depth and width do alone.
"""

import argparse
import copy
import shutil

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from recipe import TRAINING_SEEDS, Average, Muon, pixels, scenes, train, training_parser

from szt_utils.images import to_vae_range
from szt_utils.jpeg import jpeg_tensor


def high_pass(noise: torch.Tensor) -> torch.Tensor:
    """Noise (B, C, H, W) less its 5 x 5 blur."""
    return noise - F.avg_pool2d(F.pad(noise, (2, 2, 2, 2), mode="reflect"), 5, 1)


def soft_noise(x: torch.Tensor, cells: int) -> torch.Tensor:
    """Noise in [-1, 1] like `x`, smooth, with `cells` bumps across."""
    grid = torch.rand(*x.shape[:2], cells, cells, device=x.device) * 2 - 1
    return F.interpolate(grid, x.shape[-2:], mode="bicubic").clamp(-1, 1)


def compressed(x: torch.Tensor, qualities: list[int]) -> torch.Tensor:
    return torch.cat([jpeg_tensor(image[None], quality)
                      for image, quality in zip(x.cpu(), qualities, strict=True)]).to(x)


def main() -> None:
    parser = training_parser(__doc__, steps=1000, batch_size=4, lr=1e-3)
    parser.add_argument("--gain", type=float, default=0.5,
                           help="how far high-passed noise of 16 levels must move the scaled latents")
    parser.add_argument("--name", default="encoder", help="of the state and the model folder, in work_dir")
    parser.add_argument("--attacked", action="store_true",
                           help="the noise follows the encoder's gradient instead of random signs")
    parser.add_argument("--heal", action=argparse.BooleanOptionalAction, default=True,
                           help="train compressed attacked images to give the latents of the clean ones")
    parser.add_argument("--layers_per_block", type=int, help="train another architecture from scratch")
    parser.add_argument("--channels", type=int, nargs=4)
    args = parser.parse_args()
    device = torch.device(args.device)
    images, _ = scenes(args.scenes, TRAINING_SEEDS, args.work_dir)
    folder = args.work_dir / "model" / "vae"
    teacher = AutoencoderKL.from_pretrained(folder).to(device).eval().requires_grad_(False)
    torch.manual_seed(0)
    if args.layers_per_block or args.channels:
        config = {**teacher.config, "layers_per_block": args.layers_per_block or 1,
                  "block_out_channels": args.channels or teacher.config.block_out_channels}
        vae = AutoencoderKL.from_config(config).to(device)
    else:
        vae = copy.deepcopy(teacher)
    vae.requires_grad_(True).to(memory_format=torch.channels_last)
    scale = teacher.config.scaling_factor

    def moments(module, x):
        x = to_vae_range(x).contiguous(memory_format=torch.channels_last)
        return module.quant_conv(module.encoder(x))

    def mean(parameters):
        return parameters.chunk(2, dim=1)[0] * scale

    def attack(x, size):
        """Noise of `size` that moves the latents of `x` far: one step up from random noise."""
        start = torch.randint(0, 2, x.shape, device=device).float() * 2 - 1
        leaf = (x + size * start).requires_grad_()
        moved = (mean(moments(vae, leaf)) - mean(moments(vae, x)).detach()).square().sum()
        return size * torch.autograd.grad(moved, leaf)[0].sign()

    def step_loss(step):
        index = torch.randint(len(images), (args.batch_size,)).tolist()
        clean = pixels([images[i] for i in index], device)
        size = torch.empty(len(clean), 1, 1, 1, device=device).uniform_(4, 16) / 255
        qualities = torch.randint(15, 96, (len(clean[1::2]),)).tolist()
        # Of every four images, one stays as it is, one is softly shaded and two are compressed. One of these
        # is attacked before: its latents should be those without the attack.
        meant = clean.clone()
        meant[2::4] += soft_noise(clean[2::4], int(torch.randint(2, 17, ()))) * 16 / 255
        meant[1::2] = compressed(clean[1::2], qualities)
        seen = meant.clone()
        if args.heal:
            attacked = clean[3::4] + attack(clean[3::4], size[3::4])
            seen[3::4] = compressed(attacked.clamp(0, 1), qualities[1::2])
        with torch.no_grad():
            target = moments(teacher, meant.clamp(0, 1))
        answer = moments(vae, seen.clamp(0, 1))
        same = F.mse_loss(mean(answer), mean(target))
        loss = same + 0.01 * F.mse_loss(answer, target)
        record = {"same": same.detach().sqrt()}
        if args.gain:
            if args.attacked:
                noise = high_pass(attack(seen, size))
            else:
                noise = size * high_pass(torch.randint(0, 2, seen.shape, device=device).float() * 2 - 1)
            away = mean(moments(vae, seen + noise)) - mean(answer)
            distance = away.square().mean((1, 2, 3)).sqrt() / (size.flatten() * 255 / 16)
            loss = loss + F.relu(1 - distance / args.gain).square().mean()
            record["distance"] = distance.detach().mean()
        return {"loss": loss, **record}

    modules = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    optimizer = Muon([p for m in modules.values() for p in m.parameters()], args.lr)
    averages = {name: Average(module, 0.99) for name, module in modules.items()}
    done = train(args.name, args, modules, optimizer, step_loss, averages)
    for average in averages.values():
        average.copy_to_module()
    if done:
        shutil.copytree(folder.parent, args.work_dir / args.name, dirs_exist_ok=True)
        vae.save_pretrained(args.work_dir / args.name / "vae")


if __name__ == "__main__":
    main()
