"""Train the pocket VAE further until its encoder answers attacks and JPEG as real encoders do:

    python examples/train_pocket/train_encoder.py

An encoder as small as the pocket world's is attacked through low frequencies, which JPEG leaves. Encoders
that were trained on photographs are moved further, and JPEG heals a part of it. So every step attacks crops,
by few steps of the attack that check.py measures with many, and compares the shift and what JPEG leaves of it
with theirs (`jpeg_response.LEFT`). The decoder learns to follow. The latents of clean images stay near the
first ones, because the U-Net starts from a trained one.
"""

import copy
import shutil

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jpeg_response import LEFT, attack, left, shift
from recipe import HELD_OUT_SEEDS, TRAINING_SEEDS, Average, Muon, scenes, train, training_parser
from train_vae import crops, psnr, reconstruction_loss

from szt_utils.images import to_vae_range

ATTACK_STEPS, STEP_SIZE = 8, 4.0  # levels


def main() -> None:
    parser = training_parser(__doc__, steps=400, batch_size=6, lr=1e-3)
    add = parser.add_argument
    add("--name", default="encoder", help="of the state and the model folder, in work_dir")
    add("--shift", type=float, default=1.9, help="of an attack, in standard deviations of the latents")
    add("--curve", type=float, default=1.0, help="weight of the shift and of what JPEG leaves")
    add("--anchor", type=float, default=0.05, help="weight of the distance to the first latents")
    args = parser.parse_args()
    device, folder = torch.device(args.device), args.work_dir / "model" / "vae"
    images, _ = scenes(args.scenes, TRAINING_SEEDS, args.work_dir)
    held_out, _ = scenes(512, HELD_OUT_SEEDS, args.work_dir)
    torch.manual_seed(0)
    teacher = AutoencoderKL.from_pretrained(folder).to(device, memory_format=torch.channels_last).eval()
    vae = copy.deepcopy(teacher)
    teacher.requires_grad_(False)
    scale = teacher.config.scaling_factor  # the scaled latents have standard deviation 1

    def encode(x: torch.Tensor, vae=vae) -> torch.Tensor:
        x = to_vae_range(x).contiguous(memory_format=torch.channels_last)
        return vae.encode(x).latent_dist.mean * scale

    def response(x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss of the shift and of what JPEG leaves at a quality that changes with the step; and both."""
        quality = list(LEFT)[step % len(LEFT)]
        generators = [torch.Generator().manual_seed(step * len(x) + i) for i in range(len(x))]
        attacked = attack(encode, x, ATTACK_STEPS, STEP_SIZE, generators)
        size = shift(encode, attacked, x)
        kept = left(encode, attacked, x, quality, size).mean()
        loss = (size.mean() / args.shift).log().square() + ((kept - LEFT[quality]) / 0.1).square() * 0.1
        return loss, size.detach().mean(), kept.detach() - LEFT[quality]

    def step_loss(step: int) -> dict[str, torch.Tensor]:
        x = crops(images, args.batch_size, device)
        posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        y, error = vae.decode(posterior.sample()).sample, posterior.mean * scale
        error = F.mse_loss(error, encode(x / 2 + 0.5, teacher))
        curve, size, off = response(((x / 2 + 0.5) * 255).round() / 255, step)
        loss = reconstruction_loss(y, x) + 1e-5 * posterior.kl().mean() / x[0].numel()
        return {"loss": loss + args.curve * curve + args.anchor * error, "moved": error.detach().sqrt(),
                "shift": size, "off": off, "psnr": -10 * torch.log10(F.mse_loss(y, x).detach() / 4)}

    optimizer, average = Muon(vae.parameters(), args.lr), Average(vae, 0.99)
    train(args.name, args, {"vae": vae}, optimizer, step_loss, {"vae": average})
    average.copy_to_module()
    print(f"held-out reconstruction: {psnr(vae, held_out, device):.2f} dB")
    shutil.copytree(folder.parent, args.work_dir / args.name, dirs_exist_ok=True)
    vae.save_pretrained(args.work_dir / args.name / "vae")


if __name__ == "__main__":
    main()
