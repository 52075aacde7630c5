"""The table's runner: what is planned, what is skipped, how cells become a table, and one cell run whole."""

import csv
import json
import re
import runpy
import shutil

import pytest
from conftest import ROOT, run_script
from PIL import Image

TABLE1 = runpy.run_path(str(ROOT / "examples" / "table1.py"))


def cell(data, defence, value, concept="c", seed=0) -> dict:
    return {"data": data, "defence": defence, "concept": concept, "seed": seed, "metrics": {"dino": value}}


def test_a_dry_run_lists_the_missing_cells_with_their_cost_and_makes_nothing(tmp_path):
    (tmp_path / "out" / "cells").mkdir(parents=True)
    done_cell = cell("clean", "szt", 0.5, "red-dotted-heart") | {"seconds": 30, "passes": 1000}
    (tmp_path / "out" / "cells" / "clean_szt_red-dotted-heart_0.json").write_text(json.dumps(done_cell))
    done = run_script("examples/table1.py", "--output_dir", tmp_path / "out", "--data", "clean", "ea szt",
                      "--defences", "nominal", "szt", "--concepts", "red-dotted-heart", "--steps", "10",
                      "--dry_run")
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "4 cells, 3 of them to do.", "clean_nominal_red-dotted-heart_0", "ea-szt_nominal_red-dotted-heart_0",
        "ea-szt_szt_red-dotted-heart_0"]
    # Two attacks of 100 steps on five pictures, no purifier, three trainings of 10 steps, batch 4, forward
    # and backward, three times eight pictures of 25 steps with guidance: 2560 passes of 0.03 s.
    assert [int(line.split()[1].replace(",", "")) for line in lines[4:8]] == [1000, 0, 360, 1200]
    assert lines[8].startswith("about 1 minutes on one process at the rate of the cells")
    assert len(list((tmp_path / "out").rglob("*"))) == 2


def test_cells_of_concepts_and_seeds_become_means_errors_and_recovered_shares():
    cells = [cell("clean", "nominal", 0.5, "a"), cell("clean", "nominal", 0.7, "a", 1),
             cell("clean", "nominal", 0.8, "b"), cell("adm+", "nominal", 0.3, "a"),
             cell("adm+", "szt", 0.6, "a")]
    header, _, *rows = TABLE1["table"](json.loads(json.dumps(cells))).splitlines()
    assert header == "| data | nominal | szt |"
    # The concepts' means .6 and .8 are .2 apart: a standard error of .1. (.6 - .3) / (.7 - .3) is recovered.
    assert rows == ["| clean | 0.700 ± 0.100 |  |", "| adm+ | 0.300 | 0.600 |",
                    "| adm+: recovered |  | 75% |"]


def test_a_poison_that_took_nothing_has_nothing_to_recover():
    assert TABLE1["recovered"](0.6, 0.69, 0.7) is None
    assert TABLE1["recovered"](0.7, 0.5, 0.7) == pytest.approx(1)
    assert TABLE1["recovered"](0.4, 0.5, 0.7) == pytest.approx(-0.5)


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
    args = TABLE1["parse_args"](["--preset", preset])
    assert "nominal" in args.defences and len(args.defences) >= 4 and "clean" in args.data
    assert len({json.dumps(TABLE1["VARIANTS"][name]) for name in args.defences}) == len(args.defences)


def test_a_preset_takes_the_tables_cells_of_its_own_concepts_and_data(tmp_path):
    (tmp_path / "cells").mkdir()
    cells = [cell("ea", "nominal", 0.2, "star"), cell("ea", "jpeg50", 0.6, "star"),
             cell("ea", "nominal", 0.9, "heart"), cell("ea", "nominal", 0.9, "star", seed=1),
             cell("da", "nominal", 0.1, "star"), cell("ea", "szt", 0.7, "star")]
    for i, content in enumerate(cells):
        (tmp_path / "cells" / f"{i}.json").write_text(json.dumps(content))
    args = TABLE1["parse_args"](["--output_dir", str(tmp_path), "--preset", "jpeg"])
    assert TABLE1["read_cells"](args) == cells[:2]
    assert TABLE1["read_cells"](TABLE1["parse_args"](["--output_dir", str(tmp_path)])) == [
        c for c in cells if c["defence"] != "jpeg50"]


def test_a_dreambooth_folder_runs_whole_and_is_not_run_again(tmp_path, tiny_model, concept_folder):
    """Real scripts on a tiny model: poison, purify, train in one run, generate, score, tabulate."""
    for source, folder in zip(concept_folder, ("pictures", "masks"), strict=True):
        shutil.copytree(source, tmp_path / folder / "star")
    pocket = ROOT / "szt_utils" / "pocket" / "weights"
    command = ["examples/table1.py", "--output_dir", tmp_path / "out", "--dataset", "dreambooth",
               "--dataset_dir", tmp_path / "pictures", "--mask_dir", tmp_path / "masks",
               "--pretrained_model_name_or_path", tiny_model, "--dino", pocket / "dino",
               "--clip", pocket / "clip", "--initializer_token", "star", "--steps", "2", "--resolution", "64",
               "--images_per_prompt", "1", "--num_inference_steps", "1", "--metrics", "dino", "clip",
               "--data", "clean", "ea", "--defences", "nominal", "advclean", "lm"]
    done = run_script(*command)
    assert "6 cells, 6 of them to do." in done.stdout
    cells = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / "cells").iterdir())]
    assert {(c["data"], c["defence"]) for c in cells} == {
        (data, defence) for data in ("clean", "ea") for defence in ("nominal", "advclean", "lm")}
    assert all(c["concept"] == "star" and set(c["metrics"]) >= {"dino", "clip"} for c in cells)
    assert Image.open(next((tmp_path / "out" / "data" / "star" / "clean").iterdir())).size == (64, 64)
    options = json.loads((tmp_path / "out" / "learned" / "ea_lm_star_0" / "options.json").read_text())
    assert options["train_data_dir"].endswith("data/star/ea") and options["loss_mask_dir"]
    rows = list(csv.DictReader((tmp_path / "out" / "table1.csv").open()))
    assert len(rows) == 3 * 2 * 2 and {row["metric"] for row in rows} == {"dino", "clip"}
    assert (tmp_path / "out" / "sheets" / "star.png").exists() and (tmp_path / "out" / "table1.png").exists()
    assert "6 cells, 0 of them to do." in run_script(*command).stdout
    before = (tmp_path / "out" / "table1.csv").read_bytes()
    for name in ("data", "table1.csv"):  # the cells alone, as somebody else has sent them
        (tmp_path / "out" / name).rename(tmp_path / name)
    run_script(*command)
    assert (tmp_path / "out" / "table1.csv").read_bytes() == before


@pytest.mark.parametrize("flags, message", [
    (["--concepts", "blue-elephant"], "no concept 'blue-elephant'; choose from: "),
    (["--dataset", "dreambooth", "--dataset_dir", "none", "--pretrained_model_name_or_path", "m",
      "--dino", "d", "--clip", "c"], "'none' is no folder"),
    (["--dataset", "customconcept101", "--dataset_dir", "none", "--pretrained_model_name_or_path", "m",
      "--dino", "d", "--clip", "c"], "cannot be read as CustomConcept101's list")])
def test_bad_input_is_one_sentence(flags, message):
    done = run_script("examples/table1.py", *flags, "--dry_run", expect=1)
    assert message in done.stderr and done.stderr.count("\n") == 1
