"""Bit depth by the file's format, never by its own maximum, and colors by the file's profile."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from szt_utils.color import to_srgb
from szt_utils.errors import InputError
from szt_utils.images import read_image, read_upright

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
LEVELS = np.arange(256).reshape(16, 16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
COLORS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
# Red, green and blue of Display P3 and Adobe RGB as XYZ under D50, and the gamma of Adobe RGB.
P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
TO_SRGB = np.array([[3.1341359, -1.6172206, -0.4906860], [-0.9787955, 1.9162543, 0.0334428],
                    [0.0719553, -0.2289768, 1.4053427]])  # from XYZ under D50 (B. Lindbloom)


def tags(profile: bytes) -> dict[bytes, int]:
    """The offset of every tag's data."""
    count = struct.unpack_from(">I", profile, 128)[0]
    entries = [struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(count)]
    return {name: offset for name, offset, _ in entries}


def profile(primaries=None, gamma=None, gray=False) -> bytes:
    """The sRGB profile of Pillow with other primaries, a power law, or of gray pixels."""
    data, offsets = bytearray(SRGB), tags(SRGB)
    for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries or [], strict=bool(primaries)):
        struct.pack_into(">3i", data, offsets[name] + 8, *(round(value * 65536) for value in xyz))
    if gamma:  # a parametric curve of type 0
        struct.pack_into(">HHi", data, offsets[b"rTRC"] + 8, 0, 0, round(gamma * 65536))
    if gray:
        data[16:20] = b"GRAY"
        data = data.replace(b"rTRC", b"kTRC", 1)
    return bytes(data)


def encode(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decode(levels: np.ndarray) -> np.ndarray:
    values = levels / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def read(path, image, **options) -> np.ndarray:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return np.asarray(read_image(path)).astype(int)


@pytest.mark.parametrize("name, values, white", [
    ("a.tif", RAMP.astype(np.float32), 1), ("a.tif", (255 * RAMP).astype(np.float32), 1),
    ("a.tif", (RAMP * 1.005).astype(np.float32), 1), ("a.png", (LEVELS * 257).astype(np.uint16), 1),
    ("a.tif", (LEVELS * 257).astype(np.uint16), 1), ("a.png", LEVELS.astype(np.uint16), 257),
    ("a.tif", LEVELS.astype(np.uint16), 257), ("a.png", (LEVELS * 4).astype(np.uint16), 64.25),
    ("a.tif", (RAMP * (2**31 - 1)).astype(np.int32), 1)])
def test_deep_images_are_scaled_by_their_format(tmp_path, name, values, white):
    assert np.abs(read(tmp_path / name, values)[..., 0] - LEVELS / white).max() <= 1


def test_big_endian_unsigned_and_signed_integers(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    for values, options in (((LEVELS * 257).astype(">u2"), {"byteorder": ">"}),
                            ((RAMP * (2**32 - 1)).astype(np.uint32), {}),
                            ((RAMP * (2**15 - 1)).astype(np.int16), {})):
        tifffile.imwrite(path, values, **options)
        assert np.abs(np.asarray(read_image(path))[..., 0].astype(int) - LEVELS).max() <= 1, values.dtype


def test_the_white_of_12_bits_and_of_inverted_gray(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    twelve = np.rint(RAMP[:, :256] * 4095).astype(np.uint16)
    bits = np.unpackbits(twelve.astype(">u2").view(np.uint8).reshape(*twelve.shape, 2), axis=-1)
    packed = np.packbits(bits.reshape(len(twelve), -1, 16)[..., 4:].reshape(len(twelve), -1), axis=-1)
    height, width = twelve.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: height,
            279: packed.size}
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())) + bytes(4)
    path.write_bytes(header + packed.tobytes())
    shown = np.asarray(read_image(path))[..., 0].astype(int)
    assert np.abs(shown - np.rint(RAMP[:, :256] * 255)).max() <= 1
    tifffile.imwrite(path, (LEVELS * 257).astype(np.uint16), photometric="miniswhite")
    assert np.abs(np.asarray(read_image(path))[..., 0].astype(int) - (255 - LEVELS)).max() <= 1


@pytest.mark.parametrize("values", [RAMP - 0.5, RAMP * 5, RAMP * 1000, RAMP * np.nan,
                                    np.where(RAMP, RAMP, np.inf), LEVELS.astype(np.int32)])
def test_a_white_that_is_not_known_is_refused(tmp_path, values):
    deep = values if values.dtype == np.int32 else values.astype(np.float32)
    with pytest.raises(InputError, match="its values run from .* save it with 8 or 16 bits"):
        read(tmp_path / "a.tif", deep)


@pytest.mark.parametrize("primaries, gamma", [(P3, None), (ADOBE, 2.2)])
def test_a_profile_is_honored(tmp_path, primaries, gamma):
    """Display P3 and Adobe RGB, against the formula."""
    linear = (COLORS / 255) ** gamma if gamma else decode(COLORS)
    expected = encode(linear @ np.array(primaries) @ TO_SRGB.T)
    options = {"icc_profile": profile(primaries, gamma)}
    found = read(tmp_path / "a.png", COLORS, **options)
    assert np.abs(found - expected).max() <= 3 < np.abs(COLORS - expected).max()
    alpha = np.full((16, 16, 1), 255, np.uint8)
    assert np.array_equal(read(tmp_path / "b.png", np.dstack([COLORS, alpha]), **options), found)
    assert np.array_equal(read(tmp_path / "c.tif", COLORS, **options), found)
    palette = Image.fromarray(COLORS).quantize(8)
    assert np.array_equal(read(tmp_path / "d.png", palette, **options),
                          read(tmp_path / "e.png", palette.convert("RGB"), **options))


def test_gray_profiles_are_honored(tmp_path):
    gray = LEVELS.astype(np.uint8)
    for image in (gray, Image.fromarray(gray).convert("LA"), (LEVELS * 257).astype(np.uint16)):
        found = read(tmp_path / "a.png", image, icc_profile=profile(gamma=1, gray=True))
        assert np.abs(found[..., 0] - encode(RAMP)).max() <= 2


def test_lab_pixels_are_converted(tmp_path):
    flat = np.kron(np.array([[[200, 100, 50], [90, 90, 90]]], np.uint8), np.ones((8, 8, 1), np.uint8))
    lab = ImageCms.profileToProfile(Image.fromarray(flat), ImageCms.createProfile("sRGB"),
                                    ImageCms.createProfile("LAB"), outputMode="LAB")
    assert np.abs(read(tmp_path / "a.tif", lab) - flat).max() <= 3


# The profiles hold the second in which they were made: as names of tests they would differ among processes.
@pytest.mark.parametrize("data", [SRGB, profile(gray=True), b"", b"junk", SRGB[:300], bytes(200) + SRGB[200:],
                                  SRGB.replace(b"RGB ", b"CMYK", 1)], ids=range(7))
def test_srgb_and_useless_profiles_leave_every_pixel_as_it_is(tmp_path, data):
    assert np.array_equal(read(tmp_path / "a.png", COLORS, icc_profile=data), COLORS)


def test_a_profile_of_other_pixels_is_ignored(tmp_path):
    inks = Image.frombytes("CMYK", (16, 16), np.dstack([COLORS, COLORS[..., :1] * 0]).tobytes())
    assert np.array_equal(read(tmp_path / "a.tif", inks, icc_profile=profile(P3)), 255 - COLORS)
    inks.info["icc_profile"] = SRGB
    assert to_srgb(inks).mode == "RGB"


def test_masks_pass_no_profile(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(LEVELS.astype(np.uint8)).save(path, icc_profile=profile(gamma=1, gray=True))
    assert np.array_equal(np.asarray(read_upright(path)), LEVELS)
