"""The table's runner: what is planned, what is skipped, which cells a preset takes, and one row run whole."""

import csv
import json
import re
import runpy
import shutil
from dataclasses import replace

import pytest
from conftest import ROOT, run_script
from PIL import Image
from table_plan import Table

from szt_utils import pocket
from szt_utils.fingerprint import identity
from szt_utils.notices import notice
from szt_utils.tables import Cell, append_cell, read_cells, run_index

TABLE1 = runpy.run_path(str(ROOT / "examples" / "table1.py"))
RESULTS = ROOT / "results" / "world-0.1" / "table1"


def table(*flags) -> Table:
    """The table of a command line."""
    return TABLE1["read_settings"](TABLE1["parse_args"]([*map(str, flags)]))


def cell(data, defence, value, concept="c", seed=0, **extra) -> Cell:
    return Cell(data, defence, concept, seed, {"dino": value}, **extra)


def test_a_dry_run_lists_the_missing_cells_with_their_cost_and_makes_nothing(tmp_path):
    append_cell(tmp_path / "out", cell("clean", "szt", 0.5, "red-dotted-heart", seconds=30, passes=1000))
    done = run_script("examples/table1.py", "--output_dir", tmp_path / "out", "--data", "clean", "ea szt",
                      "--defences", "nominal", "szt", "--concepts", "red-dotted-heart", "--steps", "10",
                      "--metrics", "dino", "--dry_run")
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "4 cells, 3 of them to do.", "clean_nominal_red-dotted-heart_0", "ea-szt_nominal_red-dotted-heart_0",
        "ea-szt_szt_red-dotted-heart_0"]
    # Two attacks of 100 steps on five images, no purifier, three trainings of 10 steps, batch 4, forward
    # and backward, three times eight images of 25 steps with guidance: 2560 passes of 0.03 s.
    assert [int(line.split()[1].replace(",", "")) for line in lines[4:8]] == [1000, 0, 360, 1200]
    assert lines[8].startswith("about 1 minutes on one process at the rate of the cells")
    assert len(list((tmp_path / "out").rglob("*"))) == 2


def test_every_poison_and_variant_names_real_flags():
    known = {name: set(re.findall(r"--(\w+)", run_script(name, "--help").stdout))
             for name in ("poison_images.py", "purify_images.py", "textual_inversion_szt.py")}
    poisons = {flag for options in TABLE1["DATA"].values() for flag in options}
    variants = {flag for options in TABLE1["VARIANTS"].values() for flag in options} - {"purify", "dilation"}
    purifiers = {flag for options in TABLE1["VARIANTS"].values() for flag in options.get("purify", {})}
    assert poisons and poisons <= known["poison_images.py"]
    assert variants and variants <= known["textual_inversion_szt.py"]
    assert purifiers and purifiers <= known["purify_images.py"]
    assert list(TABLE1["DEFENCES"]) == ["nominal", "regen", "pdmpure", "advclean", "jpeg", "t600", "lm",
                                        "jpeg+t600", "jpeg+lm", "szt"]


@pytest.mark.parametrize("preset", TABLE1["PRESETS"])
def test_presets_differ_from_the_table_and_have_settings_of_their_own(preset):
    own = table("--preset", preset)
    assert "nominal" in own.defences and len(own.defences) >= 4 and "clean" in own.data and own.swept
    assert own.defences == own.columns and not set(own.swept) & set(TABLE1["DEFENCES"])
    assert not table().swept and list(table().columns) == list(TABLE1["DEFENCES"])
    assert len({json.dumps(flags) for flags in own.defences.values()}) == len(own.defences)


def test_a_preset_takes_the_tables_cells_of_its_own_concepts_and_data(tmp_path):
    cells = [cell("ea", "nominal", 0.2, "star"), cell("ea", "jpeg50", 0.6, "star"),
             cell("ea", "nominal", 0.9, "heart"), cell("ea", "nominal", 0.9, "star", seed=1),
             cell("da", "nominal", 0.1, "star"), cell("ea", "szt", 0.7, "star")]
    for one in cells:
        append_cell(tmp_path, one)
    assert table("--output_dir", tmp_path, "--preset", "jpeg").cells() == cells[:2]
    assert set(table("--output_dir", tmp_path).cells()) == {c for c in cells if c.defence != "jpeg50"}


@pytest.mark.parametrize("given", [["--max_train_steps", "7"], ["--steps", "7"]])
def test_the_training_steps_have_two_names(given):
    assert table(*given).settings.steps == 7
    assert table().settings.steps == 400


def test_cells_of_other_settings_are_other_cells(tmp_path, capsys):
    """A cell counts for the settings of its run; what a run is not given is as in the folder's last run."""
    flags = ("--output_dir", str(tmp_path), "--concepts", "red-dotted-heart", "--data", "clean",
             "--defences", "nominal", "--metrics", "dino")
    two = table(*flags, "--steps", "2")
    run = run_index(tmp_path, {**two.record, "versions": {}, "commit": None})
    one = cell("clean", "nominal", 0.5, "red-dotted-heart")
    append_cell(tmp_path, replace(one, run=run))
    for more, missing in (("--steps 2", 0), ("", 0), ("--steps 7", 1), ("--guidance_scale 3", 1),
                          ("--mixed_precision bf16", 1), ("--initializer_token star", 1),
                          ("--dino other", 1)):
        TABLE1["main"]([*flags, *more.split(), "--dry_run"])
        assert capsys.readouterr().out.startswith(f"1 cells, {missing} of them to do."), more
    seven = table(*flags, "--steps", "7")
    assert two.cells() == [one] and seven.cells() == []
    assert two.learned(one) != seven.learned(one) and two.generated(one) != seven.generated(one)
    assert two.home("a") == seven.home("a") != table(*flags, "--resolution", "64").home("a")
    other = table(*flags, "--guidance_scale", "3")
    assert two.learned(one) == other.learned(one) and two.generated(one) != other.generated(one)
    append_cell(tmp_path, replace(one, metrics={"dino": 0.7}, run=run_index(tmp_path, seven.record)))
    assert [c.metrics["dino"] for c in (*two.cells(), *seven.cells())] == [0.5, 0.7]
    assert table(*flags).settings.steps == 7


def test_a_table_goes_on_as_it_was_begun(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a {} here\n")
    flags = ("--output_dir", str(tmp_path / "out"))
    begun = table(*flags, "--steps", "7", "--mixed_precision", "bf16", "--initializer_token", "star",
                  "--prompts_file", tmp_path / "prompts.txt")
    assert begun.record != table(*flags).record
    run_index(tmp_path / "out", begun.record)
    notice.cache_clear()
    assert table(*flags).record == begun.record
    taken = "--steps 7, --mixed_precision bf16, --initializer_token star, other prompts"
    assert f"made with {taken}; flags that you leave" in capsys.readouterr().err
    assert table(*flags, "--mixed_precision", "no").record == {**begun.record, "mixed_precision": "no"}


def test_what_only_pdmpure_is_made_with_decides_only_its_cells(tmp_path, capsys):
    """A table may go on with PDMPure, and never mixes two of its models."""
    flags = ["--output_dir", str(tmp_path), "--concepts", "red-dotted-heart", "--data", "clean", "--metrics",
             "dino", "--defences"]
    one, other = table(*flags, "nominal"), table(*flags, "nominal", "--pdmpure_model", "other")
    run = run_index(tmp_path, {**one.record, "versions": {}, "commit": None})
    append_cell(tmp_path, replace(cell("clean", "nominal", 0.5, "red-dotted-heart"), run=run))
    assert one.home("a") == other.home("a") and one.cells() == other.cells() != []
    more = ["nominal", "pdmpure", "--pdmpure_model", "other"]
    TABLE1["main"]([*flags, *more, "--dry_run"])
    assert capsys.readouterr().out.startswith("2 cells, 1 of them to do.")
    append_cell(tmp_path, replace(cell("clean", "pdmpure", 0.5, "red-dotted-heart"), run=run))
    with pytest.raises(SystemExit, match="cells of pdmpure .* another --pdmpure_model"):
        TABLE1["main"]([*flags, *more, "--dry_run"])


def test_a_defence_that_is_asked_for_is_in_the_table(tmp_path):
    extra = cell("clean", "t500+lm16", 0.5, "red-dotted-heart")
    append_cell(tmp_path, extra)
    assert table("--output_dir", tmp_path, "--defences", "nominal", "t500+lm16").cells() == [extra]
    assert table("--output_dir", tmp_path).cells() == []


@pytest.mark.parametrize("flags", ["--seeds -1", "--steps 0", "--train_batch_size 0", "--guidance_scale nan",
                                   "--learning_rate inf", "--seeds 4294967296", "--resolution 7"])
def test_numbers_out_of_range_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        TABLE1["parse_args"](flags.split())


def test_the_committed_cells_of_an_earlier_version_give_its_tables(tmp_path, capsys, monkeypatch):
    """No cell is computed again, and the tables are the same to the last byte."""
    assert table("--output_dir", RESULTS).finished() == []  # its models were others
    monkeypatch.setattr(Table, "finished", lambda table: read_cells(table.output_dir))
    monkeypatch.setattr("cells.check_purifier", lambda *_: None)
    shutil.copytree(RESULTS / "cells", tmp_path / "cells")
    shutil.copy(RESULTS / "run.json", tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    assert len(before) == 10
    for name, count in {"table1": 1400, "timesteps": 192, "masks": 105, "dilation": 84, "jpeg": 80}.items():
        flags = ["--seeds", "0", "1"] if name == "table1" else ["--preset", name, "--concepts", *{
            c.concept for c in table("--output_dir", RESULTS, "--preset", name).cells()}]
        TABLE1["main"](["--output_dir", str(tmp_path), *flags])
        assert capsys.readouterr().out.startswith(f"{count} cells, 0 of them to do.\n")
        for suffix in (".csv", ".md"):
            assert (tmp_path / name).with_suffix(suffix).read_bytes() == (
                RESULTS / name).with_suffix(suffix).read_bytes(), name
    assert before == {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}


@pytest.mark.parametrize("folder, cells, flags", [
    ("v_prediction", 60, ["--data", "clean", "adm+", "sds+", "ea", "--defences", "nominal", "jpeg+t600",
                          "szt"]),
    ("v_prediction", 80, ["--preset", "parts"]),
    ("table1", 1400, ["--seeds", "0", "1"]),
    ("table1", 42, ["--preset", "timesteps", "--data", "clean", "adm+", "ea", "--concepts",
                    "teal-striped-star", "red-dotted-heart", "--defences", "nominal", "t300", "t400", "t500",
                    "t600", "t700", "t800"]),
    ("table1", 36, ["--preset", "jpeg", "--data", "clean", "adm+", "ea", "--concepts", "teal-striped-star",
                    "red-dotted-heart", "--defences", "nominal", "jpeg10", "jpeg25", "jpeg50", "jpeg75",
                    "jpeg95"]),
    ("table1", 42, ["--preset", "dilation", "--data", "clean", "adm+", "ea", "--concepts",
                    "teal-striped-star", "red-dotted-heart"]),
    ("table1", 30, ["--preset", "masks", "--data", "clean", "adm+", "ea", "--concepts",
                    "teal-striped-star", "red-dotted-heart"]),
    ("flow", 42, ["--preset", "timesteps", "--data", "clean", "adm+", "ea", "--concepts", "teal-striped-star",
                  "red-dotted-heart", "--defences", "nominal", "t300", "t400", "t500", "t600", "t700", "t800",
                  "--pretrained_model_name_or_path", pocket.model_path("flow")]),
    ("flow", 20, ["--preset", "parts", "--concepts", "teal-striped-star", "red-dotted-heart", "--defences",
                  "nominal", "jpeg+t500", "t500+lm16", "szt", "szt+snr",
                  "--pretrained_model_name_or_path", pocket.model_path("flow")]),
    ("first_encoder", 32, ["--data", "clean", "adm+", "sds+", "ea", "--defences", "nominal", "jpeg",
                           "jpeg+t600", "szt"]),
    ("sdxl", 40, ["--data", "clean", "adm+", "--defences", "nominal", "szt",
                  "--pretrained_model_name_or_path", pocket.model_path("sdxl")])])
def test_other_committed_cells_give_their_tables(folder, cells, flags, tmp_path, capsys, monkeypatch):
    home = ROOT / "results" / folder
    if folder in ("first_encoder", "v_prediction"):  # whose models are not bundled
        monkeypatch.setattr(Table, "finished", lambda table: read_cells(table.output_dir))
    shutil.copytree(home / "cells", tmp_path / "cells")
    shutil.copy(home / "run.json", tmp_path)
    runs = json.loads((home / "run.json").read_text())
    assert all(run["versions"] and run["commit"] for run in runs)
    flags = [*flags, "--output_dir", str(tmp_path)]
    if "--concepts" not in flags:
        flags += ["--concepts", *{cell.concept for cell in read_cells(home)}]
    TABLE1["main"]([*flags, "--dry_run"])
    assert capsys.readouterr().out.startswith(f"{cells} cells, 0 of them to do.\n")
    TABLE1["main"](flags)
    for suffix in (".csv", ".md"):
        name = flags[flags.index("--preset") + 1] if "--preset" in flags else "table1"
        assert (tmp_path / f"{name}{suffix}").read_bytes() == (home / f"{name}{suffix}").read_bytes()


def test_the_committed_cells_refer_to_their_runs():
    runs = json.loads((RESULTS / "run.json").read_text())
    cells = read_cells(RESULTS)
    assert len(cells) == 1803 and {c.run for c in cells} == set(range(len(runs)))
    assert all(run["steps"] == 200 and run["versions"] and run["commit"] for run in runs)


def test_a_dreambooth_folder_runs_whole_and_is_not_run_again(tmp_path, tiny_model, concept_folder, capsys):
    """Real scripts on a tiny model: poison, purify, train in one run, generate, score, tabulate."""
    for source, folder in zip(concept_folder, ("images", "masks"), strict=True):
        shutil.copytree(source, tmp_path / folder / "star")
    flags = ["--output_dir", tmp_path / "out", "--dataset", "dreambooth",
             "--dataset_dir", tmp_path / "images", "--mask_dir", tmp_path / "masks",
             "--pretrained_model_name_or_path", tiny_model,
             "--dino", pocket.dino_path(), "--clip", pocket.clip_path(), "--initializer_token", "star",
             "--max_train_steps", "2", "--resolution", "64", "--images_per_prompt", "1",
             "--num_inference_steps", "1", "--metrics", "dino", "clip", "--data", "clean", "ea",
             "--defences", "nominal", "advclean", "lm"]
    done = run_script("examples/table1.py", *flags)
    assert "6 cells, 6 of them to do." in done.stdout
    assert re.findall(r"^(\d)/6 (\w+, \w+), star, 0: dino ", done.stdout, re.M) == [
        (str(i), f"{data}, {defence}") for i, (data, defence) in enumerate(
            ((data, defence) for data in ("clean", "ea") for defence in ("nominal", "advclean", "lm")), 1)]
    assert "images in" not in done.stdout + done.stderr  # what the scripts print is kept from the table
    assert [path.name for path in (tmp_path / "out" / "cells").iterdir()] == ["star.jsonl"]
    cells = read_cells(tmp_path / "out")
    assert [(c.data, c.defence) for c in cells] == [
        (data, defence) for data in ("clean", "ea") for defence in ("nominal", "advclean", "lm")]
    assert all(c.concept == "star" and set(c.metrics) >= {"dino", "clip"} for c in cells)
    assert all(c.seconds > 0 and c.passes > 0 and c.run == 0 for c in cells)
    [run] = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["resolution"], run["steps"], run["dataset"], run["model"]) == (
        64, 2, "dreambooth", identity(str(tiny_model)))
    [home], [learned] = (list((tmp_path / "out").glob(name)) for name in ("data/star-*", "learned/ea_lm_*"))
    assert Image.open(next((home / "clean").iterdir())).size == (64, 64)
    options = json.loads((learned / "options.json").read_text())
    assert options["train_data_dir"].endswith("ea") and options["loss_mask_dir"]
    rows = list(csv.DictReader((tmp_path / "out" / "table1.csv").open()))
    assert len(rows) == 3 * 2 * 2 and {row["metric"] for row in rows} == {"dino", "clip"}
    assert Image.open(tmp_path / "out" / "sheets" / "table1-star.jpg").format == "JPEG"
    assert (tmp_path / "out" / "table1.png").exists()

    def again() -> str:
        TABLE1["main"]([*map(str, flags)])
        return capsys.readouterr().out

    assert again().startswith("6 cells, 0 of them to do.\n| data |")
    before = (tmp_path / "out" / "table1.csv").read_bytes()
    path = tmp_path / "out" / "cells" / "star.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # a crash within the last line
    assert again().startswith("6 cells, 1 of them to do.\n1/1 ea, lm, star, 0: dino ")
    assert (tmp_path / "out" / "table1.csv").read_bytes() == before
    for name in ("data", "table1.csv"):  # the cells alone, as somebody else has sent them
        (tmp_path / "out" / name).rename(tmp_path / name)
    again()
    assert (tmp_path / "out" / "table1.csv").read_bytes() == before


def test_each_process_uses_a_gpu_of_its_own(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", used.append)
    append_cell(tmp_path, cell("clean", "szt", 0.5, "red-dotted-heart"))
    for rank in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        TABLE1["main"](["--output_dir", str(tmp_path), "--data", "clean", "--defences", "szt", "--concepts",
                        "red-dotted-heart", "--metrics", "dino"])
    assert used == [0, 1]


@pytest.mark.parametrize("seeds", [["0", "1"], ["0", "1", "0"]])
def test_a_cell_is_planned_once(tmp_path, capsys, seeds):
    TABLE1["main"](["--output_dir", str(tmp_path), "--data", "clean", "--defences", "szt", "--concepts",
                    "red-dotted-heart", "--seeds", *seeds, "--dry_run"])
    assert capsys.readouterr().out.startswith("2 cells, 2 of them to do.\n")


@pytest.mark.parametrize("flags, message", [
    (["--concepts", "blue-elephant"], "no concept 'blue-elephant'; choose from: "),
    (["--dataset", "dreambooth", "--dataset_dir", "none", "--pretrained_model_name_or_path", "m",
      "--dino", "d", "--clip", "c"], "'none' is not a folder"),
    (["--dataset", "customconcept101", "--dataset_dir", "none", "--pretrained_model_name_or_path", "m",
      "--dino", "d", "--clip", "c"], "cannot be read as CustomConcept101's list")])
def test_bad_input_is_one_sentence(flags, message):
    done = run_script("examples/table1.py", *flags, "--dry_run", expect=1)
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", ["-1", "0", "7"])
def test_a_resolution_that_no_script_would_take_is_refused(tmp_path, capsys, given):
    with pytest.raises(SystemExit, match="2"):
        TABLE1["main"](["--output_dir", str(tmp_path / "out"), "--resolution", given])
    assert f"argument --resolution: {given} is not at least 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_line_is_one_sentence(tmp_path):
    append_cell(tmp_path, cell("clean", "szt", 0.5))
    path = tmp_path / "cells" / "c.jsonl"
    path.write_text("{\n" + path.read_text())
    done = run_script("examples/table1.py", "--output_dir", tmp_path, "--dry_run", expect=1)
    assert "Line 1 of" in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
