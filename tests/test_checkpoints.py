"""Checkpoints: whole or absent, exact, found by name, refused when damaged, set aside when of another run."""

from pathlib import Path

import pytest
import torch

from szt_utils.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    load_rank_state,
    load_shared_state,
    prune_checkpoints,
    save_checkpoint,
    set_aside,
)
from szt_utils.errors import InputError

FINGERPRINT = {"placeholder_token": "<s>", "num_vectors": 1, "images": {"a.png": "12", "b.png": "34"}}


def save(folder, step, value=1.0, **options):
    common = {"step": step, "rows": torch.full((1, 4), value), "fingerprint": FINGERPRINT}
    save_checkpoint(folder, step, common, {"random": {"cpu": torch.get_rng_state()}}, **options)
    return folder / f"checkpoint-{step}"


def killed(*_):
    raise KeyboardInterrupt


def test_common_and_every_ranks_own_come_back(tmp_path):
    common = {"step": 3, "rows": torch.randn(2, 4), "fingerprint": FINGERPRINT}
    barriers = []

    def other_ranks():  # runs at each barrier, as rank 1 would go on
        barriers.append(sorted(path.name for path in tmp_path.rglob("*")))
        if len(barriers) == 1:
            torch.save({"who": 1}, tmp_path / ".checkpoint-3.part" / "rank_1.pt")

    save_checkpoint(tmp_path, 3, common, {"who": 0}, barrier=other_ranks)
    assert "checkpoint-3" not in barriers[0] + barriers[1], "the name stands for what every rank has written"
    for rank in (0, 1):
        assert load_rank_state(tmp_path / "checkpoint-3", rank) == {"who": rank}
    assert torch.equal(load_shared_state(tmp_path / "checkpoint-3")["rows"], common["rows"])
    with pytest.raises(InputError, match="cannot be read"):
        load_rank_state(tmp_path / "checkpoint-3", 2)


def test_listing_passes_over_what_is_no_checkpoint_and_sorts_by_number(tmp_path):
    for step in (10, 9, 100):
        save(tmp_path, step)
    for name in ("checkpoint-abc", "checkpoint-", ".checkpoint-11.part", "checkpoint-1-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10",
                                                                  "checkpoint-100"]
    assert list_checkpoints(tmp_path / "none") == []


def test_finding_by_name_path_or_latest(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    nine, ten = save(tmp_path, 9), save(tmp_path, 10)
    assert find_checkpoint(tmp_path, "latest") == ten
    assert find_checkpoint(tmp_path, "checkpoint-9") == find_checkpoint(tmp_path, str(nine)) == nine
    other = save(tmp_path / "other", 9)
    with pytest.raises(InputError, match="other/checkpoint-9' is not in"):
        find_checkpoint(tmp_path, str(other))
    assert find_checkpoint(tmp_path, "/moved/away/checkpoint-9") == nine  # as upstream
    with pytest.raises(InputError, match="'checkpoint-8' is not in .*there is: checkpoint-9, checkpoint-10"):
        find_checkpoint(tmp_path, "checkpoint-8")


def test_pruning_keeps_the_newest(tmp_path):
    for step in (2, 10, 1):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, 5)
    assert len(list_checkpoints(tmp_path)) == 3
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_save_cut_short_leaves_the_old_checkpoint_and_the_next_save_cleans_up(tmp_path):
    folder = save(tmp_path, 1, 1.0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, 2.0, barrier=killed)
        assert list_checkpoints(tmp_path) == [folder]
        assert load_shared_state(folder)["rows"].unique().item() == 1.0
    save(tmp_path, 1, 3.0)
    assert load_shared_state(folder)["rows"].unique().item() == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_new_run_sets_an_earlier_runs_checkpoints_and_records_aside(tmp_path):
    for step in (2, 4):
        save(tmp_path, step)
    for name in ("options.json", "stats.jsonl", "learned_embeds.safetensors"):
        (tmp_path / name).write_text(name)
    assert set_aside(tmp_path, 0) == tmp_path / "earlier-1"
    assert {path.name for path in tmp_path.iterdir()} == {"earlier-1", "learned_embeds.safetensors"}
    assert {path.name for path in (tmp_path / "earlier-1").iterdir()} == {
        "checkpoint-2", "checkpoint-4", "options.json", "stats.jsonl"}
    assert set_aside(tmp_path, 0) is None
    save(tmp_path, 1)
    assert set_aside(tmp_path, 0) == tmp_path / "earlier-2", "nothing that was set aside is replaced"


def test_a_move_that_is_cut_short_has_begun_with_the_newest_checkpoint(tmp_path, monkeypatch):
    """What is left is never taken for the newest of the run that resumes."""
    for step in (2, 4, 10):
        save(tmp_path, step)
    rename = Path.rename

    def once(path, target):
        monkeypatch.setattr(Path, "rename", killed)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(KeyboardInterrupt):
        set_aside(tmp_path, 0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_images_of_a_checkpoint_without_their_hashes_have_none(tmp_path):
    folder = tmp_path / "checkpoint-1"
    save_checkpoint(tmp_path, 1, {"step": 1, "fingerprint": {"images": ["a.png", "b.png"]}}, {})
    assert load_shared_state(folder)["fingerprint"]["images"] == {"a.png": None, "b.png": None}


def test_a_run_resumed_from_an_older_checkpoint_sets_the_later_ones_aside_only(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    (tmp_path / "stats.jsonl").write_text("")
    set_aside(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "earlier-1",
                                                          "stats.jsonl"}
    save(tmp_path, 5)
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"], "the run's own is kept"


def test_a_removal_that_was_cut_short_stops_no_later_one(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    leftover = tmp_path / ".checkpoint-1.removed"
    leftover.mkdir()
    (leftover / "rank_0.pt").write_text("left by a run that was killed here")
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("file", ["training_state.pt", "rank_0.pt"])
def test_damaged_files_are_refused(tmp_path, file):
    folder = save(tmp_path, 1)
    whole = (folder / file).read_bytes()
    for content in (b"", b"hello", whole[:len(whole) // 2], whole[:-1]):
        (folder / file).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read") as caught:
            load_shared_state(folder), load_rank_state(folder)
        assert str(folder) in str(caught.value)
    (folder / file).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_shared_state(folder), load_rank_state(folder)


def test_a_foreign_file_runs_no_code_and_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "evil"), "w")

    folder = save(tmp_path, 1)
    for content in (pickle.dumps(Evil()), pickle.dumps([1])):
        (folder / "training_state.pt").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            load_shared_state(folder)
    torch.save([1, 2], folder / "training_state.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load_shared_state(folder)
    assert not (tmp_path / "evil").exists()
