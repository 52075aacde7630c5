"""Files that a user takes for images are read, or named with what to do."""

import io
import sys
import types

import pytest
from PIL import Image

from szt_utils import image_formats
from szt_utils.errors import InputError
from szt_utils.images import list_images, read_image
from szt_utils.notices import notice


@pytest.fixture(autouse=True)
def fresh():
    """Notices are printed again, and pillow-heif is looked for again."""
    notice.cache_clear()
    image_formats._reads_heif.cache_clear()
    yield
    image_formats._reads_heif.cache_clear()


@pytest.fixture
def no_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


def content(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format)
    return buffer.getvalue()


def test_what_is_not_read_is_named_once(tmp_path, no_heif, capsys):
    (tmp_path / "a.png").write_bytes(content("PNG"))
    for name in ("IMG_1.HEIC", "b.jfif", "c.dng", "d.psd", "notes.txt", "a.safetensors", ".x.heic"):
        (tmp_path / name).write_bytes(bytes(64))
    for name, kind in (("photo", "JPEG"), ("photo.jpg_large", "JPEG"), ("z.download", "WEBP")):
        (tmp_path / name).write_bytes(content(kind))
    for _ in range(2):
        assert [path.name for path in list_images(tmp_path)] == ["a.png"]
    assert capsys.readouterr().err == (
        f"note: '{tmp_path}': Not read: IMG_1.HEIC, b.jfif, c.dng and 4 more; convert what is an image to "
        "PNG or JPEG, or install pillow-heif for HEIC.\n")


def test_a_folder_of_nothing_else_says_why_it_is_empty(tmp_path, no_heif):
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(InputError, match="holds no image .* Not read: a.heic; convert .* pillow-heif"):
        list_images(tmp_path)


@pytest.mark.parametrize("name, is_installed, is_hinted", [
    ("a.HIF", False, True), ("a.heic", True, False), ("a.cr2", False, False)])
def test_pillow_heif_is_recommended_where_it_helps(tmp_path, monkeypatch, name, is_installed, is_hinted):
    module = types.SimpleNamespace(register_heif_opener=lambda: None) if is_installed else None
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"Not read: {name}; convert") as caught:
        list_images(tmp_path)
    assert ("pillow-heif" in str(caught.value)) == is_hinted


def test_other_suffixes_of_jpeg_and_png_are_read(tmp_path):
    for name, kind in (("a.jfif", "JPEG"), ("b.JPE", "JPEG"), ("c.apng", "PNG")):
        (tmp_path / name).write_bytes(content(kind))
    paths = list_images(tmp_path)
    assert len(paths) == 3 and all(read_image(path).size == (8, 8) for path in paths)


def test_pillow_heif_is_registered_when_it_is_installed(tmp_path, monkeypatch):
    calls = []
    module = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert [path.name for path in list_images(tmp_path)] == ["a.heic"]
    assert calls == [1] and "HEIF" in image_formats.formats()


def test_heic_is_read(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 100, 50))).save(tmp_path / "a.HEIC")
    image = read_image(list_images(tmp_path)[0])
    assert image.size == (64, 48) and max(abs(a - b) for a, b in zip(
        image.getpixel((9, 9)), (200, 100, 50), strict=True)) <= 4


def test_masks_beside_images_are_no_images(tmp_path):
    for name in ("a.png", "a-masklabel.png", "b-masklabel.png"):
        (tmp_path / name).write_bytes(content("PNG"))
    (tmp_path / "c-masklabel-2.png").write_bytes(content("PNG"))  # an image, whatever its name reminds of
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "c-masklabel-2.png"]
    assert len(list_images(tmp_path, masks=True)) == 4
