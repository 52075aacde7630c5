"""Every error is one line on stderr and exit code 1; an unexpected one is a traceback on demand."""

import errno
import subprocess
import sys

import pytest
import torch

from szt_utils.errors import InputError, exit_on_input_error, printable


def leaves_with(error) -> SystemExit:
    with pytest.raises(SystemExit) as caught:
        with exit_on_input_error():
            raise error
    return caught.value


def test_an_input_error_is_one_line_whatever_its_text():
    assert leaves_with(InputError("The file 'a'\n  is bad.\n")).code == "error: The file 'a' is bad."
    assert issubclass(InputError, ValueError)


def test_a_full_disk_and_an_unreadable_file_are_the_users():
    full = OSError(errno.ENOSPC, "No space left on device")
    assert leaves_with(full).code == "error: No space left on device."
    denied = PermissionError(errno.EACCES, "Permission denied", "/a/b.json")
    assert leaves_with(denied).code == "error: Permission denied: /a/b.json."


@pytest.mark.parametrize("error,message", [
    (ValueError("ours\nand more"),
     "error: unexpected ValueError: ours (Run the same command with --traceback for the details.)"),
    (KeyError("ours"), "error: unexpected KeyError: 'ours' (Run"),
    (RecursionError(), "error: unexpected RecursionError: RecursionError (Run"),
    (OSError("ours"), "error: unexpected OSError: ours (Run"),
    (MemoryError(), "error: The memory is not enough; lower the batch size,"),
    (torch.OutOfMemoryError("CUDA out of memory."), "error: The memory is not enough"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: The memory is not enough")])
def test_an_unexpected_error_is_a_sentence_too_and_a_traceback_on_demand(error, message, monkeypatch):
    monkeypatch.delenv("SZT_TRACEBACK", raising=False)
    assert leaves_with(error).code.startswith(message)
    monkeypatch.setenv("SZT_TRACEBACK", "1")
    with pytest.raises(type(error)) as caught:
        with exit_on_input_error():
            raise error
    assert caught.value is error


def test_a_name_cannot_steer_the_terminal():
    assert printable("a\x1b[31m\x07\n\x9b\u202e\udcff b\u00e4") == (
        "a\\x1b[31m\\x07\\n\\x9b\\u202e\\udcff b\u00e4")
    assert leaves_with(InputError("'a\x1b[2J' is bad.")).code == "error: 'a\\x1b[2J' is bad."
    missing = FileNotFoundError(errno.ENOENT, "No such file", "\x1b]0;a\x07")
    assert leaves_with(missing).code == "error: No such file: \\x1b]0;a\\x07."


def test_an_interruption_exits_with_130(capsys):
    assert leaves_with(KeyboardInterrupt()).code == 130
    assert capsys.readouterr().err == "interrupted.\n"


def test_nothing_happens_without_an_error():
    with exit_on_input_error():
        pass


def test_in_a_real_process():
    code = "from szt_utils.errors import *\nwith exit_on_input_error():\n    raise InputError('a\\nb')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: a b\n")
