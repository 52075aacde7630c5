"""A resumable run over a folder: whose folder it is, what is missing, batches of one shape, records."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from szt_utils import folder_run
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
    # A folder of an earlier version, in which a path kept the slash that a shell adds.
    arguments = ARGUMENTS | {"mask_dir": "masks/"}
    write_json(folder / "options.json", {"script": "make.py", "arguments": arguments})
    assert open_run(folder, "make.py", ARGUMENTS | {"mask_dir": "masks"}) == []


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
    None, "[not json", "[]", "{}", '{"script": "make.py"}', '{"script": "other.py", "arguments": {}}',
    '{"script": "make.py", "arguments": 3}', '{"script": "make.py", "arguments": null}', "[" * 100_000])
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


def run_in(tmp_path, image_dir=None) -> FolderRun:
    return FolderRun(tmp_path / "out", "make.py", ARGUMENTS, image_dir)


def batches_of(run: FolderRun, batch_size: int = 1, changed: str = "") -> list[list[str]]:
    return run.batches("abcd", lambda job: f"{job}.png", lambda job: (
        f"hash of {job}" + " today" * (job == changed), SHAPES[job]), batch_size)


def make(batch: list[str], today: str = "") -> list[tuple[dict, Image.Image]]:
    """A `make` for `FolderRun.work`: images of one color."""
    return [({"file": f"{job}.png", "sha256": f"hash of {job}{today}"},
             Image.new("RGB", (4, 4), (ord(job), len(today), 0))) for job in batch]


def do_all(tmp_path) -> None:
    with run_in(tmp_path) as run:
        run.begin()
        run.work(batches_of(run), make, Path)


def to_do(tmp_path, changed: str = "") -> str:
    with run_in(tmp_path) as run:
        return "".join(job for batch in batches_of(run, changed=changed) for job in batch)


def test_a_run_does_everything_in_batches_of_one_shape(tmp_path, capsys):
    with run_in(tmp_path, tmp_path / "images") as run:
        batches = batches_of(run, batch_size=2)
        assert batches == [["a", "c"], ["d"], ["b"]]
        assert capsys.readouterr().out == f"4 images in '{tmp_path / 'images'}', 4 of them to do.\n"
        assert [path.name for path in run.folder.iterdir()] == [".lock"]
        run.begin(t_min=500)
        options = json.loads((run.folder / "options.json").read_text())
        assert list(options) == ["script", "arguments", "t_min", "versions", "commit"]
        assert options["script"] == "make.py" and options["arguments"] == ARGUMENTS
        assert options["t_min"] == 500
        run.work(batches, make, Path)
    records = read_stats(run.folder / "stats.jsonl")
    assert [record["file"] for record in records] == ["a.png", "c.png", "d.png", "b.png"]
    for record in records:
        assert list(record) == ["file", "sha256", "seconds", "outputs"] and record["seconds"] >= 0
        content = (run.folder / record["file"]).read_bytes()
        assert record["outputs"] == {record["file"]: hashlib.sha256(content).hexdigest()}
    assert run.records == records and run.latest.keys() == {"a.png", "b.png", "c.png", "d.png"}


def test_a_resumed_run_does_what_is_missing_changed_or_not_recorded(tmp_path, capsys):
    do_all(tmp_path)
    capsys.readouterr()
    assert to_do(tmp_path) == "" and capsys.readouterr().out == "4 images, 0 of them to do.\n"
    (tmp_path / "out" / "b.png").unlink()
    assert to_do(tmp_path) == "b"
    assert to_do(tmp_path, changed="c") == "bc"
    lines = (tmp_path / "out" / "stats.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "stats.jsonl").write_text("".join(lines[:2]) + lines[2][:9])  # a crash
    assert to_do(tmp_path) == "bd"


def test_a_result_that_was_changed_by_hand_is_kept_and_named(tmp_path, capsys):
    do_all(tmp_path)
    for name in ("b.png", "c.png"):
        Image.new("RGB", (4, 4), "white").save(tmp_path / "out" / name)
    edited = (tmp_path / "out" / "b.png").read_bytes()
    for changed in ("", "b"):  # whether or not the image has changed, too
        capsys.readouterr()
        assert to_do(tmp_path, changed) == ""
        assert capsys.readouterr().out == (
            "4 images, 0 of them to do.\nResults made or changed by hand are kept (2): b.png, c.png; "
            "delete them to make them again.\n")
    assert (tmp_path / "out" / "b.png").read_bytes() == edited
    (tmp_path / "out" / "b.png").unlink()
    assert to_do(tmp_path) == "b"


@pytest.mark.parametrize("keeps", [False, True])
def test_a_file_without_a_record_is_kept_where_people_make_results_too(tmp_path, capsys, keeps):
    do_all(tmp_path)
    (tmp_path / "out" / "stats.jsonl").unlink()
    for name in ("a.png", "b.png"):
        (tmp_path / "out" / name).unlink()
    run = run_in(tmp_path)
    run.keeps_unrecorded = keeps
    with run:
        assert batches_of(run) == ([["a"], ["b"]] if keeps else [["a"], ["c"], ["d"], ["b"]])
    assert ("kept (2): c.png, d.png" in capsys.readouterr().out) == keeps


def test_a_folder_of_version_0_1_is_continued(folder, capsys):
    """Its records have no hash of the results, which count as untouched."""
    (folder / "a.png").write_text("as it was, or not")
    run = FolderRun(folder, "make.py", ARGUMENTS)
    with run:
        assert run.missing("a", lambda job: ["a.png"], lambda job, record: record["sha256"] == "0") == []
        assert run.missing("a", lambda job: ["a.png"], lambda job, record: record["sha256"] == "1") == ["a"]
        run.save_image({"file": "a.png", "sha256": "1"}, Image.new("L", (2, 2)))
        assert run.find("a.png") == (run.records[-1], False)
        (folder / "a.png").write_text("now it is known to be another")
        assert run.find("a.png") == (None, True)


def test_a_kill_between_a_record_and_its_file_makes_the_result_again(tmp_path, monkeypatch):
    def killed(path, content):
        raise KeyboardInterrupt

    do_all(tmp_path)
    before = (tmp_path / "out" / "b.png").read_bytes()
    with monkeypatch.context() as patch, run_in(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder_run, "write_bytes", killed)
        run.work([["b"]], lambda batch: make(batch, " today"), Path)
    assert (tmp_path / "out" / "b.png").read_bytes() == before  # of the earlier record, and no hand's work
    assert to_do(tmp_path, changed="b") == "b" and to_do(tmp_path) == ""


def test_two_runs_in_one_folder_are_refused_and_leftovers_swept(tmp_path):
    do_all(tmp_path)
    (tmp_path / "out" / "sub").mkdir()
    (tmp_path / "out" / "sub" / ".x.png.99.part").touch()
    with run_in(tmp_path):
        assert not list((tmp_path / "out" / "sub").iterdir())
        with pytest.raises(InputError, match="in use by another command"), run_in(tmp_path):
            pass
    assert to_do(tmp_path) == ""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / ".x.png.99.part").touch()
    (tmp_path / "foreign" / "x.png").touch()
    with pytest.raises(InputError), FolderRun(tmp_path / "foreign", "make.py", ARGUMENTS):
        pass
    assert len(list((tmp_path / "foreign").iterdir())) == 2  # a refused command removes nothing


@pytest.mark.parametrize("line", [
    "7", "null", "[]", '{"file": 7}', '{"file": ["a.png"], "sha256": {}}', '{"file": null, "outputs": 3}',
    '{"file": "a.png", "outputs": []}', '{"file": "a.png", "outputs": {"a.png": ["x"]}}', '{"sha256": 1}',
    '{"file": "a\\u0000.png"}', '{"outputs": {"a.png": null, "": 1}}', '{"file": "' + "a" * 5000 + '"}', "{",
    "\udcff"])
def test_foreign_records_are_no_obstacle(tmp_path, line):
    do_all(tmp_path)
    stats = tmp_path / "out" / "stats.jsonl"
    stats.write_bytes(stats.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    assert to_do(tmp_path) in ("", "a")
    stats.write_bytes(line.encode("utf-8", "surrogateescape") + b"\n")
    assert to_do(tmp_path).endswith("bcd") or to_do(tmp_path) == "acdb"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_image_that_fails_stops_no_other(tmp_path, batch_size):
    def make_but_c(batch: list[str]) -> list[tuple[dict, Image.Image]]:
        if "c" in batch:
            raise InputError("Not wanted.")
        return make(batch)

    with run_in(tmp_path) as run:
        run.begin()
        with pytest.raises(InputError, match="^'c': Not wanted.$"):
            run.work(batches_of(run, batch_size), make_but_c, Path)
    assert [record["file"] for record in read_stats(run.folder / "stats.jsonl")] == [
        "a.png", "d.png", "b.png"]


def test_images_that_fail_stop_neither_others_nor_later_runs(tmp_path):
    tried, reason = [], "{} is not wanted."

    def make_b(batch: list[str]) -> list[tuple[dict, Image.Image]]:
        tried.extend(batch)
        if batch == ["b"]:
            return make(batch)
        raise InputError(reason.format(*batch))

    for expected, attempted in (("'a': a is not wanted. 'c': c is not wanted. 'd': d is not wanted.", "acdb"),
                                ("'a', 'c', 'd': Not wanted.", "acd")):  # there is a result: it is the images
        with run_in(tmp_path) as run:
            run.begin()
            with pytest.raises(InputError, match=f"^{expected}$"):
                run.work(batches_of(run), make_b, Path)
        assert "".join(tried) == attempted
        tried, reason = [], "Not wanted."


@pytest.mark.parametrize("has_results, first", [(True, "Not wanted."), (False, "Damaged.")])
def test_a_run_goes_on_where_the_images_are_to_blame(tmp_path, has_results, first):
    """That is, where there are results, or where not all have failed for one reason."""
    if has_results:
        do_all(tmp_path)
    tried = []

    def fail(batch: list[str]) -> list[tuple[dict, Image.Image]]:
        tried.extend(batch)
        raise InputError(first if batch == ["e"] else "Not wanted.")

    with run_in(tmp_path) as run, pytest.raises(InputError) as caught:
        run.work([["e"], ["f"], ["g"], ["h"], ["i"]], fail, Path)
    assert "".join(tried) == "efghi" and "not tried" not in str(caught.value)


def test_the_seconds_of_a_record_are_those_of_one_image(tmp_path, monkeypatch):
    clock = iter(range(0, 100, 8))
    monkeypatch.setattr(folder_run.time, "perf_counter", lambda: next(clock))
    with run_in(tmp_path) as run:
        run.begin()
        run.work([["a", "c"], ["d"]], make, Path)
    assert [record["seconds"] for record in run.records] == [4, 4, 8]


def test_a_run_ends_when_no_image_can_be_made_and_its_settings_may_change(tmp_path):
    tried = []

    def fail(batch: list[str]) -> list[tuple[dict, Image.Image]]:
        tried.append(batch)
        raise InputError("Give other steps.")

    with run_in(tmp_path) as run:
        run.begin()
        with pytest.raises(InputError, match=r"^'a', 'c', 'd': Give other steps. "
                           r"The other images were not tried \(1\).$"):
            run.work(batches_of(run), fail, Path)
    assert tried == [["a"], ["c"], ["d"]]
    with FolderRun(tmp_path / "out", "make.py", ARGUMENTS | {"eps": 1}) as run:
        run.begin()
        run.work(batches_of(run), make, Path)
    with pytest.raises(InputError, match="another --eps"):
        run_in(tmp_path).__enter__()


def test_results_of_images_that_are_gone_are_named(tmp_path, capsys):
    with run_in(tmp_path) as run:
        run.begin()
        run.work(batches_of(run), lambda batch: [({**record, "source": "of an image"}, image)
                                                 for record, image in make(batch)], Path)
    with run_in(tmp_path) as run:
        run.batches("ab", lambda job: f"{job}.png", lambda job: (f"hash of {job}", SHAPES[job]))
    assert "no longer there are kept (2): c.png, d.png." in capsys.readouterr().out
    do_all(tmp_path / "drawn")  # of no image
    with run_in(tmp_path / "drawn") as run:
        run.batches("ab", lambda job: f"{job}.png", lambda job: (f"hash of {job}", SHAPES[job]))
    assert "no longer there" not in capsys.readouterr().out


def test_a_file_that_cannot_be_used_stops_the_run_before_any_work(tmp_path):
    read = []

    def broken(job: str) -> tuple[str, tuple[int, ...]]:
        read.append(job)
        if job == "d":
            raise InputError("d.png cannot be read.")
        return job, SHAPES[job]

    with pytest.raises(InputError, match="d.png"), run_in(tmp_path) as run:
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
