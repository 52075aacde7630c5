"""Numbers on a command line: argparse types that refuse what is out of range in one sentence."""

import argparse
import math
from collections.abc import Callable

__all__ = ["number"]


def number(kind: type, lowest: float, highest: float | None = None, *, above: bool = False,
           unit: str = "") -> Callable[[str], float]:
    """An argparse type: a finite `int` or `float` from `lowest`, or with `above` from above it, up to
    `highest`; `unit` says what is counted, as in " of 1/255 levels"."""
    def convert(text: str) -> float:
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a {'whole ' * (kind is int)}number{unit}") from None
        if value < lowest or (above and value == lowest) or (highest is not None and value > highest):
            least = f"above {lowest:g}" if above else f"at least {lowest:g}"
            most = "" if highest is None else f" and at most {highest:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {least}{most}")
        return value
    return convert
