"""The plan of a table: which cells are its own, whether they need masks, and what they cost."""

from dataclasses import replace
from pathlib import Path

import pytest
from table_plan import CellSettings, Table, passes, plan

from szt_utils.datasets import read_concepts
from szt_utils.metrics import Networks
from szt_utils.tables import Cell, append_cell

ROWS = {"clean": {}, "adm+": {"method": "adm+"}, "ea": {"method": "ea"},
        "ea szt": {"method": "ea", "adaptive": "szt", "loss_mask_dir": "masks"}}
COLUMNS = {"nominal": {}, "regen": {"purify": {"method": "regen"}},
           "szt": {"szt": True, "loss_mask_dir": "masks"}}
STAR = "teal-striped-star"


def table(folder: Path = Path("out"), **changes) -> Table:
    settings = CellSettings(resolution=64, steps=10, train_batch_size=4, learning_rate=5e-3,
                            images_per_prompt=2, num_inference_steps=25, guidance_scale=5.0)
    return Table(**{"output_dir": folder, "name": "table1", "rows": ROWS, "columns": COLUMNS, "swept": [],
                    "data": list(ROWS), "defences": COLUMNS, "dataset": "pocket", "settings": settings,
                    "metrics": ["dino"], "model": "m", "pdmpure_model": None, "upscaler": None,
                    "networks": Networks("d", "c"), **changes})


def test_a_model_is_known_by_its_files_not_by_its_name_alone(tmp_path):
    """Cells of another model of the same name are other cells; a copy elsewhere is the same model."""
    for folder, content in (("a", b"1"), ("b", b"2"), ("copy", b"1")):
        (tmp_path / folder / "model" / "unet").mkdir(parents=True)
        (tmp_path / folder / "model" / "unet" / "weights.bin").write_bytes(content * 2**17)
    first, other, copy = (table(model=str(tmp_path / name / "model")) for name in ("a", "b", "copy"))
    assert first.record["model"].startswith("model@") and first.record["model"] != other.record["model"]
    cell = Cell("ea", "nominal", STAR, 0)
    for place in (lambda each: each.home(STAR), lambda each: each.learned(cell),
                  lambda each: each.generated(cell), lambda each: each.key()):
        assert place(first) == place(copy) != place(other)
    scores = table(model=str(tmp_path / "a" / "model"), networks=Networks("facebook/dinov2-base", "c"))
    assert scores.record["dino"] == "facebook/dinov2-base"  # an id on the Hub
    assert scores.key() != first.key() and scores.generated(cell) == first.generated(cell)
    changed = tmp_path / "c" / "model" / "unet" / "weights.bin"
    changed.parent.mkdir(parents=True)
    changed.write_bytes(b"1" * 2**17 + b"2")
    assert table(model=str(changed.parents[1])).record["model"] != first.record["model"]


@pytest.mark.parametrize("settings, changes, kept", [
    ({}, {"networks": Networks("d", "other")}, 3), ({}, {"networks": Networks("other", "c", "i")}, 3),
    ({"guidance_scale": 2.0}, {}, 2), ({"num_inference_steps": 3}, {}, 2), ({"images_per_prompt": 1}, {}, 2),
    ({}, {"given": {"prompts": ["a {}"]}}, 2), ({"learning_rate": 1.0}, {}, 1), ({"steps": 20}, {}, 1),
    ({"train_batch_size": 1}, {}, 1), ({}, {"given": {"initializer_token": "toy"}}, 1),
    ({}, {"given": {"method": "lora"}}, 1), ({"resolution": 128}, {}, 0), ({}, {"dataset": "other"}, 0)])
def test_a_setting_changes_its_own_stage_and_those_after_it(settings, changes, kept):
    """The stages are the concept's images, what is learned of them, and what is generated."""
    one, cell = table(), Cell("ea", "nominal", STAR, 0)
    other = table(settings=replace(one.settings, **settings), **changes)
    places = [(each.home(STAR), each.learned(cell), each.generated(cell)) for each in (one, other)]
    assert [mine == its for mine, its in zip(*places, strict=True)] == [True] * kept + [False] * (3 - kept)
    assert one.key() != other.key()


@pytest.mark.parametrize("data, defences, needed", [
    (["clean", "ea"], ["nominal", "regen"], False), (["clean"], ["nominal", "szt"], True),
    (["ea szt"], ["nominal"], True)])
def test_masked_defences_and_adaptive_poisons_need_masks(data, defences, needed):
    assert table(data=data, defences={name: COLUMNS[name] for name in defences}).needs_masks is needed


def test_the_poisons_mean_is_over_those_that_know_no_defence():
    assert table().plain_poisons == ["adm+", "ea"]


def test_an_ablation_takes_cells_of_its_data_where_its_own_columns_are_trained(tmp_path):
    cells = [Cell("ea", "nominal", "a", 0, {"dino": 0.1}), Cell("ea", "szt", "a", 0, {"dino": 0.2}),
             Cell("ea", "nominal", "a", 1, {"dino": 0.3}), Cell("clean", "szt", "a", 0, {"dino": 0.4}),
             Cell("ea", "other", "a", 0, {"dino": 0.5}), Cell("ea", "nominal", "b", 0, {"dino": 0.6})]
    for cell in cells:
        append_cell(tmp_path, cell)
    assert set(table(tmp_path).cells()) == {cell for cell in cells if cell.defence != "other"}
    assert table(tmp_path, swept=["szt"], data=["ea"]).cells() == cells[:2]


def test_passes_count_a_poison_and_a_purifier_once_for_all_seeds():
    one, concepts = table(), read_concepts("pocket", names=[STAR, "red-dotted-heart"])

    def cost(data: str, defence: str, *seeds: int) -> dict[str, int]:
        return passes(one, [Cell(data, defence, STAR, seed) for seed in seeds], concepts)

    # 10 steps of batch 4, forward and backward; 8 prompts, 2 images each, 25 steps with guidance.
    assert cost("clean", "nominal", 0) == {"purify": 0, "train": 120, "generate": 800}
    # 5 images of 100 steps of 3 passes; 6 passes for each purified image.
    assert cost("adm+", "regen", 0, 1) == {"poison": 1500, "purify": 30, "train": 240, "generate": 1600}
    assert cost("ea szt", "szt", 0)["poison"] == 2 * cost("ea", "szt", 0)["poison"] == 1000
    of_both = passes(one, [Cell("adm+", "regen", name, 0) for name in concepts], concepts)
    assert of_both == {"poison": 3000, "purify": 60, "train": 240, "generate": 1600}
    assert passes(one, [], concepts) == {}


def test_a_plan_takes_the_rate_of_finished_cells_before_the_given_one():
    missing, passes = [Cell("clean", "szt", "a", 0)], {"train": 1000, "generate": 200}
    finished = [Cell("ea", "szt", "a", 0, {}, 300.0, 1000), Cell("da", "szt", "a", 0, {}, 100.0, 1000),
                Cell("ea", "lm", "a", 0)]
    assert plan(missing, passes, finished, 0.1).splitlines() == [
        "clean_szt_a_0", "train            1,000 passes of an image through the U-Net",
        "generate           200 passes of an image through the U-Net",
        "about 4 minutes on one process at the rate of the cells that are there"]
    for seconds, time in ((0.1, "2 minutes"), (10, "3.3 hours")):
        assert plan(missing, passes, [], seconds).endswith(
            f"about {time} on one process at the rate of two CPU cores")
    assert "not known yet" in plan(missing, passes, [], None) and plan([], {}, [], None) == ""
