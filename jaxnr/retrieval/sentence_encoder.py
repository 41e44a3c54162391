"""Sentence encoders, pooled and normalised, from a local folder or the hub.

BERT and RoBERTa (arXiv 1908.10084) encode queries and documents alike. Qwen3-Embedding (arXiv 2506.05176) is a decoder:
an end token is appended, whose state is the vector, and a query stands behind an instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxnr.errors import InputError
from jaxnr.hosts import place_same
from jaxnr.mesh import batch_sharding, batch_ways, replicated, traced_on, tree_shardings
from jaxnr.models.decoder import Decoder
from jaxnr.models.encoder import Classifier, Encoder, mean_pool
from jaxnr.models.huggingface import load
from jaxnr.models.weights import model_folder, read_json

_SHORTEST = 16  # tokens; longer buckets are the powers of two
_SMALL_BATCH = 8
_LARGE_BATCH = 64
_MOST_TOKENS = 8192  # in a batch, where that allows a small one
_POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


class SentenceEncoder:
    """Text to unit vectors by a pretrained encoder.

    Texts are padded to one of a few lengths and batches to one of two sizes, so few programs compile. A text is cut to
    the model's maximal length. Its vector does not depend on the texts beside it.

    Where the mesh has devices of several processes, all of them call with the same texts.

    Args:
        name: local folder, or name on the hub, in the layout of sentence-transformers or of a plain model (then: mean
            pooling of a BERT or RoBERTa, the last token of a Qwen3).
        mesh: batches are spread over its data and fsdp axes, parameters by its table; None for the default device.
        dtype: of parameters and activations.
        query_task: what a model that follows instructions is told of each query.

    Raises InputError naming the file that is missing, or the part of the model that is not supported.
    """

    def __init__(self, name: str, mesh: Mesh | None = None, dtype: str = "float32", query_task: str = ""):
        parts = _read_parts(model_folder(name))
        model, params, self._tokenizer = load(parts.encoder, mesh=mesh, dtype=dtype)
        if isinstance(model, Classifier):
            raise InputError(f"{parts.encoder}: a classifier; expected a model that embeds.")
        self.size: int = model.config.hidden_size
        instructed = isinstance(model, Decoder)
        self._query_prefix = f"Instruct: {query_task}\nQuery:" if instructed else ""
        self._end_id = cast(int, self._tokenizer.pad_token_id) if instructed else None
        limits = (parts.max_tokens, self._tokenizer.model_max_length, model.config.max_tokens)
        self._max_tokens = int(min(limits))
        self._lower_case = parts.lower_case
        self._mesh, self._ways = mesh, 1 if mesh is None else batch_ways(mesh)
        self._params = params
        self._encode = make_encode(model, params, parts.pooling or ("last" if instructed else "mean"), mesh)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Unit float32 rows [N, E]; zero for blank texts."""
        return self.embed_documents([self._query_prefix + text if text.strip() else "" for text in texts])

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Unit float32 rows [N, E]; zero for blank texts."""
        vectors_NE = np.zeros((len(texts), self.size), np.float32)
        rows = [row for row, text in enumerate(texts) if text.strip()]
        if not rows:
            return vectors_NE
        token_ids = dict(zip(rows, self._tokenize([texts[row] for row in rows]), strict=True))
        encoded = []
        lengths = {row: len(ids) for row, ids in token_ids.items()}
        for length, batch in length_batches(lengths, self._max_tokens, self._ways):
            count = batch_size(len(batch), length, self._ways)
            tokens_BS = np.zeros((count + -count % self._ways, length), np.int32)
            mask_BS = np.zeros(tokens_BS.shape, bool)
            for place, row in enumerate(batch):
                tokens_BS[place, : len(token_ids[row])] = token_ids[row]
                mask_BS[place, : len(token_ids[row])] = True
            arrays = (tokens_BS, mask_BS) if self._mesh is None else place_same((tokens_BS, mask_BS), self._mesh)
            encoded.append((batch, self._encode(self._params, *arrays)))
        for batch, vectors_BE in encoded:  # read back only now, so that the device is never waited for in between
            vectors_NE[batch] = np.asarray(vectors_BE)[: len(batch)]
        return vectors_NE

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, cut to the longest that the model reads, with the end token where it wants one."""
        given = [text.lower() for text in texts] if self._lower_case else texts
        room = self._max_tokens - (self._end_id is not None)
        encoded = cast(list[list[int]], self._tokenizer(given, truncation=True, max_length=room)["input_ids"])
        end = [] if self._end_id is None else [self._end_id]
        return [ids if ids[-1:] == end else [*ids, *end] for ids in encoded]


def length_batches(lengths: dict[int, int], longest: int, ways: int = 1) -> Iterator[tuple[int, list[int]]]:
    """(padded length, rows) of each batch: every row under the least bucket that holds its own length."""
    buckets: dict[int, list[int]] = {}
    for row, length in sorted(lengths.items(), key=lambda item: item[1]):
        bucket = min(max(_SHORTEST, 1 << (length - 1).bit_length()), longest)
        buckets.setdefault(bucket, []).append(row)
    for bucket, rows in buckets.items():
        while rows:
            count = batch_size(len(rows), bucket, ways)
            yield bucket, rows[:count]
            rows = rows[count:]


def batch_size(rows: int, length: int, ways: int = 1) -> int:
    """Rows of the next batch, over ``ways`` devices: the large one where at least half of it would be used.

    Both sizes grow with more than ``_SMALL_BATCH`` devices, each of which then has as many rows as one of so many has:
    the weights are gathered for every batch.
    """
    times = -(-ways // _SMALL_BATCH)
    large = max(_SMALL_BATCH, min(_LARGE_BATCH, _MOST_TOKENS // length)) * times
    return large if 2 * rows > large else _SMALL_BATCH * times


class _Parts(NamedTuple):
    """What the files of a sentence-transformers model say beside the weights."""

    encoder: Path
    pooling: str | None
    max_tokens: float
    lower_case: bool


def _read_parts(folder: Path) -> _Parts:
    """Follows modules.json, where there is one. Raises InputError for a module that would be left out."""
    modules = {"Transformer": "", "Pooling": "1_Pooling"}
    if (path := folder / "modules.json").is_file():
        modules = {str(module.get("type")).rpartition(".")[2]: module.get("path") for module in read_json(path, list)}
        if "Transformer" not in modules or not set(modules) <= {"Transformer", "Pooling", "Normalize"}:
            raise InputError(
                f"{path}: modules {list(modules)}; expected a Transformer, then Pooling and Normalize at most."
            )
    encoder = folder / modules["Transformer"]
    limits = read_json(path) if (path := encoder / "sentence_bert_config.json").is_file() else {}
    return _Parts(
        encoder,
        _read_pooling(folder / modules.get("Pooling", "1_Pooling") / "config.json"),
        limits.get("max_seq_length") or np.inf,
        bool(limits.get("do_lower_case")),
    )


def _read_pooling(path: Path) -> str | None:
    """'mean', 'cls' or 'last'; None where there is no such file. Raises InputError for any other pooling."""
    if not path.is_file():
        return None
    modes = [key for key, value in read_json(path).items() if key.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise InputError(f"{path}: pooling by {modes}; expected one of {list(_POOLING)}.")
    return _POOLING[modes[0]]


def make_encode(model: Encoder | Decoder, params: dict, pooling: str, mesh: Mesh | None) -> Callable[..., jax.Array]:
    """encode(params, tokens_BS, mask_BS) -> unit float32 vectors [B, E] of right-padded texts."""
    pool = {"mean": mean_pool, "cls": lambda hidden_BSE, mask_BS: hidden_BSE[:, 0], "last": last_pool}[pooling]

    def encode(params: dict, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        # Accelerators multiply float32 in fewer bits by default; these cosines become rewards and rankings.
        with jax.default_matmul_precision("highest"):
            hidden_BSE = jnp.asarray(model.apply({"params": params}, tokens_BS, mask_BS)).astype(jnp.float32)
        pooled_BE = pool(hidden_BSE, mask_BS)
        return pooled_BE / jnp.maximum(jnp.linalg.norm(pooled_BE, axis=-1, keepdims=True), 1e-12)

    if mesh is None:
        return jax.jit(encode)
    spread = batch_sharding(mesh)
    return jax.jit(
        traced_on(mesh, encode),
        in_shardings=(tree_shardings(params, mesh), spread, spread),
        out_shardings=replicated(mesh),
    )


def last_pool(hidden_BSD: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """The state [B, D] of the last attended token of right-padded texts; of the first where there is none."""
    last_B = jnp.maximum(mask_BS.sum(axis=1) - 1, 0)
    return jnp.take_along_axis(hidden_BSD, last_B[:, None, None], axis=1)[:, 0]
