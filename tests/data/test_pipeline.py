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


@pytest.mark.parametrize(("length", "batch_size"), [(24, 2), (26, 1)])
def test_hosts_see_disjoint_examples_that_cover_all_but_the_remainder(length, batch_size):
    hosts = [
        epochs(range(length), 3, batch_size=batch_size, seed=1, process_index=host, process_count=3)
        for host in range(3)
    ]
    for parts in zip(*hosts, strict=True):
        assert len({len(part) for part in parts}) == 1
        together = list(itertools.chain.from_iterable(parts))
        assert len(set(together)) == len(together) == 24


def test_hosts_together_see_what_one_host_would_see():
    alone = epochs(range(24), 1, batch_size=4, seed=1)[0]
    hosts = [epochs(range(24), 1, batch_size=4, seed=1, process_index=host, process_count=2)[0] for host in range(2)]
    assert [hosts[i % 2][i // 2] for i in range(24)] == alone


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


@pytest.mark.parametrize(("length", "hosts"), [(3, 1), (0, 1), (7, 2)])
def test_less_than_one_batch_is_an_input_error(length, hosts):
    with pytest.raises(InputError, match=rf"{length} examples.*batch of 4 \(`grpo\.prompts_per_step`\)"):
        training_batches(
            range(length), batch_size=4, batch_size_key="grpo.prompts_per_step", seed=0, process_count=hosts
        )
