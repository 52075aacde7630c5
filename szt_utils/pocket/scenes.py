"""The pocket world: scenes drawn by code, each with its caption, attributes and exact concept mask.

A scene is one object (shape x color x pattern) with shading and a soft shadow on a textured background. Both
have a fine grain, which like the texture of photographs keeps JPEG from removing perturbations. An integer
seed decides everything. The novel concepts, ten combinations of attributes, never occur among the training
scenes.
"""

from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..errors import InputError

__all__ = [
    "BACKGROUNDS", "COLORS", "NOVEL_CONCEPTS", "PATTERNS", "SHAPES", "SIZE",
    "Attributes", "Scene", "attributes_of", "caption", "concept_scenes", "draw_scene", "training_attributes",
]

SIZE = 128  # pixels
_OVERSAMPLING = 4  # outlines are drawn this much larger, then averaged, for soft edges

COLORS = {
    "red": (206, 32, 40), "orange": (244, 128, 20), "yellow": (248, 214, 40), "lime": (156, 216, 48),
    "green": (24, 128, 56), "teal": (16, 160, 164), "blue": (36, 84, 224), "purple": (124, 52, 190),
    "pink": (244, 124, 184), "brown": (120, 72, 36), "black": (34, 34, 40), "cyan": (96, 222, 242),
}
_LIGHT_TONE, _DARK_TONE = (250, 244, 226), (56, 56, 72)
_DARK_TONED = ("yellow", "lime", "cyan")  # a light second tone would vanish on these
PATTERNS = ("plain", "striped", "dotted", "checkered")


def _ngon(radii, start=90.0):
    """Corners at equal angles and the given radii, from `start` degrees; y points up."""
    angles = np.deg2rad(start + np.arange(len(radii)) * 360 / len(radii))
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _outline(radius_of_angle):
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return np.stack([radius_of_angle(angles) * np.cos(angles),
                     radius_of_angle(angles) * np.sin(angles)], axis=1)


def _heart():
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, y + 2], axis=1) / 16


def _crescent():
    outer = np.linspace(np.deg2rad(55), np.deg2rad(305), 64)
    tip = np.stack([np.cos(outer[[0, -1]]), np.sin(outer[[0, -1]])], axis=1)
    center = np.array([0.52, 0.0])
    inner_radius = np.linalg.norm(tip[0] - center)
    start, stop = (np.arctan2(*(tip[i] - center)[::-1]) % (2 * np.pi) for i in (1, 0))
    inner = np.linspace(start, stop, 48)
    inside = center + inner_radius * np.stack([np.cos(inner), np.sin(inner)], axis=1)
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), inside]) + [0.15, 0]


# Outlines within the unit disc, y up. A shape is one polygon; the ring's second polygon is its hole.
SHAPES = {
    "circle": (_outline(lambda a: 0.86 + 0 * a),),
    "square": (_ngon(np.full(4, 1.0), 45),),
    "triangle": (_ngon(np.full(3, 1.05)) - [0, 0.12],),
    "star": (_ngon(np.tile([1.08, 0.46], 5)),),
    "heart": (_heart(),),
    "cross": (np.array([(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1),
                        (-3, 1), (-1, 1), (-1, 3)]) * 0.31,),
    "ring": (_outline(lambda a: 0.95 + 0 * a), _outline(lambda a: 0.46 + 0 * a)),
    "crescent": (_crescent(),),
    "arrow": (np.array([(1.05, 0), (0.15, 0.85), (0.15, 0.36), (-0.95, 0.36), (-0.95, -0.36), (0.15, -0.36),
                        (0.15, -0.85)]),),
    "flower": (_outline(lambda a: 0.74 + 0.26 * np.cos(6 * a)),),
    "hourglass": (np.array([(-0.8, 0.95), (0.8, 0.95), (0.16, 0), (0.8, -0.95), (-0.8, -0.95), (-0.16, 0)]),),
    "house": (np.array([(0, 1.05), (1.0, 0.2), (0.68, 0.2), (0.68, -0.8), (-0.68, -0.8),
                        (-0.68, 0.2), (-1.0, 0.2)]),),
}


def _noise(rng, cells_y, cells_x):
    """Smooth noise in [0, 1] with about the given number of bumps down and across."""
    grid = Image.fromarray((rng.random((cells_y, cells_x)) * 255).astype(np.uint8))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 255


def _blend(low, high, weight):
    return (np.asarray(low, np.float32)
            + (np.asarray(high, np.float32) - np.asarray(low, np.float32)) * weight[..., None])


_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def _grass(rng):
    return _blend((54, 104, 34), (122, 172, 66), 0.6 * _noise(rng, 14, 40) + 0.4 * _noise(rng, 5, 5))


def _sand(rng):
    ripple = 0.5 + 0.5 * np.sin((_Y + 9 * _noise(rng, 3, 4)) * 2 * np.pi / 18)
    return _blend((206, 174, 120), (236, 212, 164), 0.6 * ripple + 0.4 * _noise(rng, 28, 28))


def _water(rng):
    wave = 0.5 + 0.5 * np.sin((_Y + 16 * _noise(rng, 5, 6)) * 2 * np.pi / 14)
    return _blend((22, 74, 132), (92, 160, 204), 0.7 * wave**2 + 0.3 * _noise(rng, 12, 6))


def _brick(rng):
    y = _Y + rng.uniform(0, 40)
    x = _X + rng.uniform(0, 40) + 20 * (y // 20 % 2)  # every second row is shifted by half a brick
    mortar = ((y % 20 < 3) | (x % 40 < 3)).astype(np.float32)
    return _blend(_blend((150, 66, 48), (184, 92, 68), _noise(rng, 8, 5)), (206, 194, 180), mortar)


def _wood(rng):
    grain = 0.5 + 0.5 * np.sin((_X + 22 * _noise(rng, 2, 5)) * 2 * np.pi / 16)
    return _blend((118, 78, 44), (176, 128, 82), 0.65 * grain + 0.35 * _noise(rng, 3, 30))


def _sky(rng):
    cloud = np.clip(2.4 * (0.7 * _noise(rng, 4, 4) + 0.3 * _noise(rng, 9, 8)) - 0.9, 0, 1)
    return _blend((112, 176, 236), (250, 250, 252), cloud)


def _stone(rng):
    crack = np.clip(6 * np.abs(_noise(rng, 7, 7) - 0.5), 0, 1)
    return _blend((84, 86, 92), (152, 154, 158), 0.75 * crack + 0.25 * _noise(rng, 24, 24))


def _night(rng):
    image = _blend((14, 16, 44), (44, 40, 92), _noise(rng, 4, 4))
    for _ in range(26):
        y, x = rng.integers(0, SIZE - 2, 2)
        image[y:y + 2, x:x + 2] = (226, 226, 196)
    return image


BACKGROUNDS = {"grass": _grass, "sand": _sand, "water": _water, "brick": _brick, "wood": _wood, "sky": _sky,
               "stone": _stone, "night": _night}
# Height and width of a grain in pixels, and the root mean square in levels.
_GRAINS = {"grass": (5, 2, 7), "sand": (2, 2, 6), "water": (2, 5, 6), "brick": (2, 2, 5), "wood": (9, 2, 6),
           "sky": (2, 2, 5), "stone": (2, 2, 7), "night": (2, 2, 5)}
_OBJECT_GRAIN = (2, 2, 5)


def _grain(rng, height, width, levels):
    """Gray noise in levels, (128, 128, 1): a uniform noise averaged over height x width pixels."""
    noise = rng.uniform(-1, 1, (SIZE + height - 1, SIZE + width - 1)).astype(np.float32)
    noise = sum(noise[y:y + SIZE, x:x + SIZE] for y in range(height) for x in range(width))
    return noise[..., None] * (levels * np.sqrt(3 / (height * width)))


@dataclass(frozen=True)
class Attributes:
    """What a scene shows; every field is one of the words of SHAPES, COLORS, PATTERNS and BACKGROUNDS."""

    color: str
    pattern: str
    shape: str
    background: str


@dataclass(frozen=True)
class Scene:
    """A drawn scene: `image` uint8 (128, 128, 3), `mask` bool (128, 128) of the object, `attributes`."""

    image: np.ndarray
    mask: np.ndarray
    attributes: Attributes


NOVEL_CONCEPTS = {
    f"{color}-{pattern}-{shape}": (color, pattern, shape)
    for color, pattern, shape in (
        ("teal", "striped", "star"), ("red", "dotted", "heart"), ("yellow", "checkered", "house"),
        ("purple", "plain", "crescent"), ("orange", "striped", "flower"), ("blue", "dotted", "cross"),
        ("green", "checkered", "circle"), ("pink", "plain", "hourglass"), ("cyan", "striped", "ring"),
        ("black", "dotted", "arrow"),
    )
}


def _pattern_weight(pattern, x, y):
    """Share of the second tone, in [0, 1], at object coordinates (the object's radius is 1)."""
    if pattern == "striped":
        wave = np.sin(2 * np.pi * x / 0.5)
    elif pattern == "checkered":
        wave = 2.2 * np.sin(2 * np.pi * x / 0.8) * np.sin(2 * np.pi * y / 0.8)
    elif pattern == "dotted":
        u, v = (x / 0.44) % 1 - 0.5, (y / 0.44) % 1 - 0.5
        wave = 9 * (0.27 - np.hypot(u, v))
    else:
        return np.zeros_like(x)
    return np.clip(0.5 + 2.0 * wave, 0, 1)


def _coverage(polygons, to_pixels):
    """Share of every pixel inside the outline, float32 (128, 128)."""
    big = Image.new("L", (SIZE * _OVERSAMPLING,) * 2)
    draw = ImageDraw.Draw(big)
    for polygon, value in zip(polygons, (255, 0), strict=False):
        draw.polygon([tuple(p) for p in to_pixels(polygon) * _OVERSAMPLING], fill=value)
    return np.asarray(big.reduce(_OVERSAMPLING), np.float32) / 255


def draw_scene(seed: int, attributes: Attributes) -> Scene:
    """Draw one scene; `seed` alone decides place, size, angle, light and texture.

    InputError for an attribute that is not in the pocket world.
    """
    for word, words in zip(astuple(attributes), (COLORS, PATTERNS, SHAPES, BACKGROUNDS), strict=True):
        if word not in words:
            raise InputError(f"'{word}' is not in the pocket world; choose from: {', '.join(words)}.")
    rng = np.random.default_rng(seed)
    radius = rng.uniform(32, 46)  # pixels
    center = rng.uniform(radius + 4, SIZE - radius - 4, 2)  # (x, y), pixels
    angle = np.deg2rad(rng.uniform(-20, 20))
    light = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    image = BACKGROUNDS[attributes.background](rng) * rng.uniform(0.9, 1.06)
    # The grains have random numbers of their own: neither background nor grain changes the other's.
    image = image + _grain(np.random.default_rng([seed, 2]), *_GRAINS[attributes.background])
    coverage = _coverage(SHAPES[attributes.shape], lambda p: center + radius * (p @ rotation.T) * [1, -1])

    shadow = Image.fromarray((coverage * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(4))
    shadow = np.roll(np.asarray(shadow, np.float32) / 255, (5, 3), (0, 1))
    image = image * (1 - 0.4 * shadow[..., None])

    x, y = (_X - center[0]) / radius, -(_Y - center[1]) / radius
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    second_tone = _DARK_TONE if attributes.color in _DARK_TONED else _LIGHT_TONE
    surface = _blend(COLORS[attributes.color], second_tone, _pattern_weight(attributes.pattern, u, v))
    surface = surface * (1 + 0.13 * (x * np.cos(light) + y * np.sin(light)))[..., None]
    surface = surface + _grain(np.random.default_rng([seed, 3]), *_OBJECT_GRAIN)

    image = image + (surface - image) * coverage[..., None]
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Scene(image, coverage >= 0.5, attributes)


def training_attributes(rng: np.random.Generator) -> Attributes:
    """Draw attributes uniformly over all combinations except the novel ones."""
    while True:
        color, pattern, shape, background = (
            words[rng.integers(len(words))] for words in map(list, (COLORS, PATTERNS, SHAPES, BACKGROUNDS)))
        if (color, pattern, shape) not in NOVEL_CONCEPTS.values():
            return Attributes(color, pattern, shape, background)


def attributes_of(seed: int) -> Attributes:
    """Attributes of the training scene of a seed, by a stream of their own: that of `draw_scene` starts with
    the object's size, which would follow its pattern."""
    return training_attributes(np.random.default_rng([seed, 1]))


def concept_scenes(concept: str, count: int = 5, seed: int = 0) -> list[Scene]:
    """Draw `count` scenes of a novel concept; backgrounds repeat only when there are more scenes than
    backgrounds.

    InputError for a name that is no novel concept.
    """
    if concept not in NOVEL_CONCEPTS:
        raise InputError(f"'{concept}' is not a novel concept; choose from: {', '.join(NOVEL_CONCEPTS)}.")
    rng = np.random.default_rng([seed, list(NOVEL_CONCEPTS).index(concept)])
    order = rng.permutation(list(BACKGROUNDS))
    return [draw_scene(int(rng.integers(2**31)),
                       Attributes(*NOVEL_CONCEPTS[concept], str(order[i % len(order)])))
            for i in range(count)]


def caption(attributes: Attributes) -> str:
    """The full caption of a scene, e.g. 'a photo of a teal striped star on sand'."""
    return (f"a photo of a {attributes.color} {attributes.pattern} {attributes.shape} "
            f"on {attributes.background}")
