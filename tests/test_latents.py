"""The latent cache is the live encoder, bit for bit, under one seed; and it needs the VAE no more."""

import pytest
import torch
from diffusers import AutoencoderKL

from szt_utils.latents import LatentCache, LiveLatents

COUNT = 5


@pytest.fixture(scope="module")
def vae(tiny_model):
    return AutoencoderKL.from_pretrained(tiny_model, subfolder="vae").requires_grad_(False)


@pytest.fixture(scope="module")
def picture():
    pictures = torch.rand(COUNT, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return lambda i: pictures[i]


def seeded(latents, indices, flips):
    torch.manual_seed(7)
    return latents.sample(indices, flips), torch.randn_like(latents.sample(indices, flips)), torch.rand(1)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_cache_equals_live_bit_for_bit(vae, picture, batch_size):
    cache, live = LatentCache(vae, picture, COUNT, batch_size), LiveLatents(vae, picture)
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


def test_live_is_the_upstream_expression(vae, picture):
    pixels = torch.stack([picture(3), picture(1).flip(-1)]) * 2 - 1
    torch.manual_seed(0)
    expected = vae.encode(pixels).latent_dist.sample()
    torch.manual_seed(0)
    assert torch.allclose(LiveLatents(vae, picture).sample([3, 1], [False, True]), expected, atol=1e-5)


def test_an_epochs_smaller_last_batch_is_close(vae, picture):
    cache, live = LatentCache(vae, picture, COUNT, 4), LiveLatents(vae, picture)
    for indices in ([2], [0, 4, 1]):
        flips = [i % 2 == 0 for i in indices]
        assert torch.allclose(seeded(cache, indices, flips)[0], seeded(live, indices, flips)[0], atol=1e-5)


def test_samples_are_alive_and_a_mirrored_picture_is_not_a_mirrored_latent(vae, picture):
    cache = LatentCache(vae, picture, COUNT, 1)
    assert cache.moments.shape == (COUNT, 2, 8, 8, 8)
    assert not torch.equal(cache.sample([0], [False]), cache.sample([0], [False]))
    mean, mirrored = cache.moments[0, :, :4]
    assert not torch.allclose(mirrored, mean.flip(-1), atol=1e-4)
    draws = torch.cat([cache.sample([0], [True]) for _ in range(2000)])
    deviation = (0.5 * cache.moments[0, 1, 4:]).exp()
    assert ((draws.mean(0) - mirrored).abs() < 5 * deviation / 2000**0.5 + 1e-6).all()
    assert torch.allclose(draws.std(0), deviation, rtol=0.15)


def test_every_picture_is_read_once_per_flip_and_the_vae_can_go(tiny_model, picture):
    vae, reads = AutoencoderKL.from_pretrained(tiny_model, subfolder="vae"), []

    def counting(i):
        reads.append(i)
        return picture(i)

    cache = LatentCache(vae, counting, COUNT, 1)
    assert sorted(reads) == sorted(2 * list(range(COUNT)))
    del vae
    cache.sample([4], [True])
    assert len(reads) == 2 * COUNT and not cache.moments.requires_grad


def test_a_large_cache_lives_in_a_file_that_goes_with_it(vae, picture, tmp_path):
    small = LatentCache(vae, picture, COUNT, 2, memory_limit=10**6, folder=tmp_path)
    assert not list(tmp_path.iterdir()), "what fits stays in memory"
    large = LatentCache(vae, picture, COUNT, 2, memory_limit=COUNT * 2 * 8 * 8 * 8 * 4 - 1, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == COUNT * 2 * 8 * 8 * 8 * 4
    assert torch.equal(large.moments, small.moments)
    for ours, theirs in zip(seeded(large, [3, 1], [True, False]), seeded(small, [3, 1], [True, False]),
                            strict=True):
        assert torch.equal(ours, theirs)
    del large
    assert not list(tmp_path.iterdir())


def test_a_generator_of_its_own_draws_what_the_global_one_would(vae, picture):
    cache = LatentCache(vae, picture, COUNT, 1)
    torch.manual_seed(3)
    expected = cache.sample([2], [True])
    before = torch.get_rng_state()
    assert torch.equal(cache.sample([2], [True], torch.Generator().manual_seed(3)), expected)
    assert torch.equal(torch.get_rng_state(), before)
