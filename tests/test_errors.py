"""A user's mistake is one line on stderr and exit code 1; ours is a traceback."""

import errno
import subprocess
import sys

import pytest

from szt_utils.errors import InputError, exit_on_input_error


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


@pytest.mark.parametrize("error",
                         [ValueError("ours"), KeyError("ours"), OSError("ours"),
                          OSError(errno.EPIPE, "ours")])
def test_our_own_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught:
        with exit_on_input_error():
            raise error
    assert caught.value is error


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
