"""Masks as other tools write them: each is understood, and said if it is not black and white."""

import numpy as np
import pytest
from PIL import Image

from szt_utils.errors import InputError
from szt_utils.mask_pixels import white_pixels
from szt_utils.masks import read_mask
from szt_utils.notices import notice

YX = np.mgrid[:64, :64] - 32
DISTANCE = np.sqrt((YX**2).sum(0))
DISC = DISTANCE < 20
BITS = DISC.astype(np.uint8)
GRAY = np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)
PHOTO = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
SOFT = ((20 - DISTANCE) / 3 + 0.5).clip(0, 1)


@pytest.fixture(autouse=True)
def fresh():
    notice.cache_clear()


def read(path, image, **options) -> np.ndarray:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return np.asarray(read_mask(path, (64, 64))) > 0


def painted(color, background=(0, 0, 0)) -> np.ndarray:
    return np.where(DISC[..., None], np.array(color), np.array(background)).astype(np.uint8)


def indexed(*colors, bits=BITS) -> Image.Image:
    image = Image.frombytes("P", (64, 64), bits.tobytes())
    image.putpalette([level for color in colors for level in color])
    return image


LABELS = "the values 0 and"
COLORS = "colors on black"


@pytest.mark.parametrize("name, image, note", [
    *(("a.png", value * BITS, f"{LABELS} {value}") for value in (1, 3, 100)),
    *(("a.png", value * BITS.astype(np.uint16), f"{LABELS} {value}") for value in (1, 255)),
    ("a.tif", BITS.astype(np.int32), f"{LABELS} 1"), ("a.tif", BITS.astype(np.float32), ""),
    ("a.tif", 255 * BITS.astype(np.float32), ""), ("a.png", 65535 * BITS.astype(np.uint16), ""),
    ("a.png", DISC, ""), ("a.png", 255 * BITS, ""), ("a.png", 200 * BITS, ""),
    ("a.png", np.dstack([PHOTO, 100 + 155 * BITS]), "transparent surroundings"),
    ("a.png", indexed((0, 0, 0), (120, 0, 0)), COLORS), ("a.png", indexed((9, 9, 9), (255, 255, 255)), ""),
    ("a.png", indexed((0, 0, 0), (0, 0, 0)), f"{LABELS} 1"),
    ("a.png", indexed((0, 0, 40), (0, 0, 0), bits=1 - BITS), COLORS),
    *(("a.png", painted(color), COLORS) for color in ((0, 0, 255), (64, 0, 0), (0, 128, 0), (128, 0, 128))),
    ("a.png", painted((255, 255, 255), (0, 0, 255)), "colors, but no black"),
    ("a.png", np.dstack([painted((255, 255, 255)), 255 * BITS]), ""),
    ("a.png", np.dstack([painted((200, 0, 0)), 255 * BITS]), COLORS),
    ("a.png", np.dstack([painted((0, 0, 0)), 255 * BITS]), "transparent surroundings"),
    *(("a.png", np.dstack([photo, 255 * BITS]), "transparent surroundings") for photo in (
        PHOTO, GRAY, np.dstack([GRAY] * 3), GRAY // 4, 200 + GRAY // 8, np.where(YX[0] > 0, 255, GRAY))),
    ("a.png", np.dstack([255 * BITS, np.uint8(255 * (YX[0] < 28))]), "")])
def test_what_marks_the_concept(tmp_path, capsys, name, image, note):
    assert np.array_equal(read(tmp_path / name, image), DISC)
    printed = capsys.readouterr().err
    assert printed.count("\n") == bool(note) and note in printed


def test_soft_edges_and_jpegs_lose_their_edge_alone(tmp_path):
    red = (SOFT[..., None] * np.array((120, 0, 0))).astype(np.uint8)
    for name, image in (("a.png", red), ("a.jpg", painted((0, 0, 255))), ("a.jpg", painted((0, 200, 0))),
                        ("a.png", (255 * SOFT).astype(np.uint8)), ("a.tif", SOFT.astype(np.float32)),
                        ("a.png", (65535 * SOFT).astype(np.uint16))):
        wrong = read(tmp_path / name, image) != DISC
        assert not wrong[np.abs(DISTANCE - 20) > 3].any()


def test_a_little_black_is_the_background_of_colors(tmp_path):
    hole = DISTANCE < 8  # 5 % of the image
    image = np.where(hole[..., None], 0, np.array((0, 0, 255))).astype(np.uint8)
    wrong = read(tmp_path / "a.jpg", image) != ~hole
    assert not wrong[np.abs(DISTANCE - 8) > 3].any()


def test_soft_edges_of_a_cut_out_are_judged_as_what_they_are_the_edges_of(tmp_path):
    """By its opacity a photograph, and a white or black shape; by its brightness a drawing in both."""
    soft, white, full = np.uint8(255 * SOFT), 0 * BITS + 255, np.uint8(255 * (YX[0] < 28))
    for levels, opacity in ((GRAY, soft), (white, soft), (0 * BITS, soft), (soft, full)):
        wrong = read(tmp_path / "a.png", np.dstack([levels, opacity])) != DISC
        assert not wrong[np.abs(DISTANCE - 20) > 3].any()


def test_several_objects_and_their_outline_are_one_concept(tmp_path):
    """Labels in colors, as in Pascal VOC: dark objects with a bright border."""
    image = painted((64, 0, 0))
    image[:4] = (0, 64, 0)
    ring = np.abs(DISTANCE - 20) < 2
    image[ring] = (224, 224, 192)
    assert np.array_equal(read(tmp_path / "a.png", image), DISC | ring | (YX[0] < -28))


@pytest.mark.parametrize("image", [
    0 * BITS, 0 * BITS + 127, BITS + BITS * (YX[0] > 0), np.dstack([painted((0, 0, 0)), 0 * BITS + 255])])
def test_what_marks_nothing_is_refused(tmp_path, image):
    with pytest.raises(InputError, match="a.png' is all black"):
        read(tmp_path / "a.png", image)


def test_a_mask_that_is_one_everywhere_is_white(tmp_path):
    assert read(tmp_path / "a.png", BITS * 0 + 1).all() and read(tmp_path / "a.png", BITS * 0 + 255).all()


def test_stored_modes_are_taken():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        image = Image.fromarray(255 * BITS).convert(mode)
        white, note = white_pixels(image)
        assert np.array_equal(white, DISC) and not note, mode
