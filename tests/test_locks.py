"""Locks of output folders, and the leftovers of killed commands."""

import os
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT

from szt_utils import locks
from szt_utils.errors import InputError
from szt_utils.locks import lock_folder, sweep_leftovers


def test_a_second_command_is_refused_while_the_first_works(tmp_path):
    for _ in range(2):  # and again when the first has ended
        with lock_folder(tmp_path / "out"):
            # Versions of filelock before 4 empty the file with the process's number.
            for process in (rf" \(process {os.getpid()}\)", ".*"):
                with (pytest.raises(InputError, match=f"out' is in use by another command{process}; wait"),
                      lock_folder(tmp_path / "out")):
                    pass
    with lock_folder(tmp_path / "out"):
        (tmp_path / "out" / ".lock").write_text("no number")
        with pytest.raises(InputError, match="another command; wait"), lock_folder(tmp_path / "out"):
            pass
    with lock_folder(tmp_path / "one"), lock_folder(tmp_path / "two"):
        pass


def test_a_folder_that_stays_empty_is_removed_and_no_other(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError), lock_folder(tmp_path / "there" / "a" / "b"):
        assert (tmp_path / "there" / "a" / "b" / ".lock").exists()
        raise RuntimeError
    assert list((tmp_path / "there").iterdir()) == []
    with lock_folder(tmp_path / "there"):
        pass
    with lock_folder(tmp_path / "there" / "a" / "b"):
        (tmp_path / "there" / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "there" / "a" / "b").iterdir()] == ["result"]


def test_the_lock_of_a_killed_command_is_free(tmp_path):
    code = ("import os, sys\nfrom szt_utils.locks import lock_folder\n"
            "with lock_folder(sys.argv[1]):\n    print('locked', flush=True)\n    sys.stdin.read()\n")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "locked\n"
        with (pytest.raises(InputError, match=rf"\(process {process.pid}\)"),
              lock_folder(tmp_path / "out")):
            pass
        process.kill()
    assert (tmp_path / "out" / ".lock").exists()
    with lock_folder(tmp_path / "out"):
        pass
    assert not (tmp_path / "out" / ".lock").exists()


@pytest.mark.parametrize("error", [PermissionError("read-only"), OSError(37, "No locks available"),
                                   NotImplementedError("no flock")])
def test_where_nothing_can_be_locked_the_command_works_without(tmp_path, monkeypatch, error):
    class Unlockable(locks.FileLock):
        def _acquire(self):
            raise error

    monkeypatch.setattr(locks, "FileLock", Unlockable)
    with lock_folder(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
    (tmp_path / "file").touch()
    for _ in range(2):
        with lock_folder(tmp_path / "file"), lock_folder(tmp_path / "file" / "below"):
            pass  # whoever writes there says what is wrong
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lock_folder(tmp_path / "odd"):
            pass
    assert (tmp_path / "odd" / ".lock").is_dir()


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    kept = ["a.png", "checkpoint-5", "notes.part", "old.removed", ".hidden", ".lock", "sub"]
    swept = [".latents-ab12", ".a.png.77.part", ".01ab.77.part", ".checkpoint-5.part",
             ".checkpoint-5.removed"]
    for folder in (tmp_path, tmp_path / "sub"):
        folder.mkdir(exist_ok=True)
        for name in [*kept, *swept]:
            if "checkpoint" in name:
                (folder / name / "deep").mkdir(parents=True)
                (folder / name / "deep" / ".x.part").touch()
            elif name != "sub":
                (folder / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".link.part").symlink_to(tmp_path / "elsewhere")
    sweep_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "elsewhere"}
    assert {path.name for path in (tmp_path / "sub").iterdir()} == {*kept, *swept} - {"sub"}
    sweep_leftovers(tmp_path, recursive=True)
    assert {path.name for path in (tmp_path / "sub").iterdir()} == set(kept) - {"sub"}
    sweep_leftovers(tmp_path / "missing")
