"""Notices: what a run says once on stderr about how it understands its input."""

import functools
import os
import sys

from .errors import printable

__all__ = ["notice"]


@functools.cache
def notice(text: str) -> None:
    """Print a line on stderr, the same line once per process, in the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)
