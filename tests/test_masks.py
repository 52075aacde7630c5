"""Masks: brute-force dilation, closed forms of the masked loss, files that fit or are refused."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from szt_utils.errors import InputError
from szt_utils.images import crop_and_resize, list_images
from szt_utils.masks import (
    MASK_MODES,
    dilate,
    find_mask,
    find_masks,
    masked_mean,
    prepare_mask,
    read_mask,
    to_latent_grid,
)
from szt_utils.notices import notice

MASK = np.random.default_rng(0).random((12, 20)) < 0.3


def saved(path, array, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 30])
def test_dilation_is_the_maximum_over_the_square(radius):
    mask = np.random.default_rng(1).random((2, 1, 17, 23)) < 0.02
    expected = np.zeros_like(mask)
    for b, c, y, x in np.argwhere(mask):
        expected[b, c, max(0, y - radius):y + radius + 1, max(0, x - radius):x + radius + 1] = True
    assert np.array_equal(dilate(torch.from_numpy(mask).float(), radius).numpy(), expected.astype(np.float32))


def test_negative_dilation_is_refused():
    with pytest.raises(InputError, match="must not be negative, but is -1"):
        dilate(torch.ones(1, 1, 4, 4), -1)


def test_latent_grid_counts_half_covered_cells():
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., :4, :8] = 1  # exactly half of cell (0, 0)
    mask[..., :4, 8:15] = 1  # one column less than half of cell (0, 1)
    mask[..., 8:, 16:] = 1
    grid = to_latent_grid(mask, (2, 3))
    assert grid.tolist() == [[[[1, 0, 0], [0, 0, 1]]]] and grid.dtype == torch.float32
    assert torch.equal(to_latent_grid(mask.flip(-1), (2, 3)), grid.flip(-1))


def test_masked_mean_closed_forms():
    error = torch.rand(3, 4, 5, 6, dtype=torch.float64)
    mask = (torch.rand(3, 1, 5, 6) < 0.4).double()
    inside = error[mask.expand_as(error) == 1]
    assert torch.equal(masked_mean(error), error.mean())
    assert torch.allclose(masked_mean(error, mask), inside.sum() / error.numel())  # Eq. 7, literally
    assert torch.allclose(masked_mean(error, mask, "area"), inside.mean())
    for normalization in ("none", "area"):
        assert torch.allclose(masked_mean(error, torch.ones(3, 1, 5, 6), normalization), error.mean())
        assert masked_mean(error, torch.zeros(3, 1, 5, 6), normalization) == 0
    with pytest.raises(InputError, match="'mean'; choose from: none, area"):
        masked_mean(error, mask, "mean")


@pytest.mark.parametrize("extra", [(), (3,), (2, 3)])
@pytest.mark.parametrize("normalization", ["none", "area"])
def test_masked_mean_of_any_rank_is_that_of_the_flattened_frames(extra, normalization):
    error = torch.rand(2, 4, *extra, 5, 6, generator=torch.Generator().manual_seed(0))
    mask = (torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    flat = error.reshape(2, -1, 5, 6)
    assert torch.equal(masked_mean(error, mask, normalization), masked_mean(flat, mask, normalization))
    divisor = error.numel() if normalization == "none" else mask.sum() * flat.shape[1]
    assert torch.allclose(masked_mean(error, mask, normalization), (flat * mask).sum() / divisor)
    assert torch.equal(masked_mean(error), error.mean())


def test_no_gradient_comes_from_outside_the_mask():
    error = torch.rand(2, 4, 8, 8, requires_grad=True)
    mask = (torch.rand(2, 1, 8, 8) < 0.5).float()
    masked_mean(error, mask).backward()
    assert torch.equal(error.grad, (mask / error.numel()).expand_as(error))


@pytest.mark.parametrize("center_crop", [False, True])
def test_a_mask_is_cropped_and_resized_like_its_image(center_crop):
    """An image that equals its mask still equals it afterwards: both were cropped and resized alike."""
    shape = np.zeros((40, 60), np.uint8)
    shape[10:30, 22:50] = 255
    image = crop_and_resize(Image.fromarray(shape).convert("RGB"), 32, center_crop)
    mask = prepare_mask(Image.fromarray(shape), 32, center_crop)
    assert mask.shape == (1, 1, 32, 32) and set(mask.unique().tolist()) == {0, 1}
    assert (np.asarray(image)[..., 0] >= 128).astype(int).tolist() == mask[0, 0].int().tolist()
    assert torch.equal(prepare_mask(Image.fromarray(shape), 32, center_crop, 3), dilate(mask, 3))


def test_every_kind_of_mask_file_reads_as_black_and_white(tmp_path):
    expected, size = MASK * np.uint8(255), (20, 12)
    transparent = np.dstack([np.zeros((12, 20, 3), np.uint8), expected])
    palette = Image.fromarray(MASK.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    files = [saved(tmp_path / "gray.png", expected), saved(tmp_path / "bits.png", MASK),
             saved(tmp_path / "rgb.png", np.dstack([expected] * 3)),
             saved(tmp_path / "deep.png", expected.astype(np.uint16) * 257),
             saved(tmp_path / "alpha.png", transparent), saved(tmp_path / "palette.png", palette),
             saved(tmp_path / "rgba.png", np.dstack([expected] * 3 + [np.full_like(expected, 255)])),
             saved(tmp_path / "soft.png", np.where(MASK, 128, 127).astype(np.uint8)),
             saved(tmp_path / "bmp.bmp", expected)]
    for path in files:
        mask = read_mask(path, size)
        assert mask.mode == "L" and np.array_equal(np.asarray(mask), expected), path.name


def test_a_mask_is_rotated_upright_before_its_size_is_compared(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.png", MASK * np.uint8(255), exif=exif)
    assert np.array_equal(np.asarray(read_mask(path, (12, 20))), np.rot90(MASK, -1) * np.uint8(255))
    with pytest.raises(InputError, match="is 12 x 20 pixels, but its image is 20 x 12"):
        read_mask(path, (20, 12))


def test_black_masks_are_refused(tmp_path):
    files = [saved(tmp_path / "black.png", np.zeros((12, 20), np.uint8)),
             saved(tmp_path / "dark.png", np.full((12, 20), 127, np.uint8)),
             saved(tmp_path / "clear.png", np.zeros((12, 20, 4), np.uint8)),
             saved(tmp_path / "deep.png", np.full((12, 20), 300, np.uint16))]
    for path in files:
        with pytest.raises(InputError, match="all black") as caught:
            read_mask(path, (20, 12))
        assert str(path) in str(caught.value)


def test_masks_are_found_by_stem_in_the_order_of_the_images(tmp_path):
    images = [tmp_path / name for name in ("b.jpg", "a.png")]
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in ("a-masklabel.png", "b.png"):
        saved(folder / name, MASK * np.uint8(255))
    (folder / ".DS_Store").write_bytes(b"x")
    assert [path.name for path in find_masks(folder, images)] == ["b.png", "a-masklabel.png"]
    for paths, message in ((images + [tmp_path / "c.png"], "c.png' has no mask"),
                           (images[:1], "a-masklabel.png"),
                           (images + [tmp_path / "a.jpg"], "Several images are called 'a'")):
        with pytest.raises(InputError, match=message):
            find_masks(folder, paths)
    saved(folder / "a.png", MASK)
    with pytest.raises(InputError, match="are masks of 'a'"):
        find_masks(folder, images)


@pytest.fixture
def two_images(tmp_path):
    """A folder of two images and one of their masks."""
    folders = tmp_path / "images", tmp_path / "masks"
    for folder in folders:
        folder.mkdir()
        for name in ("a.png", "b.png"):
            saved(folder / name, MASK)
    return folders


def test_the_mask_of_an_image_that_its_folder_lacks_is_refused(two_images):
    images, masks = two_images
    assert find_mask(masks, images / "a.png") == masks / "a.png"
    with pytest.raises(InputError, match=r"c.png' is not an image of its folder; choose from: a.png, b.png"):
        find_mask(masks, images / "c.png")


def test_an_image_that_is_removed_after_its_mask_was_found_is_missed(two_images):
    images, masks = two_images
    os.utime(images, (0, 0))  # the clock of a file system may not have moved on before the image is removed
    find_mask(masks, images / "a.png")
    (images / "b.png").unlink()
    with pytest.raises(InputError, match="b.png' has no image of the same name"):
        find_mask(masks, images / "a.png")


def test_mask_modes_are_those_of_the_command_line():
    import textual_inversion_szt

    common = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--placeholder_token", "<s>",
              "--initializer_token", "s", "--loss_mask_dir", "masks"]
    for mode in MASK_MODES:
        assert textual_inversion_szt.parse_args([*common, "--mask_mode", mode]).mask_mode == mode


def test_a_mask_of_another_size_and_the_same_aspect_is_resized(tmp_path, capsys):
    notice.cache_clear()
    mask = np.kron(MASK, np.ones((3, 3), bool))
    path = saved(tmp_path / "a.png", mask)
    assert np.array_equal(np.asarray(read_mask(path, (20, 12))) > 0, MASK)
    assert "another size than the image" in capsys.readouterr().err
    saved(path, MASK)
    assert read_mask(path, (2000, 1208)).size == (2000, 1208)  # within one percent
    for size in ((2000, 1225), (2000, 1175), (12, 20)):
        with pytest.raises(InputError, match=f"is 20 x 12 pixels, but its image is {size[0]} x {size[1]}"):
            read_mask(path, size)


def test_a_mask_that_vanishes_when_it_is_resized_is_refused(tmp_path):
    speck = np.zeros((120, 200), bool)
    speck[0, 0] = True
    with pytest.raises(InputError, match="all black"):
        read_mask(saved(tmp_path / "a.png", speck), (20, 12))


def test_masks_lie_beside_their_images(tmp_path, capsys):
    notice.cache_clear()
    for name in ("a.png", "a-masklabel.png", "b.webp", "b-masklabel.tif"):
        saved(tmp_path / name, MASK)
    images = list_images(tmp_path)
    assert [path.name for path in images] == ["a.png", "b.webp"]
    assert [path.name for path in find_masks(tmp_path, images)] == ["a-masklabel.png", "b-masklabel.tif"]
    assert "<stem>-masklabel" in capsys.readouterr().err
    (tmp_path / "b-masklabel.tif").unlink()
    with pytest.raises(InputError, match="b.webp' has no mask .* or 'b-masklabel.png'"):
        find_masks(tmp_path, images)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_unicode_form(tmp_path, forms, capsys):
    notice.cache_clear()
    image, mask = (unicodedata.normalize(form, "caf\u00e9") for form in forms)
    path = saved(tmp_path / f"{mask}.png", MASK)
    assert find_masks(tmp_path, [Path("images") / f"{image}.jpg"]) == [path]
    assert "Unicode form" in capsys.readouterr().err


@pytest.mark.parametrize("radius", [10**6, 10**30])
def test_a_dilation_beyond_the_image_fills_it(radius):
    mask = torch.zeros(2, 1, 512, 512)
    mask[0, 0, 5, 7] = 1
    grown = dilate(mask, radius)
    assert grown[0].all() and not grown[1].any()
