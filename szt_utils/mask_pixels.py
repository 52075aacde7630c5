"""What a mask file of any tool marks: gray, labels, colors on black, or transparency, as black and white."""

import numpy as np
from PIL import Image

from .color import is_deep, to_eight_bits

__all__ = ["white_pixels"]

_WHITE = 128  # the darkest gray that counts as white
_DARK = 32  # levels below are black in the noise of a JPEG, and channels that differ by less are gray
_DRAWN = 0.9  # share of a drawing that has one of its two commonest levels; the rest are soft edges


def white_pixels(image: Image.Image) -> tuple[np.ndarray, str]:
    """Where a mask in its stored mode marks the concept, bool (H, W), and how it was understood, if it is not
    plainly black and white."""
    if is_deep(image):
        one = _one_value(np.asarray(image), 1 if image.mode == "F" else image.info.get("white", 65535))
        return one or (np.asarray(to_eight_bits(image)) >= _WHITE, "")
    if image.mode == "P" and image.convert("RGB").getextrema() == ((0, 0),) * 3:
        image = Image.fromarray(np.asarray(image))  # a palette without colors: its numbers are the labels
    alpha = None
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        alpha = np.asarray(layers.getchannel("A")) >= _WHITE
        opaque = np.bincount(np.asarray(layers)[alpha, :3].max(-1), minlength=256)  # before edges are soft
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), layers)
    image = image.convert("RGB")
    levels = np.asarray(image)
    brightest, range_ = levels.max(-1), levels.max(-1) - levels.min(-1)
    cut_out = alpha is not None and alpha.any() and not alpha.all()
    colored = range_.max() >= _DARK
    hard = image.getcolors(16) is not None
    if cut_out and (not opaque[1:].any() or not hard and (
            colored or np.sort(opaque)[-2:].sum() < _DRAWN * opaque.sum())):
        return alpha, "transparent surroundings; what is opaque is the concept"
    if not colored:
        return _one_value(brightest, 255) or (brightest >= _WHITE, "")
    if hard and not brightest.all():
        return brightest > 0, "colors on black; all that is not black is the concept"
    if (brightest < _DARK).mean() >= 0.01:
        return (brightest >= brightest.max() / 2,
                "colors on black; what is at least half as bright as the brightest is the concept")
    return (np.asarray(image.convert("L")) >= _WHITE,
            "colors, but no black; what is at least half as bright as white is the concept")


def _one_value(levels: np.ndarray, white: float) -> tuple[np.ndarray, str] | None:
    """Where numbers are not 0, when that is one dark value: labels, such as 0 and 1; None for others."""
    marked = levels != 0
    value = levels[marked][0] if marked.any() else 0
    if not 0 < value < white / 2 or (levels[marked] != value).any() or (marked.all() and value != 1):
        return None
    return marked, f"the values 0 and {value:g}, which count as black and white"
