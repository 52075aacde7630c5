"""Images to poison: a whole image has a limited shape, and the file is named."""

import pytest
from PIL import Image

from szt_utils.errors import InputError
from szt_utils.poison_jobs import ImageJob, find_jobs, read_job


def test_a_very_long_image_is_refused_with_keep_size_alone(tmp_path):
    path = tmp_path / "a.png"
    for size in ((2, 3000), (300, 2)):
        Image.new("RGB", size).save(path)
        with pytest.raises(InputError, match=f"a.png' .{size[0]} x {size[1]}. is too long for --keep_size"):
            read_job(ImageJob("a.png", path), 64, keep_size=True)
        assert read_job(ImageJob("a.png", path), 64).attacked.shape == (1, 3, 64, 64)
    Image.new("RGB", (80, 10)).save(path)
    assert read_job(ImageJob("a.png", path), 16, keep_size=True).attacked.shape == (1, 3, 16, 128)
    with pytest.raises(InputError, match="--resolution of 100000"):
        read_job(ImageJob("a.png", path), 100_000, keep_size=True)


def test_a_loss_mask_that_fills_no_latent_cell_is_refused(tmp_path):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (30, 30, 34, 34))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    mask.save(tmp_path / "mask.png")
    job = ImageJob("a.png", tmp_path / "a.png", None, tmp_path / "mask.png")
    with pytest.raises(InputError, match="mask.png' covers less than half of every"):
        read_job(job, 64)
    assert read_job(job, 64, mask_dilation=8).loss_mask.sum() > 100


def test_masks_beside_the_images_are_not_poisoned(tmp_path):
    for name in ("a.png", "a-masklabel.png"):
        Image.new("RGB", (8, 8), "white").save(tmp_path / name)
    (job,) = find_jobs(tmp_path, mask_dir=tmp_path)
    assert (job.path.name, job.mask_path.name) == ("a.png", "a-masklabel.png")
