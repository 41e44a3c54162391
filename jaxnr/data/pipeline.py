"""The input pipeline: a Grain dataset that is shuffled, sharded by host and whose position can be saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import grain
import numpy as np

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
    rows: Sequence[int] | np.ndarray | None = None,
) -> grain.DatasetIterator[Batch]:
    """An iterator over batches of ``batch_size`` examples, each ``transform`` of the list of its ``rows``: those that
    are this host's, None for all. Only they are read.

    Every epoch is another permutation of the whole source, the same on all hosts, so hosts with different rows together
    have the batches that one alone would have. What does not fill the last batch of an epoch is left out of that epoch,
    so no batch holds an example twice. ``num_epochs`` None goes on forever.

    The iterator's ``get_state()`` is a small dict that JSON can hold, the same on all hosts and for any number of them;
    ``set_state`` goes on with exactly the batch that would have come next. Everything is read in the calling thread.
    Raises InputError, naming the setting ``batch_size_key``, where there is less than one batch.
    """
    check_batches(len(source), {batch_size_key: batch_size})
    wanted = range(batch_size) if rows is None else rows

    def read(batch: list[int]) -> Batch:
        return transform([source[batch[row]] for row in wanted])

    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        # Batched before repeated: two copies of a prompt in one batch would draw the same samples.
        .batch(batch_size, drop_remainder=True, batch_fn=list)
        .repeat(num_epochs)
        .map(read)
    )
    # Decoding an example takes microseconds; threads would only compete for the cores that the device computes on.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def check_batches(examples: int, batch_sizes: Mapping[str, int]) -> None:
    """Raises InputError naming the settings of ``batch_sizes`` that are larger than the number of examples."""
    if too_large := [f"{size} (`{key}`)" for key, size in batch_sizes.items() if size > examples]:
        raise InputError(
            f"The training split has {examples} examples, which is less than one batch of {', '.join(too_large)}: "
            "lower that, or raise `data.train_prompts_per_user` or the users."
        )
