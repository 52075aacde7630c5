"""Stable Diffusion 3 and FLUX: the loss of Diffusers' training examples, sampling as their pipelines do it,
and the real scripts on tiny models."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    TOKEN,
    build_tiny_flux,
    build_tiny_sd3,
    embedding,
    flags,
    pipeline_with,
    run_here,
    two_ranks,
)
from diffusers import AutoencoderKL, AutoPipelineForImage2Image, FluxPipeline, SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from szt_utils import pocket
from szt_utils.captions import STYLE_TEMPLATES
from szt_utils.embeddings import add_embedding, add_placeholder
from szt_utils.errors import InputError
from szt_utils.generation import generate, load_pipeline
from szt_utils.image_rng import image_generator
from szt_utils.models import load_model, residual, tokenize
from szt_utils.models.flow import T5
from szt_utils.models.flux import pack, unpack
from szt_utils.poisons import POISONS, Victim, image_gradient, image_to_image, target_pattern
from szt_utils.safe_zone import PAPER_LOG_SNR, SafeZone
from szt_utils.sensitivity import (
    cross_attention_maps,
    draw_replacements,
    prompt_conditions,
    semantic_sensitivity,
    tokenize_words,
)
from szt_utils.square_images import check_size
from szt_utils.training_run import Run

PROMPT = "a photo of a star"


@pytest.fixture(scope="module")
def folders(tiny_sd3, tiny_flux, tmp_path_factory):
    """Stable Diffusion 3 with and without T5, FLUX distilled and not."""
    folder = tmp_path_factory.mktemp("flow")
    return {"sd3": tiny_sd3, "sd3-without-t5": build_tiny_sd3(folder / "sd3", t5=False), "flux": tiny_flux,
            "schnell": build_tiny_flux(folder / "schnell", guidance_embeds=False)}


@pytest.fixture(params=["sd3", "sd3-without-t5", "flux", "schnell"])
def name(request):
    return request.param


@pytest.fixture
def folder(folders, name):
    return str(folders[name])


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(count=1, side=64):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(5)) / 255


# --- Timesteps

def test_the_papers_timesteps_begin_at_a_noise_share_of_0_618(folder):
    model = load_model(folder)
    t_min = SafeZone.paper(512, model).t_min
    sigma, before = model.sigmas(torch.tensor([t_min, t_min - 1])).tolist()
    assert sigma == pytest.approx(0.61804, abs=1e-3) and before == pytest.approx(sigma - 1e-3)
    log_snr, too_early = model.log_snr(torch.tensor([t_min, t_min - 1])).tolist()
    assert log_snr <= PAPER_LOG_SNR < too_early
    assert log_snr == pytest.approx(2 * np.log((1 - sigma) / sigma))
    lines = SafeZone.paper(512, model).describe(model, None)
    assert "timesteps 618 to 999 (uniform): noise level 0.85" in lines[1] and "to -inf" in lines[1]


# --- The loss of the training examples of Diffusers, written from their modules

def ids_of(tokenizer, prompts, length):
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True,
                     return_tensors="pt").input_ids


def sd3_example_loss(model, latents, noise, sigmas, prompts, precondition_outputs):
    """Per element, (prediction - target)^2 of the loop for SD3; the prediction is of the latents when its
    outputs are preconditioned."""
    tokenizers = [*model.tokenizers, *([model.t5.tokenizer] if model.t5 else [])]
    clip = [encoder(ids_of(tokenizer, prompts, 24), output_hidden_states=True)
            for encoder, tokenizer in zip(model.text_encoders, tokenizers[:2], strict=True)]
    states = torch.cat([output.hidden_states[-2] for output in clip], dim=-1)
    t5 = torch.zeros(len(prompts), 256, 64)
    if model.t5:
        t5 = model.t5.encoder(ids_of(tokenizers[2], prompts, 256))[0]
    states = torch.cat([torch.nn.functional.pad(states, (0, 64 - states.shape[-1])), t5], dim=-2)
    sigmas = sigmas.view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    prediction = model.network(hidden_states=noisy, timestep=sigmas.flatten() * 1000,
                               encoder_hidden_states=states,
                               pooled_projections=torch.cat([output[0] for output in clip], dim=-1),
                               return_dict=False)[0]
    if precondition_outputs:
        return (prediction * (-sigmas) + noisy - latents) ** 2
    return (prediction - (noise - latents)) ** 2


def flux_example_loss(model, latents, noise, sigmas, prompts, guidance=3.5):
    """Per element, (prediction - target)^2 of the loop for FLUX, with the pipeline's packing."""
    count, channels, height, width = latents.shape
    states = model.t5.encoder(ids_of(model.t5.tokenizer, prompts, 512))[0]
    noisy = (1.0 - sigmas.view(-1, 1, 1, 1)) * latents + sigmas.view(-1, 1, 1, 1) * noise
    timesteps = sigmas * 1000
    prediction = model.network(
        hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
        timestep=timesteps / 1000,
        guidance=torch.full((count,), guidance) if model.network.config.guidance_embeds else None,
        pooled_projections=model.text_encoders[0](ids_of(model.tokenizers[0], prompts, 24)).pooler_output,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
        return_dict=False)[0]
    prediction = FluxPipeline._unpack_latents(prediction, height * 8, width * 8, 8)
    return (prediction - (noise - latents)) ** 2


@torch.no_grad()
def test_the_loss_is_that_of_the_training_examples(folder, name):
    model, prompts = load_model(folder), ["a star", "a photo of a ring", ""]
    latents, noise, timesteps = gaussian(3, 16, 8, 12), gaussian(3, 16, 8, 12, seed=1), [0, 500, 999]
    condition = model.condition(tokenize(model, prompts))
    ours = residual(model, latents, noise, torch.tensor(timesteps), condition).square()
    sigmas = torch.tensor([0.001, 0.501, 1.0])
    if name.startswith("sd3"):
        theirs = sd3_example_loss(model, latents, noise, sigmas, prompts, precondition_outputs=False)
        weighted = sd3_example_loss(model, latents, noise, sigmas, prompts, precondition_outputs=True)
        # Of the latents, sigma times the error of the flow: the example weighs it with 1 / sigma^2.
        assert torch.allclose(weighted / sigmas.view(-1, 1, 1, 1) ** 2, ours, rtol=1e-3, atol=1e-4)
    else:
        theirs = flux_example_loss(model, latents, noise, sigmas, prompts)
    assert ours.mean() > 0.1 and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_packing_is_that_of_the_pipeline():
    latents = gaussian(2, 16, 6, 10)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack(tokens, (6, 10)), FluxPipeline._unpack_latents(tokens, 48, 80, 8))
    assert torch.equal(unpack(tokens, (6, 10)), latents)


@torch.no_grad()
def test_the_guidance_that_a_distilled_model_is_told_matters(folders):
    model = load_model(str(folders["flux"]))
    latents, noise, sigmas = gaussian(1, 16, 8, 8), gaussian(1, 16, 8, 8, seed=1), torch.tensor([0.5])
    model.guidance_scale = 6.0
    condition = model.condition(tokenize(model, PROMPT))
    ours = residual(model, latents, noise, torch.tensor([499]), condition).square()
    assert torch.allclose(ours, flux_example_loss(model, latents, noise, sigmas, [PROMPT], 6.0), rtol=1e-5)
    assert not torch.allclose(ours, flux_example_loss(model, latents, noise, sigmas, [PROMPT]), rtol=1e-3)
    assert "guidance" not in load_model(str(folders["schnell"])).condition(tokenize(model, PROMPT))


# --- Text

def test_clip_skip_and_a_missing_t5_are_those_of_the_pipeline(folders):
    for name in ("sd3", "sd3-without-t5"):
        model = load_model(str(folders[name]))
        assert (model.t5 is not None) == (name == "sd3")
        pipeline, seen = model.pipeline(), []
        for clip_skip in (None, 1):
            model.clip_skip = clip_skip or 0
            with torch.no_grad():
                condition = model.condition(tokenize(model, PROMPT))
                states, _, pooled, _ = pipeline.encode_prompt(
                    PROMPT, None, None, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip)
            assert torch.allclose(condition["states"], states, atol=1e-5)
            assert torch.allclose(condition["pooled"], pooled, atol=1e-5)
            seen.append(condition["states"])
        assert not torch.allclose(*seen, atol=1e-3)
        assert seen[0][:, 24:].any() == (name == "sd3")


def test_the_layers_of_t5_that_overflow_in_half_precision_stay_in_float32(folders):
    model = load_model(str(folders["flux"]), dtype=torch.float16)
    dtypes = {name.split(".")[-2]: p.dtype for name, p in model.t5.encoder.named_parameters()}
    assert dtypes["wo"] == torch.float32 and dtypes["q"] == model.dtype == torch.float16
    assert model.condition(tokenize(model, PROMPT))["states"].isfinite().all()


def test_a_text_encoder_that_the_index_names_must_be_there(folders, tmp_path):
    copy = shutil.copytree(folders["sd3"], tmp_path / "model")
    shutil.rmtree(copy / "text_encoder_3")
    with pytest.raises(InputError, match="no usable text_encoder_3"):
        load_model(str(copy))


# --- Poisons

@pytest.mark.parametrize("poison", POISONS)
def test_every_poison_moves_its_objective(folder, poison):
    model, images = load_model(folder), images_of(1)
    with torch.no_grad():
        condition, empty = (model.condition(tokenize(model, prompt)) for prompt in (PROMPT, ""))
    victim = Victim(model, condition, empty=empty, target=target_pattern(64, 64), chain_steps=2, strength=0.5)
    attack = POISONS[poison]
    gradient, before = image_gradient(attack, victim, [image_generator(images[0], 0)])(images)
    assert gradient.isfinite().all() and gradient.any()
    step = (0.5 if attack.ascend else -0.5) / 255 * gradient.sign()
    with torch.no_grad():
        after = attack.objective(victim, model.encode(images + step), [image_generator(images[0], 0)])
    if not poison.startswith("sds"):  # whose direction leaves out the network
        assert (after > before) if attack.ascend else (after < before)


def test_the_gradient_of_adm_is_that_of_the_closed_form(folders):
    model = load_model(str(folders["sd3"]), dtype=torch.float64)
    with torch.no_grad():
        condition = model.condition(tokenize(model, PROMPT))
    images = images_of().double()
    gradient, _ = image_gradient(POISONS["adm+"], Victim(model, condition), [image_generator(images[0], 0)])(
        images)
    generator, leaf = image_generator(images[0], 0), images.clone().requires_grad_()
    sigma = (torch.randint(0, 1000, (1,), generator=generator).double() + 1) / 1000
    noise = torch.randn(16, 8, 8, generator=generator).double()[None]
    config = model.vae.config
    z0 = (model.vae.encode(2 * leaf - 1).latent_dist.mean - config.shift_factor) * config.scaling_factor
    prediction = model.network((1 - sigma) * z0 + sigma * noise, encoder_hidden_states=condition["states"],
                               pooled_projections=condition["pooled"], timestep=sigma * 1000).sample
    (full,) = torch.autograd.grad((prediction - (noise - z0)).square().mean(), leaf)
    assert torch.allclose(gradient, full, rtol=1e-4, atol=1e-6 * full.abs().max().item())


def test_a_part_that_is_absent_may_be_null_alone(tmp_path):
    folder = build_tiny_sd3(tmp_path / "sd3", t5=False)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]
    index |= {"text_encoder_3": None, "tokenizer_3": None}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_model(str(folder)).t5 is None


@pytest.mark.parametrize("name", ["sd3", "flux", "schnell"], indirect=True)
def test_the_chain_of_da_is_the_pipelines_image_to_image(folder, name):
    model = load_model(folder)
    with torch.no_grad():
        condition, empty = (model.condition(tokenize(model, prompt)) for prompt in (PROMPT, ""))
    victim = Victim(model, condition, empty=empty, chain_steps=4, strength=0.8, guidance_scale=3.0)
    pipeline = AutoPipelineForImage2Image.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = model.encode(images_of(2))
    # Their first step begins at these latents, not at a draw from the posterior.
    mean = SimpleNamespace(latents=latents / model.scaling_factor + model.shift_factor)
    pipeline.vae.encode = lambda image: mean
    options = {"negative_prompt": [""] * 2} if name == "sd3" else {}
    theirs = pipeline([PROMPT] * 2, image=images_of(2), strength=0.8, num_inference_steps=5,
                      guidance_scale=3.0, generator=torch.Generator().manual_seed(4), output_type="pt",
                      height=64, width=64, **options).images
    noise = gaussian(*latents.shape, seed=4)
    with torch.no_grad():
        ours = image_to_image(victim, latents, noise)
    assert theirs.std() > 0.01 and torch.allclose(ours.clamp(0, 1), theirs, atol=1e-4)


# --- Sensitivity maps

@pytest.mark.parametrize("name", ["sd3", "sd3-without-t5", "flux"], indirect=True)
def test_a_replaced_word_is_replaced_in_every_text_encoder(folder, name):
    """The condition is that of the prompt with the drawn word, whatever encoder reads it."""
    model = load_model(folder)
    prompt = tokenize_words(model, "a red star on grass", ["star"])
    other = tokenize(model, "a red ring on grass")
    replaced, drawn = draw_replacements(prompt, 1, model.tokenizers[0].vocab_size, torch.Generator())
    has_t5 = name != "sd3-without-t5"
    assert replaced.sum() == (2 if has_t5 else 1) and replaced[0, prompt.positions[0]].all()
    wanted = torch.cat([other[0], other[-1]], dim=1) if has_t5 else other[0]
    with torch.no_grad():
        replaced_condition = prompt_conditions(model, prompt, replaced, wanted)
        condition = model.condition(other)
    for key, value in condition.items():
        assert torch.allclose(replaced_condition[key], value, atol=1e-5)
    unchanged = prompt_conditions(model, prompt)
    assert not torch.allclose(unchanged["states"], condition["states"], atol=1e-3)
    assert not torch.allclose(unchanged["pooled"], condition["pooled"], atol=1e-3)


def test_draws_cover_both_vocabularies_and_the_start_is_not_a_word_of_t5(folders):
    model = load_model(str(folders["sd3"]))
    prompt = tokenize_words(model, "a star", ["<|startoftext|>", "star"])
    assert prompt.positions == [[0], [2]] and prompt.t5_positions == [[], [1]]
    _, drawn = draw_replacements(prompt, 100, model.tokenizers[0].vocab_size, torch.Generator())
    assert drawn.shape == (200, 24 + 256)
    for columns, tokenizer in ((drawn[:, :24], model.tokenizers[0]), (drawn[:, 24:], model.t5.tokenizer)):
        assert set(columns.flatten().tolist()) == set(range(tokenizer.vocab_size))


@pytest.mark.parametrize("name", ["sd3", "flux"], indirect=True)
def test_maps_are_equation_6(folder):
    model = load_model(folder)
    prompt, latents, noise = tokenize_words(model, "a red star", ["star"]), *gaussian(2, 1, 16, 8, 8)
    replaced, drawn = draw_replacements(prompt, 2, model.tokenizers[0].vocab_size, torch.Generator())
    maps = semantic_sensitivity(model, latents, prompt, [300, 999], noise=noise, replaced=replaced,
                                drawn=drawn)
    assert maps.shape == (1, 2, 8, 8) and maps.min() > 0
    before = prompt_conditions(model, prompt)
    for i, t in enumerate((300, 999)):
        sigma = (t + 1) / 1000
        noised, at = (1 - sigma) * latents + sigma * noise, torch.tensor([t])
        with torch.no_grad():
            wanted = sum((model.predict(noised, at, prompt_conditions(
                model, prompt, replaced[r:r + 1], drawn[r:r + 1])) - model.predict(noised, at, before))
                .square().sum(1) for r in range(2)) / 2
        assert torch.allclose(maps[0, i], wanted[0], rtol=1e-2, atol=1e-6)
    with pytest.raises(InputError, match="Cross-attention maps need a U-Net"):
        cross_attention_maps(model, latents, prompt, [300], noise=noise)


# --- Embeddings and images

@pytest.mark.parametrize("name", ["sd3", "sd3-without-t5"], indirect=True)
def test_an_embedding_of_both_clip_encoders_is_loaded_and_generates(folder, tmp_path):
    rows = {"clip_l": 3 * gaussian(1, 32), "clip_g": 3 * gaussian(1, 24)}
    save_file(rows, tmp_path / "new.safetensors")
    prompts = ["a photo of a star", "a photo of a <new>"]
    pipelines = load_pipeline(folder), pipeline_with(folder, tmp_path / "new.safetensors")
    assert type(pipelines[1].scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    plain, learned = ([np.asarray(image, float) for image in generate(pipeline, prompts, steps=2)]
                      for pipeline in pipelines)
    assert plain[0].shape == (64, 64, 3) and np.abs(plain[0] - learned[0]).max() <= 1
    assert np.abs(plain[1] - learned[1]).max() > 1
    model = load_model(folder)
    assert add_embedding(model.tokenizers, model.text_encoders, tmp_path / "new.safetensors") == ("<new>", 1)
    with torch.no_grad():
        condition = model.condition(tokenize(model, prompts[1]))
        pipeline = pipelines[1]
        states = pipeline.encode_prompt(prompts[1], None, None, do_classifier_free_guidance=False)[0]
    assert torch.allclose(condition["states"], states, atol=1e-5)


def test_flux_generates_with_its_own_scheduler(folders):
    pipeline = load_pipeline(folders["flux"], dtype=torch.bfloat16)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    pipeline.default_sample_size = 8
    images = generate(pipeline, ["a star", "a ring"], steps=1)
    assert [image.size for image in images] == [(64, 64)] * 2


# --- The scripts

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve clean images of 64 px, and a set of two."""
    folder = tmp_path_factory.mktemp("images")
    for i, concept in enumerate(list(pocket.NOVEL_CONCEPTS)[:6]):
        pocket.write_concept(concept, folder / "clean", count=2)
        if i < 2:
            pocket.write_concept(concept, folder / "set", folder / "masks", count=1, seed=1)
    return folder


def levels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def main(script, *arguments):
    script.main([*map(str, arguments)])


@pytest.mark.parametrize("name", ["sd3", "flux"], indirect=True)
@pytest.mark.parametrize("method, options", [
    ("adm+", ["--adaptive", "szt"]), ("ea", []), ("sds-", []),
    ("da", ["--chain_steps", 2, "--strength", 0.5])])
def test_poison_images(folder, images, tmp_path, method, options):
    import poison_images

    options += ["--loss_mask_dir", images / "masks"] if "--adaptive" in options else []
    main(poison_images, "--pretrained_model_name_or_path", folder, "--image_dir", images / "set",
         "--output_dir", tmp_path / "out", "--method", method, "--resolution", 64, "--steps", 2, "--eps", 4,
         *options)
    records = [json.loads(line) for line in (tmp_path / "out" / "stats.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(0 < record["eps_reached"] <= 4 for record in records)
    assert all(levels(tmp_path / "out" / record["file"]).shape == (64, 64, 3) for record in records)
    zone = json.loads((tmp_path / "out" / "options.json").read_text())
    assert (zone["t_min"], zone["t_max"]) == (618 if options[:1] == ["--adaptive"] else 0, 1000)


def test_a_chain_that_begins_at_pure_noise_is_refused_before_the_weights(folders, images, tmp_path):
    """Nothing of the image is left there, and no gradient would reach it."""
    import poison_images

    copy = shutil.copytree(folders["flux"], tmp_path / "model")
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(SystemExit, match="begins at pure noise, .* lower --strength or raise --chain_steps"):
        main(poison_images, "--pretrained_model_name_or_path", copy, "--image_dir", images / "set",
             "--output_dir", tmp_path / "out", "--method", "da", "--resolution", 64, "--chain_steps", 1)


def test_poison_images_at_their_own_size(folders, tmp_path):
    """The sides of what is attacked are multiples of 16, as the transformer's patches need."""
    import poison_images

    (tmp_path / "set").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8)).save(
        tmp_path / "set" / "a.png")
    for name in ("sd3", "flux"):
        main(poison_images, "--pretrained_model_name_or_path", folders[name], "--image_dir",
             tmp_path / "set", "--output_dir", tmp_path / name, "--method", "adm-", "--resolution", 64,
             "--keep_size", "--steps", 1, "--eps", 4)
        change = levels(tmp_path / name / "a.png") - levels(tmp_path / "set" / "a.png")
        assert change.any() and np.abs(change).max() <= 4


@pytest.mark.parametrize("name", ["sd3", "flux"], indirect=True)
def test_sensitivity_maps(folder, name, images, tmp_path):
    import sensitivity_maps

    arguments = ["--pretrained_model_name_or_path", folder, "--image", sorted((images / "set").iterdir())[0],
                 "--prompt", PROMPT, "--tokens", "star", "photo", "--timesteps", 100, 900, "--replacements",
                 2, "--resolution", 64, "--output_dir", tmp_path / "out"]
    main(sensitivity_maps, *arguments)
    maps = load_file(tmp_path / "out" / "maps.safetensors")
    assert set(maps) == {"ssm"} and maps["ssm"].shape == (2, 2, 8, 8) and (maps["ssm"] > 0).any()
    with pytest.raises(SystemExit, match="need a U-Net, which .* models do not have; leave out"):
        main(sensitivity_maps, *arguments[:-1], tmp_path / "attention", "--cross_attention")
    with pytest.raises(SystemExit, match="multiple of 16, but it is 72"):
        main(sensitivity_maps, *arguments[:-1], tmp_path / "odd", "--resolution", 72)
    if name == "sd3":  # which has 16 positions a side
        with pytest.raises(SystemExit, match="takes at most 256 pixels a side, but would get 272 x 272"):
            main(sensitivity_maps, *arguments[:-1], tmp_path / "large", "--resolution", 272)


@pytest.mark.parametrize("patch", [1, 2])
def test_the_most_pixels_are_those_that_the_network_has_positions_for(patch):
    network = SD3Transformer2DModel(sample_size=8, patch_size=patch, in_channels=4, num_layers=1,
                                    attention_head_dim=8, num_attention_heads=1, caption_projection_dim=8,
                                    pos_embed_max_size=8)
    model = SimpleNamespace(network=network, vae_scale_factor=8)
    for side in range(64 * patch, 64 * patch + 33, 16):
        latents = torch.zeros(1, 4, side // 8, side // 8)
        if side == 64 * patch:
            check_size(model, side, 64)
            network.pos_embed(latents)
        else:
            with pytest.raises(InputError, match=f"at most {64 * patch} pixels a side, .* 64 x {side}"):
                check_size(model, side, 64)
            with pytest.raises(ValueError):
                network.pos_embed(latents)


def test_an_image_too_wide_for_stable_diffusion_3_stops_no_other(folders, tmp_path):
    import poison_images

    (tmp_path / "images").mkdir()
    for name, width in (("a", 320), ("b", 64)):
        Image.new("RGB", (width, 64), "teal").save(tmp_path / "images" / f"{name}.png")
    with pytest.raises(SystemExit, match="a.png': The model takes at most 256 pixels a side, but would get"):
        main(poison_images, "--pretrained_model_name_or_path", folders["sd3"], "--image_dir",
             tmp_path / "images", "--output_dir", tmp_path / "out", "--method", "ea", "--steps", 1,
             "--keep_size", "--resolution", 64)
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["b.png"]


@pytest.mark.parametrize("name", ["sd3", "flux"], indirect=True)
def test_diagnose_images(folder, images, tmp_path, capsys):
    import diagnose_images

    main(diagnose_images, "--pretrained_model_name_or_path", folder, "--image_dir", images / "set",
         "--clean_dir", images / "clean", "--resolution", 64, "--output_dir", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert len(report["images"]) == 2 and report["sentence"] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sd3", "sd3-without-t5", "flux"], indirect=True)
def test_purify_images_by_regen(folder, images, tmp_path):
    import purify_images

    (tmp_path / "set").mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (72, 90, 3), dtype=np.uint8)).save(tmp_path / "set" / "a.png")
    main(purify_images, "--pretrained_model_name_or_path", folder, "--image_dir", tmp_path / "set",
         "--output_dir", tmp_path / "out", "--method", "regen", "--strength", 0.5, "--steps", 2)
    assert levels(tmp_path / "out" / "a.png").shape == (72, 90, 3)
    assert (levels(tmp_path / "out" / "a.png") != levels(tmp_path / "set" / "a.png")).any()


def test_the_training_refuses_flux_before_its_weights(folders, concept_folder, tmp_path):
    copy = shutil.copytree(folders["flux"], tmp_path / "model")
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(SystemExit, match="FLUX textual inversion is not offered: users found it weak; train"):
        run_here(flags(copy, concept_folder[0], tmp_path / "out"))


# --- Textual inversion of Stable Diffusion 3

def learned(folder: Path) -> list[torch.Tensor]:
    return [embedding(folder), embedding(folder, "learned_embeds_2.safetensors")]


def test_the_rows_are_those_of_the_examples_loss(folders, concept_folder, tmp_path, monkeypatch):
    """The same batches, trained by hand on the raw modules: whole matrices whose other rows are restored."""
    import textual_inversion_szt

    batches, captions, draw, tokenize_t5 = [], {}, textual_inversion_szt.draw, T5.tokenize

    def drawing(*arguments):
        batches.append(draw(*arguments))
        return batches[-1]

    def tokenizing(t5, caption):
        ids = tokenize_t5(t5, caption)
        captions[tuple(ids[0].tolist())] = caption
        return ids

    monkeypatch.setattr(textual_inversion_szt, "draw", drawing)
    monkeypatch.setattr(T5, "tokenize", tokenizing)
    run_here(flags(folders["sd3"], concept_folder[0], tmp_path / "out", max_train_steps=4))
    model = load_model(str(folders["sd3"]))
    parameters = []
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        encoder.train()
        add_placeholder(tokenizer, encoder, TOKEN, "star")
        parameters.append(encoder.get_input_embeddings().weight.requires_grad_())
    frozen = [parameter.detach()[:-1].clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=5e-2)
    for sample in batches:
        prompts = [captions[tuple(ids)] for ids in sample.ids[2].tolist()]
        assert all(TOKEN in prompt for prompt in prompts)
        loss = sd3_example_loss(model, sample.latents, sample.noise, (sample.timesteps + 1) / 1000, prompts,
                                precondition_outputs=False).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter, before in zip(parameters, frozen, strict=True):
                parameter[:-1] = before
    assert len(batches) == 4
    for part, parameter in zip(learned(tmp_path / "out"), parameters, strict=True):
        assert torch.allclose(part[0], parameter[-1], atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "sd3-without-t5"], indirect=True)
def test_sd3_learns_rows_in_both_clip_encoders(folder, name, concept_folder, tmp_path):
    run_here(flags(folder, *[concept_folder[0]], tmp_path / "out", szt=True, loss_mask_dir=concept_folder[1],
                   validation_prompt=f"a {TOKEN}", validation_steps=6, num_validation_images=1,
                   save_as_full_pipeline=True))
    rows, model = learned(tmp_path / "out"), load_model(folder)
    for part, encoder, tokenizer in zip(rows, model.text_encoders, model.tokenizers, strict=True):
        start = encoder.get_input_embeddings().weight[tokenizer.encode("star", add_special_tokens=False)]
        assert part.shape == start.shape and part.isfinite().all() and (part != start).all()
    named = load_file(tmp_path / "out" / "star.safetensors")
    assert torch.equal(named["clip_l"], rows[0]) and torch.equal(named["clip_g"], rows[1])
    options = json.loads((tmp_path / "out" / "options.json").read_text())
    assert options["t_min"] == 618
    assert Image.open(tmp_path / "out" / "validation" / "step-00006-0.png").size == (64, 64)
    # The saved pipeline has the token, T5 does not; the folder's file makes the same of the original.
    whole, loaded = load_model(str(tmp_path / "out")), pipeline_with(folder, tmp_path / "out")
    prompt = f"a photo of a {TOKEN}"
    with torch.no_grad():
        states = loaded.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)[0]
        assert torch.allclose(whole.condition(tokenize(whole, prompt))["states"], states, atol=1e-5)
    if name == "sd3":
        assert len(whole.t5.tokenizer) == len(model.t5.tokenizer)


def test_validation_images_show_all_vectors(folders, concept_folder, tmp_path):
    """They are what the pipeline makes of the saved embedding and a prompt with all of its tokens."""
    folder = folders["sd3-without-t5"]
    run_here(flags(folder, concept_folder[0], tmp_path, num_vectors=2, validation_prompt=f"a {TOKEN}",
                   validation_steps=6, num_validation_images=1, seed=3))
    shown = np.asarray(Image.open(tmp_path / "validation" / "step-00006-0.png"), float)
    pipeline = pipeline_with(folder, tmp_path)
    own, first = (np.asarray(pipeline(prompt, num_inference_steps=25, height=64, width=64,
                                      generator=torch.Generator().manual_seed(3)).images[0], float)
                  for prompt in (f"a {TOKEN} {TOKEN}_1", f"a {TOKEN}"))
    assert np.abs(shown - own).max() <= 1 < np.abs(shown - first).max()


def test_t5_goes_when_it_has_encoded_the_captions_and_changes_no_bit(folders, concept_folder, tmp_path,
                                                                     monkeypatch):
    """Also with --offload, and with validation images, for which it is read again."""
    passes, forward = [], T5EncoderModel.forward
    monkeypatch.setattr(T5EncoderModel, "forward", lambda *args, **options: passes.append(1) or forward(
        *args, **options))
    options = dict(train_batch_size=2, repeats=40, max_train_steps=30, learnable_property="style")
    run_here(flags(folders["sd3"], concept_folder[0], tmp_path / "kept", **options))
    kept = len(passes)
    run_here(flags(folders["sd3"], concept_folder[0], tmp_path / "offload", **options, offload=True,
                   validation_prompt="a <star>", validation_steps=30, num_validation_images=1))
    monkeypatch.setattr(T5, "remember", lambda self, prompts, device: None)
    monkeypatch.setattr(T5, "states", lambda self, ids: torch.cat([
        self.encoder(row[None])[0] for row in ids]))
    passes.clear()
    run_here(flags(folders["sd3"], concept_folder[0], tmp_path / "again", **options))
    assert kept == len(set(STYLE_TEMPLATES)) < len(passes) == 60
    for name in ("offload", "again"):
        assert all(map(torch.equal, learned(tmp_path / "kept"), learned(tmp_path / name)))


def test_t5_and_the_vae_compute_in_their_own_precision_under_autocast(folders, concept_folder, tmp_path,
                                                                       monkeypatch):
    """In float16 they overflow on a GPU; bfloat16 on a CPU shows which layers autocast reaches."""
    from accelerate import Accelerator

    seen, validating = [], []
    real, decode = T5EncoderModel.forward, AutoencoderKL.decode

    def forward(self, *args, **options):
        seen.append(torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype)
        return real(self, *args, **options)

    def decoded(self, latents, *args, **options):
        image = decode(self, latents, *args, **options)
        seen.append(image[0].dtype)
        return image

    def autocast(*_):
        validating.append(torch.autocast("cpu", torch.bfloat16))
        return validating[-1]

    monkeypatch.setattr(T5EncoderModel, "forward", forward)
    monkeypatch.setattr(AutoencoderKL, "decode", decoded)
    monkeypatch.setattr(Accelerator, "autocast", autocast)
    monkeypatch.setattr(Run, "evaluation", autocast)
    run_here(flags(folders["sd3"], concept_folder[0], tmp_path, max_train_steps=1, no_cache_latents=True,
                   validation_prompt="a <star>", validation_steps=1, num_validation_images=1))
    assert validating and len(seen) > 3 and set(seen) == {torch.float32}
    assert np.asarray(Image.open(tmp_path / "validation" / "step-00001-0.png")).std() > 0


def test_another_t5_is_refused_when_a_run_is_resumed(folders, concept_folder, tmp_path):
    model = shutil.copytree(folders["sd3"], tmp_path / "model")
    options = dict(max_train_steps=1, checkpointing_steps=1)
    run_here(flags(model, concept_folder[0], tmp_path / "out", **options))
    (weights,) = (model / "text_encoder_3").glob("*.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in load_file(weights).items()}, weights,
              metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="hash of T5's weights was"):
        run_here(flags(model, concept_folder[0], tmp_path / "out", **options,
                       resume_from_checkpoint="latest"))


def test_concepts_that_all_fail_say_why(folders, tmp_path):
    """No model is loaded for none, whose T5 would have no caption to read."""
    (tmp_path / "concepts.json").write_text(json.dumps([
        {"output_dir": str(tmp_path / name), "train_data_dir": name} for name in "ab"]))
    with pytest.raises(SystemExit, match="a: The image folder 'a' does not exist.* b: The image folder 'b'"):
        run_here(flags(folders["sd3"], None, tmp_path, concepts=tmp_path / "concepts.json"))


def test_sd3_resumes_and_several_concepts_share_batches(folders, concept_folder, tmp_path):
    run_here(flags(folders["sd3"], concept_folder[0], tmp_path / "whole"))
    run_here(flags(folders["sd3"], concept_folder[0], tmp_path / "half", max_train_steps=3,
                   checkpointing_steps=3))
    run_here(flags(folders["sd3"], concept_folder[0], tmp_path / "half", resume_from_checkpoint="latest"))
    assert all(map(torch.equal, learned(tmp_path / "whole"), learned(tmp_path / "half")))
    entries = [{"output_dir": str(tmp_path / name), "seed": seed} for name, seed in (("a", 3), ("b", 4))]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    run_here(flags(folders["sd3"], concept_folder[0], tmp_path / "several",
                   concepts=tmp_path / "concepts.json"))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(
        learned(tmp_path / "whole"), learned(tmp_path / "a"), strict=True))
    assert not torch.allclose(learned(tmp_path / "a")[0], learned(tmp_path / "b")[0], atol=1e-3)


def test_a_resolution_that_the_patches_do_not_divide_is_refused(folders, concept_folder, tmp_path):
    with pytest.raises(SystemExit, match="--resolution must be a multiple of 16 for this model, but is 72"):
        run_here(flags(folders["sd3"], concept_folder[0], tmp_path / "out", resolution=72))


@pytest.mark.parametrize("name", ["sd3"], indirect=True)
def test_evaluate(folder, images, tmp_path):
    import evaluate

    save_file({"clip_l": gaussian(1, 32), "clip_g": gaussian(1, 24)}, tmp_path / "new.safetensors")
    main(evaluate, "--pretrained_model_name_or_path", folder, "--embeddings", tmp_path / "new.safetensors",
         "--clean_dir", images / "set", "--images_per_prompt", 1, "--num_inference_steps", 1, "--metrics",
         "dino", "--output_dir", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["generated"] == len(list((tmp_path / "out" / "images").iterdir())) > 1


@pytest.mark.slow
def test_sd3_is_trained_by_two_ranks(folders, concept_folder, tmp_path):
    two_ranks(*flags(folders["sd3"], concept_folder[0], tmp_path, max_train_steps=2, train_batch_size=2))
    assert all(rows.isfinite().all() for rows in learned(tmp_path))
