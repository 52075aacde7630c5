"""Train the pocket world's diffusion model of pixels, the purifier of PDMPure there, on random 64-px crops
of the drawn scenes: python examples/pocket/train_pixel_diffusion.py

A UNet2DModel without attention, so that it serves pictures of any size. It sees blocks of 2 x 2 pixels as 12
channels: the same pixels at a quarter of the cost. Half of its timesteps are drawn below 300, where a
purifier works.
"""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from recipe import HELD_OUT_SEEDS, TRAINING_SEEDS, Average, Muon, parser, pixels, scenes, train
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
    """Blocks of pictures in [-1, 1] at timesteps `t`, and the velocities to predict."""
    x = torch.nn.functional.pixel_unshuffle(x, BLOCK)
    noise = torch.randn_like(x)
    return scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)


@torch.no_grad()
def error(unet, scheduler, pictures, device, t: int) -> float:
    """Mean squared error of the velocity at one timestep, on whole held-out pictures."""
    torch.manual_seed(0)
    times = torch.full((64,), t, device=device)
    x, target = noised(scheduler, to_vae_range(pixels(pictures[:64], device)), times)
    return (unet(x, times).sample - target).square().mean().item()


def main():
    arguments = parser(__doc__, steps=800, batch_size=8, lr=5e-3).parse_args()
    device = torch.device(arguments.device)
    pictures, _ = scenes(arguments.scenes, TRAINING_SEEDS, arguments.work_dir)
    held_out, _ = scenes(512, HELD_OUT_SEEDS, arguments.work_dir)
    torch.manual_seed(0)
    unet = UNet2DModel(**CONFIG).to(device).to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(**SCHEDULE)
    average = Average(unet, 0.998)
    optimizer = Muon(unet.parameters(), arguments.lr)
    forward = torch.compile(unet) if arguments.compile else unet

    def step_loss(step):
        x = crops(pictures, arguments.batch_size, device)
        low, high = (torch.randint(end, (len(x),), device=device) for end in (300, 1000))
        t = torch.where(torch.rand(len(x), device=device) < 0.5, low, high)
        x, target = noised(scheduler, x, t)
        return {"loss": (forward(x, t).sample - target).square().mean()}

    train("pixel", arguments, {"unet": unet}, optimizer, step_loss, {"unet": average})
    average.copy_to_module()
    unet.eval()
    print("held-out error of the velocity:",
          {t: round(error(unet, scheduler, held_out, device, t), 4) for t in (50, 100, 200, 500, 800)})
    DDPMPipeline(unet, scheduler).save_pretrained(arguments.work_dir / "pixel")


if __name__ == "__main__":
    main()
