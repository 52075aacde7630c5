"""Prompt templates: the training captions of Textual Inversion (Gal et al. 2022), and prompts of evaluate.py.

The captions are in upstream's order, because its random draw is an index. Every template has one `{}`, for
the concept.
"""

from pathlib import Path

from .errors import InputError, check_choice
from .files import read_text

__all__ = ["EVALUATION_PROMPTS", "OBJECT_TEMPLATES", "STYLE_TEMPLATES", "read_prompt_templates",
           "templates_for"]

# Six places, six surfaces, six lights and weathers, six compositions.
EVALUATION_PROMPTS = (
    "a {} in a pine forest", "a {} at the foot of a waterfall", "a {} in a narrow old street",
    "a {} in front of a lighthouse", "a {} in a greenhouse full of ferns", "a {} on a railway platform",
    "a {} on a wooden kitchen table", "a {} on a bed of autumn leaves", "a {} on a pebble shore",
    "a {} on a knitted blanket", "a {} on a stack of books", "a {} on wet black asphalt",
    "a {} in thick morning fog", "a {} under a starry sky", "a {} in falling snow",
    "a {} lit by a single candle", "a {} against the setting sun", "a {} behind a window with raindrops",
    "a {} seen from above", "a close view of a {} against a blurred meadow", "a {} beside a bowl of lemons",
    "a {} between two sleeping cats", "a tiny {} on an open palm", "a {} reflected in a still pond",
)

OBJECT_TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}",
    "a photo of a clean {}", "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}",
    "a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}",
    "a cropped photo of a {}", "a photo of the {}", "a good photo of the {}", "a photo of one {}",
    "a close-up photo of the {}", "a rendition of the {}", "a photo of the clean {}", "a rendition of a {}",
    "a photo of a nice {}", "a good photo of a {}", "a photo of the nice {}", "a photo of the small {}",
    "a photo of the weird {}", "a photo of the large {}", "a photo of a cool {}", "a photo of a small {}",
)

STYLE_TEMPLATES = tuple(f"{text} in the style of {{}}" for text in (
    "a painting", "a rendering", "a cropped painting", "the painting", "a clean painting", "a dirty painting",
    "a dark painting", "a picture", "a cool painting", "a close-up painting", "a bright painting",
    "a cropped painting", "a good painting", "a close-up painting", "a rendition", "a nice painting",
    "a small painting", "a weird painting", "a large painting",
))


def templates_for(learnable_property: str) -> tuple[str, ...]:
    """The 27 caption templates of an "object" or the 19 of a "style"; InputError for another property."""
    templates = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}
    check_choice("learnable property", learnable_property, templates)
    return templates[learnable_property]


def read_prompt_templates(path: str | Path) -> list[str]:
    """Read a prompts file, one template a line; empty lines and lines that start with # are ignored.

    `{0} {1}`, token and class word in DreamBooth's list, counts as `{}`. InputError names a line without it.
    """
    prompts = []
    for i, line in enumerate(read_text(path, "prompts file").splitlines(), 1):
        prompt = line.strip().replace("{0} {1}", "{}")
        if not prompt or prompt.startswith("#"):
            continue
        if prompt.count("{}") != 1 or prompt.count("{") + prompt.count("}") != 2:
            raise InputError(f"Line {i} of the prompts file '{path}' must hold one {{}} "
                             f"where the concept goes: {prompt}")
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"The prompts file '{path}' holds no prompt.")
    return prompts
