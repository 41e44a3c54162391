"""What the devices say to each other: the collectives of the compiled step and sampler, mesh by mesh.

A collective that is not in the tables below is one that somebody has to explain: an all-gather that strayed in costs
nothing on virtual devices, and a slice its whole bandwidth.
"""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import UNOPTIMISED, tiny_decoder

from jaxnr.config import GrpoConfig, MeshConfig, OptimizerConfig
from jaxnr.mesh import abstract_on, batch_sharding, make_mesh, tree_shardings
from jaxnr.models.decoder import init_params
from jaxnr.sampling.sampler import SamplingSettings, make_sampler
from jaxnr.training.steps import ScoredBatch, TrainState, make_grpo_step, make_optimizer

V, B, G, S, T = 64, 8, 2, 6, 5
MODEL = tiny_decoder(vocab_size=V)
PARAMS = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2, fsdp 4": MeshConfig(data=2, fsdp=4),
    "data 4, tensor 2": MeshConfig(data=4, tensor=2),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 4, tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf" = (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(")


def batch_array(mesh, shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def compiled_step(mesh) -> str:
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = jax.eval_shape(lambda params: TrainState(jnp.int32(0), params, optimizer.init(params)), PARAMS)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        tree_shardings(state, mesh),
    )
    tokens = [((B, S), jnp.int32), ((B, S), bool), ((B, G, T), jnp.int32), ((B, G, T), bool)]
    arrays = [batch_array(mesh, *array) for array in [*tokens, ((B, G, T), jnp.float32), ((B, G), jnp.float32)]]
    step = make_grpo_step(MODEL, optimizer, state, mesh, V, GrpoConfig())
    return step.lower(state, ScoredBatch(*arrays)).compile(UNOPTIMISED).as_text()


def compiled_sampler(mesh) -> str:
    sampler = make_sampler(MODEL, max_new_tokens=T, vocabulary_size=V, pad_id=0, mesh=mesh)
    arrays = [batch_array(mesh, *array) for array in (((B, S), jnp.int32), ((B, S), bool), ((B,), jnp.int32))]
    names = (np.arange(G, dtype=np.int32), np.int32(0), np.int32(0), SamplingSettings(), np.array([1, 2], np.int32))
    return sampler.lower(abstract_on(PARAMS, mesh), *arrays, *names).compile(UNOPTIMISED).as_text()


def collectives(program: str, places: dict[str, str]) -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
    """How many collectives of each kind a program has in each of its parts, and what the all-gathers there give.

    A part is a loop's body or the entry: of ``places``, part to pattern, the first whose pattern a collective of the
    same computation has in its name; "once" for the entry.
    """
    found: dict[str, list[tuple[str, str, str]]] = {}
    name = ""
    for line in program.splitlines():
        if re.match(r"(ENTRY )?%?[\w.\-]+ .*\{$", line):
            name = "once" if line.startswith("ENTRY") else line
        elif call := _CALL.search(line):
            scope = re.search(r'op_name="([^"]*)"', line)
            found.setdefault(name, []).append((call[2], call[1], scope[1] if scope else ""))
    counts: dict[str, dict[str, int]] = {}
    gathered: dict[str, list[str]] = {}
    for name, calls in found.items():
        part = (
            name
            if name == "once"
            else next(part for part, pattern in places.items() if any(re.search(pattern, scope) for *_, scope in calls))
        )
        counts[part] = dict(collections.Counter(counts.get(part, {})) + collections.Counter(kind for kind, *_ in calls))
        gathered.setdefault(part, []).extend(shape for kind, shape, _ in calls if kind == "all-gather")
    return counts, gathered


STEP_PARTS = {"backward": r"transpose\(jvp\(Decoder", "forward": r"jvp\(Decoder.*while/body", "head": ""}
"""The loops over layers, and the one over chunks of tokens, which has none."""

SAMPLER_PARTS = {
    "decode": r"Decoder\.decode/while/body",
    "prefill": r"Decoder\.prefill/while/body",
    "filter": r"cond/branch_1",
    "stop": r"while/cond",
    "token": r"while/body",
}
"""The loops over layers, and what is done for each token beside: drawing it, with filters or without, and the end."""

WEIGHTS = 7
"""Matrices of a layer. Under fsdp each is gathered where a layer begins, and again in the backward pass."""

STEP_WITH_FSDP = {
    "forward": {"all-gather": WEIGHTS},
    # The gradients of a layer's matrices, then those of its biases and norms, summed over the prompts.
    "backward": {"all-gather": WEIGHTS, "all-reduce": 3},
    # Gathered: the tokens of both streams, for the lookup where the table's columns lie; and the head. Exchanged: what
    # was looked up, and its gradients. Reduced: the number of tokens, gradients of the head and the final norm, the
    # gradient's length, and metrics.
    "once": {"all-gather": 3, "all-to-all": 4, "all-reduce": 5},
}
STEP_WITH_TENSOR = {
    # What attention and the feed-forward part give, in both streams, two of them in one.
    "forward": {"all-reduce": 3},
    # The first of these again, the gradients of what enters them, and sums over the prompts as above.
    "backward": {"all-reduce": 6},
    # As above, and over the vocabulary: lookups, maxima, sums and the chosen logits of the softmax, their gradient.
    "once": {"all-reduce": 8},
}
STEP_WITH_BOTH = {
    # The two streams multiply by the same matrix; now and then the compiler gathers it for each.
    "forward": {"all-gather": WEIGHTS + 2, "all-reduce": 3},
    "backward": {"all-gather": WEIGHTS + 4, "all-reduce": 8},
    "once": {"all-gather": 3, "all-to-all": 4, "all-reduce": 12},
}
STEP = {
    "data 8": {"backward": {"all-reduce": 1}, "once": {"all-reduce": 3}},
    "fsdp 8": STEP_WITH_FSDP,
    "data 2, fsdp 4": STEP_WITH_FSDP,
    "data 4, tensor 2": STEP_WITH_TENSOR,
    "data 2, fsdp 2, tensor 2": STEP_WITH_BOTH,
    "fsdp 4, tensor 2": STEP_WITH_BOTH,
}

STOP = {"all-reduce": 1}  # has every completion ended?
SAMPLER_WITH_FSDP = {
    "prefill": {"all-gather": WEIGHTS},
    # The weights stay. Summed over fsdp: the squares of two norms, queries with keys and values, gate with up.
    # Gathered: what attention gives.
    "decode": {"all-reduce": 4, "all-gather": 1},
    # Gathered: the last tokens. Exchanged: hidden states, from columns of all prompts to prompts.
    "token": {"all-gather": 1, "all-to-all": 1},
    "stop": STOP,
    "once": {"all-gather": 2, "all-to-all": 1},  # the prompts' tokens and the head; what was looked up
}
SAMPLER_WITH_TENSOR = {
    "prefill": {"all-reduce": 2},
    "decode": {"all-reduce": 2},
    # Reduced: what was looked up. Exchanged: logits, from parts of the vocabulary to whole rows. Gathered: the tokens
    # drawn and their log-probabilities.
    "token": {"all-reduce": 1, "all-to-all": 1, "all-gather": 2},
    "stop": STOP,
    "once": {"all-reduce": 1, "all-to-all": 1, "all-gather": 2},  # the same for the first token
}
SAMPLER_WITH_BOTH = {
    "prefill": {"all-gather": WEIGHTS, "all-reduce": 2},
    "decode": {"all-gather": 1, "all-reduce": 6},
    # The hidden states are exchanged, or, by the compiler of jax 0.12 on some meshes, gathered and cut.
    "token": {"all-gather": 4, "all-to-all": 2, "all-reduce": 1},
    "stop": STOP,
    "once": {"all-gather": 4, "all-to-all": 2, "all-reduce": 1},
}
SAMPLER = {
    "data 8": {"stop": STOP},
    "fsdp 8": SAMPLER_WITH_FSDP,
    "data 2, fsdp 4": SAMPLER_WITH_FSDP,
    "data 4, tensor 2": SAMPLER_WITH_TENSOR,
    "data 2, fsdp 2, tensor 2": SAMPLER_WITH_BOTH,
    "fsdp 4, tensor 2": SAMPLER_WITH_BOTH,
}
FAST = ("fsdp 8", "data 2, fsdp 2, tensor 2")
CASES = [pytest.param(sizes, marks=() if sizes in FAST else pytest.mark.slow) for sizes in MESHES]


def assert_at_most(found: dict[str, dict[str, int]], allowed: dict[str, dict[str, int]]) -> None:
    """Fewer will do: compilers differ in what they put into one collective."""
    for part, kinds in found.items():
        for kind, count in kinds.items():
            assert count <= allowed.get(part, {}).get(kind, 0), (part, kind, found)


@pytest.mark.parametrize("sizes", CASES)
def test_the_step_gathers_the_weights_of_a_layer_and_neither_the_prompts_nor_the_logits(sizes):
    mesh = make_mesh(MESHES[sizes])
    found, gathered = collectives(compiled_step(mesh), STEP_PARTS)
    assert_at_most(found, STEP[sizes])
    matrices = [shape for part in ("forward", "backward") for shape in gathered.get(part, [])]
    assert all(re.match(r"f32\[\d+,\d+\]", shape) for shape in matrices)
    assert bool(matrices) == (mesh.shape["fsdp"] > 1)


@pytest.mark.parametrize("sizes", CASES)
def test_the_sampler_moves_activations_while_it_decodes_and_no_weights_or_caches(sizes):
    mesh = make_mesh(MESHES[sizes])
    found, gathered = collectives(compiled_sampler(mesh), SAMPLER_PARTS)
    assert_at_most(found, SAMPLER[sizes])
    # Of the prompts of a data group, one vector a completion at most.
    most = B // mesh.shape["data"] * G * MODEL.config.hidden_size
    assert all(elements(shape) <= most for part in ("decode", "token") for shape in gathered.get(part, []))


def elements(shape: str) -> int:
    return int(np.prod([int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if size]))
