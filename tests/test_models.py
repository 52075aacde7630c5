"""One contract for every model family, on tiny random models; the residual against closed forms."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_sdxl
from diffusers import AutoencoderKL, DDPMScheduler

from szt_utils.errors import InputError
from szt_utils.models import evaluating, expand, find_family, load_model, residual, tokenize
from szt_utils.models.parts import load_part

FAMILIES = {"epsilon": "Stable Diffusion", "velocity": "Stable Diffusion", "terminal": "Stable Diffusion",
            "sdxl": "SDXL"}
WIDTHS = {"Stable Diffusion": 32, "SDXL": 32 + 24}


@pytest.fixture(scope="module")
def folders(tiny_model, tiny_velocity_model, tmp_path_factory):
    """A folder of every family and prediction; "terminal" is a velocity model with zero terminal SNR."""
    terminal = shutil.copytree(tiny_velocity_model, tmp_path_factory.mktemp("terminal") / "model")
    scheduler = DDPMScheduler.from_pretrained(terminal, subfolder="scheduler")
    DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True).save_pretrained(
        terminal / "scheduler")
    return {"epsilon": tiny_model, "velocity": tiny_velocity_model, "terminal": terminal,
            "sdxl": build_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def model(folders, name):
    return load_model(str(folders[name]))


@torch.no_grad()
def a_batch(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))
    condition = model.condition(tokenize(model, ["a star", "a photo of a ring", ""]))
    return latents, noise, torch.tensor([3, 500, 999]), condition


@torch.no_grad()
def loss(*arguments, **options):
    return residual(*arguments, **options).square()


def one(condition, i):
    return {key: value[i:i + 1] for key, value in condition.items()}


# --- The contract

def test_the_family_is_found_and_its_parts_are_frozen(model, name, folders):
    assert model.family == find_family(str(folders[name])).family == FAMILIES[name]
    assert len(model.tokenizers) == len(model.text_encoders) == (2 if name == "sdxl" else 1)
    assert (model.num_timesteps, model.vae_scale_factor) == (1000, 8)
    for module in (*model.text_encoders, model.vae, model.network):
        parameters = list(module.parameters())
        assert parameters and not module.training and not any(p.requires_grad for p in parameters)


@pytest.mark.parametrize("dtype, text_dtype", [(torch.bfloat16, None), (torch.bfloat16, torch.float32)])
def test_every_part_has_the_precision_that_was_asked_for(folders, name, dtype, text_dtype):
    model = load_model(str(folders[name]), dtype=dtype, text_dtype=text_dtype)
    assert {p.dtype for part in (model.vae, model.network) for p in part.parameters()} == {dtype}
    assert {p.dtype for encoder in model.text_encoders for p in encoder.parameters()} == {text_dtype or dtype}
    assert (model.dtype, model.device) == (dtype, torch.device("cpu"))
    latents = model.encode(torch.rand(1, 3, 64, 64))
    condition = model.condition(tokenize(model, "a star"))
    assert latents.dtype == dtype and {value.dtype for value in condition.values()} == {dtype}
    # The cast of the float32 weights, no other rounding.
    whole = load_model(str(folders[name]))
    assert torch.equal(next(model.network.parameters()), next(whole.network.parameters()).to(dtype))


def test_moments_latents_and_the_encoders_mean_agree(model):
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        moments = model.moments(images)
        posterior = model.vae.encode(images * 2 - 1).latent_dist
        scale = model.vae.config.scaling_factor
        assert moments.shape == (2, 8, 8, 8)
        assert torch.allclose(model.encode(images), posterior.mean * scale, atol=1e-5)
        drawn = model.latents(moments, torch.Generator().manual_seed(5))
        noise = (drawn / scale - posterior.mean) / posterior.std
        again = model.latents(moments, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, again) and abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2


def test_decode_gives_images_and_gradients_flow_through_both(model):
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    latents = model.encode(images)
    decoded = model.decode(latents)
    expected = (model.vae.decode(latents / model.vae.config.scaling_factor).sample + 1) / 2
    assert decoded.dtype == torch.float32 and torch.allclose(decoded, expected, atol=1e-5)
    decoded.sum().backward()
    assert images.grad.abs().max() > 0


def test_a_condition_is_one_row_per_prompt(model):
    length = model.tokenizers[0].model_max_length
    with torch.no_grad():
        condition = model.condition(tokenize(model, ["a star", "star " * 100]))
        alone = model.condition(tokenize(model, "a star"))
    assert condition["states"].shape == (2, length, WIDTHS[model.family])
    for key, value in expand(alone, 3).items():
        assert value.shape == (3, *condition[key].shape[1:])
        assert torch.allclose(value[2], condition[key][0], atol=1e-6)


def test_every_sample_has_its_own_timestep_text_and_noise(model):
    latents, noise, timesteps, condition = a_batch(model)
    together = loss(model, latents, noise, timesteps, condition)
    for i in range(3):
        alone = loss(model, latents[i:i + 1], noise[i:i + 1], timesteps[i:i + 1], one(condition, i))
        assert torch.allclose(together[i:i + 1], alone, atol=1e-4)


def test_residual_follows_the_closed_forms_of_noise_and_target(model, name):
    latents, noise, timesteps, condition = a_batch(model)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    roots = torch.cumprod(1 - betas, 0).sqrt()
    if name == "terminal":  # Lin et al. 2024: shifted and scaled so that the last root is 0, the first stays
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    signal = roots[timesteps].view(-1, 1, 1, 1)
    spread = (1 - signal**2).sqrt()
    target = noise if name in ("epsilon", "sdxl") else signal * noise - spread * latents
    noised = signal * latents + spread * noise
    assert torch.allclose(model.noised(latents, noise, timesteps), noised, atol=1e-3)
    assert torch.allclose(model.target(latents, noise, timesteps), target, atol=1e-3)
    with torch.no_grad():
        prediction = model.predict(noised, timesteps, condition)
    error = loss(model, latents, noise, timesteps, condition)
    assert error.shape == latents.shape and error.dtype == torch.float32
    # Rescaling to zero terminal SNR is done in float32, where the closed form is not.
    absolute, relative = (2e-3, 1e-3) if name == "terminal" else (1e-4, 1e-5)
    assert torch.allclose(error, (prediction - target) ** 2, rtol=1e-3, atol=absolute)
    assert torch.allclose(error.mean(), F.mse_loss(prediction, target), rtol=relative)


def test_log_snr_is_that_of_the_schedule(model, name):
    found = model.log_snr(torch.tensor([0, 500, 999]))
    assert found.dtype == torch.float64 and (found.diff() < 0).all()
    if name == "terminal":
        assert found[-1] < -15  # nearly no signal is left
    else:
        assert found[1] == pytest.approx(-0.963, abs=1e-3)


def test_a_latent_mask_hides_the_noised_latent_but_not_the_target(model, name):
    latents, noise, timesteps, condition = a_batch(model)
    mask = torch.zeros(3, 1, 8, 8)
    mask[..., :4] = 1
    other = latents.clone()
    other[..., 4:] += 5
    blind = model.predict(torch.zeros_like(latents), timesteps, condition)
    masked, full, nothing = (loss(model, latents, noise, timesteps, condition, latent_mask=m)
                             for m in (mask, torch.ones_like(mask), torch.zeros_like(mask)))
    plain = loss(model, latents, noise, timesteps, condition)
    assert torch.equal(full, plain) and not torch.allclose(masked, plain)
    assert torch.allclose(nothing, (blind - model.target(latents, noise, timesteps)) ** 2, atol=1e-5)
    if name in ("epsilon", "sdxl"):  # whose target is the noise alone
        assert torch.equal(masked, loss(model, other, noise, timesteps, condition, latent_mask=mask))


def test_the_pipeline_has_the_models_own_parts(model):
    pipeline = model.pipeline()
    assert pipeline.unet is model.network and pipeline.vae is model.vae
    assert pipeline.text_encoder is model.text_encoders[0] and pipeline.tokenizer is model.tokenizers[0]
    if model.family == "SDXL":
        assert pipeline.text_encoder_2 is model.text_encoders[1]
        assert pipeline.tokenizer_2 is model.tokenizers[1]
    model.vae = None  # as after the latents have been cached: it comes from the files again
    fresh = model.pipeline()
    assert fresh.vae is not None and fresh.unet is model.network
    assert model.pipeline(from_files=True).unet is not model.network


def test_a_pipeline_gives_the_condition_that_the_model_computes(model):
    """What training sees of a prompt is what a user's pipeline will see."""
    pipeline = model.pipeline()
    with torch.no_grad():
        condition = model.condition(tokenize(model, "a photo of a star"))
        encoded = pipeline.encode_prompt("a photo of a star", device="cpu", num_images_per_prompt=1,
                                         do_classifier_free_guidance=False)
    assert torch.allclose(condition["states"], encoded[0], atol=1e-5)
    if model.family == "SDXL":
        assert torch.allclose(condition["pooled"], encoded[2], atol=1e-5)


# --- SDXL

def test_sdxl_is_told_the_sizes_and_by_default_those_of_an_image_that_was_not_cropped(folders, monkeypatch):
    model, seen = load_model(str(folders["sdxl"])), []
    forward = model.network.forward

    def recording(*arguments, **options):
        seen.append(options["added_cond_kwargs"]["time_ids"])
        return forward(*arguments, **options)

    monkeypatch.setattr(model.network, "forward", recording)
    latents, noise, timesteps, condition = a_batch(model)
    plain = loss(model, latents, noise, timesteps, condition)
    sizes = torch.tensor([[64, 64, 0, 0]] * 2 + [[480, 640, 0, 12]])
    with torch.no_grad():
        given = model.condition(tokenize(model, ["a star", "a photo of a ring", ""]), sizes)
    other = loss(model, latents, noise, timesteps, given)
    assert seen[0].tolist() == [[64, 64, 0, 0, 64, 64]] * 3
    assert seen[1].tolist() == [[64, 64, 0, 0, 64, 64]] * 2 + [[480, 640, 0, 12, 64, 64]]
    assert torch.allclose(plain[:2], other[:2], atol=1e-5)
    assert not torch.allclose(plain[2], other[2], atol=1e-5)


def test_a_vae_that_overflows_in_half_precision_stays_in_float32(folders, tmp_path):
    assert load_model(str(folders["sdxl"]), dtype=torch.float16).vae.dtype == torch.float32
    assert load_model(str(folders["epsilon"]), dtype=torch.float16).vae.dtype == torch.float16
    copy = shutil.copytree(folders["sdxl"], tmp_path / "model")
    vae = AutoencoderKL.from_pretrained(copy, subfolder="vae")
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(copy / "vae")
    assert load_model(str(copy), dtype=torch.float16).vae.dtype == torch.float16


# --- The residual without a model

class Oracle:
    """A model that knows the answer."""

    def __init__(self, answer):
        self.answer = answer

    def noised(self, latents, noise, timesteps):
        return DDPMScheduler().add_noise(latents, noise, timesteps)

    def target(self, latents, noise, timesteps):
        return noise

    def predict(self, noised, timesteps, condition):
        return self.answer


def test_a_perfect_prediction_has_no_loss_and_half_precision_gives_float32():
    latents, noise = torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 4, 8, 8).bfloat16()
    error = loss(Oracle(noise), latents, noise, torch.tensor([0, 999]), {})
    assert error.dtype == torch.float32 and not error.any()
    error = loss(Oracle(noise + 2), latents, noise, torch.tensor([0, 999]), {})
    assert torch.allclose(error, torch.full_like(error, 4), atol=0.1)


# --- Folders that cannot be used

def test_a_model_that_predicts_something_else_is_refused(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    DDPMScheduler(prediction_type="sample").save_pretrained(copy / "scheduler")
    with pytest.raises(InputError, match="'sample'; only 'epsilon' and 'v_prediction'"):
        load_model(str(copy))


def test_another_family_is_refused_before_its_weights_are_read(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text().replace('"addition_embed_type": null',
                                                 '"addition_embed_type": "image"'))
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match="takes 'image' embeddings; only Stable Diffusion and SDXL"):
        load_model(str(copy))


def test_a_model_with_a_missing_or_damaged_part_is_named(tiny_model, tmp_path):
    with pytest.raises(InputError, match="nowhere.*no folder here.*unet"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere.*no folder here.*scheduler"):
        load_part(DDPMScheduler, str(tmp_path / "nowhere"), "scheduler")
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    whole = (copy / "text_encoder" / "model.safetensors").read_bytes()
    (copy / "text_encoder" / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="no usable text_encoder"):
        load_model(str(copy))
    (copy / "text_encoder" / "model.safetensors").write_bytes(whole)
    shutil.rmtree(copy / "vae")
    with pytest.raises(InputError, match="no usable vae"):
        load_model(str(copy))


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
