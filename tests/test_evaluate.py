"""The evaluating script: pictures, scores, resume, prompts files, errors."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

from szt_utils import pocket
from szt_utils.embeddings import save_embedding
from szt_utils.metrics import Networks, image_features, measure, pairwise_similarity, similarity


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """An output folder of the training, with a row of the tiny model's width."""
    folder = tmp_path_factory.mktemp("learned")
    torch.manual_seed(0)
    save_embedding(folder / "learned_embeds.safetensors", "<new>", torch.randn(1, 32) * 3)
    return folder


@pytest.fixture
def run(script, tiny_model, learned, concept_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# places\n\na photo of a {} on sand\na {0} {1} in the sky\n")

    def call(output_dir, *more):
        script.main([*map(str, [
            "--pretrained_model_name_or_path", tiny_model, "--embeddings", learned, "--real_dir",
            concept_folder[0], "--prompts_file", prompts, "--images_per_prompt", 2,
            "--num_inference_steps", 2, "--output_dir", output_dir, *more])])
    return call


def pictures(folder) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((folder / "images").iterdir())]


def test_pictures_are_of_the_prompts_and_scores_of_the_pictures(run, tiny_model, learned, tmp_path,
                                                               concept_folder, capsys):
    from szt_utils.generation import generate, load_pipeline
    from szt_utils.images import list_images, read_image

    run(tmp_path / "out")
    made = pictures(tmp_path / "out")
    prompts = ["a photo of a <new> on sand"] * 2 + ["a <new> in the sky"] * 2
    expected = generate(load_pipeline(tiny_model, learned / "learned_embeds.safetensors"), prompts, seed=100,
                        steps=2, guidance_scale=7.5)
    assert len(made) == 4
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
               for a, b in zip(made, expected, strict=True))
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    real = [read_image(path) for path in list_images(concept_folder[0])]
    features = [image_features(images, pocket.dino_path()) for images in (made, real)]
    scores = written["metrics"]
    assert set(scores) == {"dino", "real_real", "fid", "kid", "fd_dino", "clip"}
    assert scores["dino"] == pytest.approx(similarity(*features), abs=1e-4)
    assert scores["real_real"] == pytest.approx(pairwise_similarity(features[1]), abs=1e-4)
    texts = ["a photo of a object on sand"] * 2 + ["a object in the sky"] * 2
    networks = Networks(pocket.dino_path(), pocket.clip_path())
    assert scores["clip"] == pytest.approx(measure(made, real, texts, networks, ["clip"])["clip"], abs=1e-3)
    assert written["generated"] == 4 and written["real"] == 5
    told = capsys.readouterr().out
    assert "4 generated and 5 real pictures" in told and "know the pocket world alone" in told
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.size == (5 * 132 + 4, 3 * 156 + 4)  # the real ones and a row per prompt


def test_resume_makes_only_what_is_missing_and_other_metrics_need_no_new_pictures(run, tmp_path):
    folder = tmp_path / "out"
    run(folder, "--metrics", "dino")
    whole = [np.asarray(picture).astype(int) for picture in pictures(folder)]
    (folder / "images" / "002.png").unlink()
    stamp = (folder / "images" / "001.png").stat().st_mtime_ns
    run(folder, "--metrics", "dino,clip", "--class_word", "star")
    again = pictures(folder)
    assert len(again) == len(whole) == 4
    # In a batch of its own a picture may round to another level.
    assert max(np.abs(np.asarray(a) - b).max() for a, b in zip(again, whole, strict=True)) <= 1
    assert (folder / "images" / "001.png").stat().st_mtime_ns == stamp
    assert set(json.loads((folder / "scores.json").read_text())["metrics"]) == {"dino", "real_real", "clip"}
    with pytest.raises(SystemExit, match="another --seed"):
        run(folder, "--seed", 7)


def test_another_embedding_of_the_same_name_is_not_mixed_in(run, learned, tmp_path):
    changed = tmp_path / "changed.safetensors"
    save_embedding(changed, "<new>", torch.randn(1, 32))
    run(tmp_path / "out", "--embeddings", changed, "--metrics", "dino")
    save_embedding(changed, "<new>", torch.randn(1, 32))
    with pytest.raises(SystemExit, match="another --embeddings"):
        run(tmp_path / "out", "--embeddings", changed, "--metrics", "dino")


def test_without_a_model_everything_is_the_pocket_worlds(script):
    args = script.parse_args(["--embeddings", "e", "--real_dir", "r", "--output_dir", "o"])
    assert args.pocket and (args.num_inference_steps, args.guidance_scale) == (25, 5.0)
    assert args.images_per_prompt == 5 and args.metrics == list(script.METRICS)
    from szt_utils.metrics import METRICS
    assert script.METRICS == METRICS


@pytest.mark.parametrize("line, message", [("a photo of a toy", "Line 1"), ("{} and {}", "Line 1"),
                                           ("a {name}", "Line 1"), ("# nothing", "holds no prompt")])
def test_a_prompts_file_without_a_place_for_the_concept_is_refused(run, tmp_path, line, message):
    (tmp_path / "bad.txt").write_text(line)
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "out", "--prompts_file", tmp_path / "bad.txt")
    assert not (tmp_path / "out").exists()


def test_bad_input_on_the_real_command_line(tmp_path, concept_folder):
    done = run_script("evaluate.py", "--embeddings", tmp_path, "--real_dir", concept_folder[0],
                      "--output_dir", tmp_path / "out", expect=1)
    assert done.stderr.startswith("error: The embedding") and done.stderr.count("\n") == 1
    done = run_script("evaluate.py", "--embeddings", "e", "--real_dir", "r", "--output_dir", "o", "--metrics",
                      "dino,beauty", expect=2)
    assert "unknown metric 'beauty'" in done.stderr
