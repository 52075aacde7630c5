"""The making of cells: the settings of their poisons, purifiers and trainings, and how failures are shown."""

import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import cells
import pytest
from conftest import ROOT
from PIL import Image
from table_plan import Table

import poison_images
import purify_images
from szt_utils import pocket
from szt_utils.arguments import command_line
from szt_utils.datasets import read_concepts
from szt_utils.errors import InputError
from szt_utils.images import save_png
from szt_utils.poisoning import PoisonSettings
from szt_utils.purifying import PurifySettings
from szt_utils.tables import Cell, append_cell

TABLE1 = runpy.run_path(str(ROOT / "examples" / "table1.py"))
STAR = "teal-striped-star"


def table(folder: Path, *flags: str) -> Table:
    """The table of a command line in a folder."""
    return TABLE1["read_settings"](TABLE1["parse_args"](["--output_dir", str(folder), *flags]))


@pytest.fixture
def made(monkeypatch) -> list[tuple]:
    """What would be poisoned and purified: the settings and their folders."""
    calls = []
    monkeypatch.setattr(cells, "poison_folder", lambda *call: calls.append(call))
    monkeypatch.setattr(cells, "purify_folder", lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize("data", TABLE1["DATA"])
def test_a_poison_is_what_its_script_makes(data, made, tmp_path):
    """A folder that either of them has begun is continued by the other."""
    one = table(tmp_path, "--pretrained_model_name_or_path", "m", "--mixed_precision", "bf16")
    home = tmp_path / "c"
    folder = cells.poison(one, home, data)
    assert folder == home / data.replace(" ", "-")
    if data == "clean":
        assert not made
        return
    method, adaptive = data.split()[0], {"adaptive": "szt", "loss_mask_dir": home / "masks"}
    args = poison_images.parse_args(command_line(
        pretrained_model_name_or_path="m", image_dir=home / "clean", output_dir=folder, resolution=128,
        batch_size=5, mixed_precision="bf16", method=method, **(adaptive if data.endswith(" szt") else {})))
    assert made == [(PoisonSettings(**poison_images.given_settings(args)), folder)]


@pytest.mark.parametrize("defence, flags", [
    ("nominal", None), ("szt", None), ("advclean", {}),
    ("regen", {"pretrained_model_name_or_path": "m", "batch_size": 5, "mixed_precision": "fp16"}),
    ("pdmpure", {"pretrained_model_name_or_path": "p", "upscaler": "u", "batch_size": 5,
                 "mixed_precision": "fp16"})])
def test_a_purifier_does_what_its_script_does(defence, flags, made, tmp_path):
    one = table(tmp_path, "--pretrained_model_name_or_path", "m", "--pdmpure_model", "p", "--upscaler", "u",
                "--mixed_precision", "fp16")
    images = tmp_path / "c" / "ea"
    folder = cells.purify(one, tmp_path / "c", images, defence)
    if flags is None:
        assert folder == images and not made
        return
    given = purify_images.parse_args(command_line(image_dir=images, output_dir=folder, method=defence,
                                                  **flags))
    args = {name: value for name, value in vars(given).items() if value is not None}
    assert folder == tmp_path / "c" / f"ea-{defence}"
    assert args.pop("output_dir") == str(folder) and made == [(PurifySettings(**args), folder)]


def test_only_cells_without_an_embedding_are_trained_on_images_that_they_share(made, tmp_path):
    one = table(tmp_path, "--resolution", "256", "--defences", "regen", "lm", "lm8", "jpeg", "szt")
    planned = [Cell(data, defence, STAR, seed) for data in ("clean", "ea") for defence in one.defences
               for seed in (0, 1) if (defence, seed) != ("jpeg", 1)]
    for cell in planned[:9]:  # all clean ones
        one.learned(cell).parent.mkdir(parents=True)
        one.learned(cell).touch()
    home = one.home(STAR)
    entries, failures = cells.training_entries(one, home, planned)
    assert not failures
    assert [folder for _, folder in made] == [home / "ea", home / "ea-regen"]
    masks = str(home / "masks")
    expected = {"regen": ("ea-regen", {}), "lm": ("ea", {"loss_mask_dir": masks, "mask_dilation": 0}),
                "lm8": ("ea", {"loss_mask_dir": masks, "mask_dilation": 4}),
                "jpeg": ("ea", {"jpeg_quality": 25}), "szt": ("ea", {"szt": True, "loss_mask_dir": masks})}
    assert entries == [
        {"train_data_dir": str(home / expected[cell.defence][0]), "seed": cell.seed,
         "output_dir": str(one.learned(cell).parent), **expected[cell.defence][1]}
        for cell in planned if cell.data == "ea"]
    assert one.defences["lm8"]["dilation"] == 8 and one.defences["lm"]["loss_mask_dir"] == "masks"


def test_a_concept_whose_embeddings_exist_is_not_trained(made, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "train_apart", lambda **flags: made.append(flags))
    [concept] = read_concepts("pocket", names=[STAR]).values()
    one, cell = table(tmp_path, "--steps", "1000"), Cell("clean", "nominal", STAR, 0)
    one.home(STAR).mkdir(parents=True)
    cells.train(one, concept, [cell])
    [flags] = made
    assert (flags["max_train_steps"], flags["checkpointing_steps"], flags["resume_from_checkpoint"]) == (
        1000, 200, "latest")
    assert flags["concepts"].exists() and asdict(one.settings).items() >= {
        name: flags[name] for name in ("resolution", "train_batch_size", "learning_rate")}.items()
    one.learned(cell).parent.mkdir(parents=True)
    one.learned(cell).touch()
    cells.train(one, concept, [cell])
    assert len(made) == 1


def test_a_short_training_has_a_checkpoint_every_hundred_steps(made, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "train_apart", lambda **flags: made.append(flags))
    [concept] = read_concepts("pocket", names=[STAR]).values()
    one = table(tmp_path, "--steps", "200")
    one.home(STAR).mkdir(parents=True)
    cells.train(one, concept, [Cell("clean", "nominal", STAR, 0)])
    assert made[0]["checkpointing_steps"] == 100


def test_the_work_is_quiet_and_its_failure_is_shown(capsys):
    def work(error: BaseException | None = None) -> None:
        with cells.quiet():
            print("printed")
            if error:
                raise error

    work()
    with pytest.raises(InputError, match="no image"):
        work(InputError("no image"))
    with pytest.raises(OSError):
        work(OSError(28, "No space left on device", "file.png"))
    assert capsys.readouterr() == ("", "")
    for error in (RuntimeError("a bug"), SystemExit(2), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            work(error)
        assert capsys.readouterr() == ("", "printed\n\n")


def test_the_training_does_not_see_the_launcher(monkeypatch):
    """A child that saw the launcher's variables would wait for the other processes."""
    found = []
    monkeypatch.setattr("subprocess.run", lambda command, **options: found.append((command, options))
                        or SimpleNamespace(returncode=len(found) - 1, stdout="out", stderr="err"))
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                        "MASTER_ADDR": "here", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": "4,6"}.items():
        monkeypatch.setenv(name, value)
    cells.train_apart(seed=0)
    command, options = found[0]
    assert command[1] == str(ROOT / "textual_inversion_szt.py") and command[2:] == ["--seed", "0"]
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == "6" and options["env"]["PATH"]
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                "MASTER_PORT"} & set(options["env"])
    with pytest.raises(SystemExit, match="--seed 0\nouterr"):
        cells.train_apart(seed=0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found.clear()
    for rank in "0123":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with contextlib.suppress(SystemExit):
            cells.train_apart(seed=0)
    assert [options["env"]["CUDA_VISIBLE_DEVICES"] for _, options in found] == ["0", "1", "0", "1"]


def test_cells_of_different_images_are_told(tmp_path):
    hashes = []
    for value in (0, 1):
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "a.png")
        hashes.append(cells.hash_images(tmp_path))
    made = [Cell("ea", "szt", "star", 0, images=hashes[0]), Cell("ea", "lm", "star", 0, images=hashes[0]),
            Cell("ea", "lm", "heart", 0, images=hashes[1]), Cell("adm+", "lm", "star", 0, images="x"),
            Cell("ea", "nominal", "star", 0)]
    assert hashes[0] != hashes[1] and cells.mixed_images(made) == []
    assert cells.mixed_images([*made, Cell("ea", "jpeg", "star", 0, images=hashes[1])]) == ["ea"]


def test_a_training_that_reports_an_error_fails_with_its_sentence():
    with pytest.raises(InputError, match="^The image folder 'nowhere' does not exist"):
        cells.train_apart(pretrained_model_name_or_path=pocket.model_path(), train_data_dir="nowhere",
                          placeholder_token="<a>", initializer_token="object", output_dir="out")


def test_a_cell_that_lacks_a_score_is_scored_again_and_not_trained(tmp_path, capsys):
    concepts, trained = read_concepts("pocket", names=[STAR]), []

    def train(table, concept, planned):
        for cell in planned:
            if not table.learned(cell).exists():
                trained.append(cell.name)
                table.learned(cell).parent.mkdir(parents=True)
                table.learned(cell).touch()

    for metrics, missing in ((["dino"], 1), (["clip"], 1), (["dino", "clip"], 0), (["fid", "clip"], 1)):
        one = table(tmp_path, "--data", "clean", "--defences", "nominal", "--metrics", *metrics)
        cells.make_table(one, concepts, [0], train=train,
                         score=lambda *_, metrics=metrics: dict.fromkeys(metrics, 0.5))
        assert capsys.readouterr().out.startswith(f"1 cells, {missing} of them to do.")
    assert trained == [f"clean_nominal_{STAR}_0"]
    (cell,) = one.cells()
    assert cell.metrics == {"dino": 0.5, "clip": 0.5, "fid": 0.5}


@pytest.mark.parametrize("images, missing", [(1, 0), (2, 1)])
def test_a_concept_of_one_image_is_not_scored_again_for_distances_of_sets(tmp_path, capsys, images, missing):
    concepts = read_concepts("pocket", names=[STAR])
    (tmp_path / "own").mkdir()
    for i in range(images):
        Image.new("RGB", (8, 8)).save(tmp_path / "own" / f"{i}.png")
    append_cell(tmp_path, Cell("clean", "nominal", STAR, 0, {"dino": 0.5}))
    one = table(tmp_path, "--data", "clean", "--defences", "nominal", "--metrics", "dino", "fid", "kid",
                "fd_dino")
    cells.make_table(one, {STAR: replace(concepts[STAR], image_dir=tmp_path / "own")}, [0], dry_run=True)
    assert capsys.readouterr().out.startswith(f"1 cells, {missing} of them to do.")


def test_a_sheet_shows_images_and_scores_of_its_own_seed(tmp_path, monkeypatch):
    one, sheets = table(tmp_path, "--data", "clean", "--defences", "nominal", "--metrics", "dino"), []
    monkeypatch.setattr(cells, "contact_sheet", lambda rows: sheets.append(rows) or Image.new("RGB", (8, 8)))
    save_png(Image.new("RGB", (8, 8)), one.home(STAR) / "clean" / "a.png")
    for seed, value, color in ((0, 0.25, "red"), (1, 0.75, "blue")):
        cell = Cell("clean", "nominal", STAR, seed, {"dino": value})
        append_cell(tmp_path, cell)
        save_png(Image.new("RGB", (8, 8), color), one.generated(cell) / "000.png")
    for seed, score, color in ((0, "0.25", (255, 0, 0)), (1, "0.75", (0, 0, 255))):
        cells.write_sheet(one, STAR, seed)
        captions, (image,) = sheets[-1][1]
        assert captions == [f"clean, nominal {score}"] and image.getpixel((0, 0)) == color


@pytest.mark.parametrize("rank, names", [("0", [STAR, "black-dotted-arrow"]), ("1", ["red-dotted-heart"])])
def test_a_process_makes_the_concepts_of_its_rank(tmp_path, monkeypatch, rank, names):
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)  # it would wait for the other process
    concepts = {name: read_concepts("pocket", names=[name])[name]
                for name in (STAR, "red-dotted-heart", "black-dotted-arrow")}
    one, trained = table(tmp_path, "--data", "clean", "--defences", "nominal", "--metrics", "dino"), []

    def train(table, concept, planned):
        trained.append(concept.name)
        table.learned(planned[0]).parent.mkdir(parents=True)
        table.learned(planned[0]).touch()

    cells.make_table(one, concepts, [0], train=train, score=lambda *_: {"dino": 0.5})
    assert trained == names


def test_a_poison_that_fails_does_not_keep_others_from_being_made(tmp_path, monkeypatch):
    one = table(tmp_path, "--data", "clean", "da", "ea", "--defences", "nominal", "advclean", "jpeg",
                "--metrics", "dino")
    concepts, trained = read_concepts("pocket", names=[STAR]), []

    def poison(settings, folder):
        if settings.method == "da":
            raise InputError("The gradient is not finite.")

    def purify(settings, folder):
        if settings.image_dir.endswith("ea"):
            raise InputError("An image is too small.")

    def train_apart(**flags):
        trained.extend(json.loads(flags["concepts"].read_text()))
        for entry in trained:
            Path(entry["output_dir"]).mkdir(parents=True)
            (Path(entry["output_dir"]) / "learned_embeds.safetensors").touch()
    monkeypatch.setattr(cells, "poison_folder", poison)
    monkeypatch.setattr(cells, "purify_folder", purify)
    monkeypatch.setattr(cells, "train_apart", train_apart)
    with pytest.raises(InputError, match=r"again: da: The gradient is not finite\. ea, advclean: An image is "
                                         r"too small\.$"):
        cells.make_table(one, concepts, [0], score=lambda *_: {"dino": 0.5})
    assert len(trained) == 5 and {(cell.data, cell.defence) for cell in one.cells()} == {
        *(("clean", name) for name in one.defences), ("ea", "nominal"), ("ea", "jpeg")}


def test_a_process_waits_for_the_others_before_it_fails(tmp_path):
    code = ("import os, pathlib, sys, time; from cells import wait_for_others\n"
            "file, rank = pathlib.Path(sys.argv[1]), os.environ['RANK']\n"
            "time.sleep(2 * int(rank)); file.touch() if rank == '1' else None\n"
            "wait_for_others(2); assert file.exists()")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "done")], cwd=ROOT, env={
        **os.environ, "PYTHONPATH": str(ROOT / "examples"), "RANK": rank, "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        for rank in ("0", "1")]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_a_cell_that_fails_does_not_keep_others_from_being_made(tmp_path, monkeypatch, capsys):
    """Neither its training nor its score stops the run, which ends with what failed."""
    dino = ("--metrics", "dino")
    one = table(tmp_path, "--data", "clean", "--defences", "nominal", "jpeg", "t600", *dino)
    concepts = read_concepts("pocket", names=[STAR, "red-dotted-heart"])

    def train(table, concept, planned):
        for cell in planned:
            if (cell.concept, cell.defence) != (STAR, "jpeg"):
                table.learned(cell).parent.mkdir(parents=True, exist_ok=True)
                table.learned(cell).touch()
        if concept.name == STAR:
            raise InputError("The loss is not finite.")

    def score(table, concept, cell):
        if (cell.concept, cell.defence) == (STAR, "t600"):
            raise InputError("Image 000 is not finite.")
        return {"dino": 0.5}
    for attempt, missing in enumerate((6, 2)):
        with pytest.raises(InputError, match=r"^Cells failed, .*: The loss is not finite\. "
                                             rf"clean_t600_{STAR}_0: Image 000 is not finite\.$"):
            cells.make_table(one, concepts, [0], train=train, score=score)
        assert capsys.readouterr().out.startswith(f"6 cells, {missing} of them to do."), attempt
    assert {(cell.defence, cell.concept) for cell in one.cells()} == {
        ("nominal", STAR), *((name, "red-dotted-heart") for name in one.defences)}
    assert (tmp_path / "table1.md").exists()

    silent = table(tmp_path / "silent", "--data", "clean", "--defences", "t600")
    with pytest.raises(InputError, match=f"clean_t600_{STAR}_0: its training left no 'learned_embeds"):
        cells.make_table(silent, concepts, [0], train=lambda *_: None, score=score)

    def fail(*_):
        raise InputError("The disk is slow.")
    with pytest.raises(InputError, match="^The disk is slow"):  # nothing works: the next concept is not tried
        cells.make_table(table(tmp_path / "new", "--data", "clean"), concepts, [0], train=fail, score=score)
