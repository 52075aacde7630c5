"""Train the pocket world's pixel-space diffusion model, for PDMPure, on random 64-px crops of the drawn
scenes:

    python examples/train_pocket/train_pixel_diffusion.py

A UNet2DModel without attention, so that it takes images of any size. Its input are blocks of 2 x 2 pixels as
12 channels, at a quarter of the cost of pixels. Half of its timesteps are below 300, where a purifier works.
"""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from recipe import HELD_OUT_SEEDS, TRAINING_SEEDS, Average, Muon, pixels, scenes, train, training_parser
from train_vae import crops

from szt_utils.images import to_vae_range

BLOCK = 2  # pixels
CONFIG = dict(
    sample_size=64, in_channels=3 * BLOCK**2, out_channels=3 * BLOCK**2, layers_per_block=1,
    block_out_channels=(32, 64, 96), norm_num_groups=8, add_attention=False,
    down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3,
)
SCHEDULE = dict(prediction_type="v_prediction", timestep_spacing="leading", clip_sample=True)


def noised(scheduler, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of images in [-1, 1] at timesteps `t`, and the velocities to predict."""
    x = torch.nn.functional.pixel_unshuffle(x, BLOCK)
    noise = torch.randn_like(x)
    return scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)


@torch.no_grad()
def error(unet, scheduler, images, device, t: int) -> float:
    """Mean squared error of the velocity at one timestep, on whole held-out images."""
    torch.manual_seed(0)
    times = torch.full((64,), t, device=device)
    x, target = noised(scheduler, to_vae_range(pixels(images[:64], device)), times)
    return (unet(x, times).sample - target).square().mean().item()


def main() -> None:
    parser = training_parser(__doc__, steps=800, batch_size=8, lr=5e-3)
    parser.add_argument("--start_from", help="start from the network in this folder")
    args = parser.parse_args()
    device = torch.device(args.device)
    images, _ = scenes(args.scenes, TRAINING_SEEDS, args.work_dir)
    held_out, _ = scenes(512, HELD_OUT_SEEDS, args.work_dir)
    torch.manual_seed(0)
    unet = (UNet2DModel.from_pretrained(args.start_from, subfolder="unet") if args.start_from
            else UNet2DModel(**CONFIG))
    unet.to(device).train().to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(**SCHEDULE)
    average = Average(unet, 0.998)
    optimizer = Muon(unet.parameters(), args.lr)
    forward = torch.compile(unet) if args.compile else unet

    def step_loss(step):
        x = crops(images, args.batch_size, device)
        low, high = (torch.randint(end, (len(x),), device=device) for end in (300, 1000))
        t = torch.where(torch.rand(len(x), device=device) < 0.5, low, high)
        x, target = noised(scheduler, x, t)
        return {"loss": (forward(x, t).sample - target).square().mean()}

    train("pixel", args, {"unet": unet}, optimizer, step_loss, {"unet": average})
    average.copy_to_module()
    unet.eval()
    print("held-out error of the velocity:",
          {t: round(error(unet, scheduler, held_out, device, t), 4) for t in (50, 100, 200, 500, 800)})
    DDPMPipeline(unet, scheduler).save_pretrained(args.work_dir / "pixel")


if __name__ == "__main__":
    main()
