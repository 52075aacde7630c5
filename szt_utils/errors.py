"""Mistakes in a user's input: one clear sentence on stderr and exit code 1, never a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

__all__ = ["InputError", "check_choice", "exit_on_input_error", "file_error", "first_line", "printable",
           "some_of"]


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names it
    and says what to do."""


def printable(text: object) -> str:
    """The text with escapes for what is not printable, so that a file's name cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def some_of(names: Sequence[str | Path], most: int = 3) -> str:
    """The names, of paths the last parts, as one printable text: the first `most`, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = [printable(name.name if isinstance(name, Path) else name) for name in names[:most]]
    return f"{', '.join(shown)}{more}"


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raise InputError, which lists the `choices`, for a value that is none of them."""
    if value not in (choices := tuple(choices)):
        raise InputError(f"Unknown {what} '{value}'; choose from: {', '.join(choices)}.")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def file_error(error: OSError) -> str:
    """What the system says of a file that cannot be read or written, with the file's name when it has one."""
    return f"{error.strerror}{f': {error.filename}' if error.filename else ''}."


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Print an error as one line and exit with 1; Ctrl-C exits with 130.

    An error that is neither an InputError nor that of a file or of the memory keeps its traceback when the
    environment variable SZT_TRACEBACK is set, which the flag --traceback of every script does.
    """
    try:
        yield
    except InputError as error:
        _leave(str(error))
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
            _leave(file_error(error))
        if os.environ.get("SZT_TRACEBACK"):
            raise
        if _out_of_memory(error):
            _leave("The memory is not enough; lower the batch size, --resolution or the size of the images.")
        _leave(f"unexpected {type(error).__name__}: {first_line(error)} (Run the same command with "
               "--traceback for the details.)")


def _leave(message: str) -> None:
    sys.exit(f"error: {printable(' '.join(message.split()))}")


def _out_of_memory(error: Exception) -> bool:
    """Whether Python, torch or CUDA found no memory; torch's own types are not imported here."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error) or "out of memory" in str(error))
