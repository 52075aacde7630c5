"""Images do not depend on the batch, follow the seed, and show the embedding that was loaded."""

import numpy as np
import pytest
import torch
from conftest import build_tiny_sdxl
from safetensors.torch import save_file

from szt_utils import pocket
from szt_utils.embedding_files import save_embedding
from szt_utils.embeddings import load_into
from szt_utils.errors import InputError
from szt_utils.generation import generate, load_pipeline

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


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image, np.float64) for image in images])


def test_batches_seeds_and_embeddings(model_and_embedding):
    model, embedding = model_and_embedding
    pipeline = load_pipeline(model, embedding)
    together = arrays(generate(pipeline, PROMPTS, seed=3, steps=3, batch_size=3))
    apart = arrays(generate(pipeline, PROMPTS, seed=3, steps=3, batch_size=2))
    assert together.shape == (3, 64, 64, 3)
    assert np.abs(together - apart).max() <= 1  # a level of rounding
    assert np.array_equal(together, arrays(generate(pipeline, PROMPTS, seed=3, steps=3, batch_size=3)))
    assert np.abs(together - arrays(generate(pipeline, PROMPTS, seed=4, steps=3, batch_size=3))).max() > 1
    without = arrays(generate(load_pipeline(model), PROMPTS, seed=3, steps=3, batch_size=3))
    assert np.abs(together[:2] - without[:2]).max() <= 1 < np.abs(together[2] - without[2]).max()


def test_a_pipeline_has_the_models_own_class_and_no_filters(model_and_embedding):
    pipeline = load_pipeline(model_and_embedding[0], torch_dtype=torch.bfloat16)
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


def test_what_cannot_be_loaded_is_one_sentence(tiny_model, tmp_path):
    for model, message in (("no/such", "'no/such' cannot be loaded"), (tmp_path, "model_index.json"),
                           (pocket.pixel_path(), "text-to-image pipeline")):
        with pytest.raises(InputError, match=message):
            load_pipeline(model)
    save_embedding(tmp_path / "wide.safetensors", "<w>", torch.randn(1, 33))
    save_embedding(tmp_path / "star.safetensors", "star</w>", torch.randn(1, 32))
    for name, message in (("none", "cannot be read"), ("wide", "another model"), ("star", "vocabulary")):
        with pytest.raises(InputError, match=message):
            load_pipeline(tiny_model, tmp_path / f"{name}.safetensors")
