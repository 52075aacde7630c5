"""Images: every kind of file is read as the upright RGB image that it shows, and a damaged one is named."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from szt_utils.errors import InputError
from szt_utils.images import (
    check_resolution,
    contact_sheet,
    crop_and_resize,
    from_pil,
    hash_pixels,
    list_images,
    name_results,
    read_image,
    read_upright,
    reading,
    save_png,
    to_pil,
    to_vae_range,
)

RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
GRAY = RGB[..., 0]


def written(path, array, mode=None, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def pixels(path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation, undo", [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.transpose(1, 0, 2)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a.transpose(1, 0, 2), 2)),
    (8, lambda a: np.rot90(a))])
def test_exif_orientation_is_applied(tmp_path, orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(written(tmp_path / "a.png", RGB, exif=exif)), undo(RGB))


def test_gray_palette_and_one_bit_images(tmp_path):
    assert np.array_equal(pixels(written(tmp_path / "g.png", GRAY)), np.stack([GRAY] * 3, axis=-1))
    palette = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(pixels(written(tmp_path / "p.png", palette)), np.asarray(palette.convert("RGB")))
    bits = GRAY >= 128
    assert np.array_equal(pixels(written(tmp_path / "b.png", bits)),
                          np.stack([bits * np.uint8(255)] * 3, axis=-1))


def test_cmyk_is_the_complement_of_its_inks(tmp_path):
    inks = np.dstack([RGB, np.zeros_like(GRAY)])
    image = Image.frombytes("CMYK", (20, 12), inks.tobytes())
    assert np.array_equal(pixels(written(tmp_path / "a.tif", image)), 255 - RGB)
    # Adobe's JPEGs store the inks inverted; a flat color survives the compression.
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels(written(tmp_path / "a.jpg", flat, quality=95)).astype(int) - [255, 0, 0]).max() <= 3


def test_sixteen_bit_grays_are_scaled_not_clipped(tmp_path):
    deep = GRAY.astype(np.uint16) * 257 + np.random.default_rng(1).integers(-100, 100, GRAY.shape).clip(
        -GRAY.astype(int) * 257, 65535 - GRAY.astype(int) * 257).astype(np.int16).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        assert np.array_equal(pixels(written(tmp_path / name, deep)), np.stack([GRAY] * 3, axis=-1))


def test_transparency_is_composited_on_white(tmp_path):
    alpha = np.random.default_rng(2).integers(0, 256, GRAY.shape, dtype=np.uint8)
    share = alpha[..., None] / 255
    expected = RGB * share + 255 * (1 - share)
    for suffix in ("png", "webp"):
        path = written(tmp_path / f"a.{suffix}", np.dstack([RGB, alpha]),
                       **({"lossless": True} if suffix == "webp" else {}))
        assert np.abs(pixels(path) - expected).max() <= 1
    gray = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(alpha)])
    expected = np.stack([GRAY * share[..., 0] + 255 * (1 - share[..., 0])] * 3, axis=-1)
    assert np.abs(pixels(written(tmp_path / "la.png", gray)) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    path = written(tmp_path / "p.png", palette, transparency=0)
    assert pixels(path).tolist() == [[[255, 255, 255], [0, 200, 0]]]


def test_an_animation_gives_its_first_frame(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (8, 6), color) for color in colors]
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})):
        path = written(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
        assert Image.open(path).n_frames == 3
        assert (pixels(path) == colors[0]).all()


def test_only_the_folders_own_images_are_listed_by_name(tmp_path):
    for name in ("b.PNG", "a.jpeg", "c.webp"):
        written(tmp_path / name, RGB, format="PNG")
    (tmp_path / "sub.png").mkdir()
    for name in (".DS_Store", "a.txt", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.webp"]


def test_hidden_folders_are_not_listed(tmp_path):
    for name in (".trash/a.png", "sub/.trash/a.png", "sub/b.png", "c.png"):
        save_png(Image.fromarray(RGB), tmp_path / name)
    assert list_images(tmp_path, recursive=True) == [tmp_path / "c.png", tmp_path / "sub" / "b.png"]
    assert list_images(tmp_path / ".trash") == [tmp_path / ".trash" / "a.png"]  # asked for by its name


def test_a_folder_that_is_missing_or_has_no_images_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for folder, reason in ((tmp_path, "holds no image"), (tmp_path / "x", "does not exist"),
                           (tmp_path / "notes.txt", "not a folder")):
        with pytest.raises(InputError, match=reason) as caught:
            list_images(folder)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_damaged_files_raise_nothing_but_an_error_that_names_them(tmp_path, format):
    if format.lower() not in {name.lstrip(".") for name in Image.registered_extensions()}:
        pytest.skip(f"Pillow was built without {format}")
    random, buffer = np.random.default_rng(0), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(buffer, format, **({} if format in ("GIF", "BMP") else {"exif": exif}))
    data, path, refused = buffer.getvalue(), tmp_path / f"image.{format.lower()}", 0
    for attempt in range(60):
        damaged = bytearray(data)
        if attempt % 2:
            damaged = damaged[:random.integers(len(data))]
        else:
            for _ in range(3):
                damaged[random.integers(len(data))] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_image(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 10
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        read_image(path)


def test_a_missing_or_non_image_file_is_named(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    for name in ("a.png", "b.png"):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)


@pytest.mark.parametrize("height, width", [(12, 20), (20, 12), (13, 20), (12, 12)])
def test_crop_and_resize_is_upstreams(height, width):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    crop = min(height, width)
    square = array[(height - crop) // 2:(height + crop) // 2, (width - crop) // 2:(width + crop) // 2]
    for center_crop, source in ((True, square), (False, array)):
        expected = Image.fromarray(source).resize((16, 16), Image.Resampling.BICUBIC)
        actual = crop_and_resize(Image.fromarray(array), 16, center_crop)
        assert np.array_equal(np.asarray(actual), np.asarray(expected))


def test_tensors_and_images_round_trip_at_every_level():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    images = [Image.fromarray(np.dstack([levels, levels.T, levels[::-1]])) for _ in range(2)]
    tensor = from_pil(images)
    assert tensor.shape == (2, 3, 16, 16) and tensor.dtype == torch.float32
    assert torch.equal(tensor[0, 0], torch.from_numpy(levels) / 255)
    assert all(np.array_equal(a, b) for a, b in zip(images, to_pil(tensor), strict=True))
    assert from_pil(Image.fromarray(levels)).shape == (1, 1, 16, 16)


def test_images_of_other_sizes_and_the_same_pixels_have_other_hashes():
    assert hash_pixels(Image.new("RGB", (4, 2))) != hash_pixels(Image.new("RGB", (2, 4)))


def test_to_pil_rounds_to_the_nearest_level_and_clips():
    values = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 100.4 / 255, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert np.asarray(to_pil(values)[0])[0, :, 0].tolist() == [0, 0, 1, 100, 255]


def test_vae_range_is_upstreams_bit_for_bit_and_has_slope_two():
    levels = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy((levels / 127.5 - 1.0).astype(np.float32))
    images = (torch.from_numpy(levels).float() / 255).requires_grad_()
    assert torch.equal(to_vae_range(images), expected)
    to_vae_range(images).sum().backward()
    assert torch.allclose(images.grad, torch.full((256,), 2.0))


def test_save_png_is_atomic(tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(Image.fromarray(RGB), path)
    before = path.read_bytes()
    assert np.array_equal(np.asarray(Image.open(path)), RGB)
    with pytest.raises(OSError):
        save_png(Image.new("CMYK", (4, 4)), path)  # PNG has no such mode
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_contact_sheet_shows_every_image_in_its_cell():
    colors = {"one": [(255, 0, 0), (0, 255, 0)], "two": [(0, 0, 255)]}
    rows = [(text, [Image.new("RGB", (10, 10), color) for color in row]) for text, row in colors.items()]
    sheet = np.asarray(contact_sheet(rows, tile=32))
    for row in colors.values():
        for color in row:
            assert (sheet == color).all(-1).sum() == 32 * 32
    rows, columns = ((sheet == (0, 0, 255)).all(-1).any(axis) for axis in (1, 0))
    assert np.flatnonzero(rows)[0] > np.flatnonzero((sheet == (255, 0, 0)).all(-1).any(1))[-1]
    assert np.flatnonzero(columns)[0] == np.flatnonzero((sheet == (255, 0, 0)).all(-1).any(0))[0]


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.eps"])
def test_a_program_for_ghostscript_is_never_run(tmp_path, name, monkeypatch):
    """An EPS under an image's name: Pillow would hand it to Ghostscript, which runs it."""
    from PIL import EpsImagePlugin

    def run(*_, **__):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path = tmp_path / name
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_image, read_upright):
        with pytest.raises(InputError, match=f"{name}' cannot be read"):
            read(path)


@pytest.mark.parametrize("kind, name", [("PPM", "x.png"), ("TGA", "x.tif"), ("ICO", "x.png")])
def test_formats_other_than_the_documented_ones_are_not_decoded(tmp_path, kind, name):
    Image.new("RGB", (16, 16), "red").save(tmp_path / name, kind)
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("size", [(13_000, 13_000), (30_000, 10_000), (70_000_000, 1)])
def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(tmp_path, size):
    path = tmp_path / "a.png"
    header = bytearray(written(path, Image.new("1", (8, 8))).read_bytes())
    struct.pack_into(">II", header, 16, *size)
    struct.pack_into(">I", header, 29, zlib.crc32(header[12:29]))
    path.write_bytes(header)
    with pytest.raises(InputError, match="a.png.* has more than 67,108,864 pixels.* --max_image_pixels"):
        read_image(path)


def test_the_limit_is_a_flag_of_every_script(tmp_path, monkeypatch, recwarn):
    import purify_images

    monkeypatch.setenv("SZT_MAX_IMAGE_PIXELS", "1")  # the flag sets it; it is set back after the test
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    path = written(tmp_path / "a.png", RGB)

    def parse(limit):
        return purify_images.parse_args(["--image_dir", "in", "--output_dir", "out", "--method", "jpeg",
                                         "--max_image_pixels", limit])

    assert "max_image_pixels" not in vars(parse("239"))
    with pytest.raises(InputError, match="has more than 239 pixels"):
        read_image(path)
    with pytest.raises(InputError, match="--resolution of 16 has more than 239"):
        crop_and_resize(Image.fromarray(RGB), 16)
    parse("240")
    assert read_image(path).size == (20, 12)
    parse("10000000000")
    assert read_image(path).size == (20, 12)
    assert Image.MAX_IMAGE_PIXELS == 10**10 and not recwarn


def test_a_resolution_beyond_the_limit_is_refused():
    for resolution in (8193, 10**6):
        with pytest.raises(InputError, match=f"--resolution of {resolution} has more than"):
            crop_and_resize(Image.fromarray(RGB), resolution, True)
    check_resolution(8192)


@pytest.mark.parametrize("error", [IndexError("x"), struct.error("x"), TypeError("x"), zlib.error("x")])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, error):
    with pytest.raises(InputError, match="a.png' cannot be read \\(x\\)"), reading(tmp_path / "a.png"):
        raise error


def test_a_lack_of_memory_is_not_blamed_on_the_file(tmp_path):
    with pytest.raises(MemoryError), reading(tmp_path / "a.png"):
        raise MemoryError


def test_names_of_any_bytes_and_length(tmp_path):
    for name in (b"n" * 240 + b".png", b"\xff\xfe\n.png"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        save_png(Image.fromarray(RGB), path)
        assert np.array_equal(pixels(path), RGB)
    assert len(name_results(tmp_path)) == 2
    contact_sheet([(path.name, [read_image(path)]) for path in list_images(tmp_path)])


def test_results_that_differ_in_case_only_are_refused(tmp_path):
    """They would be one file on Windows and macOS."""
    for name in ("A.jpg", "a.png"):
        Image.fromarray(RGB).save(tmp_path / name)
    with pytest.raises(InputError, match="'A.jpg' and 'a.png' would both become 'a.png'"):
        name_results(tmp_path)


def test_a_link_that_leads_nowhere_is_named(tmp_path, capsys):
    save_png(Image.fromarray(RGB), tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    assert [path.name for path in list_images(tmp_path)] == ["a.png"]
    assert "b.png" in capsys.readouterr().err


def test_a_contact_sheet_centers_images_of_any_aspect():
    images = [Image.new("RGB", size) for size in ((64, 32), (2000, 1), (1, 2000))]
    sheet = contact_sheet([("", images)], tile=32)
    dark = np.asarray(sheet).max(2) == 0
    for left, (width, height) in zip((4, 40, 76), ((32, 16), (32, 1), (1, 32)), strict=True):
        rows, columns = dark[24:56, left:left + 32].nonzero()
        assert (len(set(columns)), len(set(rows))) == (width, height)
        assert abs(rows.mean() - 15.5) <= 0.5 and abs(columns.mean() - 15.5) <= 0.5


def test_a_contact_sheet_has_a_caption_for_a_row_or_for_each_image():
    images = [Image.new("RGB", (64, 64), "white")] * 3
    for caption, columns in (("mmm", {0}), (["m", "", "m"], {0, 2})):
        dark = np.asarray(contact_sheet([(caption, images)], tile=64)).max(2) < 128
        assert {x // 68 for x in dark.nonzero()[1]} == columns


def test_a_contact_sheet_of_many_rows_is_cut(capsys):
    image = Image.new("RGB", (1, 1))
    sheet = contact_sheet([("row", [image] * 300)] * 2000, tile=128)
    assert sheet.width * sheet.height <= 2**26
    assert "shows the first 32 of 2000 rows" in capsys.readouterr().err
