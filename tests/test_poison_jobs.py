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


@pytest.mark.parametrize("multiple", [8, 16])
def test_a_mask_of_a_whole_image_has_the_size_that_is_attacked(tmp_path, multiple):
    Image.new("RGB", (90, 64)).save(tmp_path / "a.png")
    mask = Image.new("L", (90, 64))
    mask.paste(255, (30, 20, 61, 51))
    mask.save(tmp_path / "mask.png")
    job = ImageJob("a.png", tmp_path / "a.png", tmp_path / "mask.png", tmp_path / "mask.png")
    tensors = read_job(job, 64, keep_size=True, multiple=multiple)
    assert tensors.mask.shape == (1, 1, 64, 90)
    for values in (tensors.attacked_mask, tensors.loss_mask):
        assert values.shape[-2:] == tensors.attacked.shape[-2:] == (64, 88 if multiple == 8 else 96)
        assert values.unique().tolist() == [0, 1]


def test_the_hash_of_a_job_is_of_its_image_and_both_of_its_masks(tmp_path):
    """The results of another mask are made again."""
    hashes, paths = set(), {name: tmp_path / f"{name}.png" for name in ("image", "mask", "loss")}
    Image.new("RGB", (64, 64), "red").save(paths["image"])
    for name in (None, "image", "mask", "loss"):
        for path in (paths["mask"], paths["loss"]):
            Image.new("L", (64, 64), 255).save(path)
        if name:
            changed = Image.open(paths[name])
            changed.paste(0, (0, 0, 64, 32))
            changed.save(paths[name])
        hashes.add(read_job(ImageJob("a.png", *paths.values()), 64).sha256())
    assert len(hashes) == 4


def test_a_loss_mask_that_is_black_in_the_central_square_is_refused(tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 16, 64))
    mask.save(tmp_path / "mask.png")
    job = ImageJob("a.png", tmp_path / "a.png", None, tmp_path / "mask.png")
    assert read_job(job, 64, keep_size=True).loss_mask.any()
    with pytest.raises(InputError, match="mask.png' is black within the central square"):
        read_job(job, 64)


def test_masks_beside_the_images_are_not_poisoned(tmp_path):
    for name in ("a.png", "a-masklabel.png"):
        Image.new("RGB", (8, 8), "white").save(tmp_path / name)
    (job,) = find_jobs(tmp_path, mask_dir=tmp_path)
    assert (job.path.name, job.mask_path.name) == ("a.png", "a-masklabel.png")
