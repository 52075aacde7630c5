"""The poisons: their two-stage gradients are the full ones, have the closed forms of a linear model, and move
the objective the right way; adaptive attacks see what the defence lets through."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DDIMScheduler, DDPMScheduler
from torch import nn

from szt_utils import poisons
from szt_utils.errors import InputError
from szt_utils.image_rng import image_generator
from szt_utils.jpeg import jpeg_tensor
from szt_utils.models import expand, load_model, tokenize
from szt_utils.models.stable_diffusion import StableDiffusion
from szt_utils.pgd import pgd
from szt_utils.poisons import (
    POISONS,
    Victim,
    find_poison,
    image_gradient,
    image_to_image,
    measure_objective,
    sample_noise_and_timesteps,
    target_pattern,
)
from szt_utils.safe_zone import SafeZone

ADM, SDS, EA, DA = (POISONS[name] for name in ("adm+", "sds+", "ea", "da"))


def images_of(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(5)) / 255


def own_generators(images: torch.Tensor, seed: int = 0, purpose: str = "attack") -> list[torch.Generator]:
    return [image_generator(image, seed, purpose) for image in images]


def draw(latents: torch.Tensor, generators: list[torch.Generator], t_min: int = 0, t_max: int = 1000):
    return sample_noise_and_timesteps(latents, generators, SafeZone(t_min=t_min, t_max=t_max), 1000)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(str(tiny_model))


def victim_of(model, **options) -> Victim:
    condition, empty = (model.condition(tokenize(model, prompt)) for prompt in ("a photo", ""))
    return Victim(model, condition, empty=model.unprompted(empty), **options)


@pytest.fixture(scope="module")
def victim(model):
    return victim_of(model, target=target_pattern(64, 64))


@pytest.mark.parametrize("folder", ["tiny_model", "tiny_velocity_model", "tiny_sdxl"])
@pytest.mark.parametrize("draws", [1, 3])
def test_two_stage_gradient_is_the_full_gradient(request, folder, draws):
    model = load_model(str(request.getfixturevalue(folder)), dtype=torch.float64)
    images, victim = images_of().double(), victim_of(model, draws=draws)
    gradient, values = image_gradient(ADM, victim, own_generators(images))(images)

    leaf, generators = images.clone().requires_grad_(), own_generators(images)
    latents = model.encode(leaf)
    losses = []
    for _ in range(draws):
        noise, timesteps = draw(latents, generators, 0, 1000)
        noised = model.scheduler.add_noise(latents, noise, timesteps)
        velocity = folder == "tiny_velocity_model"
        target = model.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        prediction = model.predict(noised, timesteps, expand(victim.condition, 2))
        losses.append((prediction - target).square().mean((1, 2, 3)))
    loss = torch.stack(losses).mean(0)
    (full,) = torch.autograd.grad(loss.sum(), leaf)
    assert full.abs().max() > 0
    # The shared loss is float32.
    assert torch.allclose(gradient, full, rtol=1e-5, atol=1e-6 * full.abs().max().item())
    assert torch.allclose(values.double(), loss, rtol=1e-5)


class LinearEncoder(nn.Module):
    """E(x) = B x, B a convolution over 8 x 8 cells, as a VAE of which only the mean is used."""

    config = SimpleNamespace(scaling_factor=3.0, block_out_channels=(1, 1, 1, 1))
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, 4, 8, stride=8, bias=False)

    @property
    def dtype(self):
        return self.map.weight.dtype

    def encode(self, x):
        mean = self.map(x)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.cat([mean, mean], dim=1)))


class LinearNetwork(nn.Module):
    """eps_theta(z_t) = A z_t for every t and c, A a 4 x 4 matrix over the channels."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, z, timesteps, states):
        return SimpleNamespace(sample=self.map(z))


@pytest.fixture
def linear_victim():
    torch.manual_seed(0)
    vae, network = (part().double().requires_grad_(False) for part in (LinearEncoder, LinearNetwork))
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return Victim(StableDiffusion("linear", [], [], vae, network, scheduler),
                  {"states": torch.zeros(1, 1, 1)})


def linear_parts(victim, x):
    """z0 = s B (2x - 1), r = A z_t - n for the victim's first draw, and sqrt(abar)."""
    z0 = 3 * victim.model.vae.map(2 * x - 1)
    noise, t = draw(z0, own_generators(x))
    abar = victim.model.scheduler.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    return z0, victim.model.network.map(abar.sqrt() * z0 + (1 - abar).sqrt() * noise) - noise, abar.sqrt()


def to_pixels(victim, at_latent):
    """dz0/dx^T = 2 s B^T."""
    return 2 * 3 * nn.functional.conv_transpose2d(at_latent, victim.model.vae.map.weight, stride=8)


def close(a, b):
    return torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_closed_form_of_adm(linear_victim):
    x = images_of(2, 16).double()
    gradient, values = image_gradient(ADM, linear_victim, own_generators(x))(x)
    # L = |A z_t - n|^2 / N  =>  dL/dz0 = (2a / N) A^T (A z_t - n)
    z0, residual, a = linear_parts(linear_victim, x)
    A = linear_victim.model.network.map.weight[:, :, 0, 0]
    assert close(gradient, to_pixels(linear_victim, 2 * a / z0[0].numel()
                                     * torch.einsum("oi,bohw->bihw", A, residual)))
    assert torch.allclose(values.double(), residual.square().mean((1, 2, 3)), rtol=1e-5)


def test_closed_form_of_sds_leaves_out_the_jacobian_of_the_unet(linear_victim):
    x = images_of(2, 16).double()
    gradient, values = image_gradient(SDS, linear_victim, own_generators(x))(x)
    z0, residual, _ = linear_parts(linear_victim, x)
    assert close(gradient, to_pixels(linear_victim, residual / z0[0].numel()))
    assert torch.allclose(values.double(), residual.square().mean((1, 2, 3)), rtol=1e-5)


def test_closed_form_of_the_encoder_attack(linear_victim):
    x, target = images_of(2, 16).double(), target_pattern(16, 16).double()
    victim = replace(linear_victim, target=target)
    gradient, values = image_gradient(EA, victim, own_generators(x))(x)
    z0 = 3 * victim.model.vae.map(2 * x - 1)
    distance = z0 - 3 * victim.model.vae.map(2 * target - 1)
    assert close(gradient, to_pixels(victim, 2 * distance / z0[0].numel()))
    assert torch.allclose(values.double(), distance.square().mean((1, 2, 3)), rtol=1e-5)
    towards_zero, _ = image_gradient(EA, linear_victim, own_generators(x))(x)
    assert close(towards_zero, to_pixels(victim, 2 * z0 / z0[0].numel()))


def test_a_loss_mask_counts_pixels_of_what_the_diffusion_attack_generates(victim):
    images, mask = images_of(1), torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    victim = replace(victim, loss_mask=mask, chain_steps=1)
    with torch.no_grad():
        latents = victim.model.encode(images)
        noise = torch.randn(latents.shape[1:], generator=own_generators(images)[0])
        error = (image_to_image(victim, latents, noise[None]) - victim.target).square()
        value = DA.objective(victim, latents, own_generators(images))
    assert value.item() == pytest.approx(error[..., :32].mean().item(), rel=1e-5)


@pytest.mark.parametrize("poison", [ADM, SDS, EA])
def test_a_loss_mask_attacks_its_cells_and_nothing_else(linear_victim, poison):
    x, mask = images_of(2, 32).double(), torch.zeros(2, 1, 32, 32)
    mask[0, :, :16, 8:], mask[1, :, 24:, :8] = 1, 1
    whole, _ = image_gradient(poison, linear_victim, own_generators(x))(x)
    inside, values = image_gradient(poison, replace(linear_victim, loss_mask=mask), own_generators(x))(x)
    # A linear encoder of separate cells: a mean over the mask's 6 (or 1) of 16 cells.
    scale = torch.tensor([16 / 6, 16]) if poison is not SDS else torch.ones(2)
    assert close(inside, whole * mask * scale.view(-1, 1, 1, 1))
    z0, residual, _ = linear_parts(linear_victim, x)
    error = (z0 if poison is EA else residual).square()
    expected = torch.stack([error[0, :, :2, 1:].mean(), error[1, :, 3, 0].mean()])
    assert torch.allclose(values.double(), expected, rtol=1e-5)


def test_up_and_down_take_opposite_first_steps(linear_victim):
    x = torch.full((1, 3, 16, 16), 128 / 255)
    for up, down in (("adm+", "adm-"), ("sds+", "sds-")):
        moved = [pgd(x, image_gradient(poison, linear_victim, own_generators(x)), eps=4, step_size=1, steps=1,
                     ascend=poison.ascend) - x for poison in (POISONS[up], POISONS[down])]
        assert moved[0].any() and torch.equal(moved[0], -moved[1])


@pytest.mark.parametrize("name", ["adm+", "adm-", "ea"])
def test_the_objective_moves_on_a_grid_that_the_attack_never_saw(linear_victim, name):
    images, poison = images_of(3, 16), POISONS[name]
    victim = replace(linear_victim, target=target_pattern(16, 16).double())
    poisoned = pgd(images, image_gradient(poison, victim, own_generators(images)), eps=16, step_size=2,
                   steps=20, ascend=poison.ascend, generators=own_generators(images))
    # Where the image outweighs the noise.
    grid = [replace(victim, zone=SafeZone(t_min=t, t_max=t + 1)) for t in range(50, 500, 50)]

    def objectives_of(x):
        return torch.stack([poison.objective(at, at.model.encode(x), own_generators(images, purpose="grid"))
                            for at in grid])
    before, after = objectives_of(images), objectives_of(poisoned)
    assert len(before) == 9
    # Downwards, the noise that the model cannot know is a floor.
    assert (after > 1.1 * before).all() if poison.ascend else (after < before).all()


@pytest.mark.parametrize("folder, name", [*(("tiny_model", name) for name in POISONS),
                                          ("tiny_sdxl", "adm+"), ("tiny_sdxl", "da")])
def test_the_objective_moves_through_a_real_architecture(request, folder, name):
    images, poison = images_of(2), POISONS[name]
    victim = victim_of(load_model(str(request.getfixturevalue(folder))), draws=2, chain_steps=2,
                       target=target_pattern(64, 64))

    def gradient(poisoned):  # the same draws at every call: a random U-Net predicts nothing about others
        return image_gradient(poison, victim, own_generators(images))(poisoned)

    state = torch.get_rng_state()
    poisoned = pgd(images, gradient, eps=16, step_size=4, steps=6, ascend=poison.ascend,
                   generators=own_generators(images) if poison.random_start else None)
    assert torch.equal(torch.get_rng_state(), state)
    before, after = (measure_objective(poison, victim, x, own_generators(images), draws=2)
                     for x in (images, poisoned))
    # SDS does not follow the gradient: on random weights it promises nothing about the loss.
    assert name.startswith("sds") or ((after > before) if poison.ascend else (after < before)).all()
    assert not torch.equal(after, before)


def test_sds_is_the_residual_carried_back_without_a_graph_of_the_unet(model, victim):
    images = images_of(2)
    gradient, _ = image_gradient(SDS, victim, own_generators(images))(images)
    leaf = images.clone().requires_grad_()
    latents = model.encode(leaf)
    noise, timesteps = draw(latents, own_generators(images), 0, 1000)
    with torch.no_grad():
        noised = model.scheduler.add_noise(latents, noise, timesteps)
        error = model.network(noised, timesteps, victim.condition["states"].expand(2, -1, -1)).sample - noise
    (expected,) = torch.autograd.grad(latents, leaf, error / error[0].numel())
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name,one_graph,expected", [
    ("adm+", False, [("vae", False), *[("network", True)] * 3, ("vae", True)]),
    ("adm+", True, [("vae", True), *[("network", True)] * 3]),
    ("sds-", False, [("vae", True), *[("network", False)] * 3]),
    ("ea", False, [("vae", True)])])
def test_one_network_pass_per_draw_one_vae_backward_and_never_both_graphs_unasked(
        model, victim, monkeypatch, name, one_graph, expected):
    events = []
    encode, forward = model.vae.encode, model.network.forward
    monkeypatch.setattr(model.vae, "encode",
                        lambda x: events.append(("vae", torch.is_grad_enabled())) or encode(x))
    monkeypatch.setattr(model.network, "forward",
                        lambda *args: events.append(("network", torch.is_grad_enabled())) or forward(*args))
    victim, images = replace(victim, draws=1 if name == "ea" else 3, one_graph=one_graph), images_of(1)
    assert torch.is_tensor(victim.target_latent)  # encoded once, before the first step
    events.clear()
    image_gradient(POISONS[name], victim, own_generators(images))(images)
    assert events == expected


def test_one_graph_changes_no_bit(victim):
    images = images_of(2)
    twice, once = (image_gradient(ADM, replace(victim, one_graph=one_graph, random_jpeg=(15, 95)),
                                  own_generators(images))(images)[0] for one_graph in (False, True))
    assert torch.equal(twice, once) and twice.any()


def test_checkpointing_the_chain_changes_no_gradient(model, victim, monkeypatch):
    images, passes, forward = images_of(1), [], model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda *args: passes.append(1) or forward(*args))
    checkpointed, _ = image_gradient(DA, victim, own_generators(images))(images)
    assert len(passes) == 2 * 4  # forward once more in the backward pass: nothing was kept
    monkeypatch.setattr(poisons, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    plain, _ = image_gradient(DA, victim, own_generators(images))(images)
    assert len(passes) == 3 * 4 and plain.any()
    assert torch.allclose(checkpointed, plain, rtol=1e-4, atol=1e-6 * plain.abs().max().item())


@pytest.mark.parametrize("folder, chain_steps, strength, steps", [
    *((folder, 4, 0.8, 5) for folder in ("tiny_model", "tiny_velocity_model", "tiny_sdxl")),
    ("tiny_model", 4, 0.7, 6), ("tiny_model", 3, 0.55, 5)])  # of 5.7 and 5.5 steps, the nearest
def test_the_chain_is_diffusers_image_to_image(request, folder, chain_steps, strength, steps):
    folder = str(request.getfixturevalue(folder))
    victim = victim_of(load_model(folder), chain_steps=chain_steps, strength=strength, guidance_scale=3.0)
    pipeline = AutoPipelineForImage2Image.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(["a photo"] * 2, image=latents, strength=chain_steps / steps, num_inference_steps=steps,
                      guidance_scale=3.0, generator=torch.Generator().manual_seed(4),
                      output_type="pt").images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        ours = image_to_image(victim, latents, noise)
    assert theirs.std() > 0.01 and torch.allclose(ours.clamp(0, 1), theirs, atol=1e-4)


@pytest.mark.parametrize("poison", [ADM, SDS, EA])
def test_an_attack_through_jpeg_is_the_plain_one_at_the_compressed_image(victim, poison):
    images = images_of(2)
    adaptive = replace(victim, zone=SafeZone(jpeg_quality=25))
    through, values = image_gradient(poison, adaptive, own_generators(images))(images)
    compressed, generators = jpeg_tensor(images, 25), own_generators(images)
    for generator in generators:
        torch.randint(25, 26, (), generator=generator)  # the draw of the quality
    plain, plain_values = image_gradient(poison, victim, generators)(compressed)
    # Straight through, x + (jpeg(x) - x) rounds.
    assert torch.allclose(through, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
    assert torch.allclose(values, plain_values, rtol=1e-5) and not torch.equal(compressed, images)


def test_every_gradient_draws_its_quality_anew(victim, monkeypatch):
    qualities, original = [], poisons.jpeg_straight_through
    monkeypatch.setattr(poisons, "jpeg_straight_through",
                        lambda image, quality: qualities.append(quality) or original(image, quality))
    images = images_of(2)
    gradient = image_gradient(ADM, replace(victim, random_jpeg=(15, 95)), own_generators(images))
    for _ in range(20):
        gradient(images)
    first, second = qualities[0::4], qualities[1::4]
    assert qualities[2::4] == first and qualities[3::4] == second  # with and without a graph: the same
    assert first != second and len(set(first + second)) > 10 and 15 <= min(qualities) and max(qualities) <= 95


def test_the_target_pattern_has_the_highest_contrast():
    pattern = target_pattern(96, 64)
    assert pattern.shape == (1, 3, 96, 64) and set(pattern.unique().tolist()) == {0.0, 1.0}
    assert 0.4 < pattern.mean() < 0.6


@pytest.mark.parametrize("dim", [-1, -2])
def test_the_target_pattern_mirrored_is_its_negative(dim):
    """Rings are their own mirror image, but mirrored squares of the checkerboard have the other color."""
    pattern = target_pattern(96, 64)
    assert (pattern != pattern.flip(dim)).float().mean() > 0.95


def test_the_encoder_carries_any_cotangent_at_its_true_scale(model, victim):
    images = images_of(2)
    direction = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    scales = torch.tensor([1e-12, 1e6]).view(2, 1, 1, 1)

    def carried(cotangent):
        poison = replace(SDS, gradient=lambda victim, latents, generators: (cotangent, torch.zeros(2)))
        return image_gradient(poison, victim, own_generators(images))(images)[0]

    leaf = images.clone().requires_grad_()
    (plain,) = torch.autograd.grad(model.encode(leaf), leaf, direction)
    gradient = carried(direction * scales)
    assert torch.allclose(gradient / scales, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    assert not carried(torch.zeros_like(direction)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_a_float32_gradient_of_the_same_direction(tiny_model, model, dtype):
    half, images = load_model(str(tiny_model), dtype=dtype), images_of(1)
    zone = SafeZone(t_min=100, t_max=400)
    exact, rough = (image_gradient(ADM, victim_of(m, zone=zone), own_generators(images))(images)[0]
                    for m in (model, half))
    assert rough.dtype == torch.float32
    assert torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.9
    assert rough.norm() / exact.norm() == pytest.approx(1, abs=0.2)


def test_draws_depend_on_the_image_and_the_seed_and_nothing_else():
    images, latents, state = images_of(3), torch.zeros(3, 4, 8, 8), torch.get_rng_state()
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
    generator, latents = image_generator(images_of(1)[0], 0), torch.zeros(1, 4, 8, 8)
    draws = [draw(latents, [generator], 500, 504) for _ in range(100)]
    assert {t.item() for _, t in draws} == {500, 501, 502, 503}
    noise = torch.cat([noise for noise, _ in draws])
    assert abs(noise.mean()) < 0.03 and noise.std().item() == pytest.approx(1, abs=0.03)
    assert draw(latents.bfloat16(), [generator], 0, 10)[0].dtype == torch.bfloat16


def test_the_measured_objective_is_the_mean_over_its_draws(victim):
    images, generators = images_of(2), own_generators(images_of(2))
    with torch.no_grad():
        latents = victim.model.encode(images)
        each = [ADM.objective(victim, latents, generators) for _ in range(3)]
    found = measure_objective(ADM, victim, images, own_generators(images), draws=3)
    assert torch.allclose(found, torch.stack(each).mean(0))


def test_the_objective_repeats_with_equal_generators(victim):
    images = images_of(1)
    first, second = (measure_objective(ADM, victim, images, own_generators(images), draws=2)
                     for _ in range(2))
    other = measure_objective(ADM, victim, images, own_generators(images, seed=1), draws=2)
    assert torch.equal(first, second) and not torch.equal(first, other) and not first.requires_grad


def test_a_batch_is_as_good_as_its_images_alone(tiny_model):
    victim, images = victim_of(load_model(str(tiny_model), dtype=torch.float64)), images_of(3)

    def attacked(images):
        return pgd(images, image_gradient(ADM, victim, own_generators(images)), eps=8, step_size=2, steps=3,
                   generators=own_generators(images))
    together, alone = attacked(images), torch.cat([attacked(image) for image in images.split(1)])
    assert torch.equal(together, alone) and not torch.equal(together, images)


def test_adm_and_ea_start_at_random_and_the_others_at_the_image():
    assert [name for name, poison in POISONS.items() if poison.random_start] == ["adm+", "adm-", "ea"]


def test_unknown_poisons_list_the_choices():
    assert POISONS and all(find_poison(name) is poison for name, poison in POISONS.items())
    with pytest.raises(InputError, match=r"Unknown poison 'adm'; choose from: adm\+"):
        find_poison("adm")
