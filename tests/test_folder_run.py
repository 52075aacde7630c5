"""A resumable run over a folder: whose folder it is, what is missing, batches of one shape, records."""

import hashlib
import json

import pytest
import torch

from szt_utils.errors import InputError
from szt_utils.files import append_stats, read_stats, write_json
from szt_utils.folder_run import FolderRun, open_run, provenance, sha256_of

ARGUMENTS = {"method": "adm+", "eps": 16, "jpeg_quality": [25], "mask_dir": None}
SHAPES = {"a": (3, 8, 8), "b": (3, 8, 4), "c": (3, 8, 8), "d": (3, 8, 8)}


@pytest.fixture
def folder(tmp_path):
    """An output folder with one record."""
    folder = tmp_path / "out"
    folder.mkdir()
    write_json(folder / "options.json", {"script": "make.py", "arguments": ARGUMENTS, "versions": {}})
    append_stats(folder / "stats.jsonl", [{"file": "a.png", "sha256": "0"}])
    return folder


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_new_folder_has_no_records_and_is_not_made(tmp_path):
    assert open_run(tmp_path / "new" / "out", "make.py", ARGUMENTS) == []
    assert not (tmp_path / "new").exists()
    (tmp_path / ".DS_Store").touch()
    assert open_run(tmp_path, "make.py", ARGUMENTS) == []


def test_the_same_command_is_given_its_records(folder):
    before = contents(folder)
    assert open_run(folder, "make.py", ARGUMENTS) == [{"file": "a.png", "sha256": "0"}]
    fewer = {name: value for name, value in ARGUMENTS.items() if name != "mask_dir"}
    assert open_run(str(folder), "make.py", fewer) == [{"file": "a.png", "sha256": "0"}]
    assert contents(folder) == before
    (folder / "stats.jsonl").unlink()
    assert open_run(folder, "make.py", ARGUMENTS) == []


@pytest.mark.parametrize("changes, named", [
    ({"eps": 8}, "--eps;"), ({"eps": 8, "method": "ea"}, "--method, --eps;"),
    ({"jpeg_quality": [25, 50]}, "--jpeg_quality;"), ({"mask_dir": "masks"}, "--mask_dir;"),
    ({"seed": 0}, "--seed;")])
def test_other_arguments_are_refused_by_name(folder, changes, named):
    before = contents(folder)
    with pytest.raises(InputError, match=f"made with another {named} give another --output_dir"):
        open_run(folder, "make.py", ARGUMENTS | changes)
    assert contents(folder) == before


@pytest.mark.parametrize("options", [
    None, "[not json", "[]", "{}", '{"script": "make.py"}', '{"script": "other.py", "arguments": {}}'])
def test_files_that_the_script_did_not_write_are_refused(folder, options):
    (folder / "options.json").unlink()
    if options is not None:
        (folder / "options.json").write_text(options)
    before = contents(folder)
    with pytest.raises(InputError, match="holds files that this script did not write"):
        open_run(folder, "make.py", ARGUMENTS)
    assert contents(folder) == before


def test_an_output_folder_is_a_folder_outside_the_images(folder, tmp_path):
    for inside in (folder, folder / "out", folder / "other" / ".." / "out"):
        with pytest.raises(InputError, match="is --image_dir or lies in it"):
            open_run(inside, "make.py", ARGUMENTS, folder)
    assert len(open_run(folder, "make.py", ARGUMENTS, tmp_path / "images")) == 1
    with pytest.raises(InputError, match="is not a folder"):
        open_run(folder / "stats.jsonl", "make.py", ARGUMENTS)


def batches_of(run: FolderRun, batch_size: int = 1, changed: str = "") -> list[list[str]]:
    return run.batches("abcd", lambda job: f"{job}.png", lambda job: (
        f"hash of {job}" + " today" * (job == changed), SHAPES[job]), batch_size)


def made_by(run: FolderRun):
    """A `make` for `FolderRun.work` that writes files of the jobs' names."""
    def make(batch: list[str]) -> list[dict]:
        for job in batch:
            (run.folder / f"{job}.png").write_text(job)
        return [{"file": f"{job}.png", "sha256": f"hash of {job}"} for job in batch]
    return make


def test_a_run_does_everything_in_batches_of_one_shape(tmp_path, capsys):
    run = FolderRun(tmp_path / "out", "make.py", ARGUMENTS, tmp_path / "images")
    batches = batches_of(run, batch_size=2)
    assert batches == [["a", "c"], ["d"], ["b"]]
    assert capsys.readouterr().out == f"4 images in '{tmp_path / 'images'}', 4 of them to do.\n"
    assert not run.folder.exists()
    run.begin(t_min=500)
    options = json.loads((run.folder / "options.json").read_text())
    assert list(options) == ["script", "arguments", "t_min", "versions", "commit"]
    assert options["script"] == "make.py" and options["arguments"] == ARGUMENTS and options["t_min"] == 500
    run.work(batches, made_by(run))
    records = read_stats(run.folder / "stats.jsonl")
    assert [record["file"] for record in records] == ["a.png", "c.png", "d.png", "b.png"]
    assert all(list(record) == ["file", "sha256", "seconds"] and record["seconds"] >= 0 for record in records)
    assert run.records == records and run.finished.keys() == {"a.png", "b.png", "c.png", "d.png"}


def test_a_resumed_run_does_what_is_missing_changed_or_not_recorded(tmp_path, capsys):
    run = FolderRun(tmp_path / "out", "make.py", ARGUMENTS)
    run.begin()
    run.work(batches_of(run), made_by(run))

    def resumed(changed: str = "") -> list[list[str]]:
        return batches_of(FolderRun(tmp_path / "out", "make.py", ARGUMENTS), 4, changed)

    assert resumed() == [] and "4 images" in (told := capsys.readouterr().out) and "0 of them" in told
    (tmp_path / "out" / "b.png").unlink()
    assert resumed() == [["b"]]
    assert resumed(changed="c") == [["b"], ["c"]]
    lines = (tmp_path / "out" / "stats.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "stats.jsonl").write_text("".join(lines[:2]) + lines[2][:9])  # a crash
    assert resumed() == [["b"], ["d"]]


def test_a_failed_batch_keeps_the_records_before_it(tmp_path):
    run = FolderRun(tmp_path / "out", "make.py", ARGUMENTS)
    run.begin()
    make = made_by(run)

    def make_until_d(batch: list[str]) -> list[dict]:
        if batch == ["d"]:
            raise InputError("no")
        return make(batch)

    with pytest.raises(InputError):
        run.work(batches_of(run), make_until_d)
    assert [record["file"] for record in read_stats(run.folder / "stats.jsonl")] == ["a.png", "c.png"]


def test_a_file_that_cannot_be_used_stops_the_run_before_any_work(tmp_path):
    run, read = FolderRun(tmp_path / "out", "make.py", ARGUMENTS), []

    def broken(job: str) -> tuple[str, tuple[int, ...]]:
        read.append(job)
        if job == "d":
            raise InputError("d.png cannot be read.")
        return job, SHAPES[job]

    with pytest.raises(InputError, match="d.png"):
        run.batches("abcd", str, broken)
    assert read == list("abcd") and not run.folder.exists()


def test_hashes_are_those_of_the_bytes():
    a, b = torch.rand(1, 3, 4, 5), torch.ones(1, 1, 4, 5)
    assert sha256_of(a, None, b) == hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).hexdigest()
    assert sha256_of(a.transpose(2, 3).contiguous().transpose(2, 3)) == sha256_of(a) != sha256_of(a * 2)


def test_provenance_holds_the_running_versions():
    found = provenance()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"diffusers", "transformers", "accelerate", "pillow", "numpy"} <= set(found["versions"])
    assert found["commit"] is None or len(found["commit"]) == 40
    json.dumps(found)
