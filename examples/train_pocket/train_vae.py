"""Train the pocket AutoencoderKL on random 64-px crops of the drawn scenes:

    python examples/train_pocket/train_vae.py
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from recipe import HELD_OUT_SEEDS, TRAINING_SEEDS, Average, Muon, pixels, scenes, train, training_parser

from szt_utils.images import to_vae_range

CROP = 64  # pixels
CONFIG = dict(
    sample_size=128, latent_channels=4, norm_num_groups=8, layers_per_block=1,
    block_out_channels=(16, 32, 64, 128), down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)


def crops(images, count: int, device) -> torch.Tensor:
    """Random crops, half of them mirrored, float32 (count, 3, CROP, CROP) in [-1, 1]."""
    index = torch.randint(len(images), (count,)).tolist()
    corners = torch.randint(images.shape[1] - CROP + 1, (count, 2)).tolist()
    batch = to_vae_range(pixels([images[i, y:y + CROP, x:x + CROP]
                                 for i, (y, x) in zip(index, corners, strict=True)], device))
    return torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, batch.flip(3), batch)


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 between differences of neighboring pixels; keeps edges and textures sharp."""
    difference = a - b
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(y, x) + 0.5 * gradient_loss(y, x) + 0.5 * F.mse_loss(y, x)


@torch.no_grad()
def psnr(vae, images, device) -> float:
    x = pixels(images[:64], device)
    y = (vae.decode(vae.encode(to_vae_range(x)).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
    return (-10 * ((x - y) ** 2).mean(dim=(1, 2, 3)).log10()).mean().item()


@torch.no_grad()
def set_scaling_factor(vae, images, device) -> None:
    """Give the scaled latents of at most 1024 images a standard deviation of 1, and print the factor."""
    latents = torch.cat([vae.encode(to_vae_range(pixels(images[i:i + 64], device))).latent_dist.mean
                         for i in range(0, min(1024, len(images)), 64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    print(f"scaling factor {vae.config.scaling_factor:.4f}, "
          f"latent means {latents.mean(dim=(0, 2, 3)).tolist()}")


def main() -> None:
    parser = training_parser(__doc__, steps=2900, batch_size=8, lr=5e-3)
    parser.add_argument("--start_from", help="start from the VAE in this folder")
    args = parser.parse_args()
    device = torch.device(args.device)
    images, _ = scenes(args.scenes, TRAINING_SEEDS, args.work_dir)
    held_out, _ = scenes(512, HELD_OUT_SEEDS, args.work_dir)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.start_from) if args.start_from else AutoencoderKL(**CONFIG)
    vae.to(device).train().to(memory_format=torch.channels_last)
    average = Average(vae, 0.998)
    optimizer = Muon(vae.parameters(), args.lr)

    def reconstruct(x):
        posterior = vae.encode(x).latent_dist
        return vae.decode(posterior.sample()).sample, posterior.mean, posterior.logvar

    forward = torch.compile(reconstruct) if args.compile else reconstruct

    def step_loss(step):
        x = crops(images, args.batch_size, device).contiguous(memory_format=torch.channels_last)
        y, mean, logvar = forward(x)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return {"loss": reconstruction_loss(y, x) + 1e-5 * kl, "kl": kl,
                "psnr": -10 * torch.log10(F.mse_loss(y, x).detach() / 4)}

    done = train("vae", args, {"vae": vae}, optimizer, step_loss, {"vae": average})
    average.copy_to_module()
    vae.eval()
    print(f"held-out reconstruction: {psnr(vae, held_out, device):.2f} dB")
    if done:
        set_scaling_factor(vae, images, device)
        vae.save_pretrained(args.work_dir / "model" / "vae")


if __name__ == "__main__":
    main()
