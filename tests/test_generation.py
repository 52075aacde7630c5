"""Pictures do not depend on the batch, follow the seed, and show the embedding that was loaded."""

import numpy as np
import torch

from szt_utils.embeddings import save_embedding
from szt_utils.generation import generate, load_pipeline

PROMPTS = ["a photo of a red star", "a photo of a blue house", "a photo of a <new>"]


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image, np.float64) for image in images])


def test_batches_seeds_and_embeddings(tiny_model, tmp_path):
    save_embedding(tmp_path / "learned_embeds.safetensors", "<new>", torch.randn(1, 32) * 3)
    pipeline = load_pipeline(tiny_model, tmp_path / "learned_embeds.safetensors")
    together = arrays(generate(pipeline, PROMPTS, seed=3, steps=3, batch_size=3))
    apart = arrays(generate(pipeline, PROMPTS, seed=3, steps=3, batch_size=2))
    assert together.shape == (3, 64, 64, 3)
    assert np.abs(together - apart).max() <= 1  # a level of rounding
    assert np.array_equal(together, arrays(generate(pipeline, PROMPTS, seed=3, steps=3, batch_size=3)))
    assert np.abs(together - arrays(generate(pipeline, PROMPTS, seed=4, steps=3, batch_size=3))).max() > 1
    without = arrays(generate(load_pipeline(tiny_model), PROMPTS, seed=3, steps=3, batch_size=3))
    assert np.abs(together[:2] - without[:2]).max() <= 1 < np.abs(together[2] - without[2]).max()
