"""Atomic files, and statistics that survive a crash."""

import json
import math

import pytest
import torch

from szt_utils.files import (
    append_stats,
    atomic_path,
    read_stats,
    truncate_stats,
    write_json,
    write_torch,
)


def test_atomic_path_replaces_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("old", "new"):
        with atomic_path(path) as temporary:
            assert temporary.parent == tmp_path and temporary != path
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == content
    with pytest.raises(KeyError):
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyError
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_names_the_file_that_was_meant(tmp_path):
    for path in (tmp_path / "none" / "a.txt", tmp_path / "a.txt"):
        with pytest.raises(OSError) as caught:
            with atomic_path(path):
                raise OSError(28, "No space left on device")
        assert caught.value.filename == str(path)
    with pytest.raises(OSError) as caught:
        append_stats(tmp_path / "none" / "stats.jsonl", [{"step": 1}])
    assert caught.value.filename == str(tmp_path / "none" / "stats.jsonl")


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1, "path": tmp_path, "list": [1.5, None, True]})
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"a": 1, "path": str(tmp_path), "list": [1.5, None, True]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {(1, 2): 3})
    assert (tmp_path / "a.json").read_text() == text


def test_write_torch(tmp_path):
    content = {"rows": torch.rand(2, 3), "step": 4}
    write_torch(tmp_path / "a.pt", content)
    read = torch.load(tmp_path / "a.pt")
    assert torch.equal(read["rows"], content["rows"]) and read["step"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_stats_append_read_and_truncate(tmp_path):
    path = tmp_path / "stats.jsonl"
    truncate_stats(path, 3)
    assert not path.exists()
    records = [{"step": i, "loss": 1 / (i + 1), "lr": 1e-4} for i in range(6)]
    append_stats(path, records[:2])
    append_stats(path, records[2:])
    assert read_stats(path) == records and len(path.read_text().splitlines()) == 6
    truncate_stats(path, 3)
    assert read_stats(path) == records[:4]
    assert [p.name for p in tmp_path.iterdir()] == ["stats.jsonl"]


def test_a_line_that_a_crash_cut_short_is_ignored(tmp_path):
    path = tmp_path / "stats.jsonl"
    append_stats(path, [{"step": 1}, {"step": 2}])
    path.write_text(path.read_text()[:-4])
    assert read_stats(path) == [{"step": 1}]
    truncate_stats(path, 5)  # what a run does before it goes on
    append_stats(path, [{"step": 2, "loss": math.pi}])
    assert read_stats(path) == [{"step": 1}, {"step": 2, "loss": math.pi}]
