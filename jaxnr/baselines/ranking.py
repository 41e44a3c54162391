"""Full-catalogue rankings of a trained baseline, by the index and the candidates that queries are searched with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxnr.baselines.training import Learner
from jaxnr.data.examples import Example
from jaxnr.evaluation.merging import to_item_ids
from jaxnr.evaluation.recall_paths import Catalogue, search
from jaxnr.mesh import batch_sharding, replicated
from jaxnr.retrieval.index import ArticleIndex

_USERS_AT_ONCE = 256


def rank(
    learner: Learner,
    params: dict,
    examples: Sequence[Example],
    catalogue: Catalogue,
    mesh: Mesh,
    *,
    since: int,
    depth: int,
    otherwise: Sequence[list[str]],
) -> list[list[str]]:
    """The ``depth`` candidates of each example with the highest scores: article ids, best first.

    Candidates are what the protocol says (``Catalogue.is_candidate_I``), less what the model cannot score. Who has no
    history is given the ranking of the same place in ``otherwise``. No request is earlier than ``since``.
    """
    constants = jax.device_put(learner.known_at(since), replicated(mesh))
    items_IE = np.asarray(jax.jit(learner.item_vectors)(params, constants))
    # What the model cannot score leaves the catalogue before it comes.
    expires_I = np.where(learner.rankable_I, catalogue.expires_I, catalogue.published_I)
    index = ArticleIndex(items_IE, catalogue.published_I, expires_I, mesh)
    users_UE = encode_users(learner, params, constants, examples, mesh)
    _, rows_U1K = search(examples, catalogue, users_UE[:, None], index, depth)
    rankings = to_item_ids(rows_U1K[:, 0], catalogue.item_ids_I)
    return [
        ranking if learner.has_history(example) else fallback
        for ranking, example, fallback in zip(rankings, examples, otherwise, strict=True)
    ]


def encode_users(learner: Learner, params: dict, constants: Any, examples: Sequence[Example], mesh: Mesh) -> np.ndarray:
    """User vectors [U, E], some users at a time, in blocks of one shape that are spread over the mesh."""
    encode = jax.jit(learner.user_vectors, in_shardings=(None, None, batch_sharding(mesh)))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    block = -(-min(_USERS_AT_ONCE, len(examples)) // ways) * ways
    parts = []
    for start in range(0, len(examples), block):
        users = np.arange(start, start + block).clip(max=len(examples) - 1)  # the last block repeats the last user
        known = learner.make_users([examples[user] for user in users])
        parts.append(np.asarray(encode(params, constants, known))[: len(examples) - start])
    return np.concatenate(parts)
