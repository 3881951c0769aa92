"""The order of the samples depends on seed and epoch only, and can be taken up anywhere."""

from __future__ import annotations

import pytest

from mitnet_fast.training.sampler import EpochBatches, Share


def flat(batches):
    return [index for batch in batches for index in batch]


def test_an_epoch_visits_every_sample_once():
    batches = EpochBatches(12, 3, seed=5)
    assert len(batches) == 4
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    assert sorted(flat(batches)) == list(range(12))


def test_what_is_left_of_the_last_batch_is_dropped():
    batches = EpochBatches(11, 3, seed=5)
    assert len(batches) == 3
    assert len(set(flat(batches))) == 9


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_a_start_within_the_epoch_gives_the_batches_that_are_left(start):
    whole, rest = EpochBatches(12, 3, seed=5), EpochBatches(12, 3, seed=5)
    whole.set_position(epoch=7)
    rest.set_position(epoch=7, start=start)
    assert list(rest) == list(whole)[start:]
    assert len(rest) == 4 - start


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        batches = EpochBatches(50, 5, seed)
        batches.set_position(epoch)
        return flat(batches)

    orders = {tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert order(1, 2) == order(1, 2)


def test_steps_shorten_the_epoch():
    batches = EpochBatches(50, 5, seed=0, steps=2)
    assert len(list(batches)) == 2
    assert list(batches) == list(EpochBatches(50, 5, seed=0))[:2]


@pytest.mark.parametrize(("samples", "steps"), [(4, None), (9, 2), (0, None)])
def test_too_few_samples_are_an_error(samples, steps):
    with pytest.raises(ValueError, match=f"needs {5 * (steps or 1)} samples, the training set has {samples}"):
        EpochBatches(samples, 5, seed=0, steps=steps)


def test_the_last_batch_may_be_smaller():
    batches = EpochBatches(11, 4, seed=5, drop_last=False)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert sorted(flat(batches)) == list(range(11))
    assert EpochBatches(3, 4, seed=5, drop_last=False).share(0) == Share(0, 3, 3)


@pytest.mark.parametrize("samples", [9, 10, 11, 12])
def test_shares_of_any_batch_are_the_batch(samples):
    whole = EpochBatches(samples, 4, seed=1, drop_last=False)
    shares = [EpochBatches(samples, 4, seed=1, drop_last=False, rank=rank, shares=2) for rank in range(2)]
    for step, (batch, *parts) in enumerate(zip(whole, *shares, strict=True)):
        places = [each.share(step) for each in shares]
        assert [place.size for place in places] == [len(batch)] * 2
        assert places[1].start == places[0].count
        assert sum(place.count for place in places) == len(batch)
        assert abs(places[0].count - places[1].count) <= 1
        for part, place in zip(parts, places, strict=True):
            # without a sample of its own, a process computes the first, which then counts for nothing
            assert part == (batch[place.start : place.start + place.count] or batch[:1])
