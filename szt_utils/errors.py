"""Mistakes in a user's input: one clear sentence on stderr and exit code 1, never a traceback."""

import contextlib
import errno
import sys
from collections.abc import Iterator

__all__ = ["InputError", "exit_on_input_error"]


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names it
    and says what to do."""


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Print an InputError, or a file that cannot be read or written, as one line and exit with 1;
    Ctrl-C exits with 130."""
    try:
        yield
    except InputError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # no file of the user's is to blame
        sys.exit(f"error: {error.strerror}{f': {error.filename}' if error.filename else ''}.")
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(130)
