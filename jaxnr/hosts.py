"""One run of several processes, each on its own host: which rows of a batch are whose, and what only one of them does.

All processes run the same program on one mesh. A batch is spread over it by prompts, so each process reads, tokenises,
parses and rewards the prompts that lie on its own devices; steps and samplers see the whole batch, and a model that
embeds or judges the texts of all. Whatever is written or printed is the first process's. With a single process nothing
here sends or waits.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from jaxnr.config import MeshConfig
from jaxnr.errors import InputError
from jaxnr.mesh import batch_sharding, make_mesh, replicated

Item = TypeVar("Item")

_PLACE = re.compile(r"(\d+)/(\d+)@(\S+:\d+)")


def join(place: str) -> None:
    """Makes this process one of several; called once, before anything computes.

    ``place`` is "auto" where jax finds the others by itself (Cloud TPU, Slurm, Open MPI), or "I/N@HOST:PORT": process I
    of N, the first of which listens at HOST:PORT. Raises InputError for anything else, or where they do not meet.
    """
    given = _PLACE.fullmatch(place)
    if place != "auto" and not (given and int(given[1]) < int(given[2])):
        raise InputError(f"--distributed is {place!r}; expected auto, or I/N@HOST:PORT with I from 0 to N - 1.")
    options = (
        {"process_id": int(given[1]), "num_processes": int(given[2]), "coordinator_address": given[3]} if given else {}
    )
    # Accelerators run programs in the order in which they are asked for. CPUs would run two at once, whose collectives
    # then meet each other's: of several processes a program is awaited before the next is asked for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--distributed {place}: the processes did not meet ({error}).") from error


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def console() -> Console:
    """Standard output, which is silent but for the first process's."""
    return Console(quiet=not is_first())


def on_first(work: Callable[[], Any]) -> None:
    """Does ``work`` in the first process while the others wait. Where it fails there, all of them stop."""
    together(lambda: work() if is_first() else None)


def together(work: Callable[[], Item]) -> Item:
    """What ``work`` gives in each process. Where it fails in one of them, all of them stop.

    Without this the others would wait for that one in their next program, until jax finds out that it is gone.
    """
    result, problem = None, None
    try:
        result = work()
    except Exception as error:
        problem = error
    failed = largest(0 if problem is None else 1 + jax.process_index())
    if problem is not None:
        raise problem
    if failed:
        raise InputError(f"Process {failed - 1} stopped; it has said why.")
    return cast(Item, result)


def first_says(answer: int) -> int:
    """The first process's ``answer``, in every process: files appear at slightly different times on different hosts."""
    return answer if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(answer)))


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int64(number)).max())


def total(numbers: Sequence[int]) -> list[int]:
    """The sum of each number over the processes."""
    if jax.process_count() == 1:
        return list(numbers)
    return multihost_utils.process_allgather(np.array(numbers, np.int64)).sum(axis=0).tolist()


def union(texts: Sequence[str]) -> list[str]:
    """The different texts of all processes, in one order that is the same in each of them."""
    message = np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)
    # To a power of two, so that few programs compile; JSON may end in blanks.
    size = 1 << max(12, (largest(len(message)) - 1).bit_length())
    padded = np.pad(message, (0, size - len(message)), constant_values=ord(" "))
    messages = multihost_utils.process_allgather(padded)
    return list(dict.fromkeys(text for sent in messages for text in json.loads(sent.tobytes())))


def own_mesh(mesh: Mesh) -> Mesh:
    """A mesh of this process's devices, for what it computes on its own; ``mesh`` where there is no other process.

    Parameters there are spread over the devices as well, so that a host holds them once.
    """
    return mesh if jax.process_count() == 1 else make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which of the ``count`` rows of a batch lie on this process's devices, in order.

    Processes have the same rows where the tensor axis spans them.
    """
    ways, own = _parts(mesh)
    return np.arange(count).reshape(ways, -1)[list(own)].reshape(-1)


def own(mesh: Mesh, batch: Sequence[Item]) -> list[Item]:
    """The items of a batch that are this process's."""
    return [batch[row] for row in own_rows(mesh, len(batch))]


def place_rows(tree, mesh: Mesh):
    """Arrays [B, ...] on the mesh, from the rows of each that are this process's (numpy)."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    ways, own = _parts(mesh)

    def leaf(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(own)
        parts = {part * size: held for part, held in zip(own, np.split(rows, len(own)), strict=True)}

        def part(index: Any) -> np.ndarray:
            return parts[index[0].start or 0]

        return jax.make_array_from_callback((size * ways, *rows.shape[1:]), sharding, part)

    return jax.tree.map(leaf, tree)


def place_same(tree, mesh: Mesh):
    """Arrays [B, ...] on the mesh, from all rows of each (numpy), the same in every process of the mesh."""
    sharding = batch_sharding(mesh)
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)

    def leaf(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)

    return jax.tree.map(leaf, tree)


def read_rows(tree):
    """The rows of arrays [B, ...] that are this process's, on the host: the inverse of ``place_rows``.

    All rows of an array that every process holds.
    """

    def leaf(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([parts[start] for start in sorted(parts)])

    return jax.device_get(jax.tree.map(leaf, tree))


def gather_rows(tree, mesh: Mesh):
    """All rows of arrays [B, ...] on every host, from the rows of each process (numpy) or from ``place_rows``."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    placed = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else place_rows(x, mesh), tree)
    return jax.device_get(_everywhere(mesh)(placed))


@functools.lru_cache(maxsize=1)
def _everywhere(mesh: Mesh) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=1)
def _parts(mesh: Mesh) -> tuple[int, tuple[int, ...]]:
    """Into how many parts the mesh divides a batch, and which of them lie on this process's devices.

    Raises InputError where the processes do not have equally many.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    parts: dict[int, set[int]] = {}
    for device, (where,) in batch_sharding(mesh).devices_indices_map((ways,)).items():
        parts.setdefault(device.process_index, set()).add(where.start or 0)
    if len({len(held) for held in parts.values()}) > 1:
        held = {process: len(held) for process, held in sorted(parts.items())}
        raise InputError(f"mesh: a batch has {ways} parts, of which the processes hold {held}; expected equally many.")
    return ways, tuple(sorted(parts[jax.process_index()]))
