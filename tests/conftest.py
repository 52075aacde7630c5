"""Fixtures and runners: tiny models with random weights for what only needs the shapes, images of the pocket
world, the real scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from szt_utils.arguments import command_line
from szt_utils.embeddings import load_embedding

ROOT = Path(__file__).parent.parent
SCRIPT = "textual_inversion_szt.py"
TOKEN = "<star>"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a model hub
# Tiny models gain nothing from threads, and a subprocess must add up in the same order for equal bits.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def run_script(name: str, *arguments, expect: int | None = 0, **environment) -> subprocess.CompletedProcess:
    """Run a script of the project in a subprocess; `expect` is the exit code to assert, None for any."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    told = f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert expect is None or done.returncode == expect, told
    return done


def two_ranks(*arguments, expect: int = 0) -> subprocess.CompletedProcess:
    """Run the training script in two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def flags(model, images, output_dir, **changes) -> list[str]:
    """The command line of a short training; None drops a flag, True gives it no value."""
    return command_line(**{
        "pretrained_model_name_or_path": model, "train_data_dir": images, "output_dir": output_dir,
        "placeholder_token": TOKEN, "initializer_token": "star", "resolution": 64, "train_batch_size": 4,
        "max_train_steps": 6, "learning_rate": 5e-2, "repeats": 2, "seed": 3, **changes})


def embedding(folder: Path, name: str = "learned_embeds.safetensors") -> torch.Tensor:
    """The rows of an embedding file of `TOKEN`."""
    token, rows = load_embedding(folder / name)
    assert token == TOKEN
    return rows


def run_here(arguments: list) -> None:
    """Run the training script in this process: the command line's main(), without its seconds of imports."""
    from accelerate.state import AcceleratorState

    import textual_inversion_szt

    AcceleratorState._reset_state(True)  # a process has one; a test has its own
    textual_inversion_szt.main([*map(str, arguments)])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Stable-Diffusion-shaped folder of random weights: 64-px images, 8x8x4 latents, pocket tokenizer."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "epsilon", "epsilon")


@pytest.fixture(scope="session")
def tiny_velocity_model(tmp_path_factory) -> Path:
    """The same with v-prediction."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "velocity", "v_prediction")


def build_tiny_model(folder: Path, prediction_type: str) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from szt_utils.pocket.vocabulary import pocket_tokenizer

    torch.manual_seed(0)
    tokenizer = pocket_tokenizer(folder / "vocabulary")
    vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=4,
                        sample_size=64,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8,
                                layers_per_block=1,
                                cross_attention_dim=32, attention_head_dim=8,
                                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                                up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"])
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
                            scheduler=scheduler,
                            safety_checker=None, feature_extractor=None).save_pretrained(folder)
    return folder


def build_tiny_sdxl(folder: Path) -> Path:
    """An SDXL-shaped folder of random weights:
    two text encoders, pooled text and time ids, 64-px images."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from szt_utils.pocket.vocabulary import pocket_tokenizer

    torch.manual_seed(0)
    tokenizer, other = (pocket_tokenizer(folder / name) for name in ("vocabulary", "vocabulary_2"))
    encoders = [cls(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2,
        projection_dim=16, num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
        for cls, width in ((CLIPTextModel, 32), (CLIPTextModelWithProjection, 24))]
    vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=4,
                        sample_size=64,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
        cross_attention_dim=56, attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"])
    # SDXL comes with this scheduler, whose way of adding noise is not Eq. 1.
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    StableDiffusionXLPipeline(vae, *encoders, tokenizer, other, unet, scheduler,
                              add_watermarker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def concept_folder(tmp_path_factory) -> tuple[Path, Path]:
    """Five images of a novel concept and their masks, 128 px."""
    from szt_utils.pocket import write_concept

    images, masks = tmp_path_factory.mktemp("star"), tmp_path_factory.mktemp("star-masks")
    write_concept("teal-striped-star", images, masks)
    return images, masks


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """The folder of `build_tiny_sdxl`."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")
