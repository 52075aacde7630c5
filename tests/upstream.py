"""Our own plain re-telling of the Diffusers example's loop, which the training script is compared with.

The whole embedding matrix is in AdamW and put back after every step, the VAE runs at every step, a DataLoader
is prepared by accelerate.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from szt_utils.captions import OBJECT_TEMPLATES


class UpstreamImages(torch.utils.data.Dataset):
    """Images of a folder with captions, as upstream's data set draws them."""

    def __init__(self, folder: Path, tokenizer, tokens: list[str], repeats: int, resolution: int):
        self.paths, self.tokenizer, self.tokens = sorted(folder.iterdir()), tokenizer, tokens
        self.repeats, self.resolution = repeats, resolution

    def __len__(self):
        return len(self.paths) * self.repeats

    def __getitem__(self, i):
        image = Image.open(self.paths[i % len(self.paths)]).convert("RGB")
        text = random.choice(OBJECT_TEMPLATES).format(" ".join(self.tokens))
        image = image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.array(image).astype(np.uint8) / 127.5 - 1.0).astype(np.float32)
        return {"pixels": torch.from_numpy(pixels).permute(2, 0, 1),
                "ids": self.tokenizer(text, padding="max_length", truncation=True,
                                      return_tensors="pt").input_ids[0]}


def upstream(model, images: Path, *, token: str = "<star>", initializer: str = "star", batch_size: int = 4,
             steps: int = 6, accumulation: int = 1, seed: int = 3, repeats: int = 2, num_vectors: int = 1,
             lr: float = 5e-2, resolution: int = 64, t_min: int = 0, mixed_precision: str = "no",
             on_step: Callable[[int], None] = lambda step: None) -> torch.Tensor:
    """The rows that upstream's loop learns, (num_vectors, D); `on_step` is called after every step."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    AcceleratorState._reset_state(True)  # a process has one; a run has its own
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, mixed_precision=mixed_precision)
    device = accelerator.device
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    set_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False).to(device, dtype)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    unet.to(device, dtype)
    tokens = [token] + [f"{token}_{i}" for i in range(1, num_vectors)]
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    text_encoder.resize_token_embeddings(len(tokenizer))
    weight = text_encoder.get_input_embeddings().weight
    weight.data[ids] = weight.data[tokenizer.encode(initializer, add_special_tokens=False)[0]].clone()
    text_encoder.requires_grad_(False)
    weight.requires_grad_(True)

    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=1e-2)
    loader = torch.utils.data.DataLoader(UpstreamImages(images, tokenizer, tokens, repeats, resolution),
                                         batch_size=batch_size, shuffle=True)
    text_encoder, optimizer, loader = accelerator.prepare(text_encoder, optimizer, loader)
    original, step = weight.data.clone(), 0
    frozen = torch.ones(len(weight), dtype=torch.bool)
    frozen[ids] = False
    text_encoder.train()
    while step < steps:
        for batch in loader:
            with accelerator.accumulate(text_encoder):
                pixels = batch["pixels"].to(dtype)
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(t_min, scheduler.config.num_train_timesteps, (len(latents),),
                                          device=device)
                states = text_encoder(batch["ids"])[0].to(dtype)
                prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample
                target = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(
                    latents, noise, timesteps)
                accelerator.backward(F.mse_loss(prediction.float(), target.float()))
                optimizer.step()
                optimizer.zero_grad()
                weight.data[frozen] = original[frozen]
            if accelerator.sync_gradients:
                step += 1
                on_step(step)
            if step >= steps:
                break
    return weight.data[ids].clone()
