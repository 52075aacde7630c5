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
    """Images of a folder with captions, as upstream's data set draws them; SDXL's has a second tokenizer."""

    def __init__(self, folder: Path, tokenizer, tokens: list[str], repeats: int, resolution: int,
                 second_tokenizer=None):
        self.paths, self.tokenizer, self.tokens = sorted(folder.iterdir()), tokenizer, tokens
        self.second_tokenizer = second_tokenizer or tokenizer
        self.repeats, self.resolution = repeats, resolution

    def __len__(self):
        return len(self.paths) * self.repeats

    def __getitem__(self, i):
        image = Image.open(self.paths[i % len(self.paths)]).convert("RGB")
        height, width = image.height, image.width
        text = random.choice(OBJECT_TEMPLATES).format(" ".join(self.tokens))
        image = image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.array(image).astype(np.uint8) / 127.5 - 1.0).astype(np.float32)
        ids = [tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
               for tokenizer in (self.tokenizer, self.second_tokenizer)]
        return {"pixels": torch.from_numpy(pixels).permute(2, 0, 1), "ids": ids[0], "ids_2": ids[1],
                "size": torch.tensor([height, width])}


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
                loss = F.mse_loss(prediction.float(), target.float())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                weight.data[frozen] = original[frozen]
            loss.detach().item()  # upstream logs it, for which the host waits
            if accelerator.sync_gradients:
                step += 1
                on_step(step)
            if step >= steps:
                break
    return weight.data[ids].clone()


def upstream_sdxl(model, images: Path, *, token: str = "<star>", initializer: str = "star",
                  batch_size: int = 4, steps: int = 6, accumulation: int = 1, seed: int = 3, repeats: int = 2,
                  num_vectors: int = 1, lr: float = 5e-2, resolution: int = 64, t_min: int = 0,
                  mixed_precision: str = "no", on_step: Callable[[int], None] = lambda step: None,
                  ) -> list[torch.Tensor]:
    """The rows that upstream's loop for SDXL learns, (num_vectors, D) of both text encoders.

    As upstream does, it holds the second text encoder in half precision when that is asked for.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, mixed_precision=mixed_precision)
    device, dtype = accelerator.device, {"no": torch.float32, "bf16": torch.bfloat16}[mixed_precision]
    set_seed(seed)
    tokenizers = [CLIPTokenizer.from_pretrained(model, subfolder=name)
                  for name in ("tokenizer", "tokenizer_2")]
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    encoders = [CLIPTextModel.from_pretrained(model, subfolder="text_encoder"),
                CLIPTextModelWithProjection.from_pretrained(model, subfolder="text_encoder_2")]
    encoders[0].float()
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=dtype).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=dtype)
    unet.requires_grad_(False)
    for network in (vae, unet, *encoders):
        network.to(device)
    tokens = [token] + [f"{token}_{i}" for i in range(1, num_vectors)]
    ids, weights = [], []
    for tokenizer in tokenizers:
        tokenizer.add_tokens(tokens)
        ids.append(tokenizer.convert_tokens_to_ids(tokens))
    for tokenizer, encoder, new in zip(tokenizers, encoders, ids, strict=True):
        encoder.resize_token_embeddings(len(tokenizer))
        weight = encoder.get_input_embeddings().weight
        weight.data[new] = weight.data[tokenizer.encode(initializer, add_special_tokens=False)[0]].clone()
        encoder.requires_grad_(False)
        weights.append(weight.requires_grad_(True))
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=1e-2)
    data = UpstreamImages(images, tokenizers[0], tokens, repeats, resolution, tokenizers[1])
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=True)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    encoders[1].to(dtype)
    originals, step = [weight.data.clone() for weight in weights], 0
    for encoder in encoders:
        encoder.train()
    while step < steps:
        for batch in loader:
            with accelerator.accumulate(*encoders):
                latents = vae.encode(batch["pixels"].to(dtype)).latent_dist.sample()
                latents = latents * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(t_min, scheduler.config.num_train_timesteps, (len(latents),),
                                          device=device)
                with accelerator.autocast():
                    first, second = (encoder(batch[key], output_hidden_states=True)
                                     for encoder, key in zip(encoders, ("ids", "ids_2"), strict=True))
                states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1).to(dtype)
                target_size = torch.tensor([[resolution, resolution]] * len(latents), device=device)
                time_ids = torch.cat([batch["size"], torch.zeros_like(target_size), target_size], dim=1)
                prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states,
                                  added_cond_kwargs={"text_embeds": second[0].to(dtype),
                                                     "time_ids": time_ids.to(dtype)}).sample
                loss = F.mse_loss(prediction.float(), noise.float())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                for weight, original, new in zip(weights, originals, ids, strict=True):
                    frozen = torch.ones(len(weight), dtype=torch.bool)
                    frozen[new] = False
                    weight.data[frozen] = original[frozen]
            loss.detach().item()
            if accelerator.sync_gradients:
                step += 1
                on_step(step)
            if step >= steps:
                break
    return [weight.data[new].clone() for weight, new in zip(weights, ids, strict=True)]
