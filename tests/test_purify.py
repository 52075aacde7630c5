"""Purifiers: the filters against OpenCV's figures and closed forms, the diffusion ones against models whose
answer is known, and DeepFloyd IF's real pipelines on random weights."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_model

from szt_utils import pocket, purify
from szt_utils.errors import InputError
from szt_utils.images import from_pil
from szt_utils.jpeg import jpeg_tensor
from szt_utils.pocket.scenes import concept_scenes
from szt_utils.purify import (
    DEFAULTS,
    PURIFIERS,
    advclean,
    bilateral_filter,
    guided_filter,
    pdmpure,
    pdmpure_if,
    regen,
)

PIXELS = ((0, 0), (3, 4), (3, 5), (6, 8))
OPENCV = {
    "once": [[5.003, 4.961, 8.773], [2.539, 7.087, 11.931],
             [122.727, 125.71, 130.265], [123.507, 128.177, 133.177]],
    "guided": [[5.203, 5.456, 6.165], [5.917, 6.165, 6.868],
             [125.13, 124.685, 124.418], [127.036, 126.58, 126.297]],
    "full": [[5.293, 5.544, 6.252], [6.091, 6.339, 7.04],
             [124.835, 124.391, 124.126], [126.922, 126.467, 126.185]],
}


def reference_image() -> torch.Tensor:
    """An edge under a pattern of levels, (1, 3, 7, 9)."""
    levels = torch.arange(7 * 9 * 3).reshape(7, 9, 3) * 37 % 16 + 120.0 * (torch.arange(9) > 4)[None, :, None]
    return levels.permute(2, 0, 1)[None]


def at(images: torch.Tensor) -> torch.Tensor:
    return torch.stack([images[0, :, y, x] for y, x in PIXELS])


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def scenes(count: int = 2) -> torch.Tensor:
    from PIL import Image

    return from_pil([Image.fromarray(scene.image) for scene in concept_scenes("teal-striped-star", count)])


@pytest.mark.parametrize("name", ["once", "guided", "full"])
def test_filters_give_opencvs_figures(name):
    """opencv-contrib 5.0: bilateralFilter(image, 5, 8, 8), ximgproc.guidedFilter(image, 64 of it, 4, 16),
    and all of AdverseCleaner."""
    image = reference_image()
    if name == "once":
        result = bilateral_filter(image)
    elif name == "guided":
        smooth = image
        for _ in range(64):
            smooth = bilateral_filter(smooth)
        result = guided_filter(image, smooth)
    else:
        result = advclean(image / 255) * 255
    assert torch.allclose(at(result), torch.tensor(OPENCV[name]), atol=0.01)
    assert (at(result) - at(image)).abs().max() > 0.5  # the figures are not those of the image itself


def test_the_guided_filter_keeps_its_guide_or_smooths_it():
    image = reference_image()
    assert torch.allclose(guided_filter(image, image, 2, 1e-9), image, atol=1e-3)
    expected = image.numpy()
    for _ in range(2):  # the slope vanishes, and the mean of the windows' means is left
        padded = np.pad(expected, [(0, 0), (0, 0), (2, 2), (2, 2)], mode="symmetric")
        expected = F.avg_pool2d(torch.from_numpy(padded).double(), 5, 1).numpy()
    assert np.allclose(guided_filter(image, image, 2, 1e12), expected, atol=0.01)


def test_advclean_takes_noise_and_leaves_edges():
    clean = scenes()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * 4 / 255
    noisy = (clean + noise).clamp(0, 1)
    cleaned = advclean(noisy)
    assert cleaned.shape == noisy.shape and 0 <= cleaned.min() and cleaned.max() <= 1
    flat = torch.full((1, 3, 32, 32), 0.5)
    flat[..., 16:] = 0.9
    rough = flat + noise[:1, :, :32, :32]
    result = advclean(rough)
    assert (result - flat).std() < 0.5 * (rough - flat).std()
    assert (result[..., 20].mean() - result[..., 12].mean()) == pytest.approx(0.4, abs=0.01)
    with pytest.raises(InputError, match="4 x 4 pixels"):
        advclean(torch.zeros(1, 3, 4, 4))


class KnowsTheImage(torch.nn.Module):
    """A U-Net that predicts one image: whatever its input, that is x0."""

    def __init__(self, image: torch.Tensor, channels: int = 3):
        super().__init__()
        self.image, self.seen = image, []
        self.config = SimpleNamespace(in_channels=channels, out_channels=channels, block_out_channels=(1,))
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, x, t):
        self.seen.append((int(t), x.clone()))
        return SimpleNamespace(sample=self.image.expand_as(x))


def test_pdmpure_ends_at_what_the_model_predicts_and_starts_at_the_noised_image():
    from diffusers import DDPMScheduler

    believed, shown = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    unet = KnowsTheImage(2 * believed - 1)
    scheduler = DDPMScheduler(prediction_type="sample", timestep_spacing="leading")
    pipeline = SimpleNamespace(unet=unet, scheduler=scheduler)
    result = pdmpure(shown, pipeline, generators=generators(1), strength=0.1, steps=50)
    assert torch.allclose(result, believed, atol=1e-5)
    assert [t for t, _ in unet.seen] == [80, 60, 40, 20, 0]
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    signal = scheduler.alphas_cumprod[80]
    assert torch.allclose(unet.seen[0][1], signal.sqrt() * (2 * shown - 1) + (1 - signal).sqrt() * noise,
                          atol=1e-5)
    with pytest.raises(InputError, match="5 channels"):
        pdmpure(shown, SimpleNamespace(unet=KnowsTheImage(believed, 5), scheduler=scheduler),
                generators=generators(1))
    for strength in (0.01, 0, 1.5):
        with pytest.raises(InputError, match="strength"):
            pdmpure(shown, pipeline, generators=generators(1), strength=strength)


def test_the_bundled_pixel_model_removes_noise_and_serves_odd_sizes():
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(pocket.pixel_path())
    clean = scenes(4)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * 16 / 255
    noisy = (clean + noise).clamp(0, 1)
    settings = DEFAULTS["pdmpure"]
    result = pdmpure(noisy, pipeline, generators=generators(4), **settings)
    change = noisy - clean
    left = ((result - clean) * change).sum() / change.square().sum()
    assert left < 0.15, left  # it takes the scenes' own grain away as well
    alone = pdmpure(noisy[2:3], pipeline, generators=generators(1, seed=2), **settings)
    assert torch.allclose(alone, result[2:3], atol=1e-4)
    odd = pdmpure(noisy[:1, :, :61, :75], pipeline, generators=generators(1), **settings)
    assert odd.shape == (1, 3, 61, 75)


def test_regen_is_image_to_image_of_each_image_alone():
    from diffusers import AutoPipelineForImage2Image

    pipeline = AutoPipelineForImage2Image.from_pretrained(pocket.model_path(), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    images = scenes()
    result = regen(images, pipeline, generators=generators(2))
    error = (result - images).square().mean().sqrt() * 255
    assert result.shape == images.shape and 2 < error < 14, error  # the VAE's round trip and a little noise
    alone = regen(images[1:], pipeline, generators=generators(1, seed=1))
    assert torch.allclose(alone, result[1:], atol=1e-3)
    assert not torch.equal(regen(images[1:], pipeline, generators=generators(1, seed=7)), alone)
    stronger = regen(images, pipeline, generators=generators(2), strength=0.5)
    assert (stronger - images).square().mean() > 1.5 * (result - images).square().mean()
    assert regen(images[..., :100, :70], pipeline, generators=generators(2)).shape == (2, 3, 100, 70)
    with pytest.raises(InputError, match="no denoising step"):
        regen(images, pipeline, generators=generators(2), strength=0.01)


class Recorder:
    """A pipeline that returns the image it is given and keeps what it is called with."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, prompt=None, **settings):
        self.seen = {"prompt": prompt, **settings}
        return SimpleNamespace(images=settings["image"])


def test_regen_passes_its_settings_on():
    pipeline = Recorder(vae_scale_factor=8)
    regen(torch.zeros(2, 3, 8, 8), pipeline, generators=generators(2), strength=0.5, steps=4,
          guidance_scale=3.0, prompt="a star")
    assert pipeline.seen.items() >= {"prompt": ["a star"] * 2, "strength": 0.5, "num_inference_steps": 4,
                                     "guidance_scale": 3.0}.items()


def test_pdmpure_passes_the_settings_of_each_deepfloyd_stage_on():
    second = Recorder(unet=SimpleNamespace(config=SimpleNamespace(sample_size=8)))
    upscaler = Recorder()
    pdmpure_if(torch.zeros(2, 3, 8, 8), second, upscaler, generators=generators(2), strength=0.5, steps=9,
               guidance_scale=3.0, noise_level=77, prompt="a star", upscale_steps=6,
               upscale_guidance_scale=2.0, upscale_noise_level=5)
    assert second.seen.items() >= {"prompt": ["a star"] * 2, "strength": 0.5, "num_inference_steps": 9,
                                   "guidance_scale": 3.0, "noise_level": 77}.items()
    assert upscaler.seen.items() >= {"prompt": ["a star"] * 2, "num_inference_steps": 6,
                                     "guidance_scale": 2.0, "noise_level": 5}.items()


@pytest.mark.parametrize("strength", [0.01, 0, 1.5])
def test_pdmpure_refuses_a_strength_without_a_step_before_deepfloyd_runs(strength):
    with pytest.raises(InputError, match=f"--strength {strength} of --steps 10 leaves no denoising step"):
        pdmpure_if(torch.zeros(1, 3, 8, 8), None, None, generators=generators(1), strength=strength, steps=10)


@pytest.fixture(scope="module")
def deepfloyd(tmp_path_factory):
    """IF's second stage and the x4 upscaler, both of Diffusers, with random weights."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        IFImg2ImgSuperResolutionPipeline,
        StableDiffusionUpscalePipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = build_tiny_model(tmp_path_factory.mktemp("if") / "model", "epsilon")
    torch.manual_seed(0)
    common = dict(layers_per_block=1, norm_num_groups=4, cross_attention_dim=32, attention_head_dim=8,
                  block_out_channels=(16, 32))
    second = IFImg2ImgSuperResolutionPipeline(
        tokenizer=None, text_encoder=None, safety_checker=None, feature_extractor=None, watermarker=None,
        unet=UNet2DConditionModel(
            sample_size=32, in_channels=6, out_channels=6, class_embed_type="timestep",
            down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", addition_embed_type=None,
            up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"], **common),
        scheduler=DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2"),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        requires_safety_checker=False)
    upscaler = StableDiffusionUpscalePipeline(
        vae=AutoencoderKL(block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4,
                          down_block_types=["DownEncoderBlock2D"] * 3,
                          up_block_types=["UpDecoderBlock2D"] * 3),
        text_encoder=CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        unet=UNet2DConditionModel(sample_size=32, in_channels=7, out_channels=4, num_class_embeds=1000,
                                  down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                                  up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], **common),
        low_res_scheduler=DDPMScheduler(), scheduler=DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None)
    for pipeline in (second, upscaler):
        pipeline.set_progress_bar_config(disable=True)
    return second, upscaler


def test_pdmpure_runs_diffusers_deepfloyd_pipelines(deepfloyd):
    embeddings = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(0))
    settings = dict(steps=8, upscale_steps=2, prompt_embeds=embeddings[0],
                    negative_prompt_embeds=embeddings[1])
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    result = pdmpure_if(images, *deepfloyd, generators=generators(2), **settings)
    assert result.shape == images.shape and torch.isfinite(result).all()
    assert 0 <= result.min() and result.max() <= 1 and result.std() > 0.01
    again = pdmpure_if(images, *deepfloyd, generators=generators(2), **settings)
    assert torch.equal(again, result)
    other = pdmpure_if(images.flip(3), *deepfloyd, generators=generators(2), **settings)
    assert (other - result).abs().max() > 1e-3  # the input image matters
    second, upscaler = deepfloyd
    seen = []
    upscaled = pdmpure_if(images, second, lambda **flags: seen.append(flags) or SimpleNamespace(
        images=flags["image"]), generators=generators(2), **settings)
    assert seen[0]["image"].shape == (2, 3, 32, 32) and seen[0]["noise_level"] == 20
    assert 0 <= seen[0]["image"].min() and seen[0]["image"].max() <= 1  # VaeImageProcessor's range
    assert upscaled.shape == images.shape


def test_every_purifier_has_defaults_that_it_takes():
    assert PURIFIERS.keys() == DEFAULTS.keys()
    for name, purifier in PURIFIERS.items():
        parameters = inspect.signature(purifier).parameters
        assert DEFAULTS[name].keys() <= parameters.keys()
        assert all(parameters[key].default in (value, inspect.Parameter.empty)
                   for key, value in DEFAULTS[name].items())


def test_the_default_jpeg_is_the_papers():
    assert DEFAULTS["jpeg"] == {"quality": 25}
    assert not torch.equal(jpeg_tensor(scenes(1), **DEFAULTS["jpeg"]), scenes(1))


@pytest.mark.parametrize("strip", [1, 300, 10_000])
def test_the_guided_filter_in_strips_equals_that_of_the_whole(monkeypatch, strip):
    """Bit for bit, so that a large image needs little memory and gets the same result."""
    guide, images = torch.rand(2, 2, 3, 61, 70, generator=torch.Generator().manual_seed(0)) * 255
    whole = guided_filter(guide, images, 4)
    monkeypatch.setattr(purify, "_STRIP", strip)
    assert torch.equal(guided_filter(guide, images, 4), whole)


def test_images_too_large_for_a_network_are_refused(monkeypatch):
    monkeypatch.setenv("SZT_MAX_IMAGE_PIXELS", "1023")
    for purifier, settings in ((regen, {"strength": 0.1}), (pdmpure, {"strength": 0.1})):
        with pytest.raises(InputError, match="8 x 8 pixels is too large .* takes 63 pixels; give --res"):
            purifier(torch.zeros(1, 3, 8, 8), None, generators=generators(1), **settings)
