"""The models that are timed: the bundled pocket model, or the architectures of Stable Diffusion 1.5 and
SDXL with random weights, which are as fast and as large as learned ones."""

import contextlib
import json
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from szt_utils import pocket
from szt_utils.devices import best_device

DEVICE = best_device()
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_folder(size: str) -> tuple[str, int]:
    """A model's folder and its resolution: "pocket", "sd15" or "sdxl".

    The last two are made on first use, in the system's temporary folder.
    """
    if size == "pocket":
        return pocket.model_path(), 128
    folder = Path(tempfile.gettempdir()) / f"szt-benchmark-{size}"
    if not (folder / "model_index.json").exists():
        {"sd15": make_sd15, "sdxl": make_sdxl}[size](folder)
    return str(folder), {"sd15": 512, "sdxl": 1024}[size]


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


@contextlib.contextmanager
def random_weights(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """For a while, networks are made with weights of this dtype, drawn where that is fastest."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def make_sdxl(folder: Path) -> None:
    """Write an SDXL with random weights in bfloat16, in Diffusers format: 7 GB."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = big_tokenizer(folder / "vocabulary")
    ids = dict(vocab_size=len(tokenizer), bos_token_id=49_406, eos_token_id=49_407, pad_token_id=49_407)
    with random_weights(torch.bfloat16):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024,
                            down_block_types=["DownEncoderBlock2D"] * 4, scaling_factor=0.13025,
                            up_block_types=["UpDecoderBlock2D"] * 4)
        encoders = [
            CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                         num_attention_heads=12, **ids)),
            CLIPTextModelWithProjection(CLIPTextConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                projection_dim=1280, hidden_act="gelu", **ids))]
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False)
    StableDiffusionXLPipeline(vae, *encoders, tokenizer, tokenizer, unet, scheduler,
                              add_watermarker=False).save_pretrained(folder)


def make_sd15(folder: Path) -> None:
    """Write a Stable Diffusion 1.5 with random weights, in Diffusers format."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = big_tokenizer(folder / "vocabulary")
    with random_weights():
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # else the defaults
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, bos_token_id=49_406, eos_token_id=49_407, pad_token_id=49_407))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False)
    StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
                            scheduler=scheduler, safety_checker=None,
                            feature_extractor=None).save_pretrained(folder)
