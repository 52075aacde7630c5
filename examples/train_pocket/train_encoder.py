"""Train the pocket VAE further until its encoder answers attacks and JPEG as real encoders do:

    python examples/train_pocket/train_encoder.py

An encoder as small as the pocket world's is attacked through low frequencies, which JPEG leaves. Encoders
that were trained on photographs are moved further, and JPEG removes a part of the shift. So every step
attacks crops, by few steps of the attack that check.py measures with many, and compares the shift and what
JPEG leaves of it with theirs (`jpeg_response.LEFT`). Fine color is removed by JPEG of every quality, so that
an encoder could meet the curve with attacks of fine color. Real poisons have less of it, so the answer to it
is kept small. The decoder learns to follow. The latents of clean images stay near the first ones, because the
U-Net starts from a trained one.
"""

import copy
import shutil

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jpeg_response import EPS, LEFT, Encode, attack, left, luminance, shift
from recipe import HELD_OUT_SEEDS, TRAINING_SEEDS, Average, Muon, scenes, train, training_parser
from train_vae import crops, psnr, reconstruction_loss, set_scaling_factor

from szt_utils.images import to_vae_range

ATTACK_STEPS, STEP_SIZE = 8, 4.0  # levels
MARGIN = 0.05  # so much more is left of check.py's attack, of more steps and on whole images


def fine_color(x: torch.Tensor) -> torch.Tensor:
    """Noise like `x` (B, 3, H, W), signs of EPS levels less their luminance and their 5 x 5 blur."""
    signs = (torch.randint(0, 2, x.shape, device=x.device).float() * 2 - 1) * EPS / 255
    signs = signs - luminance(signs)[:, None]
    return signs - F.avg_pool2d(F.pad(signs, (2, 2, 2, 2), mode="reflect"), 5, 1)


def curve_loss(encode: Encode, x: torch.Tensor, step: int,
               aimed_shift: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How far crops' shift, and what JPEG leaves of it at a quality that changes with the step, are from
    their aims; the shift in standard deviations; the error of what is left."""
    quality = list(LEFT)[step % len(LEFT)]
    generators = [torch.Generator().manual_seed(step * len(x) + i) for i in range(len(x))]
    attacked = attack(encode, x, ATTACK_STEPS, STEP_SIZE, generators)
    size = shift(encode, attacked, x)
    off = left(encode, attacked, x, quality, size).mean() - (LEFT[quality] - MARGIN)
    relative = size.mean() / encode(x).std()  # larger latents are no larger shift
    return (relative / aimed_shift).log().square() + 10 * off.square(), relative.detach(), off.detach()


def main() -> None:
    parser = training_parser(__doc__, steps=400, batch_size=6, lr=1e-3)
    add = parser.add_argument
    add("--name", default="encoder", help="of the state and the model folder, in work_dir")
    add("--shift", type=float, default=1.9, help="of an attack, in standard deviations of the latents")
    add("--curve", type=float, default=1.0, help="weight of the shift and of what JPEG leaves")
    add("--color", type=float, default=1.0, help="weight of the answer to fine noise of color")
    add("--anchor", type=float, default=0.05, help="weight of the distance to the first latents")
    args = parser.parse_args()
    device, folder = torch.device(args.device), args.work_dir / "model" / "vae"
    images, _ = scenes(args.scenes, TRAINING_SEEDS, args.work_dir)
    held_out, _ = scenes(512, HELD_OUT_SEEDS, args.work_dir)
    torch.manual_seed(0)
    teacher = AutoencoderKL.from_pretrained(folder).to(device, memory_format=torch.channels_last).eval()
    vae = copy.deepcopy(teacher)
    teacher.requires_grad_(False)

    def posterior(module, x: torch.Tensor):
        return module.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist

    def step_loss(step: int) -> dict[str, torch.Tensor]:
        x, scale = crops(images, args.batch_size, device), teacher.config.scaling_factor
        own = posterior(vae, x)
        y = vae.decode(own.sample()).sample
        moved = F.mse_loss(own.mean * scale, posterior(teacher, x).mean * scale)
        curve, size, off = curve_loss(lambda image: posterior(vae, to_vae_range(image)).mean,
                                      ((x / 2 + 0.5) * 255).round() / 255, step, args.shift)
        color = F.mse_loss(posterior(vae, x + 2 * fine_color(x)).mean * scale, own.mean * scale)
        loss = reconstruction_loss(y, x) + 1e-5 * own.kl().mean() / own.mean[0].numel()
        loss = loss + args.curve * curve + args.anchor * moved + args.color * color
        return {"loss": loss, "moved": moved.detach().sqrt(), "color": color.detach().sqrt(),
                "shift": size, "off": off, "psnr": -10 * torch.log10(F.mse_loss(y, x).detach() / 4)}

    optimizer, average = Muon(vae.parameters(), args.lr), Average(vae, 0.99)
    train(args.name, args, {"vae": vae}, optimizer, step_loss, {"vae": average})
    average.copy_to_module()
    print(f"held-out reconstruction: {psnr(vae, held_out, device):.2f} dB")
    set_scaling_factor(vae, images, device)
    shutil.copytree(folder.parent, args.work_dir / args.name, dirs_exist_ok=True)
    vae.save_pretrained(args.work_dir / args.name / "vae")


if __name__ == "__main__":
    main()
