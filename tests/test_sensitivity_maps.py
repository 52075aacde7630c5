"""The script: its files and their axes, maps that find a concept, resume, one sentence per mistake."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import pipeline_with, run_script
from PIL import Image
from safetensors import safe_open

from szt_utils import pocket
from szt_utils.embedding_files import save_embedding, save_rows
from szt_utils.errors import InputError
from szt_utils.map_making import MapSettings, _tokenize_learned, image_maps
from szt_utils.models import load_model
from szt_utils.sensitivity import tokenize_words

PROMPT, TOKENS, TIMESTEPS = "a photo of a teal striped star on grass", ["star", "teal"], [100, 500, 900]
SCRIPT = "sensitivity_maps.py"


@pytest.fixture(scope="module")
def image(concept_folder):
    return sorted(concept_folder[0].iterdir())[0]


@pytest.fixture(scope="module")
def options(tiny_model, image):
    return ["--pretrained_model_name_or_path", tiny_model, "--image", image, "--prompt", PROMPT, "--tokens",
            *TOKENS, "--timesteps", *TIMESTEPS, "--replacements", 3]


def read(path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def here(*arguments) -> None:
    import sensitivity_maps

    sensitivity_maps.main([*map(str, arguments)])


def test_the_files_and_their_axes(options, tmp_path):
    run_script(SCRIPT, *options, "--cross_attention", "--output_dir", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "maps.safetensors", "grid.png", "options.json", "stats.jsonl"}
    maps, metadata = read(tmp_path / "out" / "maps.safetensors")
    assert json.loads(metadata["tokens"]) == TOKENS and json.loads(metadata["timesteps"]) == TIMESTEPS
    assert set(maps) == {"ssm", "cross_attention"}
    for of_kind in maps.values():
        assert of_kind.dtype == torch.float32 and of_kind.shape == (2, 3, 8, 8) and (of_kind > 0).any()
    records = [json.loads(line) for line in (tmp_path / "out" / "stats.jsonl").read_text().splitlines()]
    assert [(record["token"], record["timestep"]) for record in records] == [
        (token, t) for token in TOKENS for t in TIMESTEPS]
    assert records[4]["ssm"] == pytest.approx(maps["ssm"][1, 1].mean().item())
    assert Image.open(tmp_path / "out" / "grid.png").width > 400


def test_maps_of_the_pocket_model_find_the_concept(tmp_path):
    """The mass of the shape's map lies within the true mask, many times its share of the image."""
    paths = pocket.write_concept("teal-striped-star", tmp_path / "images", tmp_path / "masks", count=2)
    here("--pretrained_model_name_or_path", pocket.model_path(), "--image", *paths, "--prompt",
         "a photo of a teal striped star", "--tokens", "star", "--timesteps", 300, 500, "--output_dir",
         tmp_path / "out")
    for path in paths:
        maps, _ = read(tmp_path / "out" / path.stem / "maps.safetensors")
        mask = torch.from_numpy(np.asarray(Image.open(tmp_path / "masks" / path.name)) > 0).float()
        cells = torch.nn.functional.adaptive_avg_pool2d(mask[None], (16, 16))[0]
        inside = (maps["ssm"] * cells).sum() / maps["ssm"].sum()
        assert maps["ssm"].shape == (1, 2, 16, 16)
        assert inside > 2.5 * cells.mean() > 0.1


def test_resolution_embeddings_and_all_words(options, tmp_path):
    save_embedding(tmp_path / "c.safetensors", "<c>", torch.randn(2, 32))
    here(*options[:4], "--prompt", "a <c> on a grass", "--timesteps", 500, "--embeddings",
         tmp_path / "c.safetensors", "--resolution", 96, "--output_dir", tmp_path / "out")
    maps, metadata = read(tmp_path / "out" / "maps.safetensors")
    assert maps["ssm"].shape == (4, 1, 12, 12)  # both vectors of the embedding are one word
    assert json.loads(metadata["tokens"]) == ["a", "<c>", "on", "grass"]  # a repeated word has one map
    here(*options[:4], "--prompt", "a <c> on grass", "--tokens", "<c>", "--timesteps", 500, "--embeddings",
         tmp_path / "c.safetensors", "--resolution", 96, "--output_dir", tmp_path / "both")
    both, metadata = read(tmp_path / "both" / "maps.safetensors")
    assert json.loads(metadata["tokens"]) == ["<c>"] and both["ssm"].shape[0] == 1


def test_the_text_is_read_as_the_embedding_was_trained(options, tmp_path, monkeypatch):
    import szt_utils.map_making

    seen, rows, load = [], torch.randn(1, 32), szt_utils.map_making.load_model
    monkeypatch.setattr(szt_utils.map_making, "load_model", lambda *given, **more: (
        seen.append(load(*given, **more)) or seen[-1]))
    maps = {}
    for skip in (0, 1):
        save_embedding(tmp_path / f"{skip}.safetensors", "<c>", rows, {"clip_skip": str(skip)})
        here(*options[:4], "--prompt", "a <c> on grass", "--timesteps", 500, "--embeddings",
             tmp_path / f"{skip}.safetensors", "--output_dir", tmp_path / str(skip))
        maps[skip], _ = read(tmp_path / str(skip) / "maps.safetensors")
    assert [model.clip_skip for model in seen] == [0, 1]
    assert not torch.allclose(maps[0]["ssm"], maps[1]["ssm"], rtol=0.1)
    save_embedding(tmp_path / "other.safetensors", "<d>", rows)
    with pytest.raises(SystemExit, match="trained with different --clip_skip or --pooled_token"):
        here(*options[:4], "--prompt", "a <c> <d>", "--timesteps", 500, "--embeddings",
             tmp_path / "1.safetensors", tmp_path / "other.safetensors", "--output_dir", tmp_path / "both")


def test_an_sdxl_text_is_pooled_as_the_embedding_was_trained(tiny_sdxl, tmp_path):
    rows = {"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 24)}
    for pooled_token in ("upstream", "end"):
        path = tmp_path / f"{pooled_token}.safetensors"
        save_rows(path, rows, {"pooled_token": pooled_token})
        model = load_model(str(tiny_sdxl))
        _tokenize_learned(model, MapSettings(str(tiny_sdxl), ["i"], "a <c>", embeddings=[str(path)]))
        assert model.pooled_token == pooled_token


def test_a_seed_decides_the_draws_and_a_batch_size_nothing(tiny_model):
    model, batches = load_model(str(tiny_model)), []
    prompt = tokenize_words(model, "a red star", ["star"])
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model.network.register_forward_pre_hook(lambda network, args: batches.append(len(args[0])))

    def maps(**given):
        batches.clear()
        settings = MapSettings(str(tiny_model), ["i"], "a red star", None, [500], 5, **given)
        return image_maps(model, prompt, pixels, settings)["ssm"]

    zero, other = maps(), maps(seed=1)
    assert torch.equal(maps(), zero) and not torch.allclose(zero, other, rtol=0.1)
    assert batches == [6] and torch.allclose(maps(batch_size=2), zero, rtol=1e-4) and batches == [2, 2, 2]


def test_maps_that_are_not_finite_are_refused(tiny_model, monkeypatch):
    def spoiled(*args, **kwargs):
        maps = torch.ones(1, 1, 8, 8)
        maps[0, 0, 3, 3] = float("inf")
        return maps

    monkeypatch.setattr("szt_utils.map_making.semantic_sensitivity", spoiled)
    model = load_model(str(tiny_model))
    settings = MapSettings(str(tiny_model), ["i"], "a star", None, [500], 1, cross_attention=True)
    with pytest.raises(InputError, match="are not finite; use --mixed_precision bf16 or no"):
        image_maps(model, tokenize_words(model, "a star", ["star"]), torch.zeros(1, 3, 64, 64), settings)


def test_a_prompt_stands_for_all_vectors_as_in_a_pipeline(tiny_model):
    folder = tiny_model.parent
    save_embedding(folder / "c.safetensors", "<c>", torch.randn(3, 32))
    pipeline = pipeline_with(tiny_model, folder / "c.safetensors")
    for prompt in ("a <c>, on grass", "(<c>) and <c>.", "a<c>b"):
        found = _tokenize_learned(load_model(str(tiny_model)), MapSettings(
            str(tiny_model), ["i"], prompt, embeddings=[str(folder / "c.safetensors")]))
        spelled = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
        assert found.ids[0][0].tolist() == pipeline.tokenizer(spelled, padding="max_length").input_ids
    spelled = _tokenize_learned(load_model(str(tiny_model)), MapSettings(
        str(tiny_model), ["i"], "a <c> <c>_1 on", embeddings=[str(folder / "c.safetensors")]))
    assert spelled.words == ["a", "<c>", "<c>_1", "on"]
    save_embedding(folder / "d.safetensors", "<d>", torch.randn(2, 32))
    both = [str(folder / f"{name}.safetensors") for name in "cd"]
    mixed = _tokenize_learned(load_model(str(tiny_model)), MapSettings(
        str(tiny_model), ["i"], "<d> <c> <c>_1", embeddings=both))
    assert mixed.words == ["<d> <d>_1", "<c>", "<c>_1"]
    whole = _tokenize_learned(load_model(str(tiny_model)), MapSettings(
        str(tiny_model), ["i"], "a <c> on", embeddings=[str(folder / "c.safetensors")]))
    assert whole.words == ["a", "<c> <c>_1 <c>_2", "on"] and whole.positions == [[1], [2, 3, 4], [5]]


def test_the_same_command_resumes_and_another_is_refused(options, tmp_path, capsys):
    out = tmp_path / "out"
    here(*options, "--output_dir", out)
    before, _ = read(out / "maps.safetensors")
    time = (out / "maps.safetensors").stat().st_mtime_ns
    here(*options, "--output_dir", out)
    assert (out / "maps.safetensors").stat().st_mtime_ns == time
    (out / "grid.png").unlink()
    here(*options, "--output_dir", out)
    assert torch.equal(read(out / "maps.safetensors")[0]["ssm"], before["ssm"])  # the same draws
    for arguments, message in ((["--seed", 1], "made with another --seed"),
                               ([], "that this script did not write")):
        if not arguments:
            (out / "options.json").unlink()
        with pytest.raises(SystemExit) as caught:
            here(*options, *arguments, "--output_dir", out)
        assert message in str(caught.value)


def test_maps_follow_their_image_and_embedding_unless_changed_by_hand(options, image, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    paths = [shutil.copy(image, tmp_path / "images" / name) for name in ("one.png", "two.png")]
    save_embedding(tmp_path / "c.safetensors", "<c>", torch.randn(1, 32))
    command = [*options[:2], "--image", *paths, "--prompt", "a <c>", "--timesteps", 500, "--replacements", 2,
               "--embeddings", tmp_path / "c.safetensors", "--output_dir", tmp_path / "out"]
    here(*command)
    grids = [tmp_path / "out" / name / "grid.png" for name in ("one", "two")]
    before = [grid.read_bytes() for grid in grids]
    here(*command)
    assert "2 images, 0 of them to do." in capsys.readouterr().out
    grids[1].write_bytes(b"mine")
    save_embedding(tmp_path / "c.safetensors", "<c>", torch.randn(1, 32))
    here(*command)
    assert "are kept (1): two/grid.png; delete them" in capsys.readouterr().out
    assert grids[0].read_bytes() != before[0] and grids[1].read_bytes() == b"mine"
    stats = tmp_path / "out" / "stats.jsonl"
    stats.write_text('{"image": 7, "sha256": []}\n7\n' + stats.read_text())
    here(*command)
    assert "2 images, 0 of them to do." in capsys.readouterr().out


def test_the_diagnosis_works_here_for_one_more_release(tmp_path, capsys):
    """With the files of diagnose_images.py, and a sentence that names it."""
    import diagnose_images

    pocket.write_concept("blue-dotted-cross", tmp_path / "set", count=2, seed=9)
    model = ["--pretrained_model_name_or_path", pocket.model_path(), "--seed", 3]
    here(*model, "--diagnose", tmp_path / "set", "--output_dir", tmp_path / "here")
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: --diagnose has moved to diagnose_images.py")
    assert "probably clean" in shown.out
    diagnose_images.main([*map(str, [*model, "--image_dir", tmp_path / "set", "--output_dir",
                                     tmp_path / "there"])])
    for name in ("diagnosis.json", "stats.jsonl", "options.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@pytest.mark.parametrize("arguments, message", [
    (["--tokens", "ring"], "'ring' is not in the prompt"),
    (["--timesteps", 1000], "above the model's last, 999"),
    (["--resolution", 100], "multiple of 8"),
    (["--image", "none.png"], "'none.png' does not exist"),
    (["--embeddings", "none.safetensors"], "cannot be read"),
    (["--prompt", "star " * 40], "more than the 24 tokens"),
    (["--image", "a/x.png", "b/x.png"], "Several images are called 'x'"),
    (["--image", "a/X.png", "b/x.png"], "Several images are called 'X'"),
    (["--pretrained_model_name_or_path", "no/such"], "no usable"),
])
def test_one_sentence_per_mistake(options, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as caught:
        here(*options, "--output_dir", tmp_path / "out", *arguments)
    assert str(caught.value).startswith("error: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_prompt_without_a_word_is_refused_before_anything_is_written(options, tmp_path):
    with pytest.raises(SystemExit, match="^error: The prompt ' ' has no word; describe the image.$"):
        here(*options[:4], "--prompt", " ", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "x"], "--image --diagnose is required"),
    (["--image", "x.png"], "needs --prompt"),
    (["--diagnose", "x", "--tokens", "a"], "--tokens: not used"),
    (["--image", "x.png", "--prompt", "x", "--clean_dir", "d"], "--clean_dir: not used"),
    (["--diagnose", "x", "--clean_dir", "d", "--calibration", "c"], "--calibration: not used"),
    (["--image", "x.png", "--prompt", "x", "--replacements", "0"], "0 is not at least 1"),
    (["--image", "x.png", "--prompt", "x", "--timesteps", "soon"], "not a whole number"),
])
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        here("--pretrained_model_name_or_path", "m", "--output_dir", "o", *arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err
