"""The input pipeline: permutations, host shards, exact resumption. Grain is tested through integers as examples."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr.data.pipeline import training_batches
from jaxnr.errors import InputError


def epochs(source, count, **options):
    """The examples of each epoch of one host, in order."""
    size = options["batch_size"]
    batches = list(training_batches(source, num_epochs=count, **options))
    assert all(len(batch) == size for batch in batches)
    per_epoch = len(batches) // count
    return [list(itertools.chain.from_iterable(batches[i : i + per_epoch])) for i in range(0, len(batches), per_epoch)]


def test_every_epoch_is_a_permutation_and_no_two_are_the_same():
    found = epochs(range(24), 4, batch_size=4, seed=3)
    assert [sorted(epoch) for epoch in found] == [list(range(24))] * 4
    assert len({tuple(epoch) for epoch in found}) == 4


def test_the_seed_decides_the_order():
    assert epochs(range(24), 2, batch_size=4, seed=3) == epochs(range(24), 2, batch_size=4, seed=3)
    assert epochs(range(24), 2, batch_size=4, seed=3) != epochs(range(24), 2, batch_size=4, seed=4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4))
def test_a_batch_never_holds_an_example_twice_and_the_remainder_is_dropped(length, batch_size, count):
    if length < batch_size:
        return
    for epoch in epochs(range(length), count, batch_size=batch_size, seed=0):
        assert len(set(epoch)) == len(epoch) == length - length % batch_size


@pytest.mark.parametrize("rows_of_hosts", [[range(3), range(3, 6)], [[1, 4], [0, 5], [2, 3]]])
def test_hosts_together_see_what_one_host_would_see_and_read_nothing_else(rows_of_hosts):
    class Source(list):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    source = Source(range(100, 126))
    options = {"batch_size": 6, "seed": 1, "num_epochs": 3}
    alone = list(training_batches(range(100, 126), **options))
    assert len(alone) == 3 * 4
    for rows in rows_of_hosts:
        read = []
        own = list(training_batches(source, **options, rows=rows))
        assert own == [[batch[row] for row in rows] for batch in alone]
        assert [100 + place for place in read] == list(itertools.chain.from_iterable(own))


def test_the_place_of_one_host_is_that_of_all():
    states = []
    for rows in (None, [0, 1], [3]):
        batches = training_batches(range(25), batch_size=4, seed=5, rows=rows)
        for _ in range(7):
            next(batches)
        states.append(batches.get_state())
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 17])
def test_resumed_from_its_state_it_gives_what_the_uninterrupted_one_gives(stop):
    options = {"batch_size": 4, "seed": 5}
    uninterrupted = list(itertools.islice(training_batches(range(25), **options), 30))
    first = training_batches(range(25), **options)
    before = list(itertools.islice(first, stop))
    state = json.loads(json.dumps(first.get_state()))
    second = training_batches(range(25), **options)
    next(second)  # Where it stood does not matter.
    second.set_state(state)
    assert before + list(itertools.islice(second, 30 - stop)) == uninterrupted


def test_transform_sees_a_whole_batch():
    batches = training_batches(
        range(6), batch_size=3, seed=0, transform=lambda batch: {"sum": sum(batch)}, num_epochs=2
    )
    first, second, *rest = batches
    assert first["sum"] + second["sum"] == 15
    assert len(rest) == 2


@pytest.mark.parametrize("length", [3, 0])
def test_less_than_one_batch_is_an_input_error(length):
    with pytest.raises(InputError, match=rf"{length} examples.*batch of 4 \(`grpo\.prompts_per_step`\)"):
        training_batches(range(length), batch_size=4, batch_size_key="grpo.prompts_per_step", seed=0)
