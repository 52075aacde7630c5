"""The training script: upstream's result, its defects mended, resume, Safe-Zone Training."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, TOKEN, embedding, flags, run_here, run_script, two_ranks, white_masks
from PIL import Image
from safetensors.torch import load_file
from upstream import upstream

import szt_utils
import textual_inversion_szt
from szt_utils.checkpoints import list_checkpoints
from szt_utils.files import read_stats
from szt_utils.journal import Journal
from szt_utils.models import load_model
from szt_utils.settings import TrainingSettings
from szt_utils.training_run import Run


@pytest.fixture(scope="module")
def plain_run(tiny_model, concept_folder, tmp_path_factory):
    """A run with every new flag off, with checkpoints on the way."""
    folder = tmp_path_factory.mktemp("plain")
    done = run_script(SCRIPT,
                      *flags(tiny_model, concept_folder[0], folder, checkpointing_steps=3, save_steps=2,
                                     validation_prompt=f"a photo of a {TOKEN}", validation_steps=6,
                                     num_validation_images=1))
    return folder, done


def test_with_new_flags_off_the_result_is_upstreams(plain_run, tiny_model, concept_folder):
    expected = upstream(tiny_model, concept_folder[0])
    assert torch.equal(embedding(plain_run[0]), expected)


def test_with_accumulation_vectors_and_odd_batches_too(tiny_velocity_model, concept_folder, tmp_path):
    run_here(flags(tiny_velocity_model, concept_folder[0], tmp_path, train_batch_size=3, num_vectors=2,
                   gradient_accumulation_steps=2, no_cache_latents=True))
    expected = upstream(tiny_velocity_model, concept_folder[0], batch_size=3, accumulation=2, num_vectors=2)
    assert torch.equal(embedding(tmp_path), expected)


def test_a_higher_t_min_keeps_captions_and_noise(tiny_model, concept_folder, tmp_path):
    run_here(flags(tiny_model, concept_folder[0], tmp_path, t_min=500))
    assert torch.equal(embedding(tmp_path), upstream(tiny_model, concept_folder[0], t_min=500))


def test_files_of_a_run(plain_run):
    folder, _ = plain_run
    names = {path.name for path in folder.iterdir()}
    assert {"learned_embeds.safetensors", "star.safetensors", "learned_embeds-steps-2.safetensors",
            "options.json",
            "stats.jsonl", "checkpoint-3", "checkpoint-6"} <= names
    assert not [name for name in names if "part" in name]
    assert [record["step"] for record in read_stats(folder / "stats.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert Image.open(folder / "validation" / "step-00006-0.png").size == (64, 64)
    assert json.loads((folder / "options.json").read_text())["seed"] == 3
    # Kilobytes, where upstream's whole matrix and its Adam state would be megabytes on a real model.
    assert sum(path.stat().st_size for path in (folder / "checkpoint-6").iterdir()) < 60_000


def test_the_embedding_loads_into_a_pipeline_and_changes_the_image(plain_run, tiny_model):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt):
        return pipeline(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                        output_type="np").images

    pipeline.load_textual_inversion(plain_run[0], weight_name="learned_embeds.safetensors")
    row = pipeline.text_encoder.get_input_embeddings().weight[-1]
    assert torch.equal(row.detach(), embedding(plain_run[0])[0])
    assert np.abs(draw(f"a photo of a {TOKEN}") - draw("a photo of a star")).max() > 1e-4


def test_resume_continues_bit_for_bit(plain_run, tiny_model, concept_folder, tmp_path):
    run = flags(tiny_model, concept_folder[0], tmp_path, checkpointing_steps=3, max_train_steps=3)
    run_here(run)
    run_script(SCRIPT, *flags(tiny_model, concept_folder[0], tmp_path, resume_from_checkpoint="latest"))
    assert torch.equal(embedding(tmp_path), embedding(plain_run[0]))
    assert read_stats(tmp_path / "stats.jsonl") == read_stats(plain_run[0] / "stats.jsonl")


def test_a_checkpoint_of_version_0_1_is_resumed(plain_run, tiny_model, concept_folder, tmp_path):
    """That version wrote the rows of its only text encoder as a tensor, and called images pictures."""
    run_here(flags(tiny_model, concept_folder[0], tmp_path, checkpointing_steps=3, max_train_steps=3))
    path = tmp_path / "checkpoint-3" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    (state["rows"],) = state["rows"]
    state["fingerprint"]["pictures"] = state["fingerprint"].pop("images")
    (state["fingerprint"]["embedding width"],) = state["fingerprint"]["embedding width"]
    torch.save(state, path)
    run_here(flags(tiny_model, concept_folder[0], tmp_path, resume_from_checkpoint="latest"))
    assert torch.equal(embedding(tmp_path), embedding(plain_run[0]))


def test_resuming_a_finished_run_trains_no_further(plain_run, tiny_model, concept_folder):
    before = embedding(plain_run[0])
    (plain_run[0] / "checkpoint-abc").mkdir(exist_ok=True)  # upstream crashes on such a name
    run_here(flags(tiny_model, concept_folder[0], plain_run[0], resume_from_checkpoint="latest"))
    assert torch.equal(embedding(plain_run[0]), before)
    assert [record["step"] for record in read_stats(plain_run[0] / "stats.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_killed_at_a_random_moment_and_resumed_ends_at_the_same_place(tiny_model, concept_folder, tmp_path):
    # Far apart: a fast machine must not end the run before it is killed.
    steps, moment = 200, random.randint(1, 20)
    options = dict(checkpointing_steps=1, max_train_steps=steps, checkpoints_total_limit=2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_here(flags(tiny_model, concept_folder[0], whole, max_train_steps=steps))
    process = subprocess.Popen([sys.executable, str(ROOT / SCRIPT),
                                *flags(tiny_model, concept_folder[0], killed, **options)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.time() + 120
    while not any(int(checkpoint.name.split("-")[1]) >= moment for checkpoint in list_checkpoints(killed)):
        assert process.poll() is None and time.time() < deadline, "no checkpoint to kill the run after"
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))  # anywhere in a step, or in the writing of a checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "learned_embeds.safetensors").exists(), "the run ended before it was killed"
    done = run_script(SCRIPT,
                      *flags(tiny_model, concept_folder[0], killed, **options,
                             resume_from_checkpoint="latest"))
    assert "Resuming from" in done.stdout + done.stderr
    assert torch.equal(embedding(killed), embedding(whole))
    assert [r["step"] for r in read_stats(killed / "stats.jsonl")] == list(range(1, steps + 1))
    assert len(list_checkpoints(killed)) == 2


def test_two_ranks_draw_different_noise_and_resume_exactly(tiny_model, concept_folder, tmp_path):
    """The embedding is that of rank 0; a test of `Run.step` below says that the ranks average gradients."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    changes = dict(train_batch_size=2, checkpointing_steps=3, max_train_steps=6)
    two_ranks(*flags(tiny_model, concept_folder[0], whole, **changes))
    states = [torch.load(whole / "checkpoint-6" / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not torch.equal(states[0]["random"]["device"], states[1]["random"]["device"])
    assert states[0]["stream"]["seed"] == states[1]["stream"]["seed"], "the ranks share one order of samples"
    assert states[0]["stream"]["position"] == states[1]["stream"]["position"]
    two_ranks(*flags(tiny_model, concept_folder[0], halves, **{**changes, "max_train_steps": 3}))
    two_ranks(*flags(tiny_model, concept_folder[0], halves, **changes, resume_from_checkpoint="latest"))
    assert torch.equal(embedding(halves), embedding(whole))
    single = tmp_path / "single"
    run_script(SCRIPT, *flags(tiny_model, concept_folder[0], single, **changes))
    assert not torch.allclose(embedding(single), embedding(whole), atol=1e-5)
    done = run_script(SCRIPT,
                      *flags(tiny_model, concept_folder[0], whole, **changes,
                             resume_from_checkpoint="latest"), expect=1)
    assert "number of processes was 2 and is now 1" in done.stderr


def test_safe_zone_training_in_bf16_records_what_it_did(tiny_model, concept_folder, tmp_path):
    images, masks = concept_folder
    done = run_script(SCRIPT,
                      *flags(tiny_model, images, tmp_path, szt=True, loss_mask_dir=masks,
                             mixed_precision="bf16",
                                     gradient_checkpointing=True, max_train_steps=3))
    for found in ("timesteps 500 to 999", "JPEG quality 25", "5 masks"):
        assert found in done.stdout
    options = json.loads((tmp_path / "options.json").read_text())
    assert (options["jpeg_quality"], options["t_min"], options["mask_dilation"]) == (25, 500, 2)
    from safetensors import safe_open

    with safe_open(tmp_path / "learned_embeds.safetensors", "pt") as file:
        assert file.metadata()["t_min"] == "500" and file.metadata()["step"] == "3"
        assert list(file.keys()) == [TOKEN] and file.get_tensor(TOKEN).dtype == torch.float32
    assert all(math.isfinite(record["loss"]) for record in read_stats(tmp_path / "stats.jsonl"))


def test_a_loss_mask_hides_everything_outside(tiny_model, concept_folder, tmp_path):
    """Literal Eq. 7: the learned row is that of the hand-made loss, and a full mask changes nothing."""
    images, masks = concept_folder
    white = white_masks(masks, tmp_path / "white")
    plain, full, masked = tmp_path / "plain", tmp_path / "full", tmp_path / "masked"
    run_here(flags(tiny_model, images, plain))
    run_here(flags(tiny_model, images, full, loss_mask_dir=white))
    run_here(flags(tiny_model, images, masked, loss_mask_dir=masks, mask_dilation=8))
    assert torch.equal(embedding(plain), embedding(full))
    assert not torch.allclose(embedding(plain), embedding(masked), atol=1e-4)
    losses = [[r["loss"] for r in read_stats(folder / "stats.jsonl")] for folder in (plain, masked)]
    assert losses[1][0] < 0.8 * losses[0][0], "part of the squared error must be gone from the mean"


def test_epochs_decide_only_when_they_alone_are_given(tiny_model, concept_folder, tmp_path):
    """10 samples in batches of 4, two batches a step, are 2 steps an epoch; the schedule ends with them."""
    changes = dict(num_train_epochs=2, gradient_accumulation_steps=2, lr_scheduler="linear",
                   lr_warmup_steps=0)
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "epochs", max_train_steps=None, **changes))
    records = read_stats(tmp_path / "epochs" / "stats.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["lr"]
            for record in records] == pytest.approx([5e-2 * share for share in (0.75, 0.5, 0.25, 0)])
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "steps", max_train_steps=3, **changes))
    assert [record["step"] for record in read_stats(tmp_path / "steps" / "stats.jsonl")] == [1, 2, 3]


def test_validation_epochs_count_epochs_and_change_nothing(tiny_model, concept_folder, tmp_path):
    """Upstream takes 10 samples an epoch for 10 steps, and would not validate at all here."""
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "a", validation_epochs=1,
                   num_validation_images=2,
                   validation_prompt=f"a {TOKEN}"))
    names = sorted(path.name for path in (tmp_path / "a" / "validation").iterdir())
    assert names == [f"step-{step:05d}-{i}.png" for step in (3, 6) for i in (0, 1)]
    first, second, *_ = sorted((tmp_path / "a" / "validation").iterdir())
    assert first.read_bytes() != second.read_bytes()
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "b"))
    assert torch.equal(embedding(tmp_path / "a"), embedding(tmp_path / "b"))


def test_validation_images_have_a_size_that_pipelines_take(tiny_model, concept_folder, tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "step-00001-1.png").write_bytes(b"of an earlier run")
    run_here(flags(tiny_model, concept_folder[0], tmp_path, resolution=68, max_train_steps=1,
                   validation_prompt=f"a {TOKEN}", validation_steps=1, num_validation_images=1))
    assert Image.open(tmp_path / "validation" / "step-00001-0.png").size == (64, 64)


def test_trackers_get_steps_in_order_with_all_concepts(tiny_model, concept_folder, tmp_path, monkeypatch):
    """Losses come before the validation image of their step: wandb drops what comes for an earlier one."""
    tracked = []
    monkeypatch.setattr("szt_utils.outputs._track", lambda run, concept, images, step: tracked.append(
        (step, {concept.name})))
    monkeypatch.setattr("szt_utils.training_run.Run.log",
                        lambda self, values, step: tracked.append((step, set(values))))
    (tmp_path / "concepts.json").write_text(json.dumps([{"output_dir": str(tmp_path / name)}
                                                        for name in "ab"]))
    run_here(flags(tiny_model, concept_folder[0], tmp_path, concepts=tmp_path / "concepts.json",
                   max_train_steps=12, validation_prompt=f"a {TOKEN}", validation_steps=4,
                   num_validation_images=1))
    steps = [step for step, _ in tracked]
    assert steps == sorted(steps) and set(steps) == set(range(1, 13))
    assert [names for _, names in tracked if "lr" in names] == [{"lr", "loss/a", "loss/b"}] * 12


def test_wandb_counts_by_itself():
    """Its own steps rise by one, and the plots are over ours."""
    calls, run = {}, Run.__new__(Run)
    run.accelerator = SimpleNamespace(trackers=[
        SimpleNamespace(name=name, log=lambda values, name=name, **options: calls.update({name: (
            values, options)})) for name in ("wandb", "tensorboard")])
    run.log({"loss": 1.0}, 7)
    assert calls == {"wandb": ({"loss": 1.0, "step": 7}, {}), "tensorboard": ({"loss": 1.0}, {"step": 7})}


@pytest.fixture
def two_rank_run():
    """A run whose other rank has a gradient of three everywhere, without any process of its own."""
    run = Run.__new__(Run)
    run.num_ranks, run.device = 2, "cpu"
    run.accelerator = SimpleNamespace(
        prepare=lambda optimizer: optimizer,
        reduce=lambda own, how: {"mean": (own + 3) / 2, "sum": own + 3}[how])
    return run


def step_once(run, was_skipped: bool = False) -> tuple[torch.nn.Parameter, int]:
    """Rows that began at 0 with a gradient of 1, after a step, and how often the schedule stepped."""
    rows = torch.nn.Parameter(torch.zeros(1, 2))
    rows.grad = torch.ones(1, 2)
    optimizer, scheduled = torch.optim.SGD([rows], lr=1.0), []
    optimizer.step_was_skipped = was_skipped
    run.step(optimizer, SimpleNamespace(step=lambda: scheduled.append(1)), [rows])
    return rows, len(scheduled)


def test_a_step_averages_the_gradients_of_the_ranks(two_rank_run):
    rows, _ = step_once(two_rank_run)
    assert (rows == -2).all() and rows.grad is None


@pytest.mark.parametrize("was_skipped", [False, True])
def test_the_schedule_waits_for_a_step_that_the_loss_scaler_skips(two_rank_run, was_skipped):
    assert step_once(two_rank_run, was_skipped)[1] == (not was_skipped)


@pytest.mark.parametrize("own, other_asks, meanwhile, is_stopping, stopped", [
    (None, False, None, False, None), (signal.SIGINT, False, None, True, signal.SIGINT),
    (None, True, None, True, signal.SIGTERM), (None, False, signal.SIGINT, False, signal.SIGINT)],
    ids=["none asks", "this rank asks", "the other asks", "a signal that the other does not know of"])
def test_ranks_stop_after_the_same_step(two_rank_run, own, other_asks, meanwhile, is_stopping, stopped):
    def reduce(flag, how):
        two_rank_run.stopped = two_rank_run.stopped or meanwhile
        return flag + other_asks

    two_rank_run.stopped, two_rank_run.accelerator.reduce = own, reduce
    assert two_rank_run.stopping() == is_stopping and two_rank_run.stopped == stopped


def test_a_concept_that_fails_on_another_rank_fails_here_too(two_rank_run):
    journal = Journal.__new__(Journal)
    journal.run, journal.skips_steps = two_rank_run, False
    journal.group = SimpleNamespace(step=7, rows_of=lambda concept: [torch.ones(1, 2)])
    records = [{"step": 7, "loss": 1.0}]
    assert journal._problem(None, records) == "Another process has failed before step 7."
    two_rank_run.accelerator.reduce = lambda own, how: own
    assert journal._problem(None, records) is None


def test_the_optimizer_and_its_schedule_have_the_settings_of_the_flags(two_rank_run):
    two_rank_run.settings = SimpleNamespace(
        learning_rate=0.5, adam_beta1=0.1, adam_beta2=0.2, adam_weight_decay=0.3, adam_epsilon=0.4,
        lr_scheduler="cosine_with_restarts", lr_warmup_steps=0, max_train_steps=8, lr_num_cycles=2)
    optimizer, schedule = two_rank_run.make_optimizer([torch.nn.Parameter(torch.zeros(1, 2))])
    expected = {"lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.3, "eps": 0.4}
    assert expected.items() <= optimizer.defaults.items()
    rates = []
    for _ in range(8):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx(rates[4:]) and rates[0] == 0.5 > rates[1]


@pytest.mark.parametrize("scale_lr, rate", [(False, 0.1), (True, 3.0)])
def test_the_learning_rate_is_scaled_by_the_images_of_a_step_when_asked_for(scale_lr, rate):
    settings = TrainingSettings("model", learning_rate=0.1, scale_lr=scale_lr, train_batch_size=3,
                                gradient_accumulation_steps=5).resolved(7, num_ranks=2)
    assert settings.learning_rate == pytest.approx(rate)
    assert (settings.max_train_steps, settings.validation_steps) == (5000, 100)


SOME_FLAGS = ["--pretrained_model_name_or_path", "model", "--placeholder_token", "<s>", "--initializer_token",
              "star"]


@pytest.mark.parametrize("given, asked", [
    ([], (None, "image", None)),
    (["--dataset_config_name", "big", "--image_column", "photo", "--caption_column", "text",
      "--caption_mode", "file"], ("big", "photo", "text"))])
def test_the_columns_of_a_data_set_are_those_of_the_flags(monkeypatch, given, asked):
    monkeypatch.setattr("szt_utils.hub_datasets.dataset_folder", lambda *wanted: wanted)
    arguments = [*SOME_FLAGS, "--dataset_name", "org/set", *given]
    _, (concept,) = textual_inversion_szt.read_settings(textual_inversion_szt.parse_args(arguments),
                                                        arguments)
    assert concept.train_data_dir == str(("org/set", *asked))


def test_a_script_of_another_version_than_the_library_says_so(monkeypatch, capsys):
    monkeypatch.setattr(szt_utils, "__version__", "9.8")
    monkeypatch.setattr(textual_inversion_szt, "train", lambda *_: None)
    textual_inversion_szt.main([*SOME_FLAGS, "--train_data_dir", "images"])
    assert "but the installed szt_utils of version 9.8" in capsys.readouterr().err


def test_clip_skip_changes_training_and_validation(tiny_model, concept_folder, tmp_path):
    """test_models compares the layer with the pipeline's; here, both need only be others."""
    options = dict(validation_prompt=f"a {TOKEN}", validation_steps=2, num_validation_images=1,
                   max_train_steps=2)
    for skipped in (0, 1):
        run_here(flags(tiny_model, concept_folder[0], tmp_path / str(skipped), clip_skip=skipped, **options))
    rows = [embedding(tmp_path / name) for name in "01"]
    assert not torch.allclose(*rows, atol=1e-4)
    images = [(tmp_path / name / "validation" / "step-00002-0.png").read_bytes() for name in "01"]
    assert images[0] != images[1]


def test_masks_with_velocities_are_warned_about(tiny_velocity_model, tiny_model, tiny_sd3, concept_folder,
                                                tmp_path, capsys):
    advice = "predicts velocities: add --snr_gamma 5"
    for i, (model, more, is_given) in enumerate([
            (tiny_velocity_model, {}, True), (tiny_sd3, {}, True),
            (tiny_velocity_model, {"snr_gamma": 5}, False),
            (tiny_velocity_model, {"mask_mode": "latent"}, False),
            (tiny_velocity_model, {"loss_mask_dir": None}, False), (tiny_model, {}, False)]):
        run_here(flags(model, concept_folder[0], tmp_path / str(i), **{
            "szt": True, "loss_mask_dir": concept_folder[1], "max_train_steps": 1, **more}))
        assert (advice in capsys.readouterr().out) == is_given, i


def test_snr_gamma_weights_the_loss_of_each_timestep(tiny_velocity_model, concept_folder, tmp_path):
    """The losses of one image and one timestep differ by the weight of that timestep."""
    model = load_model(str(tiny_velocity_model))
    for gamma in (None, 0.2):
        run_here(flags(tiny_velocity_model, concept_folder[0], tmp_path / str(gamma), snr_gamma=gamma,
                       t_min=700, t_max=701, learning_rate=0, max_train_steps=2))
    plain, weighted = ([line["loss"] for line in read_stats(tmp_path / name / "stats.jsonl")]
                       for name in ("None", "0.2"))
    snr = model.log_snr(torch.tensor([700])).exp().item()
    weight = min(snr, 0.2) / (snr + 1)
    assert 0.01 < weight < 0.5 and weighted == pytest.approx([weight * loss for loss in plain], rel=1e-3)


def test_no_tracker_is_a_choice(tiny_model, concept_folder, tmp_path, capsys):
    run_here(flags(tiny_model, concept_folder[0], tmp_path, report_to="none", max_train_steps=1))
    assert "No tracker" not in capsys.readouterr().out and not (tmp_path / "logs").exists()
    assert len(read_stats(tmp_path / "stats.jsonl")) == 1


def test_a_full_pipeline_keeps_its_precision_and_knows_all_vectors_of_the_token(tiny_model, concept_folder,
                                                                                tmp_path):
    from diffusers import StableDiffusionPipeline

    run_here(flags(tiny_model, concept_folder[0], tmp_path, mixed_precision="bf16", num_vectors=2,
                   save_as_full_pipeline=True,
                   max_train_steps=2))
    saved, original = (StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
                       for folder in (tmp_path, tiny_model))
    for part in ("unet", "vae"):
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (saved, original))
        assert ours.keys() == theirs.keys() and all(ours[name].dtype == torch.float32 for name in ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    weight = saved.text_encoder.get_input_embeddings().weight
    assert torch.equal(weight[-2:].detach(), embedding(tmp_path))
    assert torch.equal(weight[:-2], original.text_encoder.get_input_embeddings().weight)
    prompt = saved.maybe_convert_prompt(f"a photo of a {TOKEN}", saved.tokenizer)
    assert saved.tokenizer.encode(prompt, add_special_tokens=False)[-2:] == [len(weight) - 2, len(weight) - 1]
    # The embedding file alone gives an untouched pipeline the very same prompt.
    original.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    states = [pipeline.encode_prompt(f"a {TOKEN}", "cpu", 1, False)[0] for pipeline in (saved, original)]
    assert torch.equal(*states)
    assert not torch.equal(states[0], original.encode_prompt(f"a {TOKEN}_1", "cpu", 1, False)[0])


def test_a_full_pipeline_of_files_in_half_precision_is_one_too(tiny_model, concept_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, torch_dtype=torch.float16
                                            ).save_pretrained(tmp_path / "model")
    run_here(flags(tmp_path / "model", concept_folder[0], tmp_path / "out", max_train_steps=1,
                   save_as_full_pipeline=True))
    for part, dtype in (("unet", torch.float16), ("vae", torch.float16), ("text_encoder", torch.float32)):
        (file,) = (tmp_path / "out" / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()} == {
            dtype}, part


def test_a_variant_is_asked_for_everywhere(tiny_model, concept_folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None).save_pretrained(
        tmp_path / "model", variant="fp16")
    assert not list((tmp_path / "model").rglob("model.safetensors"))
    run_here(flags(tmp_path / "model", concept_folder[0], tmp_path / "out", variant="fp16",
                   save_as_full_pipeline=True,
                   validation_prompt="a photo", validation_steps=1, num_validation_images=1,
                   max_train_steps=1))
    assert (tmp_path / "out" / "validation" / "step-00001-0.png").exists()
    assert (tmp_path / "out" / "model_index.json").exists()


def test_a_limit_above_the_number_of_checkpoints_removes_none(tiny_model, concept_folder, tmp_path):
    run_here(flags(tiny_model, concept_folder[0], tmp_path, checkpointing_steps=1, max_train_steps=3,
                   checkpoints_total_limit=5, no_safe_serialization=True))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2",
                                                                  "checkpoint-3"]
    assert embedding(tmp_path, "learned_embeds.bin").shape == (1, 32)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_loss_inside_and_outside_the_masks_is_recorded(tiny_model, concept_folder, tmp_path):
    """Of masks that are alike and symmetric, so that a share of the grid is known: a quarter."""
    import numpy as np
    from PIL import Image

    (tmp_path / "masks").mkdir()
    for path in concept_folder[0].iterdir():
        mask = np.zeros((128, 128), np.uint8)
        mask[:64, 32:96] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / path.name)
    for name, changes in (("plain", {}), ("watched", {"mask_mode": "none"}), ("masked", {})):
        masks = {} if name == "plain" else {"loss_mask_dir": tmp_path / "masks"}
        run_here(flags(tiny_model, concept_folder[0], tmp_path / name, max_train_steps=12, **masks,
                       **changes))
    plain, watched, masked = (read_stats(tmp_path / name / "stats.jsonl")
                              for name in ("plain", "watched", "masked"))
    # To watch changes nothing else.
    assert torch.equal(embedding(tmp_path / "watched"), embedding(tmp_path / "plain"))
    assert [{name: record[name] for name in ("step", "loss", "lr")} for record in watched] == plain
    assert [set(record) for record in plain] == [{"step", "loss", "lr"}] * 12
    for record in watched:
        inside, outside = record["loss_inside"], record["loss_outside"]
        assert record["loss"] == pytest.approx((inside + 3 * outside) / 4, rel=1e-5)
        assert inside != pytest.approx(outside, rel=1e-4)
    for record in masked:
        assert record["loss"] == pytest.approx(record["loss_inside"] / 4, rel=1e-5)
    assert masked[0]["loss_outside"] == pytest.approx(watched[0]["loss_outside"], rel=1e-5)


def test_mask_modes_differ_and_a_white_mask_changes_nothing(tiny_model, concept_folder, tmp_path):
    images, masks = concept_folder
    white = white_masks(masks, tmp_path / "white")

    def losses(**changes):
        run_here(flags(tiny_model, images, tmp_path / "out", max_train_steps=2, **changes))
        return [record["loss"] for record in read_stats(tmp_path / "out" / "stats.jsonl")]

    plain, seen = losses(), []
    for mode in ("loss", "image", "latent", "image_and_loss"):
        assert losses(loss_mask_dir=white, mask_mode=mode) == pytest.approx(plain, rel=1e-5), mode
        seen.append(losses(loss_mask_dir=masks, mask_mode=mode))
    assert len({round(values[0], 6) for values in [plain, *seen]}) == 5
    area = losses(loss_mask_dir=masks, mask_normalization="area")
    assert area[0] > 1.5 * seen[0][0], "the concept covers less than two thirds of the images"


def test_the_hub_token_is_in_no_file(tiny_model, concept_folder, tmp_path):
    run_here(flags(tiny_model, concept_folder[0], tmp_path, hub_token="hf_very_secret", checkpointing_steps=1,
                   max_train_steps=1))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6 and not [path for path in files if b"very_secret" in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_run_ends_where_an_eager_one_does(tiny_model, concept_folder, tmp_path):
    ends = []
    for name, compile in (("eager", None), ("compiled", True)):
        run_script(SCRIPT, *flags(tiny_model, concept_folder[0], tmp_path / name, compile=compile,
                                  loss_mask_dir=concept_folder[1]))
        ends.append(embedding(tmp_path / name))
    assert (ends[0] - ends[1]).norm() <= 1e-4 * ends[0].norm()
