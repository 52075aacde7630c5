"""Train the pocket U-Net and text encoder together on the cached latents:
python examples/pocket/train_diffusion.py

Needs the VAE of train_vae.py in `work_dir/model/vae`; writes the whole model, in Diffusers format,
to `work_dir/model`.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from recipe import TRAINING_SEEDS, Average, Muon, parser, pixels, scenes, train
from transformers import CLIPTextConfig, CLIPTextModel

from szt_utils.diffusion import denoising_loss
from szt_utils.images import to_vae_range
from szt_utils.pocket.vocabulary import pocket_tokenizer, training_caption

SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                steps_offset=1, clip_sample=False)


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(80, 160),
        norm_num_groups=16, cross_attention_dim=128,
        attention_head_dim=5,  # Diffusers takes this for the number of heads
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"])


def new_text_encoder(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


@torch.no_grad()
def cached_latents(vae, pictures, path: Path, device) -> torch.Tensor:
    """Scaled posterior means of the pictures, every second one mirrored,
    float16 (N, 4, 16, 16); encoded once."""
    if not path.exists():
        batches = []
        for start in range(0, len(pictures), 100):
            x = to_vae_range(pixels(pictures[start:start + 100], device))
            x[1::2] = x[1::2].flip(3)
            batches.append((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half().cpu())
            print(f"encoded {start + len(x)} of {len(pictures)}", end="\r", flush=True)
        torch.save(torch.cat(batches), path)
    return torch.load(path, weights_only=True)


def main():
    arguments = parser(__doc__, steps=3000, batch_size=32, lr=3e-3)
    arguments.add_argument("--start_from",
                           help="start at this model's U-Net and text encoder, not anew; use its VAE")
    arguments = arguments.parse_args()
    device = torch.device(arguments.device)
    pictures, attributes = scenes(arguments.scenes, TRAINING_SEEDS, arguments.work_dir)
    model_dir = arguments.work_dir / "model"
    vae = AutoencoderKL.from_pretrained(arguments.start_from or model_dir, subfolder="vae").to(device)
    latents = cached_latents(vae, pictures, arguments.work_dir / f"latents-{arguments.scenes}.pt", device)
    tokenizer = pocket_tokenizer(model_dir / "tokenizer")
    scheduler = DDPMScheduler(**SCHEDULE)

    torch.manual_seed(0)
    unet = new_unet().to(device, memory_format=torch.channels_last)
    text_encoder = new_text_encoder(tokenizer).to(device)
    modules = {"unet": unet, "text_encoder": text_encoder}
    if arguments.start_from:
        for name, module in modules.items():
            module.load_state_dict(
                type(module).from_pretrained(arguments.start_from, subfolder=name).state_dict())
    tables = [p for name, p in text_encoder.named_parameters() if "embedding" in name]
    others = [p for m in modules.values() for p in m.parameters() if not any(p is table for table in tables)]
    optimizer = Muon([{"params": others}, {"params": tables, "adam": True}], arguments.lr)
    averages = {name: Average(module, 0.998) for name, module in modules.items()}
    if arguments.compile:
        unet.compile()

    def step_loss(step):
        rng = np.random.default_rng([step, 1])
        index = rng.integers(len(latents), size=arguments.batch_size)
        captions = [training_caption(attributes[i], rng) for i in index]
        ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)
        z0 = latents[index].to(device).float().contiguous(memory_format=torch.channels_last)
        # Stratified over the batch, and tilted towards high timesteps: shape and layout are decided there.
        u = (torch.arange(len(z0), device=device) + torch.rand(len(z0), device=device)) / len(z0)
        timesteps = (u**0.75 * 1000).long().clamp(max=999)
        error = denoising_loss(unet, scheduler, z0, torch.randn_like(z0), timesteps, text_encoder(ids)[0])
        # Half way between the losses of noise (weight 1) and velocity (1 / alpha_bar):
        # for outlines, not only texture.
        weight = scheduler.alphas_cumprod.to(device)[timesteps].rsqrt().view(-1, 1, 1, 1)
        return {"loss": (weight * error).mean(), "unweighted": error.mean().detach(),
                "high_t": error[timesteps >= 500].mean().detach()}

    train("diffusion", arguments, modules, optimizer, step_loss, averages)
    for average in averages.values():
        average.copy_to_module()
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, safety_checker=None,
        feature_extractor=None, scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False))
    pipeline.save_pretrained(model_dir)
    pocket_tokenizer(model_dir / "tokenizer")  # vocab.json and merges.txt, for readers of older transformers


if __name__ == "__main__":
    main()
