"""The cache of moments is the live encoder, bit for bit, under one seed; and it needs the VAE no more."""

import os

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from szt_utils.errors import InputError
from szt_utils.images import to_vae_range
from szt_utils.latents import LiveMoments, MomentCache, randn_like

COUNT = 5


@pytest.fixture(scope="module")
def encode(tiny_model):
    vae = AutoencoderKL.from_pretrained(tiny_model, subfolder="vae").requires_grad_(False)
    return lambda images: vae.encode(to_vae_range(images)).latent_dist.parameters


@pytest.fixture(scope="module")
def image():
    images = torch.rand(COUNT, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return lambda i: images[i]


def sample(moments, indices, flips, generator=None):
    return DiagonalGaussianDistribution(moments.take(indices, flips)).sample(generator)


def seeded(moments, indices, flips):
    torch.manual_seed(7)
    return sample(moments, indices, flips), randn_like(sample(moments, indices, flips)), torch.rand(1)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_cache_equals_live_bit_for_bit(encode, image, batch_size):
    cache, live = MomentCache(encode, image, COUNT, batch_size), LiveMoments(encode, image)
    generator = torch.Generator().manual_seed(batch_size)
    seen = set()
    for _ in range(12):
        indices = torch.randint(0, COUNT, (batch_size,), generator=generator).tolist()
        flips = (torch.rand(batch_size, generator=generator) < 0.5).tolist()
        seen |= set(zip(indices, flips, strict=True))
        # The second sample, noise drawn LIKE it (its memory layout counts) and what the generator gives next.
        for ours, theirs in zip(seeded(cache, indices, flips), seeded(live, indices, flips), strict=True):
            assert torch.equal(ours, theirs)
    assert len(seen) >= 2 * COUNT - 4


def test_live_is_the_upstream_expression(tiny_model, encode, image):
    vae = AutoencoderKL.from_pretrained(tiny_model, subfolder="vae")
    pixels = torch.stack([image(3), image(1).flip(-1)]) * 2 - 1
    torch.manual_seed(0)
    expected = vae.encode(pixels).latent_dist.sample()
    torch.manual_seed(0)
    assert torch.allclose(sample(LiveMoments(encode, image), [3, 1], [False, True]), expected, atol=1e-5)


def test_an_epochs_smaller_last_batch_is_close(encode, image):
    cache, live = MomentCache(encode, image, COUNT, 4), LiveMoments(encode, image)
    for indices in ([2], [0, 4, 1]):
        flips = [i % 2 == 0 for i in indices]
        assert torch.allclose(seeded(cache, indices, flips)[0], seeded(live, indices, flips)[0], atol=1e-5)


def test_samples_are_alive_and_a_mirrored_image_is_not_a_mirrored_latent(encode, image):
    cache = MomentCache(encode, image, COUNT, 1)
    assert cache.moments.shape == (COUNT, 2, 8, 8, 8)
    assert not torch.equal(sample(cache, [0], [False]), sample(cache, [0], [False]))
    mean, mirrored = cache.moments[0, :, :4]
    assert not torch.allclose(mirrored, mean.flip(-1), atol=1e-4)
    draws = torch.cat([sample(cache, [0], [True]) for _ in range(2000)])
    deviation = (0.5 * cache.moments[0, 1, 4:]).exp()
    assert ((draws.mean(0) - mirrored).abs() < 5 * deviation / 2000**0.5 + 1e-6).all()
    assert torch.allclose(draws.std(0), deviation, rtol=0.15)


def test_every_image_is_read_once_per_flip_and_the_vae_can_go(tiny_model, image):
    vaes, reads = [AutoencoderKL.from_pretrained(tiny_model, subfolder="vae")], []

    def encode(images):
        return vaes[0].encode(to_vae_range(images)).latent_dist.parameters

    def counting(i):
        reads.append(i)
        return image(i)

    cache = MomentCache(encode, counting, COUNT, 1)
    assert sorted(reads) == sorted(2 * list(range(COUNT)))
    vaes.clear()
    sample(cache, [4], [True])
    assert len(reads) == 2 * COUNT and not cache.moments.requires_grad


def test_a_large_cache_lives_in_a_file_that_goes_with_it(encode, image, tmp_path):
    size = COUNT * 2 * 8 * 8 * 8 * 4
    small = MomentCache(encode, image, COUNT, 2, memory_limit=size, folder=tmp_path)
    assert not list(tmp_path.iterdir()), "what fits stays in memory"
    large = MomentCache(encode, image, COUNT, 2, memory_limit=size - 1, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == size
    assert torch.equal(large.moments, small.moments)
    for ours, theirs in zip(seeded(large, [3, 1], [True, False]), seeded(small, [3, 1], [True, False]),
                            strict=True):
        assert torch.equal(ours, theirs)
    del large
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="not on macOS")
def test_a_large_cache_without_room_is_an_error_and_no_bus_error(encode, image, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match=r"needs 0\.0 GB in .* \(No space left on device\); make room"):
        MomentCache(encode, image, COUNT, 2, memory_limit=0, folder=tmp_path)


def test_a_generator_of_its_own_draws_what_the_global_one_would(encode, image):
    cache = MomentCache(encode, image, COUNT, 1)
    torch.manual_seed(3)
    expected = sample(cache, [2], [True])
    before = torch.get_rng_state()
    assert torch.equal(sample(cache, [2], [True], torch.Generator().manual_seed(3)), expected)
    assert torch.equal(torch.get_rng_state(), before)
