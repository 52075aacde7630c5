"""Random numbers of an image: its own, and the same wherever it is drawn."""

import torch

from szt_utils.image_rng import image_generator


def images_of(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(5)) / 255


def drawn(*arguments) -> list[float]:
    return torch.rand(4, generator=image_generator(*arguments)).tolist()


def test_the_generator_depends_on_the_image_the_seed_and_the_purpose():
    first, second = images_of()
    nearly = first.clone()
    nearly[2, 7, 7] = 1 - nearly[2, 7, 7]
    draws = [drawn(first, 0), drawn(second, 0), drawn(nearly, 0), drawn(first, 1), drawn(first, 0, "measure")]
    assert len(set(map(tuple, draws))) == 5
    assert drawn(first, 0) == drawn(first.clone(), 0, "attack") == draws[0]


def test_the_seed_is_that_of_version_0_1():
    image = torch.arange(3 * 4 * 4).reshape(3, 4, 4) / 255
    assert image_generator(image, 0).initial_seed() == 2681920269
    assert image_generator(image, 7, "measure").initial_seed() == 3620083181


def test_neither_layout_nor_precision_changes_it():
    image = images_of(1)[0]
    channels_last = image[None].contiguous(memory_format=torch.channels_last)[0]
    assert drawn(image.double(), 3) == drawn(channels_last, 3) == drawn(image.requires_grad_(), 3)
    assert drawn(image, 3) == drawn((image * 255 + 0.2) / 255, 3)  # the 8-bit image counts


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    generator = image_generator(images_of(1)[0], 0)
    torch.rand(3, generator=generator)
    assert torch.equal(torch.get_rng_state(), state) and generator.device.type == "cpu"
