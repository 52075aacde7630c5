"""Pocket models of other families: first predictions of grown ones, their targets, their trainings."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import bundle
import diffusers
import grow
import numpy as np
import pytest
import recipe
import torch
import train_diffusion
from safetensors.torch import load_file

from szt_utils import pocket
from szt_utils.generation import generate, load_pipeline
from szt_utils.models import find_family, load_model, tokenize
from szt_utils.pocket.scenes import Attributes

PROMPTS = ["a photo of a teal striped star on sand", "", "a close-up photo of the red heart"]
SCENES = [Attributes("red", "plain", "star", "sand"), Attributes("teal", "dotted", "house", "night")]
KINDS = {  # flags, folder, pipeline
    "sdxl": (["--family", "sdxl"], "model-sdxl", "StableDiffusionXLPipeline"),
    "flow": (["--family", "flow"], "model-flow", "StableDiffusion3Pipeline"),
    "coarse flow": (["--family", "flow", "--patch", "2"], "model-flow", "StableDiffusion3Pipeline"),
    "velocity": (["--prediction_type", "v_prediction"], "model-v", "StableDiffusionPipeline")}


@pytest.fixture
def first():
    return load_model(pocket.model_path())


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def noised(count=3):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def captions(model, seed=0):
    return train_diffusion.draw_captions(model.tokenizers[0], SCENES, np.random.default_rng(seed))


@torch.no_grad()
def prediction(model, prompts=PROMPTS, sizes=None):
    condition = model.condition(tokenize(model, prompts), sizes)
    return model.predict(noised(), torch.tensor([20, 500, 980]), condition)


def test_a_grown_sdxl_predicts_what_the_first_model_does(first):
    expected = prediction(first)
    grown = grow.grow_sdxl(first)
    assert torch.allclose(prediction(grown), expected, atol=2e-5)
    # The new inputs are there and have no weight yet.
    assert torch.allclose(prediction(grown, sizes=torch.tensor([[64, 90, 3, 5]] * 3)), expected, atol=2e-5)
    assert not torch.allclose(prediction(grown, PROMPTS[::-1]), expected, atol=1e-2)
    grow.balance(grown)
    assert torch.allclose(prediction(grown), expected, atol=2e-5)
    grow.merge(grown.network)
    assert torch.allclose(prediction(grown), expected, atol=2e-5)
    assert not any("parametrizations" in name for name in grown.network.state_dict())


def test_the_wider_text_encoder_holds_the_normalized_states_and_pools_the_end(first):
    grown = grow.grow_sdxl(first)
    states = first.condition(tokenize(first, PROMPTS))["states"]
    condition = grown.condition(tokenize(grown, PROMPTS))
    assert condition["states"].shape == (3, 24, 384)
    assert torch.allclose(condition["states"][..., 256:], grow.STREAM_SCALE * states, atol=1e-4)
    ends = [len(first.tokenizers[0](prompt).input_ids) - 1 for prompt in PROMPTS]
    similarity = torch.cosine_similarity(condition["pooled"][:, None], states, dim=2)
    assert similarity.argmax(1).tolist() == ends and similarity.amax(1).min() > 0.99


def test_new_inputs_of_a_grown_sdxl_learn_from_the_first_steps(first):
    grown = grow.grow_sdxl(first)
    grow.balance(grown)
    grown.network.requires_grad_(True)
    optimizer = recipe.Muon(grown.network.parameters(), 1e-3)
    for step in range(2):
        torch.manual_seed(step)
        loss = train_diffusion.batch_loss(grown, noised(2), captions(grown, step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    grow.merge(grown.network)
    read = [module.weight for name, module in grown.network.named_modules() if name.endswith("attn2.to_k")]
    assert len(read) == 4 and all(weight[:, :256].abs().amax(0).min() > 0 for weight in read)
    cropped = prediction(grown, sizes=torch.tensor([[64, 90, 3, 5]] * 3))
    assert not torch.allclose(prediction(grown), cropped, atol=1e-6)


def test_one_empty_token_stands_for_all_of_t5s(first):
    model = grow.grow_flow(first, heads=2, layers=3)
    assert not prediction(model).any()
    for name, weight in model.network.named_parameters():
        if name.endswith("weight") and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05)
    short = prediction(model)
    model.network.set_attn_processor(diffusers.models.attention_processor.JointAttnProcessor2_0())
    model.__class__ = grow.SD3
    assert model.condition(tokenize(model, PROMPTS))["states"].shape == (3, 24 + 256, 256)
    assert torch.allclose(short, prediction(model), atol=1e-5) and short.abs().mean() > 0.01


@pytest.mark.parametrize("name", ["sdxl", "flow"])
def test_a_model_of_the_family_is_trained_further(name, first, tmp_path):
    draw_noise(tmp_path / "further")
    bundled = pocket.model_path(name)
    train(tmp_path / "further", name, bundled, steps=1, lr=0)
    folder = tmp_path / "further" / KINDS[name][1]
    weights, before = load_file(weights_file(folder)), load_file(weights_file(Path(bundled)))
    assert weights.keys() == before.keys()
    assert all(torch.allclose(weights[key], before[key].float(), rtol=1e-3, atol=1e-6) for key in weights)
    assert torch.allclose(prediction(load_model(str(folder))), prediction(load_model(bundled)), atol=1e-3)


def draw_noise(work_dir: Path) -> None:
    """Four training images, without the second that drawing scenes takes."""
    work_dir.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), dtype=np.uint8)
    np.save(work_dir / f"scenes-{recipe.TRAINING_SEEDS}-4.npy", images)


def train(work_dir, kind, start, **changes):
    given = {"scenes": 4, "steps": 2, "batch_size": 2, **changes}
    train_diffusion.main([*KINDS[kind][0], "--work_dir", str(work_dir), "--start_from", str(start),
                          *(str(part) for name, value in given.items() for part in (f"--{name}", value))])


def test_a_training_resumes_and_writes_a_pipeline(kind, tiny_model, tmp_path, monkeypatch):
    """In one go, and stopped by the clock after one of two steps."""
    _, folder, pipeline_class = KINDS[kind]
    for name in ("once", "twice"):
        draw_noise(tmp_path / name)
    train(tmp_path / "once", kind, tiny_model)
    monkeypatch.setattr(recipe, "time", SimpleNamespace(time=itertools.count().__next__))
    train(tmp_path / "twice", kind, tiny_model, minutes=3.5 / 60)
    state = torch.load(next((tmp_path / "twice").glob("diffusion-*.pt")), weights_only=True)
    assert state["step"] == 1
    train(tmp_path / "twice", kind, tiny_model)
    once, twice = (load_file(weights_file(tmp_path / name / folder)) for name in ("once", "twice"))
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)
    check_pipeline(tmp_path / "once" / folder, pipeline_class)


def test_captions_that_workers_draw_ahead_change_no_result(tiny_model, tmp_path):
    for workers in (0, 2):
        draw_noise(tmp_path / str(workers))
        train(tmp_path / str(workers), "flow", tiny_model, steps=3, workers=workers)
    alone, ahead = (load_file(weights_file(tmp_path / name / "model-flow")) for name in "02")
    assert alone.keys() == ahead.keys() and all(torch.equal(alone[name], ahead[name]) for name in alone)


def test_a_new_flow_model_has_the_patches_that_were_asked_for(first):
    for patch in (1, 2):
        network = grow.grow_flow(first, heads=1, layers=1, patch=patch).network
        assert network.pos_embed(noised(1)).shape == (1, (16 // patch) ** 2, 32)


def weights_file(folder: Path) -> Path:
    network = "transformer" if (folder / "transformer").is_dir() else "unet"
    return folder / network / "diffusion_pytorch_model.safetensors"


def check_pipeline(folder: Path, name: str) -> None:
    """Its own class loads it unmodified and generates; so does this package."""
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if "3" in name else {}
    pipeline = getattr(diffusers, name).from_pretrained(folder, **without_t5)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red star", num_inference_steps=1, height=64, width=64, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    assert find_family(str(folder)).family == {"StableDiffusionPipeline": "Stable Diffusion",
                                               "StableDiffusionXLPipeline": "SDXL",
                                               "StableDiffusion3Pipeline": "Stable Diffusion 3"}[name]
    assert torch.isfinite(prediction(load_model(str(folder)))).all()
    assert len(generate(load_pipeline(folder), ["a red star"], steps=1)) == 1


def test_a_velocity_model_is_trained_on_velocities_up_to_pure_noise(first, tmp_path):
    model = grow.grow_velocity(first)
    signal = model.scheduler.alphas_cumprod
    assert signal[-1] == 0 and (signal[:-1] > 0).all()
    z0, seen = noised(2), []

    def velocity(z, timesteps, condition):
        a = signal[timesteps].view(-1, 1, 1, 1)
        seen.append(timesteps)
        return a.sqrt() * (z - a.sqrt() * z0) / (1 - a).sqrt() - (1 - a).sqrt() * z0
    model.predict = velocity
    assert train_diffusion.batch_loss(model, z0, captions(model))["loss"] < 1e-8
    assert model.log_snr(torch.tensor([999])) == -torch.inf
    grow.write(model, tmp_path)
    written = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert written.config.prediction_type == "v_prediction" and written.alphas_cumprod[-1] == 0
    written.set_timesteps(25)
    assert written.timesteps[0] == 999  # sampling starts at pure noise


def test_a_flow_model_is_trained_on_velocities_at_logit_normal_sigmas(first):
    model, z0 = grow.grow_flow(first, heads=1, layers=1), noised(2)
    model.predict = lambda z, timesteps, condition: (z - z0) / model.sigmas(timesteps).view(-1, 1, 1, 1)
    assert train_diffusion.batch_loss(model, z0, captions(model))["loss"] < 1e-8
    sigmas = model.sigmas(train_diffusion.draw_timesteps(model, 4000))
    assert sigmas.logit().isfinite().any() and 0 < sigmas.min() and sigmas.max() <= 1
    quantiles = sigmas.quantile(torch.tensor([0.1587, 0.5, 0.8413])).logit()
    assert quantiles.tolist() == pytest.approx([-1, 0, 1], abs=0.02)
    assert train_diffusion.draw_timesteps(first, 4000).float().quantile(0.5) == pytest.approx(595, abs=2)


def test_text_encoders_of_grown_models_are_frozen(kind, tiny_model):
    flags, _, _ = KINDS[kind]
    args = train_diffusion.parse([*flags, "--start_from", str(tiny_model)])
    model, modules = train_diffusion.build(args, Path("unused"))
    assert list(modules.values()) == [model.network]
    assert all(p.requires_grad for p in model.network.parameters())
    assert not any(p.requires_grad for encoder in model.text_encoders for p in encoder.parameters())


def test_the_first_model_trains_its_text_encoder_too(tiny_model, tmp_path):
    work_dir = tmp_path / "training"
    draw_noise(work_dir)
    shutil.copytree(tiny_model / "vae", work_dir / "model" / "vae")
    train_diffusion.main(["--work_dir", str(work_dir), "--scenes", "4", "--steps", "1", "--batch_size", "2"])
    state = torch.load(work_dir / "diffusion.pt", weights_only=True)
    assert list(state["modules"]) == ["unet", "text_encoder"] and state["step"] == 1
    check_pipeline(work_dir / "model", "StableDiffusionPipeline")


def test_bundled_networks_are_half_as_large_and_load_in_float32(tiny_sdxl, tmp_path):
    shutil.copytree(tiny_sdxl, tmp_path, dirs_exist_ok=True)
    paths = [*tmp_path.glob("*/*.safetensors")]
    assert len(paths) == 4
    for path in paths:
        bundle.halve(path)
        assert {weight.dtype for weight in load_file(path).values()} == {torch.float16}
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert part.dtype == torch.float32


@pytest.mark.parametrize("family", ["sdxl", "flow"])
def test_only_the_first_family_has_a_kind_of_prediction(family, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_diffusion.main(["--family", family, "--prediction_type", "v_prediction"])
    told = capsys.readouterr().err
    assert f"--prediction_type is of --family sd; a model of --family {family} has its own" in told
