"""GrabCut: what points, boxes and strokes say, the mask of a disc, and a sentence without OpenCV."""

import sys

import numpy as np
import pytest
from PIL import Image

from szt_utils import grabcut as module
from szt_utils.errors import InputError
from szt_utils.grabcut import BACKGROUND, CONCEPT, check_available, grabcut, is_available, seeds_of
from szt_utils.sam_prompts import SamPrompt

SIZE = (160, 120)
needs_opencv = pytest.mark.skipif(not is_available(), reason="opencv-python-headless is not installed")


@pytest.fixture
def disc():
    """A red disc on noisy green, and its mask."""
    y, x = np.mgrid[:SIZE[1], :SIZE[0]]
    mask = np.hypot(x - 70, y - 60) < 30
    pixels = np.where(mask[..., None], (190, 40, 30), (60, 130, 60))
    pixels = pixels + np.random.default_rng(0).normal(0, 12, pixels.shape)
    return Image.fromarray(np.uint8(pixels.clip(0, 255))), mask


def overlap(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return (a & b).sum() / (a | b).sum()


def test_seeds_of_points_and_a_box():
    seeds = seeds_of(SamPrompt(((50, 60),), ((10.5, 10.5),), (20, 20, 100, 100)), SIZE)
    assert seeds.shape == SIZE[::-1] and seeds[60, 50] == CONCEPT and seeds[10, 10] == BACKGROUND
    outside = seeds[:, 101:]
    assert (outside == BACKGROUND).all() and (seeds[60, 20:100] != BACKGROUND).all()
    assert seeds[21, 21] == module.PROBABLY_BACKGROUND and seeds[60, 90] == module.PROBABLY_CONCEPT
    assert (seeds_of(SamPrompt(((0, 0),)), SIZE) == CONCEPT).any()  # in a corner, too
    assert (seeds_of(SamPrompt(((4, 4),)), (8, 8)) == CONCEPT).sum() == 4  # in a small image, too
    both = seeds_of(SamPrompt(((50, 60),), ((50, 60),)), SIZE)
    assert both[60, 50] == BACKGROUND and not (both == CONCEPT).any()


@needs_opencv
def test_a_box_points_and_strokes_find_a_disc(disc):
    image, mask = disc
    point = ((70, 60),)
    for prompt in (SamPrompt(box=(30, 20, 110, 100)), SamPrompt(point), SamPrompt(point, ((5, 5),))):
        found = grabcut(image, seeds_of(prompt, SIZE))
        assert found.dtype == module.torch.bool and overlap(found, mask) > 0.95
        assert np.array_equal(found, grabcut(image, seeds_of(prompt, SIZE)))
    large = image.resize((1600, 1200), Image.Resampling.NEAREST)
    found = grabcut(large, seeds_of(SamPrompt(box=(300, 200, 1100, 1000)), large.size))
    assert overlap(found, mask.repeat(10, 0).repeat(10, 1)) > 0.95


@needs_opencv
def test_parts_without_a_certain_pixel_are_left_out(disc):
    image, mask = disc
    two = Image.new("RGB", (320, 120))
    two.paste(image, (0, 0))
    two.paste(image, (160, 0))
    found = np.asarray(grabcut(two, seeds_of(SamPrompt(((230, 60),)), two.size)))
    assert not found[:, :150].any() and overlap(found[:, 160:], mask) > 0.95


@needs_opencv
def test_small_parts_and_holes_are_noise():
    mask = np.zeros((40, 60), bool)
    mask[5:35, 5:35] = True
    clean = mask.copy()
    mask[10:12, 10:12] = False  # of 900 pixels, 2 % are 18
    mask[20, 50] = True
    assert np.array_equal(module._largest_parts(mask, mask & False), clean)
    for part in (np.s_[20:26, 20:26], np.s_[10:16, 45:51]):  # a true hole, and a second part
        clean[part] = mask[part] = ~clean[part]
    assert np.array_equal(module._largest_parts(mask, mask & False), clean)
    certain = np.zeros_like(mask)
    certain[30, 30] = True
    clean[10:16, 45:51] = False
    assert np.array_equal(module._largest_parts(mask, certain), clean)


@needs_opencv
def test_seeds_that_leave_nothing_to_learn_are_refused(disc):
    for value, message in ((BACKGROUND, "nothing marks"), (CONCEPT, "whole image is marked")):
        with pytest.raises(InputError, match=message):
            grabcut(disc[0], np.full(SIZE[::-1], value, np.uint8))
    flat = Image.new("RGB", (40, 40), "gray")  # no colors to tell apart: any mask, no crash
    assert grabcut(flat, seeds_of(SamPrompt(box=(10, 10, 30, 30)), flat.size)).shape == (40, 40)
    tiny = Image.new("RGB", (1, 2))
    seeds = np.array([[CONCEPT], [BACKGROUND]], np.uint8)
    assert grabcut(tiny, seeds).shape == (2, 1)


@pytest.mark.parametrize("code, reason", [
    (None, "cv2"), ("raise ImportError('libGL.so.1: cannot open shared object file')", "libGL.so.1"),
    ("import numpy\nnumpy.no_such_name", "no_such_name")])
def test_without_opencv_that_works_a_sentence_says_what_to_install(monkeypatch, tmp_path, code, reason):
    """opencv-python is installed, but needs a library of a display."""
    module._why_not.cache_clear()
    if code is None:
        monkeypatch.setitem(sys.modules, "cv2", None)
    else:
        monkeypatch.delitem(sys.modules, "cv2", raising=False)
        (tmp_path / "cv2.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
    try:
        assert not is_available()
        with pytest.raises(InputError, match=rf"\(.*{reason}.*\): pip install opencv-python-headless\.$"):
            check_available()
    finally:
        module._why_not.cache_clear()
