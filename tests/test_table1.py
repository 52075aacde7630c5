"""The table's runner: what is planned, what is skipped, how cells become a table."""

import json
import re
import runpy

import pytest
from conftest import ROOT, run_script

TABLE1 = runpy.run_path(str(ROOT / "examples" / "table1.py"))


def test_a_dry_run_lists_the_missing_cells_and_makes_nothing(tmp_path):
    (tmp_path / "out" / "cells").mkdir(parents=True)
    (tmp_path / "out" / "cells" / "clean_szt_red-dotted-heart_0.json").write_text("{}")
    done = run_script("examples/table1.py", "--output_dir", tmp_path / "out", "--data", "clean", "ea szt",
                      "--defences", "nominal", "szt", "--concepts", "red-dotted-heart", "--dry_run")
    assert done.stdout.splitlines() == [
        "4 cells, 3 of them to do.", "clean_nominal_red-dotted-heart_0", "ea-szt_nominal_red-dotted-heart_0",
        "ea-szt_szt_red-dotted-heart_0"]
    assert len(list((tmp_path / "out").rglob("*"))) == 2


def test_cells_of_concepts_and_seeds_become_a_mean_with_its_standard_error():
    cells = [{"data": data, "defence": defence, "concept": "c", "seed": seed, "metrics": {"dino": value}}
             for data, defence, seed, value in (("clean", "nominal", 0, 0.5), ("clean", "nominal", 1, 0.7),
                                                ("adm+", "nominal", 0, 0.25), ("adm+", "szt", 0, 0.6))]
    header, _, *rows = TABLE1["table"](json.loads(json.dumps(cells))).splitlines()
    assert header == "| data | nominal | szt |"
    # Standard deviation of two values a distance d apart: d / sqrt(2); over sqrt(2) again: d / 2.
    assert rows == ["| clean | 0.600 ± 0.100 |  |", "| adm+ | 0.250 | 0.600 |"]


@pytest.mark.parametrize("kind", ["POISONS", "DEFENCES"])
def test_every_poison_and_defence_names_real_flags(kind):
    script = {"POISONS": "poison_images.py", "DEFENCES": "textual_inversion_szt.py"}[kind]
    flags = {flag for options in TABLE1[kind].values() for flag in options}
    known = set(re.findall(r"--(\w+)", run_script(script, "--help").stdout))
    assert flags and flags <= known
