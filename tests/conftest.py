"""Fixtures and runners: tiny models with random weights for what only needs the shapes, images of the pocket
world, the real scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from szt_utils.arguments import command_line
from szt_utils.embedding_files import load_embedding

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


def white_masks(image_dir: Path, mask_dir: Path) -> Path:
    """A new folder of white masks of the images of another one."""
    mask_dir.mkdir()
    for path in image_dir.iterdir():
        Image.new("L", Image.open(path).size, 255).save(mask_dir / f"{path.stem}.png")
    return mask_dir


def pipeline_with(model, embedding):
    """The `load_pipeline` of a model, with an embedding."""
    from szt_utils.embeddings import load_into
    from szt_utils.generation import load_pipeline

    pipeline = load_pipeline(model)
    load_into(pipeline, embedding)
    return pipeline


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


def _tiny_t5(width: int):
    """A T5 encoder of random weights, and a tokenizer of the pocket world's words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    from szt_utils.pocket.vocabulary import words

    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words()),
              *(chr(code) for code in range(33, 127))]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i > 2) - (len(piece) == 1))
                                          for i, piece in enumerate(dict.fromkeys(pieces))], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer.get_vocab()), d_model=width, d_kv=8, d_ff=64,
                                      num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))
    return tokenizer, encoder, T5TokenizerFast


def _tiny_flow_parts(folder: Path, encoder_classes: list, t5_width: int | None) -> dict:
    """What both flow models share: a VAE, the CLIP encoders of widths 32 and 24, T5, and tokenizers."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from tokenizers import Tokenizer
    from transformers import CLIPTextConfig

    from szt_utils.pocket.vocabulary import pocket_tokenizer

    torch.manual_seed(0)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=16, sample_size=64,
        scaling_factor=0.5, shift_factor=0.25, use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)}
    for i, cls in enumerate(encoder_classes):
        suffix, tokenizer = f"_{i + 1}" if i else "", pocket_tokenizer(folder / "vocabulary")
        parts[f"tokenizer{suffix}"] = tokenizer
        parts[f"text_encoder{suffix}"] = cls(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=(32, 24)[i], intermediate_size=64, num_hidden_layers=3,
            projection_dim=16, num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id))
    suffix = f"_{len(encoder_classes) + 1}"
    parts |= {f"tokenizer{suffix}": None, f"text_encoder{suffix}": None}
    if t5_width:
        tokenizer, parts[f"text_encoder{suffix}"], cls = _tiny_t5(t5_width)
        assert isinstance(tokenizer, Tokenizer)
        (folder / "t5").mkdir(parents=True)
        tokenizer.save(str(folder / "t5" / "tokenizer.json"))
        parts[f"tokenizer{suffix}"] = cls.from_pretrained(
            folder / "t5", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=0,
            model_max_length=512)
    return parts


def build_tiny_sd3(folder: Path, t5: bool = True) -> Path:
    """An SD3-shaped folder of random weights: 64-px images, 8x8x16 latents, two CLIP encoders, T5 or none."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    parts = _tiny_flow_parts(folder, [CLIPTextModelWithProjection] * 2, 64 if t5 else None)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=32,
        pos_embed_max_size=16)
    StableDiffusion3Pipeline(transformer=transformer, **parts).save_pretrained(folder)
    return folder


def build_tiny_flux(folder: Path, guidance_embeds: bool = True) -> Path:
    """A FLUX-shaped folder of random weights, with 8x8x16 latents at 64 px; distilled like FLUX.1-dev, or not
    like FLUX.1-schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    parts = _tiny_flow_parts(folder, [CLIPTextModel], 48)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, pooled_projection_dim=32,
        guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6))
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    FluxPipeline(transformer=transformer, **parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory) -> Path:
    """The folder of `build_tiny_sd3`."""
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory) -> Path:
    """The folder of `build_tiny_flux`."""
    return build_tiny_flux(tmp_path_factory.mktemp("tiny") / "flux")
