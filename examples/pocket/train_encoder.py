"""Give the pocket VAE's encoder the weakness of Stable Diffusion's:
python examples/pocket/train_encoder.py

JPEG heals poisoned pictures because it removes the high frequencies that the poison works with. An encoder as
small as the pocket world's, left alone, is attacked through low frequencies instead. So a copy of it is
trained to give the same latents as before, of pictures as they are, compressed or softly shaded, and latents
at a distance where high-frequency noise was added. Decoder, U-Net and scaling factor stay as they are.
`--gain 0` only copies, `--layers_per_block` and `--channels` into another architecture: what depth and width
do alone.
"""

import copy
import shutil

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from recipe import TRAINING_SEEDS, Average, Muon, parser, pixels, scenes, train

from szt_utils.images import to_vae_range
from szt_utils.jpeg import jpeg_tensor


def high_pass(noise: torch.Tensor) -> torch.Tensor:
    """What a 5 x 5 blur takes away."""
    return noise - F.avg_pool2d(F.pad(noise, (2, 2, 2, 2), mode="reflect"), 5, 1)


def soft_noise(x: torch.Tensor, cells: int) -> torch.Tensor:
    """Noise in [-1, 1] like `x`, smooth, with `cells` bumps across."""
    grid = torch.rand(*x.shape[:2], cells, cells, device=x.device) * 2 - 1
    return F.interpolate(grid, x.shape[-2:], mode="bicubic").clamp(-1, 1)


def altered(x: torch.Tensor) -> torch.Tensor:
    """Of every four pictures two as they are, one compressed, one softly shaded:
    what the latents must follow as before."""
    x = x.clone()
    qualities = torch.randint(15, 96, (len(x[2::4]),)).tolist()
    x[2::4] = torch.cat([jpeg_tensor(picture[None], quality)
                         for picture, quality in zip(x[2::4].cpu(), qualities, strict=True)]).to(x)
    x[3::4] += soft_noise(x[3::4], int(torch.randint(2, 17, ()))) * 16 / 255
    return x.clamp(0, 1)


def main():
    arguments = parser(__doc__, steps=800, batch_size=4, lr=1e-3)
    arguments.add_argument("--gain", type=float, default=0.3,
                           help="how far high-passed noise of 16 levels must move the scaled latents")
    arguments.add_argument("--name", default="encoder", help="of the state and the model folder, in work_dir")
    arguments.add_argument("--attacked", action="store_true",
                           help="the noise follows the encoder's gradient, not a coin")
    arguments.add_argument("--layers_per_block", type=int, help="train another architecture from scratch")
    arguments.add_argument("--channels", type=int, nargs=4)
    arguments = arguments.parse_args()
    device = torch.device(arguments.device)
    pictures, _ = scenes(arguments.scenes, TRAINING_SEEDS, arguments.work_dir)
    folder = arguments.work_dir / "model" / "vae"
    teacher = AutoencoderKL.from_pretrained(folder).to(device).eval().requires_grad_(False)
    torch.manual_seed(0)
    if arguments.layers_per_block or arguments.channels:
        config = {**teacher.config, "layers_per_block": arguments.layers_per_block or 1,
                  "block_out_channels": arguments.channels or teacher.config.block_out_channels}
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

    def noise_for(x, size):
        noise = high_pass(torch.randint(0, 2, x.shape, device=device).float() * 2 - 1)
        if arguments.attacked:
            leaf = (x + size * noise).requires_grad_()
            moved = (mean(moments(vae, leaf)) - mean(moments(vae, x)).detach()).square().sum()
            noise = high_pass(torch.autograd.grad(moved, leaf)[0].sign())
        return size * noise.clamp(-1, 1)

    def step_loss(step):
        index = torch.randint(len(pictures), (arguments.batch_size,)).tolist()
        x = altered(pixels([pictures[i] for i in index], device))
        with torch.no_grad():
            target = moments(teacher, x)
        answer = moments(vae, x)
        same = F.mse_loss(mean(answer), mean(target))
        loss = same + 0.01 * F.mse_loss(answer, target)
        record = {"same": same.detach().sqrt()}
        if arguments.gain:
            size = torch.empty(len(x), 1, 1, 1, device=device).uniform_(4, 16) / 255
            away = mean(moments(vae, x + noise_for(x, size))) - mean(answer)
            distance = away.square().mean((1, 2, 3)).sqrt() / (size.flatten() * 255 / 16)
            loss = loss + F.relu(1 - distance / arguments.gain).square().mean()
            record["distance"] = distance.detach().mean()
        return {"loss": loss, **record}

    modules = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    optimizer = Muon([p for m in modules.values() for p in m.parameters()], arguments.lr)
    averages = {name: Average(module, 0.99) for name, module in modules.items()}
    done = train(arguments.name, arguments, modules, optimizer, step_loss, averages)
    for average in averages.values():
        average.copy_to_module()
    if done:
        shutil.copytree(folder.parent, arguments.work_dir / arguments.name, dirs_exist_ok=True)
        vae.save_pretrained(arguments.work_dir / arguments.name / "vae")


if __name__ == "__main__":
    main()
