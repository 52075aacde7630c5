"""JPEG: the codec's own numbers, one subsampling at every quality, and the straight-through gradient."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from szt_utils.errors import InputError
from szt_utils.images import from_pil
from szt_utils.jpeg import check_quality, jpeg, jpeg_straight_through, jpeg_tensor

RGB = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("quality", [1, 25, 75, 96, 100])
def test_equals_a_file_with_halved_chroma(tmp_path, quality):
    Image.fromarray(RGB).save(tmp_path / "a.jpg", quality=quality, subsampling="4:2:0")
    actual = jpeg(Image.fromarray(RGB), quality)
    assert actual.mode == "RGB" and actual.size == (64, 48)
    assert np.array_equal(np.asarray(actual), np.asarray(Image.open(tmp_path / "a.jpg")))


def test_gray_blocks_come_back_as_whole_multiples_of_the_quantization_steps():
    """Closed form: at quality 25 the steps are twice the standard table's."""
    gray = np.random.default_rng(1).normal(128, 12, (32, 32)).clip(60, 196).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, "JPEG", quality=50)
    steps = 2 * np.array(Image.open(buffer).quantization[0]).reshape(8, 8)  # quality 50 is the standard table
    assert steps[0, 0] == 32
    once = np.asarray(jpeg(Image.fromarray(np.dstack([gray] * 3)), 25)).astype(float)
    assert (once == once[..., :1]).all()
    k = np.arange(8)
    dct = np.sqrt(np.where(k == 0, 1, 2) / 8)[:, None] * np.cos(np.pi * k[:, None] * (2 * k + 1) / 16)
    blocks = (once[..., 0] - 128).reshape(4, 8, 4, 8).swapaxes(1, 2)
    in_steps = dct @ blocks @ dct.T / steps
    assert np.abs(in_steps - in_steps.round()).max() < 0.15  # pixels were rounded to whole levels
    assert (in_steps.round() == 0).mean() > 0.5 and np.abs(in_steps.round()[..., 1:, 1:]).max() >= 1


def test_lower_quality_loses_more():
    smooth = Image.fromarray(RGB).resize((256, 192), Image.Resampling.BICUBIC)
    error = [np.square(np.asarray(jpeg(smooth, q)).astype(float) - np.asarray(smooth)).mean()
             for q in (100, 75, 25, 5)]
    assert error == sorted(error) and error[-1] > 10 * error[0]


def test_the_tensor_version_is_the_image_version_of_a_batch():
    images = from_pil([Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())])
    expected = from_pil([jpeg(Image.fromarray(RGB), 25), jpeg(Image.fromarray(RGB[::-1].copy()), 25)])
    assert torch.equal(jpeg_tensor(images, 25), expected)
    assert jpeg_tensor(images.half(), 25).dtype == torch.float16


def test_straight_through_is_jpeg_forward_and_the_identity_backward():
    images = from_pil(Image.fromarray(RGB)).requires_grad_()
    out = jpeg_straight_through(images, 25)
    assert torch.allclose(out, jpeg_tensor(images, 25), atol=1e-6)
    assert (out - images).abs().max() > 0.1
    weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    (out * weight).sum().backward()
    assert torch.equal(images.grad, weight)


def test_quality_outside_1_to_100_is_refused():
    for quality in (1, 100):
        check_quality(quality)
    for quality in (0, 101, -5):
        with pytest.raises(InputError, match=f"from 1 to 100, but is {quality}"):
            jpeg(Image.fromarray(RGB), quality)


def test_an_image_that_is_too_long_for_jpeg_is_refused():
    with pytest.raises(InputError, match="70000 x 1 pixels is too long for JPEG"):
        jpeg(Image.new("RGB", (70_000, 1)), 25)
