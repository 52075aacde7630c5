"""ADM+: the two-stage gradient is the full one, has the closed form of a linear model,
and makes the loss rise."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from szt_utils.diffusion import LatentDiffusion
from szt_utils.errors import InputError
from szt_utils.objectives import (
    POISONS,
    denoising_objective,
    draw,
    find_poison,
    image_generator,
    image_gradient,
    measure,
    through_encoder,
)
from szt_utils.pgd import pgd

FULL_RANGE = dict(t_min=0, t_max=1000)
ADM = POISONS["adm+"]


def pictures(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(5)) / 255


def own_generators(images: torch.Tensor, seed: int = 0, purpose: str = "attack") -> list[torch.Generator]:
    return [image_generator(image, seed, purpose) for image in images]


@pytest.fixture(scope="module")
def model(tiny_model):
    return LatentDiffusion.load(str(tiny_model))


@pytest.mark.parametrize("folder", ["tiny_model", "tiny_velocity_model"])
@pytest.mark.parametrize("draws", [1, 3])
def test_two_stage_gradient_is_the_full_gradient(request, folder, draws):
    model = LatentDiffusion.load(str(request.getfixturevalue(folder)), dtype=torch.float64)
    images, text_states = pictures().double(), model.embed_text("a photo")
    gradient, values = image_gradient(ADM, model, text_states, own_generators(images), draws=draws,
                                      **FULL_RANGE)(images)

    leaf, generators = images.clone().requires_grad_(), own_generators(images)
    latents = model.encode(leaf)
    losses = []
    for _ in range(draws):
        noise, timesteps = draw(latents, generators, **FULL_RANGE)
        noised = model.scheduler.add_noise(latents, noise, timesteps)
        target = noise if folder == "tiny_model" else model.scheduler.get_velocity(latents, noise, timesteps)
        prediction = model.unet(noised, timesteps, text_states.expand(2, -1, -1)).sample
        losses.append((prediction - target).square().mean((1, 2, 3)))
    loss = torch.stack(losses).mean(0)
    (full,) = torch.autograd.grad(loss.sum(), leaf)
    assert full.abs().max() > 0
    # The shared loss is float32.
    assert torch.allclose(gradient, full, rtol=1e-5, atol=1e-6 * full.abs().max().item())
    assert torch.allclose(values.double(), loss, rtol=1e-5)


class LinearEncoder(nn.Module):
    """E(x) = B x, B a convolution over 8 x 8 cells, as a VAE of which only the posterior mean is used."""

    config = SimpleNamespace(scaling_factor=3.0)

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, 4, 8, stride=8, bias=False)

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=self.map(x)))


class LinearUNet(nn.Module):
    """eps_theta(z_t) = A z_t for every t and c, A a 4 x 4 matrix over the channels."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, z, timesteps, text_states):
        return SimpleNamespace(sample=self.map(z))


@pytest.fixture
def linear_model():
    torch.manual_seed(0)
    vae, unet = LinearEncoder().double().requires_grad_(False), LinearUNet().double().requires_grad_(False)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return LatentDiffusion(None, None, vae, unet, scheduler)


def test_closed_form_of_a_linear_model(linear_model):
    vae, unet, x = linear_model.vae, linear_model.unet, pictures(2, 16).double()
    gradient, values = image_gradient(ADM, linear_model, torch.zeros(1, 1, 1), own_generators(x),
                                      **FULL_RANGE)(x)

    # z0 = s B (2x - 1); z_t = a z0 + b n; L = |A z_t - n|^2 / N  =>  dL/dx = 2s B^T (2a/N) A^T (A z_t - n)
    z0 = 3 * vae.map(2 * x - 1)
    noise, t = draw(z0, own_generators(x), **FULL_RANGE)
    abar = linear_model.scheduler.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    residual = unet.map(abar.sqrt() * z0 + (1 - abar).sqrt() * noise) - noise
    at_latent = (2 * abar.sqrt() / z0[0].numel()
                 * torch.einsum("oi,bohw->bihw", unet.map.weight[:, :, 0, 0], residual))
    expected = 2 * 3 * nn.functional.conv_transpose2d(at_latent, vae.map.weight, stride=8)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert torch.allclose(values.double(), residual.square().mean((1, 2, 3)), rtol=1e-5)


def test_the_loss_rises_on_a_grid_that_the_attack_never_saw(linear_model):
    images, text_states = pictures(3, 16), torch.zeros(1, 1, 1)
    gradient = image_gradient(ADM, linear_model, text_states, own_generators(images), **FULL_RANGE)
    poisoned = pgd(images, gradient, eps=16, step_size=2, steps=20, ascend=ADM.ascend,
                   generators=own_generators(images))
    noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(11)).double()
    grid = [torch.full((3,), t) for t in range(50, 500, 50)]  # where the picture outweighs the noise

    def losses(pictures):
        z0 = linear_model.encode(pictures)
        return torch.stack([denoising_objective(linear_model, z0, noise, t, text_states) for t in grid])

    before, after = losses(images), losses(poisoned)
    assert len(before) == 9 and (after > 1.1 * before).all()


def test_the_loss_rises_through_a_real_architecture(model):
    images, text_states = pictures(2), model.embed_text("a photo")

    def gradient(pictures):  # the same draws at every call: a random U-Net tells nothing about others
        return image_gradient(ADM, model, text_states, own_generators(images), draws=2,
                              **FULL_RANGE)(pictures)

    state = torch.get_rng_state()
    poisoned = pgd(images, gradient, eps=16, step_size=4, steps=6, ascend=ADM.ascend,
                   generators=own_generators(images))
    assert torch.equal(torch.get_rng_state(), state)
    before, after = (measure(ADM, model, pictures, text_states, own_generators(images), draws=2, **FULL_RANGE)
                     for pictures in (images, poisoned))
    assert (after > before + 1e-3).all()


def test_one_unet_pass_per_draw_one_vae_backward_and_never_both_graphs(model, monkeypatch):
    events = []
    encode, forward = model.vae.encode, model.unet.forward
    monkeypatch.setattr(model.vae, "encode",
                        lambda x: events.append(("vae", torch.is_grad_enabled())) or encode(x))
    monkeypatch.setattr(model.unet, "forward",
                        lambda *args: events.append(("unet", torch.is_grad_enabled())) or forward(*args))
    images = pictures(1)
    image_gradient(ADM, model, model.embed_text("a photo"), own_generators(images), draws=3,
                   **FULL_RANGE)(images)
    assert events == [("vae", False), *[("unet", True)] * 3, ("vae", True)]


def test_the_encoder_carries_any_cotangent_at_its_true_scale(model):
    images = pictures(2)
    direction = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    scales = torch.tensor([1e-12, 1e6]).view(2, 1, 1, 1)
    gradient, _ = through_encoder(model, images, lambda z: (direction * scales, torch.zeros(2)))
    leaf = images.clone().requires_grad_()
    (plain,) = torch.autograd.grad(model.encode(leaf), leaf, direction)
    assert torch.allclose(gradient / scales, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    zero, _ = through_encoder(model, images, lambda z: (torch.zeros_like(z), torch.zeros(2)))
    assert not zero.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_a_float32_gradient_of_the_same_direction(tiny_model, model, dtype):
    half, images = LatentDiffusion.load(str(tiny_model), dtype=dtype), pictures(1)
    exact, rough = (image_gradient(ADM, m, m.embed_text("a photo"), own_generators(images),
                                   t_min=100, t_max=400)(images)[0] for m in (model, half))
    assert rough.dtype == torch.float32
    assert torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.9
    assert rough.norm() / exact.norm() == pytest.approx(1, abs=0.2)


def test_draws_depend_on_the_picture_and_the_seed_and_nothing_else():
    images, latents, state = pictures(3), torch.zeros(3, 4, 8, 8), torch.get_rng_state()
    noise, timesteps = draw(latents, own_generators(images), 200, 700)
    order = [2, 0, 1]
    again, timesteps_again = draw(latents, own_generators(images[order]), 200, 700)
    assert torch.equal(again, noise[order]) and torch.equal(timesteps_again, timesteps[order])
    assert torch.equal(draw(latents[:1], own_generators(images[:1]), 200, 700)[0], noise[:1])

    nearly = images.clone()
    nearly[0, 0, 0, 0] = 1 - nearly[0, 0, 0, 0]
    for other in (own_generators(images, seed=1), own_generators(images, purpose="measure"),
                  own_generators(nearly)):
        assert not torch.equal(draw(latents, other, 200, 700)[0][0], noise[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_timesteps_fill_the_half_open_range_and_the_noise_is_normal():
    generator, latents = image_generator(pictures(1)[0], 0), torch.zeros(1, 4, 8, 8)
    draws = [draw(latents, [generator], 500, 504) for _ in range(100)]
    assert {t.item() for _, t in draws} == {500, 501, 502, 503}
    noise = torch.cat([noise for noise, _ in draws])
    assert abs(noise.mean()) < 0.03 and noise.std().item() == pytest.approx(1, abs=0.03)
    assert draw(latents.bfloat16(), [generator], 0, 10)[0].dtype == torch.bfloat16


def test_measure_repeats_with_equal_generators(model):
    images, text_states = pictures(1), model.embed_text("a photo")
    first, second = (measure(ADM, model, images, text_states, own_generators(images), draws=2, **FULL_RANGE)
                     for _ in range(2))
    other = measure(ADM, model, images, text_states, own_generators(images, seed=1), draws=2, **FULL_RANGE)
    assert torch.equal(first, second) and not torch.equal(first, other) and not first.requires_grad


def test_unknown_poisons_list_the_choices():
    assert POISONS and all(find_poison(name) is poison for name, poison in POISONS.items())
    with pytest.raises(InputError, match=r"Unknown poison 'adm'; choose from: adm\+"):
        find_poison("adm")
