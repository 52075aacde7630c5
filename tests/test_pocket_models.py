"""The bundled diffusion models, by Diffusers alone: they draw what a prompt says, and learn a new concept."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import run_here
from safetensors import safe_open

from szt_utils import pocket
from szt_utils.attributes import read_attributes
from szt_utils.evaluation import evaluate_embedding
from szt_utils.images import read_image
from szt_utils.metrics import Networks, image_features
from szt_utils.pocket import write_concept

PIPELINES = {"diffusion": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
             "flow": "StableDiffusion3Pipeline"}
WITHOUT_T5 = {"flow": {"text_encoder_3": None, "tokenizer_3": None}}
PROMPTS = {("teal", "plain", "circle", "sand"), ("red", "striped", "square", "grass"),
           ("blue", "checkered", "heart", "stone"), ("yellow", "dotted", "triangle", "water"),
           ("black", "plain", "ring", "brick"), ("orange", "striped", "cross", "sky")}


@pytest.mark.parametrize("network", PIPELINES)
def test_diffusers_loads_them_and_they_draw_what_the_prompt_says(network):
    pipeline = getattr(diffusers, PIPELINES[network]).from_pretrained(
        pocket.model_path(network), **WITHOUT_T5.get(network, {}))
    pipeline.set_progress_bar_config(disable=True)
    words = [dict(zip(("color", "pattern", "shape", "background"), each, strict=True))
             for each in sorted(PROMPTS)]
    images = pipeline(["a photo of a {color} {pattern} {shape} on {background}".format(**each)
                       for each in words], num_inference_steps=20, guidance_scale=5.0,
                      generator=[torch.Generator().manual_seed(i) for i in range(len(words))]).images
    assert {image.size for image in images} == {(128, 128)}
    read = read_attributes(image_features(images, pocket.dino_path(), normalized=False), pocket.dino_path())
    right = {kind: sum(a[kind] == b[kind] for a, b in zip(words, read, strict=True)) for kind in words[0]}
    # By chance half a shape would be right.
    assert min(right["color"], right["pattern"], right["background"]) >= 5 and right["shape"] >= 4, right


@pytest.mark.parametrize("network", PIPELINES)
def test_they_name_no_path_of_the_machine_that_trained_them(network):
    folder = Path(pocket.model_path(network))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == PIPELINES[network]
    for path in folder.rglob("*.json"):
        assert "pocket_training" not in path.read_text(), path
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}, path


@pytest.mark.slow
@pytest.mark.parametrize("network", ["diffusion", "sdxl"])  # flow is not trained to the end
def test_textual_inversion_learns_a_new_concept(network, tmp_path):
    paths = write_concept("teal-striped-star", tmp_path / "images")
    run_here(["--pretrained_model_name_or_path", pocket.model_path(network), "--train_data_dir",
              tmp_path / "images", "--output_dir", tmp_path / "out", "--placeholder_token", "<c>",
              "--initializer_token", "object", "--resolution", 128, "--train_batch_size", 4,
              "--max_train_steps", 300, "--learning_rate", 5e-3, "--seed", 0])
    _, scores = evaluate_embedding(pocket.model_path(network), tmp_path / "out",
                                   [read_image(path) for path in paths], pocket.PROMPTS,
                                   Networks(pocket.dino_path(), pocket.clip_path()))
    assert scores["dino"] > 0.7 * scores["real_real"], scores
