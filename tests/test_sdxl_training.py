"""Textual inversion of SDXL: upstream's result bit for bit, without its defects; files that tools load."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from conftest import TOKEN, build_tiny_sdxl, embedding, flags, run_here, two_ranks
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from upstream import upstream_sdxl

from szt_utils.embedding_files import load_embedding
from szt_utils.files import read_stats
from szt_utils.models import load_model, tokenize

WIDTHS = (32, 24)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return build_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def sdxl_pooling_the_largest(sdxl, tmp_path_factory):
    """The same with the config of the published SDXL, with which transformers pools the largest token id."""
    folder = shutil.copytree(sdxl, tmp_path_factory.mktemp("sdxl") / "legacy")
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 2}))
    return folder


def both(folder) -> list[torch.Tensor]:
    return [embedding(folder), embedding(folder, "learned_embeds_2.safetensors")]


def equal(ours, theirs) -> bool:
    assert [part.shape[1] for part in ours] == list(WIDTHS)
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- Upstream

@pytest.mark.parametrize("model", ["sdxl", "sdxl_pooling_the_largest"])
def test_with_new_flags_off_both_embeddings_are_upstreams(request, model, concept_folder, tmp_path):
    """Ten samples in batches of four: upstream's script cannot take the epoch's smaller last batch."""
    folder = request.getfixturevalue(model)
    run_here(flags(folder, concept_folder[0], tmp_path))
    assert equal(both(tmp_path), upstream_sdxl(folder, concept_folder[0]))


def test_with_accumulation_vectors_a_higher_t_min_and_no_cache_too(sdxl, concept_folder, tmp_path):
    run_here(flags(sdxl, concept_folder[0], tmp_path, train_batch_size=3, num_vectors=2, t_min=500,
                   gradient_accumulation_steps=2, no_cache_latents=True))
    expected = upstream_sdxl(sdxl, concept_folder[0], batch_size=3, accumulation=2, num_vectors=2, t_min=500)
    assert equal(both(tmp_path), expected)


def test_images_of_other_shapes_are_squashed_and_the_network_is_told_their_sizes(sdxl, tmp_path):
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(96, 64), (64, 200)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    run_here(flags(sdxl, tmp_path / "images", tmp_path / "out", repeats=4))
    ours = both(tmp_path / "out")
    assert equal(ours, upstream_sdxl(sdxl, tmp_path / "images", repeats=4))
    # Upstream's --center_crop crops nothing; ours does, and tells the network where, unless asked not to.
    others = []
    for conditioning in ("crop", "upstream"):
        run_here(flags(sdxl, tmp_path / "images", tmp_path / conditioning, repeats=4, center_crop=True,
                       micro_conditioning=conditioning))
        others.append(both(tmp_path / conditioning))
    assert not equal(others[0], ours) and not equal(others[1], ours) and not equal(*others)


# --- Its defects

@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rows_of_both_encoders_are_trained_in_float32(sdxl, concept_folder, tmp_path, precision):
    """A step of 1e-5 would vanish in the spacing of bfloat16 at these values; fp16 needs no gradient scaler's
    blessing of half-precision parameters."""
    run_here(flags(sdxl, concept_folder[0], tmp_path, mixed_precision=precision, learning_rate=1e-6,
                   max_train_steps=1, gradient_checkpointing=True))
    model = load_model(str(sdxl))
    for rows, encoder, tokenizer in zip(both(tmp_path), model.text_encoders, model.tokenizers, strict=True):
        start = encoder.get_input_embeddings().weight[tokenizer.encode("star", add_special_tokens=False)[0]]
        moved = (rows[0] - start).abs()
        assert rows.dtype == torch.float32 and 0 < moved.max() < 2e-6
        assert (moved > 0).float().mean() > 0.5


def test_gradient_checkpointing_reaches_the_unet(sdxl, concept_folder, tmp_path, monkeypatch):
    from diffusers import UNet2DConditionModel

    called = []
    monkeypatch.setattr(UNet2DConditionModel, "enable_gradient_checkpointing",
                        lambda self: called.append(self))
    run_here(flags(sdxl, concept_folder[0], tmp_path, gradient_checkpointing=True, max_train_steps=1))
    assert len(called) == 1


@pytest.mark.skipif(not find_spec("torchao"), reason="needs pip install szt-utils[quantize]")
def test_a_quantized_network_trains_on_nearly_the_same_loss(sdxl, concept_folder, tmp_path):
    losses = []
    for name, quantize in (("whole", None), ("8bit", "8bit")):
        run_here(flags(sdxl, concept_folder[0], tmp_path / name, quantize=quantize, max_train_steps=3,
                       gradient_checkpointing=True))
        losses.append([record["loss"] for record in read_stats(tmp_path / name / "stats.jsonl")])
        assert all(rows.isfinite().all() and rows.dtype == torch.float32 for rows in both(tmp_path / name))
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)


# --- All that Stable Diffusion has

def test_the_whole_defence_with_masks_vectors_and_validation(sdxl, concept_folder, tmp_path, capsys):
    images, masks = concept_folder
    run_here(flags(sdxl, images, tmp_path, szt=True, loss_mask_dir=masks, num_vectors=2, max_train_steps=2,
                   save_steps=1, validation_prompt=f"a {TOKEN}", validation_steps=2, num_validation_images=1,
                   use_8bit_adam=True))
    printed = capsys.readouterr().out
    for line in ("timesteps 500 to 999", "5 masks, mode loss, dilated by 2 px", "pooled token: upstream",
                 "--use_8bit_adam is ignored"):
        assert line in printed
    assert {"learned_embeds-steps-1.safetensors", "learned_embeds_2-steps-1.safetensors",
            "learned_embeds.safetensors", "learned_embeds_2.safetensors", "star.safetensors"} <= {
        path.name for path in tmp_path.iterdir()}
    assert Image.open(tmp_path / "validation" / "step-00002-0.png").size == (64, 64)
    assert "loss_outside" in read_stats(tmp_path / "stats.jsonl")[0]


def test_resume_is_exact_and_checkpoints_are_small(sdxl, concept_folder, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_here(flags(sdxl, concept_folder[0], whole, checkpointing_steps=3))
    run_here(flags(sdxl, concept_folder[0], halves, checkpointing_steps=3, max_train_steps=3))
    run_here(flags(sdxl, concept_folder[0], halves, resume_from_checkpoint="latest"))
    assert equal(both(halves), both(whole))
    assert sum(path.stat().st_size for path in (whole / "checkpoint-6").iterdir()) < 60_000


def test_concepts_share_batches_and_end_where_they_would_alone(sdxl, concept_folder, tmp_path):
    entries = [{"placeholder_token": TOKEN, "initializer_token": "star"},
               {"placeholder_token": "<ring>", "initializer_token": "ring", "seed": 8, "szt": True,
                "loss_mask_dir": str(concept_folder[1])}]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    run_here(flags(sdxl, concept_folder[0], tmp_path / "together", placeholder_token=None,
                   initializer_token=None, concepts=tmp_path / "concepts.json"))
    for entry, name in zip(entries, ("star", "ring"), strict=True):
        run_here(flags(sdxl, concept_folder[0], tmp_path / name, **entry))
        for file in ("learned_embeds", "learned_embeds_2"):
            ours, theirs = (load_embedding(folder / f"{file}.safetensors")[1]
                            for folder in (tmp_path / "together" / name, tmp_path / name))
            assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_two_ranks_train_both_embeddings(sdxl, concept_folder, tmp_path):
    """A test of `Run.step` in test_textual_inversion_szt says that they average gradients."""
    two_ranks(*flags(sdxl, concept_folder[0], tmp_path, max_train_steps=2, train_batch_size=2))
    assert all(rows.isfinite().all() for rows in both(tmp_path))


# --- Files

@pytest.fixture(scope="module")
def learned(sdxl, concept_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    run_here(flags(sdxl, concept_folder[0], folder, num_vectors=2, max_train_steps=2))
    return folder


def test_the_pipeline_loads_both_files_in_two_calls(sdxl, learned):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    for rows, (encoder, tokenizer) in zip(both(learned), (
            (pipeline.text_encoder, pipeline.tokenizer), (pipeline.text_encoder_2, pipeline.tokenizer_2)),
            strict=True):
        pipeline.load_textual_inversion(rows, token=TOKEN, text_encoder=encoder, tokenizer=tokenizer)
        assert torch.equal(encoder.get_input_embeddings().weight[-2:].detach(), rows)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(f"a {TOKEN}", num_inference_steps=1, height=64, width=64).images[0]
    assert image.size == (64, 64)


def test_the_named_file_is_one_that_other_tools_load(learned):
    """A1111 and kohya read the keys clip_l and clip_g; ComfyUI looks for each encoder's key and takes it when
    its width is right."""
    content = load_file(learned / "star.safetensors")
    shapes = {name: tuple(part.shape) for name, part in content.items()}
    assert shapes == {"clip_l": (2, 32), "clip_g": (2, 24)}
    for ours, part in zip(both(learned), (content["clip_l"], content["clip_g"]), strict=True):
        assert torch.equal(ours, part)
    with safe_open(learned / "star.safetensors", "pt") as file:
        assert file.metadata()["pooled_token"] == "upstream" and file.metadata()["t_min"] == "0"


# --- The pooled token

def test_the_end_of_the_text_is_pooled_when_asked_for(sdxl_pooling_the_largest, concept_folder, tmp_path):
    """With the published config transformers pools an added token, which only saw the words before it."""
    model = load_model(str(sdxl_pooling_the_largest))
    model.tokenizers[1].add_tokens([TOKEN])
    model.tokenizers[0].add_tokens([TOKEN])
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        encoder.resize_token_embeddings(len(tokenizer))
    pooled = {}
    with torch.no_grad():
        for name in ("upstream", "end"):
            model.pooled_token = name
            pooled[name] = [model.condition(tokenize(model, f"a {TOKEN} on {place}"))["pooled"]
                            for place in ("grass", "sand")]
    assert torch.allclose(*pooled["upstream"], atol=1e-6), "the placeholder sees nothing of what follows it"
    assert not torch.allclose(*pooled["end"], atol=1e-4)
    folders = [tmp_path / name for name in ("upstream", "end")]
    for folder in folders:
        run_here(flags(sdxl_pooling_the_largest, concept_folder[0], folder, pooled_token=folder.name))
    assert not torch.allclose(both(folders[0])[1], both(folders[1])[1], atol=1e-4)
    with safe_open(folders[1] / "learned_embeds_2.safetensors", "pt") as file:
        assert file.metadata()["pooled_token"] == "end"


def test_both_pool_the_same_where_the_config_names_the_end_token(sdxl):
    model = load_model(str(sdxl))
    with torch.no_grad():
        plain = model.condition(tokenize(model, ["a star", "a photo of a ring on grass"]))
        model.pooled_token = "end"
        assert torch.allclose(plain["pooled"], model.condition(tokenize(
            model, ["a star", "a photo of a ring on grass"]))["pooled"], atol=1e-6)
