"""The input pipeline: a Grain dataset that is shuffled, sharded by host and whose position can be saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import grain

from jaxnr.data.examples import Example
from jaxnr.errors import InputError

Batch = TypeVar("Batch")


def training_batches(
    source: Sequence[Example],
    *,
    batch_size: int,
    batch_size_key: str = "batch_size",
    seed: int,
    transform: Callable[[list[Example]], Batch] = list,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """An iterator over this host's batches, each ``transform`` of a list of ``batch_size`` examples.

    Every epoch is another permutation of the whole source, the same on all hosts; host i takes every
    ``process_count``-th example of it from the i-th on, so the hosts' examples are disjoint and equally many. What does
    not fill the last batch of an epoch is left out of that epoch, so no batch holds an example twice. ``num_epochs``
    None goes on forever.

    The iterator's ``get_state()`` is a small dict that JSON can hold; ``set_state`` goes on with exactly the batch that
    would have come next. Everything is read in the calling thread. Raises InputError, naming the setting
    ``batch_size_key``, where a host has less than one batch.
    """
    check_batches(len(source), process_count, {batch_size_key: batch_size})
    share = len(source) // process_count
    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .slice(slice(process_index, share * process_count, process_count))
        # Batched before repeated: two copies of a prompt in one batch would draw the same samples.
        .batch(batch_size, drop_remainder=True, batch_fn=list)
        .repeat(num_epochs)
        .map(transform)
    )
    # Decoding an example takes microseconds; threads would only compete for the cores that the device computes on.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def check_batches(examples: int, hosts: int, batch_sizes: Mapping[str, int]) -> None:
    """Raises InputError naming the settings of ``batch_sizes`` that are larger than a host's share of the examples."""
    share = examples // hosts
    if too_large := [f"{size} (`{key}`)" for key, size in batch_sizes.items() if size > share]:
        raise InputError(
            f"The training split has {examples} examples, {share} for each of {hosts} hosts, which is less than one "
            f"batch of {', '.join(too_large)}: lower that, or raise `data.train_prompts_per_user` or the users."
        )
