"""Runs that are stopped, resumed, started twice or in the folder of another: nothing is lost or mixed up."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TOKEN, embedding, flags, run_here
from PIL import Image

import textual_inversion_szt
from szt_utils.checkpoints import list_checkpoints
from szt_utils.embedding_files import load_embedding, read_embedding
from szt_utils.files import read_json, read_stats
from szt_utils.fingerprint import compare, hash_weights, identity
from szt_utils.locks import lock_folder
from szt_utils.models import load_model
from szt_utils.outputs import upload_all
from szt_utils.settings import ConceptSettings, TrainingSettings, public_name
from szt_utils.training_run import Run


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, action)` calls `action` when the n-th batch is drawn."""
    draw, count = textual_inversion_szt.draw, []

    def register(step, action):
        def acting(concept, model):
            count.append(1)
            if len(count) == step:
                action()
            return draw(concept, model)

        monkeypatch.setattr(textual_inversion_szt, "draw", acting)

    return register


def kill():
    raise MemoryError("killed")


@pytest.mark.parametrize("limit", [None, 1])
def test_a_new_run_in_an_earlier_ones_folder_resumes_its_own_checkpoint(tiny_model, concept_folder, tmp_path,
                                                                        at_step, limit):
    options = dict(checkpointing_steps=1, checkpoints_total_limit=limit)
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", **options))
    before = (tmp_path / "out" / "stats.jsonl").read_bytes()
    at_step(4, kill)
    new = dict(options, seed=9)
    with pytest.raises((MemoryError, SystemExit)):
        run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", **new))
    assert list_checkpoints(tmp_path / "out")[-1].name == "checkpoint-3"
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", **new, resume_from_checkpoint="latest"))
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "alone", seed=9))
    assert torch.equal(embedding(tmp_path / "out"), embedding(tmp_path / "alone"))
    assert (tmp_path / "out" / "earlier-1" / "checkpoint-6" / "training_state.pt").exists()
    assert (tmp_path / "out" / "earlier-1" / "stats.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_run_is_never_the_latest(tiny_model, concept_folder, tmp_path):
    """As one copied back by hand, or left by version 0.1, which replaced options.json only."""
    options = dict(checkpointing_steps=3)
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", **options))
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", seed=9, max_train_steps=3, **options))
    shutil.move(tmp_path / "out" / "earlier-1" / "checkpoint-6", tmp_path / "out")
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", seed=9, resume_from_checkpoint="latest"))
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "alone", seed=9))
    assert torch.equal(embedding(tmp_path / "out"), embedding(tmp_path / "alone"))


@pytest.fixture(scope="module")
def half_run(tiny_model, concept_folder, tmp_path_factory):
    """A folder with a copy of the images and masks, and a run of them that has a checkpoint."""
    folder = tmp_path_factory.mktemp("half")
    for source, name in zip(concept_folder, ("images", "masks"), strict=True):
        shutil.copytree(source, folder / name)
    run_here(flags(tiny_model, folder / "images", folder / "out", loss_mask_dir=folder / "masks",
                   checkpointing_steps=1, max_train_steps=1))
    return folder


def resume(model, folder, **changes):
    run_here(flags(model, folder / "images", folder / "out", **{
        "loss_mask_dir": folder / "masks", "resume_from_checkpoint": "latest", "max_train_steps": 1,
        **changes}))


@pytest.mark.parametrize("name, value", [
    ("learning_rate", 1e-3), ("seed", 4), ("t_min", 500), ("jpeg_quality", 25), ("resolution", 128),
    ("center_crop", True), ("mixed_precision", "bf16"), ("initializer_token", "ring"),
    ("lr_scheduler", "cosine"), ("mask_dilation", 3), ("mask_mode", "image"), ("t_distribution", "power"),
    ("adam_beta1", 0.5), ("train_batch_size", 2), ("repeats", 3), ("learnable_property", "style"),
    ("clip_skip", 1)])
def test_a_changed_setting_is_refused_with_both_values(tiny_model, half_run, name, value):
    with pytest.raises(SystemExit) as caught:
        resume(tiny_model, half_run, **{name: value})
    message = caught.value.code
    assert message.startswith("error: The checkpoint") and " was " in message and " is now " in message
    assert f"--{name}" in message and "\n" not in message


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_an_image_or_mask_that_changed_came_or_went_is_refused(tiny_model, half_run, kind):
    path = sorted((half_run / kind).iterdir())[0]
    before = path.read_bytes()
    try:
        levels = np.array(Image.open(path))
        levels[0, 0] = 255 - levels[0, 0]  # one pixel
        Image.fromarray(levels).save(path)
        with pytest.raises(SystemExit, match=f"the {kind[:-1]} '{path.name}' has other content"):
            resume(tiny_model, half_run)
    finally:
        path.write_bytes(before)
    resume(tiny_model, half_run)  # the old content is welcome back


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_an_optimizers_state_of_another_shape_is_refused(tiny_model, half_run, tmp_path, name):
    copy = shutil.copytree(half_run, tmp_path / "copy")
    path = copy / "out" / "checkpoint-1" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0][name] = torch.zeros(2, 32)
    torch.save(state, path)
    with pytest.raises(SystemExit, match="its optimizer's state has another shape"):
        resume(tiny_model, copy)


def test_other_weights_of_the_same_shape_are_refused(tiny_model, tiny_velocity_model, half_run):
    with pytest.raises(SystemExit, match="the hash of the model's weights was"):
        resume(tiny_velocity_model, half_run)


def test_images_that_came_or_went_are_named():
    with pytest.raises(ValueError, match="image 'b.png' is missing"):
        compare({"images": {"a.png": "1", "b.png": "2"}}, {"images": {"a.png": "1"}})
    with pytest.raises(ValueError, match="image 'b.png' is new"):
        compare({"images": {"a.png": None}}, {"images": {"a.png": "1", "b.png": "2"}})
    assert compare({"images": {"a.png": None}}, {"images": {"a.png": "1"}}) == [], "0.1 kept no hash"
    assert compare({"seed": 3}, {"seed": 3, "clip_skip": 1}) == [], "it knew no such flag"


def test_the_hash_of_a_models_weights_is_of_every_part(tiny_model):
    model = load_model(tiny_model)
    hashes = {hash_weights(model)}
    for part in (model.network, model.vae, *model.text_encoders):
        next(part.parameters()).data.view(-1)[0] += 1
        hashes.add(hash_weights(model))
    schedule = model.log_snr
    model.log_snr = lambda timesteps: schedule(timesteps) + (timesteps > 900)
    assert len(hashes | {hash_weights(model)}) == 5


def test_a_models_identity_is_also_of_the_ends_of_large_files(tmp_path):
    names = []
    for folder, content in (("a", b"old"), ("b", b"old"), ("c", b"new")):
        (tmp_path / folder).mkdir()
        with open(tmp_path / folder / "model", "wb") as file:
            file.seek(2**26)  # of 64 MB, which take no room on the disk
            file.write(content)
        names.append(identity(str(tmp_path / folder / "model")))
    assert names[0] == names[1] != names[2]


def test_more_steps_are_welcome_and_said(tiny_model, half_run, capsys):
    resume(tiny_model, half_run, max_train_steps=2)
    assert "--max_train_steps was 1 and is now 2." in capsys.readouterr().out
    shutil.rmtree(half_run / "out" / "checkpoint-2", ignore_errors=True)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_run_without_a_seed_keeps_that_of_its_checkpoint(tiny_model, concept_folder, tmp_path, seed):
    """One that was drawn, and one that counts as false."""
    run_here(flags(tiny_model, concept_folder[0], tmp_path, seed=seed, checkpointing_steps=1,
                   max_train_steps=1))
    seed = read_json(tmp_path / "options.json")["seed"]
    run_here(flags(tiny_model, concept_folder[0], tmp_path, seed=None, resume_from_checkpoint="latest"))
    assert read_json(tmp_path / "options.json")["seed"] == seed
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "whole", seed=seed))
    assert torch.equal(embedding(tmp_path), embedding(tmp_path / "whole"))


def test_a_finished_run_trains_no_further(tiny_model, concept_folder, tmp_path, capsys):
    """Also one whose last step is no multiple of --checkpointing_steps, and that had no seed."""
    options = dict(seed=None, checkpointing_steps=4, max_train_steps=6)
    run_here(flags(tiny_model, concept_folder[0], tmp_path, **options))
    before, stats = embedding(tmp_path), (tmp_path / "stats.jsonl").read_bytes()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    run_here(flags(tiny_model, concept_folder[0], tmp_path, **options, resume_from_checkpoint="latest"))
    assert torch.equal(embedding(tmp_path), before) and (tmp_path / "stats.jsonl").read_bytes() == stats
    assert "checkpoint-6" in capsys.readouterr().out


def test_what_an_earlier_run_left_is_not_loaded_with_a_new_embedding(tiny_model, concept_folder, tmp_path):
    """Files with the other suffix, which would come first, and of a second text encoder."""
    run_here(flags(tiny_model, concept_folder[0], tmp_path, max_train_steps=1))
    (tmp_path / "learned_embeds_2.safetensors").write_bytes(
        (tmp_path / "learned_embeds.safetensors").read_bytes())
    run_here(flags(tiny_model, concept_folder[0], tmp_path, max_train_steps=2, no_safe_serialization=True))
    token, rows = read_embedding(tmp_path)
    assert token == TOKEN and torch.equal(rows["any"], embedding(tmp_path, "learned_embeds.bin"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tiny_model, concept_folder, tmp_path,
                                                                at_step, number, capsys):
    """From which also the schedule of its learning rate continues."""
    schedule = dict(lr_scheduler="cosine", lr_warmup_steps=2)
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    at_step(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", **schedule))
    assert caught.value.code == 128 + number
    assert "--resume_from_checkpoint latest." in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    assert not (tmp_path / "out" / "learned_embeds.safetensors").exists(), "it has not been learned yet"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", **schedule,
                   resume_from_checkpoint="latest"))
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "whole", **schedule))
    assert torch.equal(embedding(tmp_path / "out"), embedding(tmp_path / "whole"))
    ours, whole = (read_stats(tmp_path / name / "stats.jsonl") for name in ("out", "whole"))
    assert ours == whole and [record["step"] for record in ours] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_signal_ends_the_run_at_once(tiny_model, concept_folder, tmp_path, at_step, before):
    """Also in a shell's background job, which ignores SIGINT."""
    def twice():
        for _ in range(2):  # os.kill may reach another thread first
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)  # Python handles a signal a little later

    at_step(3, twice)
    handler = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(SystemExit) as caught:
            run_here(flags(tiny_model, concept_folder[0], tmp_path))
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, handler)
    assert caught.value.code == 130 and list_checkpoints(tmp_path) == []


def test_the_validation_images_of_a_step_come_before_its_checkpoint(tiny_model, concept_folder, tmp_path,
                                                                    monkeypatch):
    """A run that is killed while it generates them does so again."""
    from szt_utils import outputs

    monkeypatch.setattr(outputs, "validate", lambda *arguments: kill())
    with pytest.raises((MemoryError, SystemExit)):
        run_here(flags(tiny_model, concept_folder[0], tmp_path, checkpointing_steps=2, validation_steps=2,
                       validation_prompt=f"a {TOKEN}"))
    assert list_checkpoints(tmp_path) == []


def test_a_folder_in_use_is_refused_and_a_killed_runs_leftovers_are_removed(tiny_model, concept_folder,
                                                                            tmp_path):
    with lock_folder(tmp_path), pytest.raises(SystemExit, match="is in use by another command"):
        run_here(flags(tiny_model, concept_folder[0], tmp_path))
    for name in (".checkpoint-3.part", ".checkpoint-1.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training_state.pt").write_text("half")
    (tmp_path / ".latents-abc").write_text("half")
    run_here(flags(tiny_model, concept_folder[0], tmp_path, max_train_steps=1))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_processes_that_accelerate_does_not_see_are_refused(tiny_model, concept_folder, tmp_path,
                                                            monkeypatch):
    """As torchrun starts them: on a CPU, some versions of Accelerate want to be told that there are two."""
    from accelerate import Accelerator

    make = Accelerator.__init__

    def made(self, *arguments, **options):
        make(self, *arguments, **options)
        monkeypatch.setenv("WORLD_SIZE", "2")

    monkeypatch.setattr(Accelerator, "__init__", made)
    with pytest.raises(SystemExit, match="2 processes were started, .*sees 1: .*ACCELERATE_USE_CPU"):
        run_here(flags(tiny_model, concept_folder[0], tmp_path))


@pytest.mark.parametrize("vectors", [73, 80, 1_000_000])
def test_vectors_that_no_caption_has_room_for_are_refused(tiny_model, concept_folder, tmp_path, vectors):
    with pytest.raises(SystemExit, match=f"--num_vectors is {vectors}, but a caption .*has room for"):
        run_here(flags(tiny_model, concept_folder[0], tmp_path, num_vectors=vectors))


def test_no_path_of_this_machine_is_in_what_is_shared(tiny_model, concept_folder, tmp_path):
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", loss_mask_dir=concept_folder[1],
                   max_train_steps=1))
    shared = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(shared) >= 4
    for path in shared:
        for private in (tmp_path, tiny_model, *concept_folder):
            assert os.fsencode(private.parent) not in path.read_bytes(), path
    options = read_json(tmp_path / "out" / "options.json")
    assert options["pretrained_model_name_or_path"] == tiny_model.name
    assert options["train_data_dir"] == concept_folder[0].name and options["output_dir"] == "out"


@pytest.mark.parametrize("path, name", [
    ("/home/me/gone", "gone"), ("~/models/private", "private"), ("../private/gone", "gone"),
    ("private/model", "model"), ("./private/model", "model"), ("openai/clip", "openai/clip"),
    ("latest", "latest"), (None, None)])
def test_of_a_path_of_this_machine_the_last_name_is_public(tmp_path, monkeypatch, path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "model").mkdir(parents=True)
    assert public_name(path) == name


def test_a_pipeline_that_cannot_be_saved_leaves_the_old_one_and_the_embedding(tiny_model, concept_folder,
                                                                              tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    options, moved, move = dict(save_as_full_pipeline=True, max_train_steps=1), [], Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, to: moved.append(path) or move(path, to))
        run_here(flags(tiny_model, concept_folder[0], tmp_path, **options))
    assert tmp_path / ".pipeline.part" / "unet" in moved and moved[-1].name == "model_index.json"
    before = {path: path.read_bytes() for path in (tmp_path / "unet").iterdir()}

    def full(self, folder, *_, **__):
        folder.mkdir()
        (folder / "unet").write_text("half")
        raise RuntimeError("I/O error: No space left on device (os error 28)\nmore")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", full)
    with pytest.raises(SystemExit) as caught:
        run_here(flags(tiny_model, concept_folder[0], tmp_path, **options, seed=4))
    assert caught.value.code == (f"error: The pipeline cannot be saved in '{tmp_path}' (I/O error: No space "
                                 "left on device (os error 28)); the embedding is saved there.")
    assert before and all(path.read_bytes() == content for path, content in before.items())
    assert read_json(tmp_path / "options.json")["seed"] == 4 and embedding(tmp_path).isfinite().all()
    assert not (tmp_path / ".pipeline.part").exists()


def concepts(folder, images, names):
    (folder / "concepts.json").write_text(json.dumps([
        {"train_data_dir": str(images), "placeholder_token": f"<{name}>", "initializer_token": "star"}
        for name in names]))
    return dict(images=None, output_dir=folder, placeholder_token=None, initializer_token=None,
                concepts=folder / "concepts.json")


def test_one_lost_folder_or_damaged_checkpoint_stops_no_other_concept(tiny_model, concept_folder, tmp_path):
    options = concepts(tmp_path, concept_folder[0], "abc")
    run_here(flags(tiny_model, **options, checkpointing_steps=2, max_train_steps=2))
    (tmp_path / "b" / "checkpoint-2" / "training_state.pt").write_bytes(b"damaged")
    entries = read_json(tmp_path / "concepts.json")
    entries[0]["train_data_dir"] = str(tmp_path / "lost")
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    with pytest.raises(SystemExit) as caught:
        run_here(flags(tiny_model, **options, resume_from_checkpoint="latest"))
    assert "a: The image folder" in caught.value.code and "b: The checkpoint" in caught.value.code
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "alone", placeholder_token="<c>"))
    ours, alone = (load_embedding(tmp_path / name / "learned_embeds.safetensors")[1]
                   for name in ("c", "alone"))
    assert (ours - alone).norm() < 1e-4 * alone.norm()


def test_a_group_that_resumes_together_ends_bit_for_bit_where_it_would_have(tiny_model, concept_folder,
                                                                            tmp_path):
    ends = []
    for name, halves in (("whole", [6]), ("halves", [3, 6])):
        (tmp_path / name).mkdir()
        options = concepts(tmp_path / name, concept_folder[0], "abc")
        for steps in halves:
            run_here(flags(tiny_model, **options, checkpointing_steps=3, max_train_steps=steps,
                           resume_from_checkpoint="latest"))
        ends.append([load_embedding(tmp_path / name / each / "learned_embeds.safetensors")[1]
                     for each in "abc"])
    assert all(map(torch.equal, *ends))


def test_entries_whose_folders_are_one_are_refused(tiny_model, concept_folder, tmp_path):
    options = concepts(tmp_path, concept_folder[0], "ab")
    entries = read_json(tmp_path / "concepts.json")
    for entry, folder in zip(entries, ("x", "y/../x"), strict=True):
        entry["output_dir"] = str(tmp_path / folder)
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    with pytest.raises(SystemExit, match="Concept 2 .*is another concept's, too"):
        run_here(flags(tiny_model, **options))


def test_everything_is_saved_before_any_upload_and_a_failed_one_stops_no_other(tiny_model, concept_folder,
                                                                               tmp_path, monkeypatch):
    import huggingface_hub

    uploaded = []

    def create_repo(name, **_):
        assert all((tmp_path / each / "learned_embeds.safetensors").exists() for each in "ab")
        if name == "a":
            raise ConnectionError("no route to the Hub")
        return type("Repo", (), {"repo_id": f"me/{name}"})

    def upload_folder(folder_path, ignore_patterns, **_):
        uploaded.append(folder_path)
        assert {"checkpoint-*", "earlier-*"} <= set(ignore_patterns)

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    with pytest.raises(SystemExit, match="a: The upload to the Hub failed .no route to the Hub.; everything"):
        run_here(flags(tiny_model, **concepts(tmp_path, concept_folder[0], "ab"), concepts_per_batch=1,
                       max_train_steps=1, push_to_hub=True))
    assert uploaded == [str(tmp_path / "b")]
    card = (tmp_path / "b" / "README.md").read_text()
    assert 'pipe.load_textual_inversion("me/b")' in card and str(tiny_model.parent) not in card


@pytest.mark.parametrize("hub_model_id, name", [("me/it", "me/it"), (None, "out")])
@pytest.mark.parametrize("encoders, load", [
    (1, 'pipe.load_textual_inversion("hub/repo")'), (2, 'load_into(pipe, snapshot_download("hub/repo"))')])
def test_an_upload_has_the_names_of_the_flags_and_no_files_of_the_training(tmp_path, monkeypatch, name, load,
                                                                           hub_model_id, encoders):
    import huggingface_hub

    calls = []

    def create_repo(name, exist_ok, token):
        calls.append((name, exist_ok, token))
        return SimpleNamespace(repo_id="hub/repo")

    def upload_folder(repo_id, folder_path, commit_message, token, ignore_patterns):
        paths = [path.relative_to(folder_path).as_posix() for path in (tmp_path / "out").rglob("*")]
        calls.append((repo_id, token, sorted(huggingface_hub.utils.filter_repo_objects(
            paths, ignore_patterns=ignore_patterns))))

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    for path in ("learned_embeds.bin", "tracked/events", "checkpoint-5/rank_0.pt", ".lock", ".latents-x",
                 "earlier-1/learned_embeds.bin"):
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).touch()
    run = Run.__new__(Run)
    run.rank, run.one_concept, run.failures = 0, True, {}
    run.settings = TrainingSettings("model", push_to_hub=True, hub_token="secret", hub_model_id=hub_model_id,
                                    logging_dir="tracked")
    concept = SimpleNamespace(settings=ConceptSettings("images", TOKEN, "star"), output_dir=tmp_path / "out")
    upload_all(run, SimpleNamespace(path="model", text_encoders=[None] * encoders), [concept])
    assert calls == [(name, True, "secret"), ("hub/repo", "secret", [
        "README.md", "learned_embeds.bin", "tracked"])]
    card = (tmp_path / "out" / "README.md").read_text()
    assert load in card and f"`{TOKEN}`" in card and "secret" not in card
