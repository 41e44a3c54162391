"""Exact top-k articles by inner product, on device, sharded over the mesh by articles.

Every device scores its own articles and keeps its own best k; only those are gathered and merged. A plain top-k over a
sharded score matrix would gather all of it (DESIGN decision 3).

Articles are scored in blocks whose size depends on the catalogue alone, never on the mesh. That bounds the memory of a
search to one [queries, block] score matrix a device, and makes scores, and so the order of near ties, the same bit for
bit on any number of devices of a kind.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnr.errors import InputError

NEVER = np.iinfo(np.int64).max
"""``expires`` of an article that never leaves the catalogue."""

_LATEST = np.iinfo(np.int32).max
_QUERIES_AT_ONCE = 1024


class Rows(Protocol):
    """Float32 vectors [I, E] that are read some rows at a time: an array, or files that are mapped into memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(I, E)."""
        ...

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray: ...


class Shelf(NamedTuple):
    """The catalogue on device: M blocks of I articles; times as ``ArticleIndex.relative`` gives them.

    The last blocks are padded with articles that are never published.
    """

    embeddings_MIE: jax.Array
    published_MI: jax.Array
    expires_MI: jax.Array


class ArticleIndex:
    """Exact top-k over a catalogue, whose rows are the rows of ``embeddings_IE``.

    Args:
        embeddings_IE: float32 article vectors, unit length where scores are to be cosines. They go to the devices shard
            by shard, so the host copies no more than one shard at a time.
        published_I: UTC seconds; an article can be found from this second on.
        expires_I: UTC seconds; an article can no longer be found from this second on. NEVER (or None for all) if it
            stays.
        mesh: articles are spread over all of its axes; None for the default device.

    Raises InputError naming the first row with a vector that is not finite, or times more than 68 years apart (int32).
    """

    def __init__(
        self,
        embeddings_IE: Rows,
        published_I: np.ndarray,
        expires_I: np.ndarray | None = None,
        mesh: Mesh | None = None,
    ):
        published_I = np.asarray(published_I, np.int64)
        expires_I = np.full_like(published_I, NEVER) if expires_I is None else np.asarray(expires_I, np.int64)
        _check(embeddings_IE, published_I, expires_I)
        self.size = len(published_I)
        self.mesh = mesh
        self._epoch = int(published_I.min())
        self.shelf = _place(embeddings_IE, self.relative(published_I), self._seconds(expires_I, _LATEST), mesh)

    def relative(self, times_N: np.ndarray) -> np.ndarray:
        """UTC seconds as int32 seconds since the first publication: what ``top_k`` takes, as jax has no int64."""
        return self._seconds(times_N, latest=_LATEST - 1)  # 'never', _LATEST, has to stay later than every time

    def _seconds(self, times: np.ndarray, latest: int) -> np.ndarray:
        # Nothing is published before 0, so -1 stands for all of the past.
        return (np.clip(np.asarray(times, np.int64), self._epoch - 1, self._epoch + latest) - self._epoch).astype(
            np.int32
        )

    def search(
        self, queries_NE: np.ndarray, times_N: np.ndarray, k: int, exclude_NX: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best articles of each query among those with published <= time < expires, best first.

        Args:
            queries_NE: query vectors. A zero vector scores 0 with every article, so it finds the first valid rows.
            times_N: UTC seconds.
            k: articles a query.
            exclude_NX: article rows that a query must not find (those the user has clicked), padded with -1.

        Returns:
            (scores_NK float32, rows_NK int32), on the host. Equal scores come in the order of rows. Where fewer than k
            articles are valid the rest has row -1 and score -inf.
        """
        queries_NE = np.asarray(queries_NE, np.float32)
        times_N = self.relative(times_N)
        N = len(queries_NE)
        exclude_NX = np.zeros((N, 0), np.int32) if exclude_NX is None else np.asarray(exclude_NX, np.int32)
        found = [(np.zeros((0, k), np.float32), np.zeros((0, k), np.int32))]
        for start in range(0, N, _QUERIES_AT_ONCE):
            chunk = slice(start, min(start + _QUERIES_AT_ONCE, N))
            found.append(self._search_chunk(queries_NE[chunk], times_N[chunk], k, exclude_NX[chunk]))
        scores, rows = zip(*found, strict=True)
        return np.concatenate(scores), np.concatenate(rows)

    def _search_chunk(self, queries_NE, times_N, k: int, exclude_NX) -> tuple[np.ndarray, np.ndarray]:
        """``search``, padded to one of a few numbers of queries and exclusions, so that few programs compile."""
        N, X = exclude_NX.shape
        more_N = -N % 128 if N > 128 else _power_of_two(N, 8) - N
        more_X = _power_of_two(X, 8) - X if X else 0
        scores_NK, rows_NK = _jitted_top_k(
            self.shelf,
            np.pad(queries_NE, ((0, more_N), (0, 0))),
            np.pad(times_N, (0, more_N)),
            np.pad(exclude_NX, ((0, more_N), (0, more_X)), constant_values=-1),
            k=k,
            mesh=self.mesh,
        )
        return np.asarray(scores_NK)[:N], np.asarray(rows_NK)[:N]


def top_k(
    shelf: Shelf, queries_NE: jax.Array, times_N: jax.Array, exclude_NX: jax.Array, *, k: int, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """``ArticleIndex.search`` as a pure function, for use inside another jit; ``times_N`` as ``relative`` gives them.

    Holds one float32 score matrix [N, block] a device, where a block has 512 to 8192 articles.
    """
    if mesh is None:
        scores_NK, rows_NK = _shard_top_k(shelf, queries_NE, times_N, exclude_NX, k=k, axes=())
    else:
        axes = tuple(mesh.axis_names)
        local = jax.shard_map(
            functools.partial(_shard_top_k, k=k, axes=axes),
            mesh=mesh,
            in_specs=(P(axes), P(), P(), P()),
            out_specs=P(None, axes),  # the shards' lists side by side: lower rows first, as in one shard
        )
        gathered = jax.lax.with_sharding_constraint(
            local(shelf, queries_NE, times_N, exclude_NX), NamedSharding(mesh, P())
        )
        scores_NK, rows_NK = _best(*gathered, k=k)
    return scores_NK, jnp.where(scores_NK == -jnp.inf, -1, rows_NK)


_jitted_top_k = jax.jit(top_k, static_argnames=("k", "mesh"))


def _shard_top_k(shelf: Shelf, queries_NE, times_N, exclude_NX, *, k: int, axes: tuple[str, ...]):
    """The best k of one shard's blocks (``axes`` of the mesh; none for a single device), as rows of the catalogue."""
    M, I = shelf.published_MI.shape
    N = len(queries_NE)

    def step(best, block):
        part, start = block
        scores_NI = _masked_scores(part, queries_NE, times_N, exclude_NX - start)
        scores_NK, rows_NK = jax.lax.top_k(scores_NI, min(k, I))
        # The best so far have lower rows, so they come first: of equal scores top_k takes the first.
        both = [jnp.concatenate(pair, axis=1) for pair in zip(best, (scores_NK, rows_NK + start), strict=True)]
        return _best(*both, k=k), None

    nothing = (jnp.full((N, k), -jnp.inf, jnp.float32), jnp.full((N, k), -1, jnp.int32))
    first_row = 0
    if axes:
        nothing = jax.lax.pcast(nothing, axes, to="varying")
        first_row = jax.lax.axis_index(axes) * M * I
    starts_M = first_row + jnp.arange(M, dtype=jnp.int32) * I
    return jax.lax.scan(step, nothing, (shelf, starts_M))[0]


def _masked_scores(block: Shelf, queries_NE, times_N, exclude_NX) -> jax.Array:
    """Scores [N, I] of one block; -inf for articles not in the catalogue at the time, or excluded."""
    embeddings_IE, published_I, expires_I = block
    scores_NI = jnp.einsum("ne,ie->ni", queries_NE, embeddings_IE, precision=jax.lax.Precision.HIGHEST)
    scores_NI = jnp.where(scores_NI == 0, 0.0, scores_NI)  # some sorts put -0 behind 0; they are to tie
    valid_NI = (published_I <= times_N[:, None]) & (times_N[:, None] < expires_I)
    scores_NI = jnp.where(valid_NI, scores_NI, -jnp.inf)
    N, I = scores_NI.shape
    column_NX = jnp.where(exclude_NX < 0, I, exclude_NX)  # a negative index would count from the end
    return scores_NI.at[jnp.arange(N)[:, None], column_NX].set(-jnp.inf, mode="drop")


def _best(scores_NC: jax.Array, rows_NC: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of C >= k candidates, the earlier one where scores are equal."""
    scores_NK, column_NK = jax.lax.top_k(scores_NC, k)
    return scores_NK, jnp.take_along_axis(rows_NC, column_NK, axis=1)


def _place(embeddings_IE: Rows, published_I: np.ndarray, expires_I: np.ndarray, mesh: Mesh | None) -> Shelf:
    """Cuts the catalogue into blocks, as many as the devices share evenly, and puts them there."""
    size, E = embeddings_IE.shape
    block = int(np.clip(_power_of_two(size // 64, 1), 512, 8192))
    devices = 1 if mesh is None else mesh.size
    blocks = -(-size // (block * devices)) * devices
    more = blocks * block - size
    times = (
        np.pad(published_I, (0, more), constant_values=_LATEST).reshape(blocks, block),
        np.pad(expires_I, (0, more)).reshape(blocks, block),
    )

    if mesh is None:
        return Shelf(jnp.asarray(_read_blocks(embeddings_IE, range(blocks), block)), *map(jnp.asarray, times))
    sharding = NamedSharding(mesh, P(tuple(mesh.axis_names)))
    # One shard after the other: jax.make_array_from_callback would first gather those of all devices on the host.
    places = cast(Any, sharding.addressable_devices_indices_map((blocks, block, E)))
    shards = [
        jax.device_put(_read_blocks(embeddings_IE, range(blocks)[where[0]], block), device).block_until_ready()
        for device, where in places.items()
    ]
    embeddings_MIE = jax.make_array_from_single_device_arrays((blocks, block, E), sharding, shards)
    return Shelf(embeddings_MIE, *jax.device_put(times, sharding))


def _read_blocks(embeddings_IE: Rows, wanted: range, block: int) -> np.ndarray:
    """Some of the catalogue's blocks [M, block, E], zeros past its end.

    Raises InputError naming the first article whose vector is not finite.
    """
    size, E = embeddings_IE.shape
    read_MIE = np.zeros((len(wanted), block, E), np.float32)
    for read_IE, number in zip(read_MIE, wanted, strict=True):
        start = min(number * block, size)
        rows = embeddings_IE[slice(start, min(start + block, size))]
        read_IE[: len(rows)] = rows
        broken = np.flatnonzero(~np.isfinite(read_IE).all(axis=1))
        if len(broken):
            raise InputError(
                f"article index: the embedding of article row {start + broken[0]} is not finite, expected numbers only."
            )
    return read_MIE


def _power_of_two(count: int, smallest: int) -> int:
    """The least power of two that is at least ``count`` and ``smallest``."""
    return 1 << (max(count, smallest) - 1).bit_length()


def _check(embeddings_IE: Rows, published_I: np.ndarray, expires_I: np.ndarray) -> None:
    """Raises InputError for what cannot be indexed."""
    shape = embeddings_IE.shape
    if len(shape) != 2 or not shape[0] == len(published_I) == len(expires_I) > 0:
        raise InputError(
            f"article index: embeddings {shape}, {len(published_I)} publish times and {len(expires_I)} "
            "expiry times; expected a row of embeddings and a time of each kind for each article, at least one."
        )
    check_times(published_I)


def check_times(published_I: np.ndarray) -> None:
    """Raises InputError where articles are published too far apart for one index."""
    span = int(published_I.max()) - int(published_I.min())
    if span >= _LATEST:
        raise InputError(
            f"article index: article rows {published_I.argmin()} and {published_I.argmax()} are published "
            f"{span / 31_557_600:.0f} years apart; expected UTC seconds within 68 years."
        )
