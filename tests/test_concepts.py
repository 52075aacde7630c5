"""--concepts: several concepts share the batches, and each ends where it would have ended alone."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPT, flags, run_here, run_script, two_ranks

import textual_inversion_szt
from szt_utils.checkpoints import list_checkpoints
from szt_utils.concepts import Concept, Group, _seeded, groups
from szt_utils.embedding_files import load_embedding
from szt_utils.files import read_stats
from szt_utils.pocket import write_concept

# The same random numbers and another batch size: the sums within it are rounded otherwise.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def heart(tmp_path_factory):
    """Three images and masks of another concept: another epoch than that of the star's five."""
    images, masks = tmp_path_factory.mktemp("heart"), tmp_path_factory.mktemp("heart-masks")
    write_concept("red-dotted-heart", images, masks)
    for path in sorted(images.iterdir())[3:]:
        path.unlink()
        (masks / path.name).unlink()
    return images, masks


@pytest.fixture
def entries(concept_folder, heart):
    """Three concepts that differ in whatever may differ."""
    return [
        {"train_data_dir": str(concept_folder[0]), "placeholder_token": "<star>",
         "initializer_token": "star"},
        {"train_data_dir": str(heart[0]), "placeholder_token": "<heart>", "initializer_token": "heart",
         "szt": True, "loss_mask_dir": str(heart[1]), "seed": 8, "learnable_property": "style"},
        {"train_data_dir": str(heart[0]), "placeholder_token": "<star>", "initializer_token": "ring",
         "output_dir": "other", "loss_mask_dir": str(heart[1]), "mask_mode": "latent",
         "t_distribution": "power"},
    ]


def together(model, folder, entries, **changes):
    """The command line of a run of all `entries`; "output_dir" of an entry is taken within `folder`."""
    entries = [{**entry, "output_dir": str(folder / entry["output_dir"])} if "output_dir" in entry else entry
               for entry in entries]
    (folder / "concepts.json").write_text(json.dumps(entries))
    return flags(model, None, folder, placeholder_token=None, initializer_token=None,
                 concepts=folder / "concepts.json", **changes)


def alone(model, folder, entry, **changes):
    entry = {name: value for name, value in entry.items() if name != "output_dir"}
    return flags(model, entry.pop("train_data_dir"), folder, **{**entry, **changes})


def rows(folder) -> torch.Tensor:
    return load_embedding(folder / "learned_embeds.safetensors")[1]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("changes", [
    {}, {"num_vectors": 2, "gradient_accumulation_steps": 3, "train_batch_size": 2},
    {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "concepts_per_batch": 2}],
    ids=["plain", "accumulation and vectors", "schedule and groups"])
def test_each_ends_where_it_would_have_ended_alone(tiny_model, entries, tmp_path, changes):
    run_here(together(tiny_model, tmp_path, entries, max_train_steps=12, **changes))
    names, found = ["star", "heart", "other"], []
    for entry, name in zip(entries, names, strict=True):
        run_here(alone(tiny_model, tmp_path / f"alone-{name}", entry, max_train_steps=12, **changes))
        ours, theirs = rows(tmp_path / name), rows(tmp_path / f"alone-{name}")
        assert distance(ours, theirs) < TOLERANCE
        records = [read_stats(folder / "stats.jsonl")
                   for folder in (tmp_path / name, tmp_path / f"alone-{name}")]
        assert [r["lr"] for r in records[0]] == [r["lr"] for r in records[1]]
        assert [r["loss"] for r in records[0]] == pytest.approx([r["loss"] for r in records[1]], rel=1e-4)
        token = load_embedding(tmp_path / name / "learned_embeds.safetensors")[0]
        assert token == entry["placeholder_token"]
        found.append(ours)
    assert min(distance(a, b) for i, a in enumerate(found) for b in found[:i]) > 100 * TOLERANCE
    options = json.loads((tmp_path / "heart" / "options.json").read_text())
    assert (options["seed"], options["t_min"], options["jpeg_quality"]) == (8, 500, 25)
    assert not (tmp_path / "learned_embeds.safetensors").exists()


def test_after_a_hundred_steps_too(tiny_model, entries, tmp_path):
    run_here(together(tiny_model, tmp_path, entries[:2], max_train_steps=100, learning_rate=5e-3))
    for entry, name in zip(entries[:2], ("star", "heart"), strict=True):
        run_here(alone(tiny_model, tmp_path / f"alone-{name}", entry, max_train_steps=100,
                       learning_rate=5e-3))
        assert distance(rows(tmp_path / name), rows(tmp_path / f"alone-{name}")) < TOLERANCE


def test_each_resumes_where_it_is_also_from_a_run_of_its_own(tiny_model, entries, tmp_path):
    """One has six steps of a run alone behind it, one four of a run together, one none."""
    changes = dict(checkpointing_steps=2, resume_from_checkpoint="latest")
    run_here(together(tiny_model, tmp_path, entries[1:], max_train_steps=4, **changes))
    shutil.rmtree(tmp_path / "other")
    run_here(alone(tiny_model, tmp_path / "star", entries[0], max_train_steps=6, **changes))
    run_here(together(tiny_model, tmp_path, entries, max_train_steps=8, **changes))
    for entry, name in zip(entries, ("star", "heart", "other"), strict=True):
        run_here(alone(tiny_model, tmp_path / f"alone-{name}", entry, max_train_steps=8))
        assert distance(rows(tmp_path / name), rows(tmp_path / f"alone-{name}")) < TOLERANCE
        assert [r["step"] for r in read_stats(tmp_path / name / "stats.jsonl")] == list(range(1, 9))
        assert list_checkpoints(tmp_path / name)[-1].name == "checkpoint-8"


def test_checkpoints_and_pipelines_hold_one_concept_each(tiny_model, entries, tmp_path):
    from diffusers import StableDiffusionPipeline

    run_here(together(tiny_model, tmp_path, entries[:2], max_train_steps=2, checkpointing_steps=2,
                      num_vectors=2, save_as_full_pipeline=True, validation_prompt="a <heart> on sand",
                      validation_steps=2, num_validation_images=1))
    for name in ("star", "heart"):
        state = torch.load(tmp_path / name / "checkpoint-2" / "training_state.pt", weights_only=True)
        (saved,) = state["rows"]  # of one text encoder
        assert torch.equal(saved, rows(tmp_path / name)) and saved.shape == (2, 32)
        assert state["optimizer"]["state"][0]["exp_avg"].shape == (2, 32)
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / name, safety_checker=None)
        weight = pipeline.text_encoder.get_input_embeddings().weight
        assert torch.equal(weight[-2:].detach(), rows(tmp_path / name))
        assert pipeline.tokenizer.convert_tokens_to_ids(f"<{name}>_1") == len(weight) - 1
        assert (tmp_path / name / "validation" / "step-00002-0.png").exists()


def test_every_rank_has_a_seed_also_after_the_largest():
    states = []
    for rank, seed in ((0, 0), (1, 2**32 - 1), (0, 2**32 - 1)):
        states.append(_seeded(SimpleNamespace(rank=rank, device="cpu"), SimpleNamespace(text_encoders=[]), [],
                              [], seed)["cpu"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


def test_one_that_fails_does_not_stop_the_others(tiny_model, entries, tmp_path, monkeypatch):
    draw, count = textual_inversion_szt.draw, []

    def poisoned(concept, model):
        sample = draw(concept, model)
        if concept.name == "heart":
            count.append(1)
            if len(count) > 3:
                sample.noise = sample.noise * float("nan")
        return sample

    monkeypatch.setattr(textual_inversion_szt, "draw", poisoned)
    with pytest.raises(SystemExit) as caught:
        run_here(together(tiny_model, tmp_path, entries, max_train_steps=12, save_steps=2))
    assert caught.value.code.startswith("error: heart: The loss is not a number at step 4")
    assert not (tmp_path / "heart" / "learned_embeds.safetensors").exists()
    assert (tmp_path / "heart" / "learned_embeds-steps-2.safetensors").exists()
    records = read_stats(tmp_path / "heart" / "stats.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]  # all before the one that failed
    monkeypatch.undo()
    run_here(alone(tiny_model, tmp_path / "alone", entries[0], max_train_steps=12))
    assert distance(rows(tmp_path / "star"), rows(tmp_path / "alone")) < TOLERANCE


def test_a_group_that_begins_does_not_go_on_with_the_scale_of_another():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    first = scaler.state_dict()
    scaler.load_state_dict({**first, "scale": 2.0})
    run = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler), first_scaler_state=first)
    Group.load_state(SimpleNamespace(step=0, run=run), None, None)
    assert scaler.get_scale() == 8


def test_a_group_that_resumes_goes_on_with_the_scale_of_its_checkpoint():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    checkpoint = {"optimizer": {"state": {}}, "lr_scheduler": {},
                  "scaler": {**scaler.state_dict(), "scale": 2.0}}
    group = SimpleNamespace(
        step=3, run=SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler)),
        concepts=[SimpleNamespace(checkpoint=checkpoint, checkpoint_folder=Path("checkpoint-3"))])
    ignoring = SimpleNamespace(load_state_dict=lambda state: None)
    Group.load_state(group, ignoring, ignoring)
    assert scaler.get_scale() == 2


def test_concepts_at_one_step_share_a_group_up_to_its_size():
    concepts = [SimpleNamespace(step=step) for step in (3, 0, 0, 0)]
    assert [[concept.step for concept in group] for group in groups(concepts, 2)] == [[0, 0], [0], [3]]


def test_every_error_is_weighted_by_its_own_timestep():
    concept = SimpleNamespace(snr_weights=torch.tensor([1.0, 2.0, 3.0]))
    weighed = Concept.weigh(concept, torch.ones(2, 1, 1, 1), torch.tensor([2, 0]))
    assert weighed.flatten().tolist() == [3, 1]


def test_a_checkpoint_whose_steps_a_scaler_has_skipped_goes_on(tiny_model, entries, tmp_path):
    """Its optimizer has no state yet."""
    stopped = alone(tiny_model, tmp_path / "out", entries[0], max_train_steps=2, checkpointing_steps=1)
    run_here(stopped)
    expected = rows(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    file = tmp_path / "out" / "checkpoint-1" / "training_state.pt"
    state = torch.load(file, weights_only=True)
    torch.save({**state, "optimizer": {**state["optimizer"], "state": {}}}, file)
    run_here([*stopped, "--resume_from_checkpoint", "latest"])
    assert not torch.equal(rows(tmp_path / "out"), expected)  # the second step had no moments of the first


def test_processes_share_the_concepts_out(tiny_model, entries, tmp_path):
    """Each of two processes trains its own as if it were alone: one has two, the other one."""
    two_ranks(*together(tiny_model, tmp_path, entries, max_train_steps=4))
    run_script(SCRIPT, *alone(tiny_model, tmp_path / "alone", entries[1], max_train_steps=4))
    assert torch.equal(rows(tmp_path / "heart"), rows(tmp_path / "alone"))
    run_here(alone(tiny_model, tmp_path / "alone-star", entries[0], max_train_steps=4))
    assert distance(rows(tmp_path / "star"), rows(tmp_path / "alone-star")) < TOLERANCE
    assert rows(tmp_path / "other").isfinite().all()


def test_a_process_whose_concepts_fail_does_not_end_the_others(tiny_model, entries, tmp_path):
    """The launcher would: it ends all processes when one reports a failure."""
    failed = {**entries[0], "train_data_dir": "missing", "output_dir": "failed"}
    done = two_ranks(*together(tiny_model, tmp_path, [entries[0], failed], max_train_steps=60), expect=1)
    assert "failed: The image folder 'missing' does not exist" in done.stderr
    assert rows(tmp_path / "star").isfinite().all()


def test_a_concept_can_go_without_a_defence_of_the_command_line(tiny_model, entries, heart, tmp_path):
    """False and null are flags that are not given, whatever the command line says."""
    entries = [{**entries[0], "szt": False, "loss_mask_dir": None, "output_dir": "without"},
               {**entries[1], "output_dir": "with"}]
    run_here(together(tiny_model, tmp_path, entries, max_train_steps=1, szt=True, loss_mask_dir=heart[1]))
    without, zone = (json.loads((tmp_path / name / "options.json").read_text())
                     for name in ("without", "with"))
    assert (without["szt"], without["loss_mask_dir"], without["jpeg_quality"], without["t_min"]) == (
        False, None, None, 0)
    assert (zone["szt"], zone["jpeg_quality"], zone["t_min"]) == (True, 25, 500)
    assert without["concepts"] == "concepts.json"  # and not this machine's folder


def test_epochs_that_do_not_count_are_no_obstacle(entries, tmp_path):
    """With --max_train_steps, that is."""
    arguments = [*map(str, together("model", tmp_path, entries, num_train_epochs=2))]
    _, concepts = textual_inversion_szt.read_settings(textual_inversion_szt.parse_args(arguments), arguments)
    assert len(concepts) == len(entries)


def test_zero_is_a_value_and_null_is_a_default(entries, tmp_path):
    entry = {**entries[0], "t_min": 0, "seed": 0, "output_dir": None}
    arguments = [*map(str, together("model", tmp_path, [], t_min=500, seed=3))]
    (tmp_path / "concepts.json").write_text(json.dumps([entry]))
    _, (concept,) = textual_inversion_szt.read_settings(textual_inversion_szt.parse_args(arguments),
                                                        arguments)
    assert (concept.seed, concept.zone_flags["t_min"]) == (0, 0)
    assert concept.output_dir == str(tmp_path / "star")


@pytest.mark.parametrize("content, message", [
    ("no json", "not valid JSON"), ("{}", "must hold a list"), ("[]", "must hold a list"),
    ("[1]", "must hold a list"),
    ('[{"train_data_dir": "x"}]', "Concept 1 of .*required: --placeholder_token, --initializer_token"),
    ('[{"learning_rate": 1}]', "Concept 1 of .*'learning_rate' cannot be set for one concept, only train_d"),
    ('[{"t_min": "low"}]', "Concept 1 of .*--t_min"),
    ('[{"t_min": [1]}]', "Concept 1 of .*'t_min' must be a text, a number, true or false"),
    ('[{"train_data_dir": {"a": 1}}]', "Concept 1 of .*'train_data_dir' must be a text"),
    ('[{"train_data_dir": "x", "placeholder_token": "<a>", "initializer_token": "star", "jpeg_quality": 0}]',
     "Concept 1 of .*--jpeg_quality: 0 is not at least 1 and at most 100"),
    ('[{"placeholder_token": "<a>", "train_data_dir": "x", "initializer_token": "star"},'
     ' {"placeholder_token": "<a>", "train_data_dir": "y", "initializer_token": "star"}]',
     "Concept 2 of .*is another concept's, too")])
def test_a_file_that_cannot_be_used(tiny_model, tmp_path, content, message):
    (tmp_path / "concepts.json").write_text(content)
    with pytest.raises(SystemExit, match=message) as caught:
        run_here(flags(tiny_model, None, tmp_path / "out", placeholder_token=None, initializer_token=None,
                       concepts=tmp_path / "concepts.json"))
    assert "\n" not in caught.value.code and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"num_train_epochs": 2, "max_train_steps": None},
                                     {"validation_epochs": 1}, {"hub_model_id": "me/it"},
                                     {"dataset_name": "me/set"}])
def test_flags_that_would_mean_another_thing_for_each(tiny_model, entries, tmp_path, changes, capsys):
    with pytest.raises(SystemExit) as caught:
        run_here(together(tiny_model, tmp_path, entries, **changes))
    assert caught.value.code == 2
    assert "differs between concepts, so --concepts cannot use it" in capsys.readouterr().err
