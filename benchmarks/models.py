"""The models that are timed: the bundled pocket model, or Stable Diffusion 1.5's architecture with random
weights, which is as fast as with learned ones."""

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import torch

from szt_utils import pocket
from szt_utils.devices import best_device

DEVICE = best_device()
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_folder(size: str) -> tuple[str, int]:
    """A model's folder and its resolution; "sd15" is made on first use, in the system's temporary folder."""
    if size == "pocket":
        return pocket.model_path(), 128
    folder = Path(tempfile.gettempdir()) / "szt-benchmark-sd15"
    if not (folder / "model_index.json").exists():
        make_sd15(folder)
    return str(folder), 512


def big_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer with the 49,408 tokens of Stable Diffusion's: single characters and fillers."""
    from transformers import CLIPTokenizer

    tokens = [c + end for c in string.ascii_lowercase + string.digits + string.punctuation
              for end in ("", "</w>")]
    merges = [("o", "b"), ("ob", "j"), ("obj", "e"), ("obje", "c"), ("objec", "t</w>")]
    tokens += [a + b for a, b in merges]
    tokens += [f"filling{i}</w>" for i in range(49_406 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def make_sd15(folder: Path) -> None:
    """Write a Stable Diffusion 1.5 with random weights, in Diffusers format."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = big_tokenizer(folder / "vocabulary")
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # Diffusers' defaults are SD 1.5's
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, bos_token_id=49_406, eos_token_id=49_407, pad_token_id=49_407))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False)
    StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
                            scheduler=scheduler, safety_checker=None,
                            feature_extractor=None).save_pretrained(folder)
