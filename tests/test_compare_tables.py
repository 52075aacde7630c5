"""examples/compare_tables.py: rank correlation, the paper's rows, and the cells that folders share."""

import runpy
from pathlib import Path

import pytest

from szt_utils.errors import InputError
from szt_utils.tables import Cell, append_cell, run_index

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def compare():
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "compare_tables.py"))


def write(folder, values, concepts=("one", "two"), seed=0, metric="dino"):
    """Cells of ADM+, whose defences have the values, and clean ones of 0.6."""
    for concept in concepts:
        for defence, value in values.items():
            append_cell(folder, Cell("adm+", defence, concept, seed, {metric: value}))
            append_cell(folder, Cell("clean", defence, concept, seed, {metric: 0.6}))


def test_the_papers_own_table_agrees_with_itself_and_its_reverse_does_not(compare):
    paper = dict(zip(compare["DEFENCES"], compare["PAPER"]["ea"], strict=True))
    assert compare["rank_correlation"](paper, paper) == pytest.approx(1)
    assert compare["rank_correlation"](paper, {d: -v for d, v in paper.items()}) == pytest.approx(-1)
    assert paper["jpeg"] == 0.33 and paper["szt"] == 0.46  # as in the paper
    assert all(len(row) == len(compare["DEFENCES"]) == 10 for row in compare["PAPER"].values())


def test_only_shared_concepts_count_and_the_share_is_that_of_the_damage(compare, tmp_path, capsys):
    write(tmp_path / "a", {"nominal": 0.2, "advclean": 0.25, "jpeg": 0.3, "szt": 0.6})
    write(tmp_path / "b", {"nominal": 0.2, "advclean": 0.25, "jpeg": 0.5, "szt": 0.4}, ["one"])
    write(tmp_path / "b", {"nominal": 0.0, "jpeg": 0.0, "szt": 0.0}, ["three"])
    compare["main"]([str(tmp_path / "a"), str(tmp_path / "b")])
    printed = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")]
                                              for line in printed.splitlines() if "|" in line)}
    assert printed.startswith("concepts: 1, seeds: 1\n")
    columns = {defence: i for i, defence in enumerate(compare["DEFENCES"])}
    first, second = (rows[f"{tmp_path / name}, recovered"] for name in "ab")
    assert (first[columns["jpeg"]], first[columns["szt"]]) == ("25%", "100%")
    assert (second[columns["jpeg"]], second[columns["szt"]]) == ("75%", "50%")
    assert rows["the paper, poisons"][columns["szt"]] == "0.45"
    # The paper orders AdvClean, JPEG and SZT as the first folder does; nominal training is no defence.
    assert (rows[str(tmp_path / "a")][0], rows[str(tmp_path / "b")][0]) == ("1.00", "0.50")


def test_the_papers_mean_is_over_the_poisons_of_the_folders(compare, tmp_path, capsys):
    write(tmp_path, {"nominal": 0.2, "szt": 0.6})
    compare["main"]([str(tmp_path)])
    [mean] = [line for line in capsys.readouterr().out.splitlines() if "the paper, poisons" in line]
    assert mean.split(" | ")[1:] == [f"{value:.2f}" for value in compare["PAPER"]["adm+"][:-1]] + ["0.45 |"]


def test_a_defence_that_lacks_a_shared_cell_is_left_out(compare, tmp_path):
    for name in "ab":
        write(tmp_path / name, {"nominal": 0.2}, ["one", "two"])
    write(tmp_path / "a", {"szt": 0.6}, ["one", "two"])
    write(tmp_path / "b", {"szt": 0.6}, ["two"])
    first, second = compare["read_folders"]([tmp_path / "a", tmp_path / "b"]).values()
    assert first["poisons"] == pytest.approx({"nominal": 0.2, "szt": 0.6})
    assert second["poisons"] == pytest.approx({"nominal": 0.2}) and list(second["clean"]) == ["nominal"]


def test_only_seeds_that_all_data_of_all_folders_have_count(compare, tmp_path):
    for name in "ab":
        write(tmp_path / name, {"nominal": 0.2, "szt": 0.6})
    write(tmp_path / "a", {"nominal": 0.9, "szt": 0.9}, seed=1)  # b lacks the seed
    for name in "ab":
        append_cell(tmp_path / name, Cell("adm+", "szt", "one", 2, {"dino": 0.9}))  # and clean this one
    for rows in compare["read_folders"]([tmp_path / "a", tmp_path / "b"]).values():
        assert rows["poisons"] == pytest.approx({"nominal": 0.2, "szt": 0.6})


def test_the_metric_is_the_one_that_was_asked_for(compare, tmp_path, capsys):
    write(tmp_path, {"nominal": 0.2, "szt": 0.6})
    write(tmp_path, {"nominal": 0.1, "szt": 0.3}, ["three"], metric="attributes")
    found = {}
    for metric in ("dino", "attributes"):
        compare["main"]([str(tmp_path), "--metric", metric])
        lines = capsys.readouterr().out.splitlines()
        (line,) = [line for line in lines if f"{tmp_path}, poisons" in line]
        found[metric] = [cell.strip() for cell in line.strip("|").split("|")][1:]
    columns = [compare["DEFENCES"].index(defence) for defence in ("nominal", "szt")]
    assert {metric: [cells[i] for i in columns] for metric, cells in found.items()} == {
        "dino": ["0.20", "0.60"], "attributes": ["0.10", "0.30"]}


def test_a_folder_of_several_settings_is_refused(compare, tmp_path):
    write(tmp_path, {"nominal": 0.2})
    for steps in (200, 400):
        run_index(tmp_path, {"steps": steps, "versions": {}, "commit": None})
    with pytest.raises(InputError, match="with different settings"):
        compare["read_folders"]([tmp_path])


def test_folders_without_common_concepts_are_refused(compare, tmp_path):
    write(tmp_path / "a", {"szt": 0.5}, ["one"])
    write(tmp_path / "b", {"szt": 0.5}, ["two"])
    write(tmp_path / "c", {"szt": 0.5}, [])
    for folders in (["a", "b"], ["a", "c"]):
        with pytest.raises(InputError, match="no cells with dino of the same poisons"):
            compare["read_folders"]([tmp_path / name for name in folders])
