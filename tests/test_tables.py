"""Cells on disk (round trip, resume, damage) and the statistics that make a table of them, in closed form."""

import csv
import dataclasses
import io
import json

import pytest

from szt_utils.errors import InputError
from szt_utils.tables import (
    Cell,
    append_cell,
    averages,
    csv_table,
    markdown_table,
    poison_average,
    read_cells,
    recovered,
    recovered_share,
    run_index,
    share_text,
    shared_cells,
    write_table,
)

DATA, DEFENCES, POISONS = ["clean", "adm+", "ea"], ["nominal", "jpeg", "szt"], ["adm+", "ea"]


def cell(data, defence, value, concept="c", seed=0) -> Cell:
    return Cell(data, defence, concept, seed, {"dino": value})


def test_a_cell_is_read_as_it_was_written_and_others_are_appended(tmp_path):
    cells = [Cell("adm+ szt", "jpeg+lm", "star", 3, {"dino": 1 / 3, "kid": -2.638750278635804, "fid": 1e-17},
                  26.52, 2858, 1), cell("clean", "szt", 0.1 + 0.2, "star")]
    for one in cells:
        append_cell(tmp_path, one)
    append_cell(tmp_path, cell("clean", "szt", 0.5, "arrow"))
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == ["arrow.jsonl", "star.jsonl"]
    lines = (tmp_path / "cells" / "star.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dataclasses.asdict(one) for one in cells]
    assert list(json.loads(lines[0])) == ["data", "defence", "concept", "seed", "metrics", "seconds",
                                          "passes", "run", "images"]
    read = read_cells(tmp_path)
    assert [dataclasses.astuple(one) for one in read[1:]] == [dataclasses.astuple(one) for one in cells]
    assert read[0].concept == "arrow" and read[1].name == "adm+-szt_jpeg+lm_star_3"


def test_a_new_folder_has_no_cells(tmp_path):
    assert read_cells(tmp_path / "none") == []


def test_a_finished_cell_equals_the_planned_one_and_differs_in_each_part():
    done = Cell("clean", "szt", "star", 0, {"dino": 0.5}, 1.0, 2, 0)
    assert done == Cell("clean", "szt", "star", 0) and done in {Cell("clean", "szt", "star", 0)}
    for part in ({"data": "ea"}, {"defence": "lm"}, {"concept": "arrow"}, {"seed": 1}):
        assert dataclasses.replace(done, **part) != done


def test_a_last_line_cut_short_is_ignored_and_replaced_by_the_next(tmp_path):
    first, second = cell("clean", "nominal", 0.5), cell("clean", "szt", 0.6)
    append_cell(tmp_path, first)
    append_cell(tmp_path, second)
    path = tmp_path / "cells" / "c.jsonl"
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole) - 1):  # wherever the crash was
        path.write_bytes(whole[:end])
        assert read_cells(tmp_path) == [first]
        append_cell(tmp_path, second)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # only the newline is missing
    assert read_cells(tmp_path) == [first, second]
    append_cell(tmp_path, cell("ea", "szt", 0.7))
    assert path.read_bytes().startswith(whole) and len(read_cells(tmp_path)) == 3


@pytest.mark.parametrize("line", [
    '{"data": "clean", "defence": "sz', "[1, 2]", "3", "\xff", '{"data": "clean"}',
    '{"data": ["clean"], "defence": "szt", "concept": "c", "seed": 0, "metrics": {}}',
    '{"data": "clean", "defence": "szt", "concept": "c", "seed": 0, "metrics": {"dino": "high"}}',
    '{"data": "clean", "defence": "szt", "concept": "c", "seed": 0, "metrics": 0.5}'])
@pytest.mark.parametrize("last", [False, True])
def test_a_damaged_line_is_refused(tmp_path, line, last):
    """A whole last line too: a crash would have left no newline after it."""
    append_cell(tmp_path, cell("clean", "nominal", 0.5))
    path = tmp_path / "cells" / "c.jsonl"
    damaged = line.encode("latin-1") + b"\n"
    path.write_bytes(path.read_bytes() + damaged if last else damaged + path.read_bytes())
    with pytest.raises(InputError, match=rf"Line {2 if last else 1} of '.*c\.jsonl' is damaged; "):
        read_cells(tmp_path)


def test_a_second_line_of_one_cell_is_refused(tmp_path):
    for value in (0.5, 0.6):
        append_cell(tmp_path, cell("clean", "nominal", value))
    with pytest.raises(InputError, match="Line 2 of '.*' repeats the cell 'clean_nominal_c_0'; "):
        read_cells(tmp_path)


def test_a_run_is_recorded_once(tmp_path):
    runs = [{"steps": 200, "learning_rate": 5e-3, "versions": {"torch": "2"}, "commit": None},
            {"steps": 200, "learning_rate": 5e-3, "versions": {"torch": "3"}, "commit": "abc"}]
    folder = tmp_path / "new"
    assert [run_index(folder, runs[i]) for i in (0, 1, 0, 1)] == [0, 1, 0, 1]
    assert json.loads((folder / "run.json").read_text()) == runs
    for content in ('{"steps": 200}', "[{", "null"):
        (folder / "run.json").write_text(content)
        with pytest.raises(InputError, match="The list of runs '.*run.json'.* is"):
            run_index(folder, runs[0])
        assert (folder / "run.json").read_text() == content


def test_seeds_are_averaged_within_concepts_and_the_error_is_over_concepts():
    cells = [cell("clean", "nominal", 0.5, "a"), cell("clean", "nominal", 0.7, "a", 1),
             cell("clean", "nominal", 0.8, "b"), cell("ea", "szt", 0.5, "a"), cell("ea", "szt", 0.7, "a", 1),
             cell("ea", "jpeg", 0.4, "a"), Cell("ea", "lm", "a", 0, {"fid": 3.0})]
    found = averages(cells, "dino")
    assert set(found) == {("clean", "nominal"), ("ea", "szt"), ("ea", "jpeg")}
    # The concepts' means .6 and .8 have a standard deviation of .2 / sqrt 2, so an error of .1.
    assert found["clean", "nominal"] == pytest.approx((0.7, 0.1, 3))
    assert found["ea", "szt"] == pytest.approx((0.6, 0.1, 2))  # one concept: over its seeds
    assert found["ea", "jpeg"] == (0.4, None, 1)


def test_the_average_over_poisons_needs_all_that_have_cells():
    cells = [cell("adm+", "nominal", 0.2, "a"), cell("ea", "nominal", 0.4, "a"),
             cell("adm+", "nominal", 0.4, "b"), cell("ea", "nominal", 0.6, "b"),
             cell("adm+", "szt", 0.6, "a"), cell("ea", "szt", 0.7, "a"),
             cell("adm+", "jpeg", 0.9, "a"), cell("clean", "nominal", 0.9, "a")]
    found = poison_average(cells, POISONS, DEFENCES, "dino")
    assert set(found) == {"nominal"}  # jpeg lacks ea, szt lacks a concept
    assert found["nominal"] == pytest.approx((0.4, 0.1, 4))  # of the concepts' .3 and .5
    found = poison_average([c for c in cells if c != cell("adm+", "nominal", 0.4, "b")], POISONS, DEFENCES,
                           "dino")  # then nominal has one concept alone, and that counts
    assert found["nominal"] == (pytest.approx(0.3), None, 2)
    assert found["szt"] == (pytest.approx(0.65), None, 2)
    assert poison_average([c for c in cells if c.data != "ea"], POISONS, DEFENCES, "dino") == {}
    assert poison_average(cells, POISONS, DEFENCES, "fid") == {}


def test_a_defence_with_more_concepts_than_the_first_is_averaged_over_those_of_the_first():
    cells = [cell(data, "nominal", 0.3) for data in POISONS]
    cells += [cell(data, "szt", value, concept) for data in POISONS
              for concept, value in (("c", 0.5), ("another", 0.9))]
    found = poison_average(cells, POISONS, DEFENCES, "dino")
    assert found == {"nominal": (0.3, None, 2), "szt": (0.5, None, 2)}


def test_cells_are_shared_where_every_place_has_the_metric():
    places = [("clean", "nominal"), ("ea", "nominal")]
    cells = [cell(*place, 0.5, "whole") for place in places]
    other = Cell("ea", "nominal", "half", 0, {"fid": 1.0})
    assert shared_cells([*cells, cell("clean", "nominal", 0.5, "half"), other], "dino", places) == cells


def test_a_poison_that_took_nothing_has_nothing_to_recover():
    assert recovered(0.6, 0.69, 0.7) is None
    assert recovered(0.7, 0.5, 0.7) == pytest.approx(1)
    assert recovered(0.4, 0.5, 0.7) == pytest.approx(-0.5)


def test_cells_of_concepts_and_seeds_become_means_errors_and_recovered_shares():
    cells = [cell("clean", "nominal", 0.5, "a"), cell("clean", "nominal", 0.7, "a", 1),
             cell("clean", "nominal", 0.8, "b"), cell("adm+", "nominal", 0.3, "a"),
             cell("adm+", "szt", 0.6, "a")]
    header, _, *rows = markdown_table(cells, "dino", DATA, DEFENCES, POISONS).splitlines()
    assert header == "| data | nominal | szt |"
    # The concepts' means .6 and .8 are .2 apart: a standard error of .1. Of the one training that has all
    # cells, (.6 - .3) / (.5 - .3) is recovered.
    assert rows == ["| clean | 0.700 ± 0.100 |  |", "| adm+ | 0.300 | 0.600 |",
                    "| adm+: recovered |  | 150% |"]
    cells += [cell("ea", "nominal", 0.4, "a"), cell("ea", "szt", 0.5, "a"),
              cell("clean", "nominal", 0.9, "c"), cell("ea", "nominal", 0.1, "c")]
    *_, mean, _, ea, share = markdown_table(cells, "dino", DATA, DEFENCES, POISONS).splitlines()
    assert mean == "| poisons' mean | 0.350 | 0.550 |"
    assert ea == "| ea: recovered |  | 100% |"  # (.5 - .4) / (.5 - .4)
    assert share == "| poisons' mean: recovered |  | 133% |"  # (.55 - .35) / (.5 - .35)


def test_a_recovered_share_has_an_interval_over_concepts():
    def cells(*rows):
        """Clean and poisoned nominal training, and the defence, of a concept each."""
        return [cell(*place, value, concept) for concept, values in zip("abcdefgh", rows, strict=False)
                for place, value in zip((("clean", "nominal"), ("ea", "nominal"), ("ea", "szt")), values,
                                        strict=True)]

    same = recovered_share(cells(*[(0.8, 0.4, 0.6)] * 5), ["ea"], "szt", "dino")
    assert (same["value"], same["low"], same["high"], same["n"]) == pytest.approx((0.5, 0.5, 0.5, 5))
    assert share_text(same) == "50% [50, 50]"
    # Half of the concepts recover all, half nothing: the share is that of the first in a resampled set.
    halves = recovered_share(cells(*[(0.8, 0.4, 0.8)] * 4, *[(0.8, 0.4, 0.4)] * 4), ["ea"], "szt", "dino")
    assert halves["value"] == pytest.approx(0.5)
    assert (halves["low"], halves["high"]) == pytest.approx((1 / 8, 7 / 8))  # binomial: 2.5 % at 1 of 8
    # Where the poison took nothing for sure, nothing can be recovered.
    vain = cells(*[(0.8, 0.4, 0.6)] * 2, *[(0.6, 0.8, 0.8)] * 2)
    assert recovered_share(vain, ["ea"], "szt", "dino") is None
    assert share_text(recovered_share(cells((0.8, 0.4, 0.6)), ["ea"], "szt", "dino")) == "50%"
    assert recovered_share(cells((0.8, 0.4, 0.6)), ["ea"], "jpeg", "dino") is None and share_text(None) == ""


@pytest.mark.filterwarnings("error")
def test_a_recovered_share_leaves_out_draws_without_damage():
    cells = [cell(*place, value, concept)
             for concept, values in (("a", (1.0, 0.0, 0.5)), ("b", (1.0, 0.0, 0.5)), ("c", (1.0, 0.0, 0.5)),
                                     ("spared", (0.0, 0.0, 0.5)))
             for place, value in zip((("clean", "nominal"), ("ea", "nominal"), ("ea", "szt")), values,
                                     strict=True)]
    share = recovered_share(cells, ["ea"], "szt", "dino")
    assert share["value"] == pytest.approx(2 / 3)
    # .5 over the mean damage, which is 1 at most and 1/4 at least where it is not 0.
    assert share["low"] == pytest.approx(1 / 2) and share["high"] == pytest.approx(2)


def test_only_similarity_and_attributes_have_recovered_shares():
    cells = [Cell(data, defence, "a", 0, {"attributes": value}) for data, defence, value in
             [("clean", "nominal", 0.9), ("ea", "nominal", 0.3), ("ea", "szt", 0.6)]]
    assert "| ea: recovered |  | 50% |" in markdown_table(cells, "attributes", DATA, DEFENCES, POISONS)
    cells = [Cell(data, defence, "a", 0, {"fid": value}) for data, defence, value in
             [("clean", "nominal", 3.0), ("ea", "nominal", 9.0), ("ea", "szt", 4.0)]]
    assert "recovered" not in markdown_table(cells, "fid", DATA, DEFENCES, POISONS)


def test_the_csv_has_unrounded_values_in_the_order_given():
    cells = [cell("ea", "szt", 1 / 3), cell("clean", "szt", 0.5, "a"), cell("clean", "szt", 0.7, "b")]
    rows = list(csv.DictReader(io.StringIO(csv_table(cells, ["dino"], DATA, DEFENCES))))
    assert [(row["metric"], row["data"], row["defence"], row["cells"]) for row in rows] == [
        ("dino", "clean", "szt", "2"), ("dino", "ea", "szt", "1")]
    assert float(rows[0]["standard_error"]) == pytest.approx(0.1) and rows[1]["standard_error"] == ""
    assert float(rows[1]["mean"]) == 1 / 3


@pytest.mark.parametrize("sweep", [False, True])
def test_a_table_is_written_with_all_metrics_and_a_plot_of_similarity(tmp_path, sweep):
    cells = [Cell(data, "nominal", "a", 0, {"dino": 0.5, "clip": 20.0}) for data in ("clean", "ea")]
    shown = write_table(tmp_path / "t", cells, ["dino", "fid", "clip"], DATA, DEFENCES, POISONS, sweep)
    assert shown == markdown_table(cells, "dino", DATA, DEFENCES, POISONS)
    text = (tmp_path / "t.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == ["## dino", "## clip"]
    assert "2 cells, at most 1 a place, of 1 concept; ± is the standard error over seeds" in text
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert (tmp_path / "t.csv").read_text() == csv_table(cells, ["dino", "clip"], DATA, DEFENCES)


def test_a_table_without_similarity_has_no_plot(tmp_path):
    cells = [Cell("clean", "szt", "a", 0, {"clip": 20.0})]
    shown = write_table(tmp_path / "t", cells, ["dino", "clip"], DATA, DEFENCES, POISONS)
    assert "## clip" in shown and not (tmp_path / "t.png").exists()
    assert write_table(tmp_path / "empty", [], ["dino"], DATA, DEFENCES, POISONS) == ""
