"""The script: images, scores, resume, prompts files, errors."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import build_tiny_sdxl, pipeline_with, run_script
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
from szt_utils import pocket
from szt_utils.embedding_files import save_embedding
from szt_utils.evaluation import EvaluationSettings, as_trained
from szt_utils.metrics import (
    SCORES,
    Networks,
    image_features,
    pairwise_similarity,
    score_images,
    similarity,
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """An output folder of the training, with a row of the tiny model's width."""
    folder = tmp_path_factory.mktemp("learned")
    torch.manual_seed(0)
    save_embedding(folder / "learned_embeds.safetensors", "<new>", torch.randn(1, 32) * 3)
    return folder


@pytest.fixture
def run(tiny_model, learned, concept_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# places\n\na photo of a {} on sand\na {0} {1} in the sky\n")

    def call(output_dir, *more):
        evaluate.main([*map(str, [
            "--pretrained_model_name_or_path", tiny_model, "--embeddings", learned, "--clean_dir",
            concept_folder[0], "--prompts_file", prompts, "--images_per_prompt", 2,
            "--num_inference_steps", 2, "--output_dir", output_dir, *more])])
    return call


def images_in(folder) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((folder / "images").iterdir())]


def test_images_are_of_the_prompts_and_scores_of_the_images(run, tiny_model, learned, tmp_path,
                                                           concept_folder, capsys):
    from szt_utils.generation import generate
    from szt_utils.images import list_images, read_image

    run(tmp_path / "out")
    made = images_in(tmp_path / "out")
    prompts = ["a photo of a <new> on sand"] * 2 + ["a <new> in the sky"] * 2
    expected = generate(pipeline_with(tiny_model, learned / "learned_embeds.safetensors"), prompts, seed=100,
                        steps=2, guidance_scale=7.5)
    assert len(made) == 4
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
               for a, b in zip(made, expected, strict=True))
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    real = [read_image(path) for path in list_images(concept_folder[0])]
    features = [image_features(images, pocket.dino_path()) for images in (made, real)]
    scores = written["metrics"]
    assert set(scores) == {*SCORES, "real_real"}
    assert scores["dino"] == pytest.approx(similarity(*features), abs=1e-4)
    assert scores["real_real"] == pytest.approx(pairwise_similarity(features[1]), abs=1e-4)
    texts = ["a photo of a object on sand"] * 2 + ["a object in the sky"] * 2
    networks = Networks(pocket.dino_path(), pocket.clip_path())
    again = score_images(made, real, texts, networks, ["clip"])
    assert scores["clip"] == pytest.approx(again["clip"], abs=1e-3)
    assert written["generated"] == 4 and written["real"] == 5
    shown = capsys.readouterr().out
    assert "4 generated and 5 real images" in shown and "only know the pocket world" in shown
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.size == (5 * 132 + 4, 3 * 156 + 4)  # the clean ones and a row per prompt


def test_resume_makes_only_what_is_missing_and_other_metrics_need_no_new_images(run, tmp_path):
    folder = tmp_path / "out"
    run(folder, "--metrics", "dino")
    whole = [np.asarray(image).astype(int) for image in images_in(folder)]
    (folder / "images" / "002.png").unlink()
    stamp = (folder / "images" / "001.png").stat().st_mtime_ns
    run(folder, "--metrics", "dino,clip", "--class_word", "star")
    again = images_in(folder)
    assert len(again) == len(whole) == 4
    # In a batch of its own an image may round to another level.
    assert max(np.abs(np.asarray(a) - b).max() for a, b in zip(again, whole, strict=True)) <= 1
    assert (folder / "images" / "001.png").stat().st_mtime_ns == stamp
    assert set(json.loads((folder / "scores.json").read_text())["metrics"]) == {"dino", "real_real", "clip"}
    for name, value in (("seed", 7), ("num_inference_steps", 3), ("guidance_scale", 2)):
        with pytest.raises(SystemExit, match=f"another --{name}"):
            run(folder, f"--{name}", value)


def test_another_embedding_of_the_same_name_is_not_mixed_in(run, learned, tmp_path):
    changed = tmp_path / "changed.safetensors"
    save_embedding(changed, "<new>", torch.randn(1, 32))
    run(tmp_path / "out", "--embeddings", changed, "--metrics", "dino")
    save_embedding(changed, "<new>", torch.randn(1, 32))
    with pytest.raises(SystemExit, match="another --embeddings"):
        run(tmp_path / "out", "--embeddings", changed, "--metrics", "dino")


def test_without_a_model_everything_is_the_pocket_worlds():
    from szt_utils.metrics import METRICS

    # The old name of --clean_dir stays.
    args = evaluate.parse_args(["--embeddings", "e", "--real_dir", "r", "--output_dir", "o"])
    assert (args.num_inference_steps, args.guidance_scale, args.clean_dir) == (25, None, "r")
    assert args.images_per_prompt == 5 and args.metrics == list(evaluate.METRICS)
    assert evaluate.METRICS == METRICS
    for model in (None, pocket.model_path(), pocket.model_path("sdxl")):
        settings = EvaluationSettings("e", "r", pretrained_model_name_or_path=model)
        assert settings.prompts == list(pocket.PROMPTS) and settings.guidance_scale == 5
    other = EvaluationSettings("e", "r", "org/model")
    assert other.prompts != settings.prompts and other.guidance_scale == 7.5
    assert settings.networks == Networks(pocket.dino_path(), pocket.clip_path())


def test_networks_that_are_given_replace_the_pocket_ones():
    settings = EvaluationSettings("e", "r", dino="org/dino", clip="org/clip", inception="weights.pth")
    assert settings.networks == Networks("org/dino", "org/clip", "weights.pth")


@pytest.mark.parametrize("network", ["dino", "clip"])
def test_one_network_alone_leaves_the_warning_about_the_bundled_ones(run, tmp_path, capsys, network):
    run(tmp_path / "out", "--metrics", "dino", f"--{network}", getattr(pocket, f"{network}_path")())
    assert "only know the pocket world" in capsys.readouterr().out


@pytest.mark.parametrize("inside", ["", "out"])
def test_a_folder_of_results_among_the_clean_images_is_refused(run, concept_folder, tmp_path, inside):
    clean = shutil.copytree(concept_folder[0], tmp_path / "clean")
    with pytest.raises(SystemExit, match="is --clean_dir or lies in it"):
        run(clean / inside, "--clean_dir", clean)
    assert sorted(path.name for path in clean.iterdir()) == sorted(os.listdir(concept_folder[0]))


def test_an_sdxl_model_is_evaluated_and_a_mistake_leaves_the_folder_as_it_was(run, tmp_path):
    model = build_tiny_sdxl(tmp_path / "sdxl")
    save_file({"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 24)}, tmp_path / "Toy.safetensors")
    options = ["--pretrained_model_name_or_path", model, "--metrics", "dino"]
    with pytest.raises(SystemExit, match="width 32, but the model's are 32 and 24 wide"):
        run(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", *options, "--embeddings", tmp_path / "Toy.safetensors")
    assert len(images_in(tmp_path / "out")) == 4
    assert "dino" in json.loads((tmp_path / "out" / "scores.json").read_text())["metrics"]
    # A training's folder holds a file for each text encoder.
    for name, width in (("learned_embeds", 32), ("learned_embeds_2", 24)):
        save_file({"<toy>": load_file(tmp_path / "Toy.safetensors")["clip_l" if width == 32 else "clip_g"]},
                  tmp_path / f"{name}.safetensors")
    run(tmp_path / "both", *options, "--embeddings", tmp_path)
    assert images_in(tmp_path / "both") == images_in(tmp_path / "out")
    save_file({"<toy>": torch.randn(2, 24)}, tmp_path / "learned_embeds_2.safetensors")
    with pytest.raises(SystemExit, match="made with another --embeddings"):
        run(tmp_path / "both", *options, "--embeddings", tmp_path)


@pytest.mark.parametrize("line, message", [("a photo of a toy", "Line 1"), ("{} and {}", "Line 1"),
                                           ("a {name}", "Line 1"), ("# nothing", "holds no prompt")])
def test_a_prompts_file_without_a_place_for_the_concept_is_refused(run, tmp_path, line, message):
    (tmp_path / "bad.txt").write_text(line)
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "out", "--prompts_file", tmp_path / "bad.txt")
    assert not (tmp_path / "out").exists()


def test_one_image_gets_what_can_be_given(run, concept_folder, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    path = sorted(concept_folder[0].iterdir())[0]
    (tmp_path / "one" / path.name).write_bytes(path.read_bytes())
    run(tmp_path / "out", "--clean_dir", tmp_path / "one")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["metrics"]
    assert {name for name, value in scores.items() if value is None} == {"real_real", "fid", "kid", "fd_dino"}
    assert abs(scores["dino"]) < 1 and scores["clip"] > 0
    shown = capsys.readouterr().out
    assert "fid        n/a" in shown and "real_real  n/a" in shown and "there are 1 and 4" in shown


def test_a_prompt_without_room_for_all_vectors_is_refused(run, tmp_path):
    save_embedding(tmp_path / "long.safetensors", "<new>", torch.randn(20, 32))
    with pytest.raises(SystemExit, match="'a photo of a <new> on sand' leaves no room for all vectors of"):
        run(tmp_path / "out", "--embeddings", tmp_path / "long.safetensors")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_all_vectors_of_an_embedding_of_stable_diffusion_3_are_in_the_prompts(run, tiny_sd3, tmp_path):
    """Its pipeline does not add those behind the first."""
    from szt_utils.generation import generate

    def evaluated(count):
        torch.manual_seed(0)
        save_file({"clip_l": 3 * torch.randn(count, 32), "clip_g": 3 * torch.randn(count, 24)},
                  tmp_path / f"{count}.safetensors")
        run(tmp_path / f"out-{count}", "--pretrained_model_name_or_path", tiny_sd3, "--embeddings",
            tmp_path / f"{count}.safetensors", "--metrics", "dino")
        return np.stack([np.asarray(image, int) for image in images_in(tmp_path / f"out-{count}")])

    def generated(count, words):
        prompts = [f"a photo of a {words} on sand"] * 2 + [f"a {words} in the sky"] * 2
        pipeline = pipeline_with(tiny_sd3, tmp_path / f"{count}.safetensors")
        return np.stack([np.asarray(image, int) for image in generate(pipeline, prompts, seed=100, steps=2,
                                                                      guidance_scale=7.5)])

    one, three = evaluated(1), evaluated(3)
    assert np.abs(one - generated(1, "<1>")).max() <= 1
    assert np.abs(three - generated(3, "<3> <3>_1 <3>_2")).max() <= 1 < np.abs(
        three - generated(3, "<3>")).max()
    with pytest.raises(SystemExit, match="leaves no room for all vectors of"):
        evaluated(20)


def test_an_embedding_is_evaluated_with_the_layers_it_was_trained_with(run, tiny_model, learned, tmp_path,
                                                                      capsys):
    from szt_utils.generation import generate

    (token, rows), = load_file(learned / "learned_embeds.safetensors").items()
    path = tmp_path / "skipped.safetensors"
    save_embedding(path, token, rows, {"clip_skip": "1", "pooled_token": "end"})
    run(tmp_path / "out", "--embeddings", path, "--metrics", "dino")
    assert "trained with --pooled_token end" in capsys.readouterr().out
    pipeline = pipeline_with(tiny_model, path)
    prompt = ["a photo of a <new> on sand"]
    made, own, plain = (np.asarray(images[0], int) for images in (
        images_in(tmp_path / "out"), *(generate(pipeline, prompt, seed=100, steps=2, guidance_scale=7.5,
                                                clip_skip=skip) for skip in (1, 0))))
    assert np.abs(made - own).max() <= 1 < np.abs(made - plain).max()
    for wrong in ("", "x", "-1"):
        save_embedding(path, token, rows, {"clip_skip": wrong})
        assert as_trained(path) == {}


def test_images_that_are_not_finite_are_refused_not_saved(run, tmp_path):
    save_embedding(tmp_path / "huge.safetensors", "<new>", torch.full((1, 32), 1e38))
    with pytest.raises(SystemExit, match="Image 000, 'a photo of a <new> on sand', is not finite"):
        run(tmp_path / "out", "--embeddings", tmp_path / "huge.safetensors")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_bad_input_on_the_real_command_line(tmp_path, concept_folder):
    done = run_script("evaluate.py", "--embeddings", tmp_path, "--clean_dir", concept_folder[0],
                      "--output_dir", tmp_path / "out", expect=1)
    assert done.stderr.startswith("error: The embedding") and done.stderr.count("\n") == 1
    done = run_script("evaluate.py", "--embeddings", "e", "--clean_dir", "r", "--output_dir", "o",
                      "--metrics", "dino,beauty", expect=2)
    assert "unknown metric 'beauty'" in done.stderr
