"""The order of samples: that of a real DataLoader prepared by accelerate; any position can be continued."""

import random

import numpy as np
import pytest
import torch

from szt_utils.captions import OBJECT_TEMPLATES
from szt_utils.stream import Generators, SampleStream


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Drawing(torch.utils.data.Dataset):
    """Draws as the Diffusers example does: a template, then the mirror."""

    def __init__(self, images, repeats):
        self.images, self.repeats = images, repeats

    def __len__(self):
        return self.images * self.repeats

    def __getitem__(self, i):
        template = random.choice(OBJECT_TEMPLATES)
        return i % self.images, template, bool(torch.rand(1) < 0.5)


@pytest.mark.parametrize("images, repeats, batch_size",
                         [(5, 2, 4), (5, 2, 1), (3, 4, 3), (2, 1, 16), (1, 1, 1)])
def test_equals_a_prepared_data_loader_for_two_epochs(images, repeats, batch_size):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    seed_all(3)
    loader = Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(
        Drawing(images, repeats), batch_size=batch_size, shuffle=True, collate_fn=list))
    expected = []
    for _ in range(2):
        batches = []
        for batch in loader:
            # The training step draws from the same generators between two batches.
            batches.append((*map(list, zip(*batch, strict=True)), torch.randn(3).tolist(), random.random()))
        expected += [(*batch, i + 1 == len(batches)) for i, batch in enumerate(batches)]

    seed_all(3)
    generators = Generators()
    stream = SampleStream([OBJECT_TEMPLATES] * images, repeats, batch_size, generators)
    untouched = random.getstate(), torch.get_rng_state()
    actual = []
    for _ in expected:
        batch = next(stream)
        actual.append((batch.indices, batch.templates, batch.flips,
                       torch.randn(3, generator=generators.cpu_rng).tolist(), generators.python_rng.random(),
                       batch.last))
    assert untouched[0] == random.getstate() and torch.equal(untouched[1], torch.get_rng_state())
    assert actual == expected and len(actual) == 2 * stream.batches_per_epoch


def test_continues_exactly_at_every_position(tmp_path):
    def new():
        return SampleStream([OBJECT_TEMPLATES] * 5, 2, 4, Generators())

    def go_on(stream, count):
        draws = stream.generators
        return [(next(stream), torch.rand(2, generator=draws.device_rng).tolist(), draws.python_rng.random())
                for _ in range(count)]

    for position in range(8):  # in the middle, at the end and at the start of an epoch of three batches
        seed_all(1)
        stream = new()
        go_on(stream, position)
        torch.save([stream.state_dict(), stream.generators.state_dict()], tmp_path / "state")
        expected = go_on(stream, 7)
        seed_all(99)
        continued = new()
        state, generators = torch.load(tmp_path / "state", weights_only=True)
        continued.load_state_dict(state)
        continued.generators.load_state_dict(generators)
        assert go_on(continued, 7) == expected


def test_generators_begin_where_the_global_ones_stand_and_do_not_meet():
    seed_all(5)
    random.random(), torch.rand(3)
    first, second = Generators(), Generators()
    expected = random.random(), torch.rand(3).tolist()
    assert first.cpu_rng is first.device_rng
    for generators in (first, second):
        drawn = generators.python_rng.random(), torch.rand(3, generator=generators.cpu_rng).tolist()
        assert drawn == expected


def test_state_is_plain_numbers_that_later_batches_do_not_change():
    import json

    seed_all(0)
    stream = SampleStream([OBJECT_TEMPLATES] * 5, 2, 4, Generators())
    next(stream)
    state = stream.state_dict()
    before = json.dumps(state)
    for _ in range(5):
        next(stream)
    assert json.dumps(state) == before and json.loads(before)["position"] == 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_share_one_order_and_see_equally_many_batches(num_ranks):
    images, repeats, batch_size = 5, 3, 2
    streams, agreed = [], []

    def broadcast(seed):
        agreed.append(seed)
        return agreed[0]

    generators = Generators()  # whose numbers differ from rank to rank, as they are drawn in turn
    for rank in range(num_ranks):
        streams.append(SampleStream([OBJECT_TEMPLATES] * images, repeats, batch_size, generators, rank=rank,
                                    num_ranks=num_ranks, broadcast=broadcast))
    per_rank = [[next(stream) for _ in range(stream.batches_per_epoch)] for stream in streams]
    assert len(set(agreed)) == num_ranks, "the ranks' own seeds differ, so only agreeing makes one order"
    assert all([batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
               for batches in per_rank)
    in_order = [batch for together in zip(*per_rank, strict=True) for batch in together]
    shown = [i for batch in in_order[:streams[0].total_batches] for i in batch.indices]
    assert sorted(shown) == sorted(repeats * list(range(images)))
    extra = in_order[streams[0].total_batches:]
    assert len(in_order) % num_ranks == 0 and len(extra) < num_ranks
    assert [batch.indices for batch in extra] == [batch.indices for batch in in_order[:len(extra)]]


def test_epochs_differ_in_order_and_flips_are_fair():
    seed_all(0)
    stream = SampleStream([OBJECT_TEMPLATES] * 10, 100, 10, Generators())
    epochs = [[next(stream) for _ in range(stream.batches_per_epoch)] for _ in range(2)]
    orders = [[i for batch in epoch for i in batch.indices] for epoch in epochs]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    flips = [flip for epoch in epochs for batch in epoch for flip in batch.flips]
    assert len(flips) == 2000 and abs(sum(flips) / 2000 - 0.5) < 5 * 0.5 / 2000**0.5
    templates = [template for epoch in epochs for batch in epoch for template in batch.templates]
    assert set(templates) == set(OBJECT_TEMPLATES)
