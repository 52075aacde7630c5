"""Atomic files, and statistics that survive a crash."""

import json
import math
import os

import pytest
import torch

from szt_utils.errors import InputError
from szt_utils.files import (
    MEGABYTES,
    append_stats,
    atomic_path,
    read_json,
    read_stats,
    read_text,
    truncate_stats,
    write_json,
    write_text,
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


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.txt", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, path.exists())))
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert synced == [(3, False)] and path.read_text() == "new"


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


def test_text_may_hold_the_bytes_of_any_file_name(tmp_path):
    write_text(tmp_path / "a.txt", os.fsdecode("\u00e4".encode() + b"\xff"))
    assert (tmp_path / "a.txt").read_bytes() == "\u00e4".encode() + b"\xff"


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


def test_read_text_whatever_the_bytes(tmp_path):
    path = tmp_path / "a.txt"
    text = "h\u00e4 \u2028\n\u00f6\nx"
    for content in (text.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + text.encode()):
        path.write_bytes(content)
        assert read_text(path) == text
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="The prompts file '.*a.txt' is not UTF-8 text; save it as UTF-8."):
        read_text(path, "prompts file")
    with pytest.raises(InputError, match="The file '.*none' does not exist."):
        read_text(tmp_path / "none")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)."):
        read_text(tmp_path)
    with path.open("wb") as file:
        file.truncate((MEGABYTES << 20) + 1)
    with pytest.raises(InputError, match="has more than 64 MB; give a smaller one."):
        read_text(path)


@pytest.mark.parametrize("text,reason", [
    ('{"a": 1, "b": {"c": 2, "c": 3}}', "'c' twice"), ("[NaN]", "NaN is not a finite number"),
    ("[-Infinity]", "-Infinity"), ("[1e999]", "1e999"), ("[" * 10**5, "nested too deeply"),
    ('{"a":' * 10**5, "nested too deeply"), ("9" * 5000, "5000 digits"), ("", "Expecting value")])
def test_read_json_refuses_what_is_not_standard(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=f"The points file '.*a.json' is not valid JSON .*{reason}"):
        read_json(tmp_path / "a.json", "points file")


def test_read_json_reads_what_write_json_writes(tmp_path):
    names = {"\u00e4\u732b": 1.5, os.fsdecode(b"\xff.png"): None}
    write_json(tmp_path / "a.json", names)
    assert read_json(tmp_path / "a.json") == names and (tmp_path / "a.json").read_bytes().isascii()
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + '{"\u00e4": 1}'.encode())
    assert read_json(tmp_path / "a.json") == {"\u00e4": 1}


@pytest.mark.parametrize("name", [b"a" * 240, "\u00e4".encode() * 127, b"\xff\xfe.json"])
def test_any_name_that_a_file_can_have(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    write_json(path, {"a": 1})
    assert os.listdir(os.fsencode(tmp_path)) == [name] and read_json(path) == {"a": 1}


def test_a_foreign_stats_file_is_no_error(tmp_path):
    path = tmp_path / "stats.jsonl"
    deep = b"[" * 10**5
    lines = [b'{"step": 1}', b"[1]", b"3", b"null", b'"a"', b"\xff\xfe", deep, b'{"step": "two"}',
             b'{"file": "a"}', b'{"step": 9}', b'{"step": null}', b'{"st']
    path.write_bytes(b"\n".join(lines))
    foreign = [{"step": "two"}, {"file": "a"}]
    assert read_stats(path) == [{"step": 1}, *foreign, {"step": 9}, {"step": None}]
    truncate_stats(path, 3)
    assert read_stats(path) == [{"step": 1}, *foreign, {"step": None}]
