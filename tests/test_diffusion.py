"""The denoising loss against F.mse_loss and the analytic velocity, and the latent diffusion model."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler

from szt_utils.diffusion import LatentDiffusion, denoising_loss, denoising_target, evaluating, load_part
from szt_utils.errors import InputError


@pytest.fixture(scope="module")
def model(tiny_model):
    return LatentDiffusion.load(str(tiny_model))


def a_batch(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))
    return latents, noise, torch.tensor([3, 500, 999]), model.embed_text(["a star", "a photo of a ring", ""])


@pytest.mark.parametrize("folder", ["tiny_model", "tiny_velocity_model"])
def test_loss_is_the_mean_squared_error_of_the_closed_forms(request, folder):
    model = LatentDiffusion.load(str(request.getfixturevalue(folder)))
    latents, noise, timesteps, states = a_batch(model)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = torch.cumprod(1 - betas, 0)[timesteps].view(-1, 1, 1, 1)
    noised = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * latents
    target = noise if folder == "tiny_model" else velocity
    with torch.no_grad():
        prediction = model.unet(noised, timesteps, states).sample
        error = denoising_loss(model.unet, model.scheduler, latents, noise, timesteps, states)
    assert error.shape == latents.shape and error.dtype == torch.float32
    assert torch.allclose(error, (prediction - target) ** 2, rtol=1e-3, atol=1e-4)
    assert torch.allclose(error.mean(), F.mse_loss(prediction, target), rtol=1e-5)
    assert torch.allclose(denoising_target(model.scheduler, latents, noise, timesteps), target, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model.loss(latents, noise, timesteps, states), error)


def test_every_sample_has_its_own_timestep_text_and_noise(model):
    latents, noise, timesteps, states = a_batch(model)
    with torch.no_grad():
        together = model.loss(latents, noise, timesteps, states)
        for i in range(3):
            alone = model.loss(latents[i:i + 1], noise[i:i + 1], timesteps[i:i + 1], states[i:i + 1])
            assert torch.allclose(together[i:i + 1], alone, atol=1e-4)


def test_a_latent_mask_hides_the_noised_latent_but_not_the_target(model):
    latents, noise, timesteps, states = a_batch(model)
    mask = torch.zeros(3, 1, 8, 8)
    mask[..., :4] = 1
    other = latents.clone()
    other[..., 4:] += 5  # unseen: epsilon's target is the noise alone
    with torch.no_grad():
        masked = model.loss(latents, noise, timesteps, states, latent_mask=mask)
        assert torch.equal(masked, model.loss(other, noise, timesteps, states, latent_mask=mask))
        assert not torch.allclose(masked, model.loss(latents, noise, timesteps, states))
        full = model.loss(latents, noise, timesteps, states, latent_mask=torch.ones_like(mask))
        assert torch.equal(full, model.loss(latents, noise, timesteps, states))
        blind = model.unet(torch.zeros_like(latents), timesteps, states).sample
        nothing = model.loss(latents, noise, timesteps, states, latent_mask=torch.zeros_like(mask))
        assert torch.allclose(nothing, (blind - noise) ** 2, atol=1e-5)


def test_a_perfect_predictor_has_no_loss_and_half_precision_gives_float32():
    class Oracle:
        def __init__(self, answer):
            self.answer = answer

        def __call__(self, noised, timesteps, states):
            return self

        @property
        def sample(self):
            return self.answer

    scheduler = DDPMScheduler()
    latents, noise = torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 4, 8, 8).bfloat16()
    error = denoising_loss(Oracle(noise), scheduler, latents, noise, torch.tensor([0, 999]), None)
    assert error.dtype == torch.float32 and not error.any()
    error = denoising_loss(Oracle(noise + 2), scheduler, latents, noise, torch.tensor([0, 999]), None)
    assert torch.allclose(error, torch.full_like(error, 4), atol=0.1)


def test_a_model_that_predicts_something_else_is_refused():
    with pytest.raises(InputError, match="'sample'; only 'epsilon' and 'v_prediction'"):
        denoising_target(DDPMScheduler(prediction_type="sample"), None, None, None)


def test_encode_is_the_scaled_mean_and_decode_its_range(model):
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        posterior = model.vae.encode(images * 2 - 1).latent_dist
        assert torch.allclose(model.encode(images), posterior.mean * model.vae.config.scaling_factor,
                              atol=1e-5)
        decoded = model.vae.decode(posterior.mean).sample
        assert torch.allclose(model.decode(model.encode(images)), (decoded + 1) / 2, atol=1e-5)
    leaf = images.requires_grad_()
    model.decode(model.encode(leaf)).sum().backward()
    assert leaf.grad.abs().max() > 0


def test_embed_text_pads_and_truncates_to_the_models_length(model):
    length = model.tokenizer.model_max_length
    states = model.embed_text(["a star", "star " * 100])
    assert states.shape == (2, length, 32) and not states.requires_grad
    assert torch.allclose(model.embed_text("a star"), states[:1], atol=1e-6)


def test_load_is_frozen_and_in_the_asked_precision(tiny_model):
    model = LatentDiffusion.load(str(tiny_model), dtype=torch.bfloat16)
    for module in (model.text_encoder, model.vae, model.unet):
        parameters = list(module.parameters())
        assert parameters and not module.training
        assert not any(p.requires_grad for p in parameters)
        assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    assert model.embed_text("a star").dtype == model.encode(torch.rand(1, 3, 64, 64)).dtype == torch.bfloat16
    # The cast of the float32 weights, no other rounding.
    assert torch.equal(next(model.unet.parameters()),
                       next(LatentDiffusion.load(str(tiny_model)).unet.parameters()).bfloat16())


def test_a_model_with_a_missing_or_damaged_part_is_named(tiny_model, tmp_path):
    with pytest.raises(InputError, match="nowhere.*no folder here.*scheduler"):
        load_part(DDPMScheduler, str(tmp_path / "nowhere"), "scheduler")
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    whole = (copy / "text_encoder" / "model.safetensors").read_bytes()
    (copy / "text_encoder" / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="no usable text_encoder"):
        LatentDiffusion.load(str(copy))
    (copy / "text_encoder" / "model.safetensors").write_bytes(whole)
    shutil.rmtree(copy / "vae")
    with pytest.raises(InputError, match="no usable vae"):
        load_part(AutoencoderKL, str(copy), "vae")


def test_evaluating_restores_every_modules_own_mode():
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    network.train()
    network[1].eval()
    before = [part.training for part in network.modules()]
    with pytest.raises(KeyError):
        with evaluating(network):
            assert not any(part.training for part in network.modules())
            raise KeyError
    assert [part.training for part in network.modules()] == before == [True, True, False, False]
