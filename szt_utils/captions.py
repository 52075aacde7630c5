"""Training captions: the template lists of Textual Inversion (Gal et al. 2022),
in the order upstream draws them."""

from .errors import InputError

__all__ = ["OBJECT_TEMPLATES", "STYLE_TEMPLATES", "templates_for"]

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
    """The 27 templates for an "object" or the 19 for a "style"; each has one `{}` for the placeholder."""
    templates = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}
    if learnable_property not in templates:
        raise InputError(f"Unknown learnable property '{learnable_property}'; "
                         f"choose from: {', '.join(templates)}.")
    return templates[learnable_property]
