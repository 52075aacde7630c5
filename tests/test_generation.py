"""Images do not depend on the batch, follow the seed, and show the embedding that was loaded."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import build_tiny_sdxl, pipeline_with
from safetensors.torch import load_file, save_file

from szt_utils import pocket
from szt_utils.embedding_files import save_embedding
from szt_utils.embeddings import load_into
from szt_utils.errors import InputError
from szt_utils.generation import generate, load_pipeline, use_dpm_solver
from szt_utils.models import load_model

PROMPTS = ["a photo of a red star", "a photo of a blue house", "a photo of a <new>"]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model_and_embedding(request, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    torch.manual_seed(0)
    if request.param == "sd":
        save_embedding(folder / "learned_embeds.safetensors", "<new>", torch.randn(2, 32) * 3)
        return tiny_model, folder / "learned_embeds.safetensors"
    save_file({"clip_l": torch.randn(2, 32) * 3, "clip_g": torch.randn(2, 24) * 3},
              folder / "new.safetensors")
    return build_tiny_sdxl(folder / "sdxl"), folder / "new.safetensors"


@pytest.mark.parametrize("name, options, kept", [
    ("EDMDPMSolverMultistepScheduler", {}, True), ("FlowMatchEulerDiscreteScheduler", {}, True),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, True),
    ("EulerDiscreteScheduler", {}, False), ("PNDMScheduler", {}, False),
    ("UniPCMultistepScheduler", {}, False)])
def test_only_a_scheduler_of_another_noise_schedule_is_kept(name, options, kept):
    pipeline = SimpleNamespace(scheduler=getattr(diffusers, name)(**options))
    use_dpm_solver(pipeline)
    assert type(pipeline.scheduler).__name__ == (name if kept else "DPMSolverMultistepScheduler")


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image, np.float64) for image in images])


def test_batches_seeds_and_embeddings(model_and_embedding):
    model, embedding = model_and_embedding
    pipeline = pipeline_with(model, embedding)
    together = arrays(generate(pipeline, PROMPTS, seed=3, steps=3, batch_size=3))
    apart = arrays(generate(pipeline, PROMPTS, seed=3, steps=3, batch_size=2))
    assert together.shape == (3, 64, 64, 3)
    assert np.abs(together - apart).max() <= 1  # a level of rounding
    assert np.array_equal(together, arrays(generate(pipeline, PROMPTS, seed=3, steps=3, batch_size=3)))
    assert np.abs(together - arrays(generate(pipeline, PROMPTS, seed=4, steps=3, batch_size=3))).max() > 1
    without = arrays(generate(load_pipeline(model), PROMPTS, seed=3, steps=3, batch_size=3))
    assert np.abs(together[:2] - without[:2]).max() <= 1 < np.abs(together[2] - without[2]).max()


def test_zero_terminal_snr_rescales_the_guidance(tiny_model, tiny_velocity_model, tmp_path):
    """Without it, images of these schedules are too bright and too dark."""
    shutil.copytree(tiny_velocity_model, tmp_path / "zero")
    path = tmp_path / "zero" / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(config))
    pipeline = load_pipeline(tmp_path / "zero")
    made = arrays(generate(pipeline, PROMPTS[:1], steps=3))
    for rescale, same in ((0.7, True), (0.0, False)):
        own = pipeline(PROMPTS[:1], num_inference_steps=3, guidance_scale=5.0, guidance_rescale=rescale,
                       generator=[torch.Generator().manual_seed(0)]).images
        assert (np.abs(made - arrays(own)).max() <= 1) == same
    plain = load_pipeline(tiny_model)
    own = plain(PROMPTS[:1], num_inference_steps=3, guidance_scale=5.0,
                generator=[torch.Generator().manual_seed(0)]).images
    assert np.abs(arrays(generate(plain, PROMPTS[:1], steps=3)) - arrays(own)).max() <= 1


def test_a_pipeline_has_the_models_own_class_and_no_filters(model_and_embedding):
    pipeline = load_pipeline(model_and_embedding[0], dtype=torch.bfloat16)
    xl = hasattr(pipeline, "text_encoder_2")
    assert type(pipeline).__name__ == ("StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline")
    assert (pipeline.watermark if xl else pipeline.safety_checker) is None
    assert pipeline.unet.dtype == torch.bfloat16
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_both_vectors_of_an_embedding_are_in_the_prompt(model_and_embedding):
    model, embedding = model_and_embedding
    pipeline = load_pipeline(model)
    assert load_into(pipeline, embedding) == "<new>"
    assert pipeline.maybe_convert_prompt("a <new>", pipeline.tokenizer) == "a <new> <new>_1"


def test_a_token_with_capitals_keeps_all_its_vectors(model_and_embedding, tmp_path):
    """CLIP's tokenizers lower-case prompts, so that Diffusers would find its first vector only."""
    model, embedding = model_and_embedding
    rows, path = load_file(embedding), tmp_path / "Big.safetensors"
    save_file({name.replace("<new>", "<Big>"): part for name, part in rows.items()}, path)
    pipeline = load_pipeline(model)
    assert load_into(pipeline, path) == "<big>"
    same = pipeline_with(model, embedding)
    images = [arrays(generate(each, [f"a photo of a {token}"], steps=2))
              for each, token in ((pipeline, "<big>"), (same, "<new>"))]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_what_cannot_be_loaded_is_one_sentence(tiny_model, tmp_path):
    for model, message in (("no/such", "'no/such' cannot be loaded"), (tmp_path, "model_index.json"),
                           (pocket.pixel_path(), "text-to-image pipeline")):
        with pytest.raises(InputError, match=message):
            load_pipeline(model)
    save_embedding(tmp_path / "wide.safetensors", "<w>", torch.randn(1, 33))
    save_embedding(tmp_path / "star.safetensors", "star</w>", torch.randn(1, 32))
    for name, message in (("none", "cannot be read"), ("wide", "another model"), ("star", "vocabulary")):
        with pytest.raises(InputError, match=message):
            pipeline_with(tiny_model, tmp_path / f"{name}.safetensors")


def changed(model, folder, part, change):
    """A copy of a model whose part's weights went through `change`."""
    shutil.copytree(model, folder)
    [path] = (folder / part).glob("*.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_pipeline_whose_weights_are_not_all_there_is_refused(tiny_model, tmp_path, part):
    """Libraries would fill in random ones, and the images would be of another model."""
    lacking = changed(tiny_model, tmp_path / "lacking", part, lambda state: state.pop(sorted(state)[-1]))
    with pytest.raises(InputError, match=f"The {part} of '.*lacking' lacks 1 weights, such as"):
        load_pipeline(lacking)
    broken = changed(tiny_model, tmp_path / "broken", part,
                     lambda state: state[sorted(state)[0]].flatten()[0].fill_(float("inf")))
    with pytest.raises(InputError, match=f"The {part} of '.*broken' has weights that are not finite"):
        load_pipeline(broken)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_checkpoint_in_one_file_is_told_how_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    for load in (load_pipeline, load_model):
        with pytest.raises(InputError, match="is one file, .*convert it .*from_single_file"):
            load(str(tmp_path / name))


@pytest.mark.parametrize("file, content", [
    ("model_index.json", "[]"), ("model_index.json", "{}"), ("model_index.json", "[" * 10**5),
    ("model_index.json", '{"_class_name": 3}'), ("unet/config.json", "null"), ("unet/config.json", "\xff"),
    ("unet/config.json", '{"sample_size": "a", "cross_attention_dim": "b"}'), ("vae/config.json", "{"),
    ("text_encoder/config.json", '{"hidden_size": 0}'), ("text_encoder/config.json", "3"),
    ("tokenizer/tokenizer.json", "{}"), ("scheduler/scheduler_config.json", '{"beta_schedule": "none"}'),
    ("vae/diffusion_pytorch_model.safetensors", "cut"), ("text_encoder/model.safetensors", None),
    ("unet/config.json", None)])
def test_a_model_folder_that_is_broken_anywhere_is_one_sentence(tiny_model, tmp_path, file, content):
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / file
    if not path.exists():
        pytest.skip("the tiny model has no such file")
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    for load in (load_pipeline, load_model):
        if load is load_pipeline or not file.startswith("model_index"):
            with pytest.raises(InputError, match="The .*model"):
                load(str(tmp_path / "model"))


@pytest.mark.parametrize("index", [
    {"_class_name": ["pipeline", "Evil"]}, {"unet": ["evil", "Evil"]}, {"_class_name": "evil.Evil"},
    {"unet": ["unet", "Evil"]}, {"scheduler": ["evil", "Evil"]}, {"scheduler": ["diffusers", "Evil"]},
    {"more": ["evil", "Evil"]}])
def test_no_code_of_a_model_folder_is_run(tiny_model, tmp_path, index, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "more").mkdir()
    for name in ("pipeline.py", "evil.py", "unet/unet.py", "unet/evil.py", "scheduler/evil.py",
                 "scheduler/diffusers.py", "more/evil.py"):
        (tmp_path / "model" / name).write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Evil: 1\n")
    path = tmp_path / "model" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    with pytest.raises(InputError, match="model"):
        load_pipeline(tmp_path / "model")
    if "_class_name" not in index:
        with pytest.raises(InputError, match="code of its own for its part .* never run"):
            load_model(str(tmp_path / "model"))
    assert not (tmp_path / "was-run").exists()
