"""Safe-Zone Training in a training loop of your own: a LoRA of a Stable Diffusion U-Net, by peft.

    python examples/szt_in_your_loop.py --image_dir images --mask_dir masks --prompt "a photo of a teal star"

The lines that end in `# SZT` are all that Safe-Zone Training changes in the loop; without --szt they do what
any loop does. The model is the bundled pocket model. The result, `pytorch_lora_weights.safetensors` in
--output_dir, is for `pipe.load_lora_weights`. Needs peft: pip install peft.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from szt_utils import pocket
from szt_utils.arguments import number, script_parser, seed, user_path
from szt_utils.errors import exit_on_input_error
from szt_utils.images import list_images, read_image
from szt_utils.masks import find_masks, read_mask
from szt_utils.safe_zone import SafeZone

try:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
except ImportError:
    raise SystemExit("This example needs peft: pip install peft") from None


class Images(Dataset):
    """The images of a folder and their masks, cropped and flipped at random."""

    def __init__(self, image_dir: str, mask_dir: str, resolution: int, zone: SafeZone):
        self.paths, self.zone = list_images(image_dir), zone
        self.mask_paths = find_masks(mask_dir, self.paths)
        self.transform = v2.Compose([v2.Resize(round(resolution * 1.125)), v2.RandomCrop(resolution),
                                     v2.RandomHorizontalFlip()])
        self.to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                                     v2.Normalize([0.5], [0.5])])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        image = read_image(self.paths[i])
        mask = read_mask(self.mask_paths[i], image.size)
        image, mask = self.zone.transform(self.transform, image, mask)                              # SZT
        return {"pixels": self.to_tensor(image), "mask": mask}


def load(path: str) -> tuple:
    """The parts of a Stable Diffusion model, frozen, and its U-Net with a LoRA to train."""
    tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian",
                                target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    return tokenizer, text_encoder, vae, unet, DDPMScheduler.from_pretrained(path, subfolder="scheduler")


def train(image_dir: str, mask_dir: str, output_dir: str, prompt: str, resolution: int, batch_size: int,
          steps: int, learning_rate: float, szt: bool) -> None:
    """Train the LoRA and save it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, text_encoder, vae, unet, scheduler = load(pocket.model_path())
    zone = SafeZone.paper(resolution, scheduler) if szt else SafeZone(mask_mode="none")             # SZT
    for part in (text_encoder, vae, unet):
        part.to(device)
    loader = DataLoader(Images(image_dir, mask_dir, resolution, zone), batch_size, shuffle=True)
    optimizer = torch.optim.AdamW([each for each in unet.parameters() if each.requires_grad], learning_rate)
    ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = text_encoder(ids.to(device))[0]

    with tqdm(total=steps) as progress:
        while progress.n < steps:
            for batch in loader:
                latents = vae.encode(batch["pixels"].to(device)).latent_dist.sample()
                latents, noise = latents * vae.config.scaling_factor, torch.randn_like(latents)
                timesteps = zone.timesteps(scheduler, len(latents), device=device)                  # SZT
                noised = scheduler.add_noise(latents, noise, timesteps)
                prediction = unet(noised, timesteps, states.expand(len(latents), -1, -1)).sample
                loss = zone.loss(prediction, noise, batch["mask"])                                  # SZT
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                progress.update()
                progress.set_postfix(loss=loss.item())
                if progress.n == steps:
                    break
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(output_dir, weights)
    print(f"Saved {Path(output_dir) / 'pytorch_lora_weights.safetensors'}.")


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--image_dir", required=True, type=user_path, help="folder of the training images")
    add("--mask_dir", required=True, type=user_path, help="folder of their masks, white = the concept")
    add("--output_dir", default="lora", type=user_path, help="where the LoRA goes (lora)")
    add("--prompt", required=True, help="what the images show")
    add("--resolution", type=number(int, 8), default=128, help="side of the training images in pixels (128)")
    add("--batch_size", type=number(int, 1), default=4, help="images per step (4)")
    add("--steps", type=number(int, 1), default=400, help="number of training steps (400)")
    add("--learning_rate", type=number(float, 0), default=1e-3, help="learning rate of AdamW (0.001)")
    add("--seed", type=seed, default=0, help="seed of all random draws (0)")
    add("--szt", action="store_true", help="Safe-Zone Training, with the paper's settings")
    args = vars(parser.parse_args(argv))
    torch.manual_seed(args.pop("seed"))
    with exit_on_input_error():
        train(**args)


if __name__ == "__main__":
    main()
