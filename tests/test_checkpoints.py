"""Checkpoints: whole or absent, exact, found by name, and refused when damaged or of another run."""

import pytest
import torch

from szt_utils.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from szt_utils.errors import InputError

FINGERPRINT = {"placeholder_token": "<s>", "num_vectors": 1, "images": ["a.png", "b.png"]}


def save(folder, step, value=1.0, **options):
    common = {"step": step, "rows": torch.full((1, 4), value), "fingerprint": FINGERPRINT}
    save_checkpoint(folder, step, common, {"random": {"cpu": torch.get_rng_state()}}, **options)
    return folder / f"checkpoint-{step}"


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
        loaded, own = load_checkpoint(tmp_path / "checkpoint-3", FINGERPRINT, rank)
        assert torch.equal(loaded["rows"], common["rows"]) and own == {"who": rank}
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(tmp_path / "checkpoint-3", FINGERPRINT, 2)


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

    def killed():
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, 2.0, barrier=killed)
        assert list_checkpoints(tmp_path) == [folder]
        assert load_checkpoint(folder, FINGERPRINT)[0]["rows"].unique().item() == 1.0
    save(tmp_path, 1, 3.0)
    assert load_checkpoint(folder, FINGERPRINT)[0]["rows"].unique().item() == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("key, value",
                         [("placeholder_token", "<t>"), ("num_vectors", 2), ("images", ["a.png"]),
                                        ("batch", 4)])
def test_another_runs_checkpoint_is_refused_with_both_values(tmp_path, key, value):
    folder = save(tmp_path, 1)
    with pytest.raises(InputError, match="does not fit this run") as caught:
        load_checkpoint(folder, {**FINGERPRINT, key: value})
    assert f"{key} was {FINGERPRINT.get(key)!r} and is now {value!r}" in str(caught.value)


@pytest.mark.parametrize("file", ["training_state.pt", "rank_0.pt"])
def test_damaged_files_are_refused(tmp_path, file):
    folder = save(tmp_path, 1)
    whole = (folder / file).read_bytes()
    for content in (b"", b"hello", whole[:len(whole) // 2], whole[:-1]):
        (folder / file).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read") as caught:
            load_checkpoint(folder, FINGERPRINT)
        assert str(folder) in str(caught.value)
    (folder / file).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(folder, FINGERPRINT)


def test_a_foreign_file_runs_no_code_and_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "evil"), "w")

    folder = save(tmp_path, 1)
    for content in (pickle.dumps(Evil()), pickle.dumps([1])):
        (folder / "training_state.pt").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            load_checkpoint(folder, FINGERPRINT)
    torch.save([1, 2], folder / "training_state.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(folder, FINGERPRINT)
    assert not (tmp_path / "evil").exists()
