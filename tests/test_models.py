"""One contract for every model family, on tiny random models; the residual against closed forms."""

import json
import math
import shutil
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_sdxl
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from szt_utils.errors import InputError
from szt_utils.files import write_json
from szt_utils.models import (
    check_length,
    evaluating,
    expand,
    find_family,
    load_model,
    min_snr_weights,
    residual,
    tokenize,
)
from szt_utils.models.parts import file_precision, load_part

FAMILIES = {"epsilon": "Stable Diffusion", "velocity": "Stable Diffusion", "terminal": "Stable Diffusion",
            "sdxl": "SDXL", "sd3": "Stable Diffusion 3", "flux": "FLUX"}
ENCODERS = {"sdxl": 2, "sd3": 2}
FLOW = ("sd3", "flux")
CHANNELS = {"sd3": 16, "flux": 16}
# Tokens and width of the prompt's states; CLIP has 24 tokens here.
STATES = {"Stable Diffusion": (24, 32), "SDXL": (24, 32 + 24), "Stable Diffusion 3": (24 + 256, 64),
          "FLUX": (512, 48)}


@pytest.fixture(scope="module")
def folders(tiny_model, tiny_velocity_model, tiny_sd3, tiny_flux, tmp_path_factory):
    """A folder of every family and prediction; "terminal" is a velocity model with zero terminal SNR."""
    terminal = shutil.copytree(tiny_velocity_model, tmp_path_factory.mktemp("terminal") / "model")
    scheduler = DDPMScheduler.from_pretrained(terminal, subfolder="scheduler")
    DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True).save_pretrained(
        terminal / "scheduler")
    return {"epsilon": tiny_model, "velocity": tiny_velocity_model, "terminal": terminal,
            "sdxl": build_tiny_sdxl(tmp_path_factory.mktemp("sdxl")), "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def model(folders, name):
    return load_model(str(folders[name]))


@torch.no_grad()
def a_batch(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    channels = model.vae.config.latent_channels
    latents, noise = (torch.randn(3, channels, 8, 8, generator=generator).to(dtype) for _ in range(2))
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
    assert len(model.tokenizers) == len(model.text_encoders) == ENCODERS.get(name, 1)
    assert (model.num_timesteps, model.vae_scale_factor) == (1000, 8)
    assert (model.network_name, model.patch) == (("transformer", 2) if name in FLOW else ("unet", 1))
    assert model.resolution == (1024 if name == "flux" else 64)
    assert (model.t5 is not None) == (name in FLOW)
    for module in (*model.text_encoders, *([model.t5.encoder] if model.t5 else []), model.vae, model.network):
        parameters = list(module.parameters())
        assert parameters and not module.training and not any(p.requires_grad for p in parameters)


@pytest.mark.parametrize("dtype, text_dtype", [(torch.bfloat16, None), (torch.bfloat16, torch.float32)])
def test_every_part_has_the_precision_that_was_asked_for(folders, name, dtype, text_dtype):
    model = load_model(str(folders[name]), dtype=dtype, text_dtype=text_dtype)
    frozen = [model.vae, model.network, *([model.t5.encoder] if model.t5 else [])]
    assert {p.dtype for part in frozen for p in part.parameters()} == {dtype}
    assert {p.dtype for encoder in model.text_encoders for p in encoder.parameters()} == {text_dtype or dtype}
    assert (model.dtype, model.device) == (dtype, torch.device("cpu"))
    latents = model.encode(torch.rand(1, 3, 64, 64))
    condition = model.condition(tokenize(model, "a star"))
    assert latents.dtype == dtype and {value.dtype for value in condition.values()} == {dtype}
    # The cast of the float32 weights, no other rounding.
    whole = load_model(str(folders[name]))
    assert torch.equal(next(model.network.parameters()), next(whole.network.parameters()).to(dtype))


def test_linear_layers_in_half_precision_change_no_bit_under_autocast(folders, name):
    ends = []
    for linear in (None, torch.bfloat16):
        model = load_model(str(folders[name]), dtype=torch.bfloat16, text_dtype=torch.float32,
                           text_linear=linear)
        matrices = [encoder.get_input_embeddings().weight.requires_grad_() for encoder in model.text_encoders]
        with torch.autocast("cpu", torch.bfloat16):
            condition = model.condition(tokenize(model, "a star"))
        sum(value.float().square().sum() for value in condition.values()).backward()
        ends.append([*condition.values(), *(matrix.grad for matrix in matrices)])
    halves = [p for encoder in model.text_encoders for p in encoder.parameters() if p.dtype == torch.bfloat16]
    assert halves and all(torch.equal(before, after) for before, after in zip(*ends, strict=True))


def test_moments_latents_and_the_encoders_mean_agree(model, name):
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        moments = model.moments(images)
        posterior = model.vae.encode(images * 2 - 1).latent_dist
        scale, shift = model.vae.config.scaling_factor, model.vae.config.shift_factor or 0
        assert (shift != 0) == (name in FLOW)
        assert moments.shape == (2, 2 * CHANNELS.get(name, 4), 8, 8)
        assert torch.allclose(model.encode(images), (posterior.mean - shift) * scale, atol=1e-5)
        drawn = model.latents(moments, torch.Generator().manual_seed(5))
        noise = (drawn / scale + shift - posterior.mean) / posterior.std
        again = model.latents(moments, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, again) and abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2


def test_decode_gives_images_and_gradients_flow_through_both(model):
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    latents = model.encode(images)
    decoded = model.decode(latents)
    config = model.vae.config
    expected = (model.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample + 1) / 2
    assert decoded.dtype == torch.float32 and torch.allclose(decoded, expected, atol=1e-5)
    decoded.sum().backward()
    assert images.grad.abs().max() > 0


def test_a_condition_is_one_row_per_prompt(model):
    assert model.tokenizers[0].model_max_length == 24
    with torch.no_grad():
        condition = model.condition(tokenize(model, ["a star", "star " * 100]))
        alone = model.condition(tokenize(model, "a star"))
    assert condition["states"].shape == (2, *STATES[model.family])
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
    if name in FLOW:
        spread = (timesteps.view(-1, 1, 1, 1) + 1) / 1000
        signal = 1 - spread
    target = (noise if name in ("epsilon", "sdxl") else noise - latents if name in FLOW
              else signal * noise - spread * latents)
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


def test_min_snr_makes_a_loss_of_denoised_latents_of_every_prediction(model):
    """Each prediction is solved for the denoised latents, whose squared error counts by min(SNR, gamma)."""
    torch.manual_seed(0)
    timesteps, gamma = torch.tensor([10, 300, 700, model.num_timesteps - 1]), 0.5
    shape = (4, model.vae.config.latent_channels, 8, 8)
    latents, noise, error = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    noised, target = model.noised(latents, noise, timesteps), model.target(latents, noise, timesteps)
    snr = model.log_snr(timesteps).exp().view(-1, 1, 1, 1)
    one, zero = torch.ones_like(latents), torch.zeros_like(latents)
    signal, level = model.noised(one, zero, timesteps), model.noised(zero, one, timesteps)
    kind = model.scheduler.config.get("prediction_type")

    def denoised(prediction):
        if kind == "epsilon":
            return (noised - level * prediction) / signal
        if kind == "v_prediction":
            return signal * noised - level * prediction
        return noised - level * prediction
    assert torch.allclose(denoised(target), latents, atol=1e-4)
    expected = snr.clamp(max=gamma) * (denoised(target + error) - latents).square()
    weights = min_snr_weights(model, gamma)
    assert weights.shape == (model.num_timesteps,)
    assert torch.allclose(weights[timesteps].view(-1, 1, 1, 1) * error.square(), expected, rtol=1e-3)


def test_min_snr_of_noise_prediction_is_one_where_only_noise_is_left(tiny_model):
    """Its weight is min(1, gamma / SNR), also for a schedule that ends without signal."""
    model = load_model(str(tiny_model))
    model.scheduler = DDPMScheduler.from_config(model.scheduler.config, rescale_betas_zero_snr=True)
    model.scheduler.alphas_cumprod[-1] = 0
    weights = min_snr_weights(model, 5.0)
    assert weights[-1] == 1 and weights.isfinite().all() and 0 < weights[0] < 0.1


def test_log_snr_is_that_of_the_schedule(model, name):
    found = model.log_snr(torch.tensor([0, 500, 999]))
    assert found.dtype == torch.float64 and (found.diff() < 0).all()
    if name == "terminal":
        assert found[-1] < -15  # nearly no signal is left
    elif name in FLOW:
        assert found[-1] == -torch.inf and found[1] == pytest.approx(-0.008, abs=1e-3)
        assert found[0] == pytest.approx(2 * math.log(999))
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
    assert getattr(pipeline, model.network_name) is model.network and pipeline.vae is model.vae
    assert pipeline.text_encoder is model.text_encoders[0] and pipeline.tokenizer is model.tokenizers[0]
    for i in range(1, len(model.text_encoders)):
        assert getattr(pipeline, f"text_encoder_{i + 1}") is model.text_encoders[i]
        assert getattr(pipeline, f"tokenizer_{i + 1}") is model.tokenizers[i]
    if model.t5:
        number = len(model.text_encoders) + 1
        assert getattr(pipeline, f"text_encoder_{number}") is model.t5.encoder
        assert getattr(pipeline, f"tokenizer_{number}") is model.t5.tokenizer
    model.vae = None  # as after the latents have been cached: it comes from the files again
    fresh = model.pipeline()
    assert fresh.vae is not None and getattr(fresh, model.network_name) is model.network
    assert getattr(model.pipeline(from_files=True), model.network_name) is not model.network


def test_a_pipeline_gives_the_condition_that_the_model_computes(model, name):
    """What training sees of a prompt is what a user's pipeline will see."""
    pipeline = model.pipeline()
    options = {} if name == "flux" else {"do_classifier_free_guidance": False}
    options |= {"prompt_2": None, "prompt_3": None} if name == "sd3" else {}
    with torch.no_grad():
        condition = model.condition(tokenize(model, "a photo of a star"))
        encoded = pipeline.encode_prompt("a photo of a star", device="cpu", num_images_per_prompt=1,
                                         **options)
    assert torch.allclose(condition["states"], encoded[0], atol=1e-5)
    assert ("pooled" in condition) == (model.family != "Stable Diffusion")
    if "pooled" in condition:
        assert torch.allclose(condition["pooled"], encoded[1 if name == "flux" else 2], atol=1e-5)


@pytest.mark.parametrize("name", ["epsilon", "sdxl"], indirect=True)
def test_skipped_layers_of_the_text_encoders_are_those_of_the_pipeline(model):
    states = []
    for clip_skip in (None, 1):
        model.clip_skip = clip_skip or 0
        with torch.no_grad():
            states.append(model.condition(tokenize(model, "a photo of a star"))["states"])
            encoded = model.pipeline().encode_prompt(
                "a photo of a star", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False,
                clip_skip=clip_skip)
        assert torch.allclose(states[-1], encoded[0], atol=1e-5)
    assert not torch.allclose(*states, atol=1e-3)


def test_a_prompt_may_fill_all_tokens(tiny_model):
    model = load_model(str(tiny_model))
    check_length(model, "star " * 22)  # with the start and the end of the text, 24
    with pytest.raises(InputError, match="has more than the 24 tokens that the model takes"):
        check_length(model, "star " * 23)


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


@pytest.mark.parametrize("is_zero", [True, False])
def test_sdxl_is_guided_against_zeros_where_its_pipeline_says_so(folders, tmp_path, is_zero):
    copy = shutil.copytree(folders["sdxl"], tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text())
    write_json(copy / "model_index.json", {**index, "force_zeros_for_empty_prompt": is_zero})
    model = load_model(str(copy))
    with torch.no_grad():
        condition = model.condition(tokenize(model, ""))
    for name, value in model.unprompted(condition).items():
        assert torch.equal(value, torch.zeros_like(value) if is_zero else condition[name]), name


def test_a_vae_that_overflows_in_half_precision_stays_in_float32(folders, tmp_path):
    assert load_model(str(folders["sdxl"]), dtype=torch.float16).vae.dtype == torch.float32
    assert load_model(str(folders["epsilon"]), dtype=torch.float16).vae.dtype == torch.float16
    copy = shutil.copytree(folders["sdxl"], tmp_path / "model")
    vae = AutoencoderKL.from_pretrained(copy, subfolder="vae")
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(copy / "vae")
    assert load_model(str(copy), dtype=torch.float16).vae.dtype == torch.float16


# --- Rectified flow

@pytest.mark.parametrize("name", FLOW, indirect=True)
def test_the_noise_of_a_timestep_is_exact_in_half_precision(folders, name):
    model, timesteps = load_model(str(folders[name]), dtype=torch.bfloat16), torch.tensor([0, 499, 617, 999])
    assert torch.allclose(model.sigmas(timesteps), (timesteps + 1) / 1000, atol=1e-7)


# --- Quantized networks

@pytest.mark.skipif(not find_spec("torchao"), reason="needs pip install szt-utils[quantize]")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_of_8_bits_predicts_and_differentiates_nearly_as_the_whole_one(dtype):
    """With the bundled weights: a random model says nothing of what rounding does to a trained one."""
    from szt_utils import pocket

    gradients, predictions, sizes = [], [], []
    for quantize in (None, "8bit"):
        model = load_model(pocket.model_path(), dtype=dtype, quantize=quantize)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        with torch.no_grad():
            condition = model.condition(tokenize(model, "a photo of a star"))
        leaf = condition["states"].requires_grad_()
        predictions.append(model.predict(latents, torch.tensor([700]), condition).float())
        gradients.append(torch.autograd.grad(predictions[-1].square().mean(), leaf)[0].float())
        sizes.append({type(module.weight.data) for module in model.network.modules()
                      if isinstance(module, torch.nn.Linear)})
    assert sizes[0] == {torch.Tensor} and torch.Tensor not in sizes[1]
    for (whole, small), bound in ((predictions, 0.02), (gradients, 0.1)):
        assert 0 < (small - whole).norm() < bound * whole.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_4_bits_without_a_gpu_or_a_library_are_refused_in_a_sentence(tiny_model, monkeypatch):
    with pytest.raises(InputError, match="--quantize 4bit needs bitsandbytes|no usable unet: No GPU"):
        load_model(str(tiny_model), quantize="4bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for bits, library in (("8bit", "torchao"), ("4bit", "bitsandbytes")):
        with pytest.raises(InputError, match=f"--quantize {bits} needs {library}: pip install"):
            load_model(str(tiny_model), quantize=bits)


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


# --- The precision of files

def test_the_precision_of_a_variant_is_that_of_its_own_files(tmp_path):
    (tmp_path / "unet").mkdir()
    for suffix, dtype in (("", torch.float32), (".fp16", torch.float16)):
        save_file({"weight": torch.ones(1, dtype=dtype)}, tmp_path / "unet" / f"model{suffix}.safetensors")
    assert file_precision(str(tmp_path))["unet"] == torch.float32
    assert file_precision(str(tmp_path), variant="fp16")["unet"] == torch.float16


# --- Folders that cannot be used

def test_a_model_that_predicts_something_else_is_refused(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    DDPMScheduler(prediction_type="sample").save_pretrained(copy / "scheduler")
    with pytest.raises(InputError, match="'sample'; only 'epsilon' and 'v_prediction'"):
        load_model(str(copy))


@pytest.mark.parametrize("scheduler, kind", [
    (EDMEulerScheduler(), "EDM"), (EDMDPMSolverMultistepScheduler(), "EDM"),
    (DPMSolverMultistepScheduler(use_flow_sigmas=True), "flow"), (FlowMatchEulerDiscreteScheduler(), "flow")])
def test_a_u_net_of_another_noise_schedule_is_refused(folders, tmp_path, scheduler, kind):
    """Loaded as DDPM, it would be trained on noise that it has never seen."""
    copy = shutil.copytree(folders["sdxl"], tmp_path / "model")
    scheduler.save_pretrained(copy / "scheduler")
    with pytest.raises(InputError, match=f"model' has the noise schedule of {kind}; only SDXL models with"):
        load_model(str(copy))


def test_the_sampler_steps_as_the_pipeline_whatever_the_config_leaves_out(tiny_model, tmp_path):
    """Latents are not clipped to [-1, 1], as images are, and the last step is t = 1."""
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    write_json(path, {name: value for name, value in config.items()
                      if name not in ("clip_sample", "steps_offset")})
    latents = torch.full((1, 4, 2, 2), 5.0)
    timesteps, step = load_model(str(tmp_path / "model")).sampler(10, latents)
    assert timesteps[-1] == 1
    expected, expected_step = load_model(str(tiny_model)).sampler(10, latents)
    assert torch.equal(timesteps, expected)
    assert torch.equal(step(latents * 0, 9, latents), expected_step(latents * 0, 9, latents)) and (
        step(latents * 0, 9, latents) > 4).all()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler,
                                       LCMScheduler, PNDMScheduler, UniPCMultistepScheduler])
def test_schedulers_of_the_noise_schedule_of_ddpm_are_read_as_it(tiny_model, tmp_path, scheduler):
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    written = scheduler(beta_start=0.001, beta_end=0.011, beta_schedule="scaled_linear")
    written.save_pretrained(copy / "scheduler")
    assert torch.equal(load_model(str(copy)).scheduler.alphas_cumprod, written.alphas_cumprod)


def test_another_family_is_refused_before_its_weights_are_read(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text().replace('"addition_embed_type": null',
                                                 '"addition_embed_type": "image"'))
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match="takes 'image' embeddings; only Stable Diffusion, SDXL, Stable "
                                         "Diffusion 3 and FLUX are supported"):
        load_model(str(copy))


@pytest.mark.parametrize("before, after, message", [
    ("SD3Transformer2DModel", "PixArtTransformer2DModel",
     "is a PixArtTransformer2DModel; only Stable Diffusion, SDXL, Stable Diffusion 3 and FLUX"),
    ('"in_channels": 16', '"in_channels": 33', "takes 33 channels, more than the latents have")])
def test_another_transformer_is_refused_before_its_weights_are_read(tiny_sd3, tmp_path, before, after,
                                                                    message):
    copy = shutil.copytree(tiny_sd3, tmp_path / "model")
    config = copy / "transformer" / "config.json"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=message):
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


def rewrite(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("change, message", [
    (lambda weights: weights.pop(sorted(weights)[3]), "lacks 1 weights"),
    (lambda weights: weights.update(extra=torch.ones(2)), "has 1 unknown weights, such as 'extra'"),
    (lambda weights: weights.update({f"other.{name}": weights.pop(name) for name in list(weights)}), "lacks"),
    (lambda weights: weights[sorted(weights)[3]].fill_(torch.nan), "not finite")],
    ids=["missing", "unknown", "renamed", "nan"])
def test_weights_that_are_not_the_networks_are_refused(tiny_model, tmp_path, part, change, message):
    """Libraries would fill in random numbers, and a training would succeed at learning nothing."""
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    (path,) = (copy / part).glob("*.safetensors")
    rewrite(path, change)
    with pytest.raises(InputError, match=f"The {part} of '.*{message}"):
        load_model(str(copy))


def test_position_ids_of_older_versions_do_no_harm(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    rewrite(copy / "text_encoder" / "model.safetensors", lambda weights: weights.update(
        {"text_model.embeddings.position_ids": torch.arange(16)[None]}))
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


def test_a_tokenizer_without_vocabulary_or_of_another_model_is_refused(folders, tmp_path):
    """transformers 5 makes an empty tokenizer where the files are missing."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty.*has no usable .*: its vocabulary is missing"):
        load_model(str(folders["epsilon"]), tokenizer=str(tmp_path / "empty"))
    model = load_model(str(folders["epsilon"]))
    (tokenizer,), (encoder,) = model.tokenizers, model.text_encoders
    spare = len(encoder.get_input_embeddings().weight) - len(tokenizer)
    tokenizer.add_tokens([f"<more{i}>" for i in range(spare + 1)])
    tokenizer.save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match="large' has .* tokens, more than the text encoder knows"):
        load_model(str(folders["epsilon"]), tokenizer=str(tmp_path / "large"))
