"""The mesh, and the one table from parameter path to PartitionSpec."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnr.config import Config, MeshConfig, flatten
from jaxnr.errors import InputError

AXES = ("data", "fsdp", "tensor")

PARTITION = (
    # (end of the parameter's path, spec). Scanned layers carry a leading, unsharded layer axis.
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head", P("tensor", "fsdp")),
    (r"layers/(q|k|v|gate|up)_proj/kernel", P(None, "fsdp", "tensor")),
    (r"layers/(o|down)_proj/kernel", P(None, "tensor", "fsdp")),
    (r"layers/(q|k|v|gate|up)_proj/lora_a", P(None, "fsdp")),
    (r"layers/(q|k|v|gate|up)_proj/lora_b", P(None, None, ("tensor", "fsdp"))),
    (r"layers/(o|down)_proj/lora_a", P(None, ("tensor", "fsdp"))),
    (r"layers/(o|down)_proj/lora_b", P(None, None, "fsdp")),
    (r"layers/(q|k|v)_proj/bias", P(None, "tensor")),
    (r"norm/weight", P()),
    # Baselines; all but their embeddings is small.
    (r"item_embedding", P("tensor", "fsdp")),
    # Encoders; their norms, position and token-type embeddings are on every device.
    (r"word_embeddings/embedding", P("tensor", "fsdp")),
    (r"layers/(query|key|value|intermediate)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/(attention_)?output/kernel", P(None, "tensor", "fsdp")),
    (r"layers/(query|key|value|intermediate)/bias", P(None, "tensor")),
    (r"classifier_dense/kernel", P("fsdp", "tensor")),
    (r"classifier_dense/bias", P("tensor")),
    (r"classifier_out/kernel", P("tensor", "fsdp")),
)
"""Optimizer moments end in the same paths as their parameters, so the table shards them too."""

BATCH = P(("data", "fsdp"))
"""Prompts are spread over both axes that do not split a matrix multiplication."""


HEAD = P("tensor")
"""The output projection where it is multiplied: gathered over fsdp, so that the logits of a row stay where it lies."""

LOGITS = P("tensor", ("data", "fsdp"))
"""Logits [V, N] of the rows of a batch, as that product gives them."""

WHOLE_LOGITS = P(None, AXES)
"""Logits [V, N], each row's on one device."""


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of the run. Raises InputError when the axes do not multiply to the number of devices, and for more than
    one TPU slice."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = int(np.prod([size for size in sizes if size > 0]))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes) or len(devices) % fixed:
        raise InputError(
            f"mesh: data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} do not fit {len(devices)} devices; "
            "expected positive sizes whose product is the device count, at most one of them -1 (what is left)."
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(shape)) != len(devices):
        raise InputError(f"mesh: {dict(zip(AXES, shape, strict=True))} does not use all {len(devices)} devices.")
    # GPUs have a slice_index too, their host's; between hosts of one cluster an axis may lie.
    if len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) > 1:
        raise InputError("mesh: the devices are those of several TPU slices; expected one slice.")
    # On a torus an axis may be a part of a physical one: 16 × 2 on 4 × 8 chips.
    laid_out = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * 3)


def check_batch_sizes(config: Config, mesh: Mesh) -> None:
    """Raises InputError, naming each setting, where prompts of a step or microbatch cannot be spread evenly."""
    ways = batch_ways(mesh)
    settings = flatten(config)
    uneven = []
    for key in (key for key in settings if key.endswith(".prompts_per_step")):
        parts = settings.get(key.replace("prompts_per_step", "microbatches"), 1)
        if settings[key] % (ways * parts):
            why = f" ({ways} devices × {parts} microbatches)" if parts > 1 else ""
            uneven.append(f"`{key}` is {settings[key]}: expected a multiple of {ways * parts}{why}")
    if uneven:
        raise InputError(
            f"The prompts of a step are spread over {ways} devices (data × fsdp of the mesh), but {'; '.join(uneven)}."
        )


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec of one array by the table; replicated where no row names it.

    An axis that does not divide its dimension is left out there (a tiny model on a large mesh).
    """
    for pattern, spec in PARTITION:
        if re.search(f"{pattern}$", path) and len(spec) <= len(shape):
            pairs = zip(spec, shape, strict=False)  # a spec may leave out trailing dimensions
            return P(*(axis if axis and size % _ways(axis, mesh) == 0 else None for axis, size in pairs))
    return P()


def _ways(axes: str | tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def tree_shardings(tree, mesh: Mesh):
    """The NamedSharding of every array (or abstract array) in a tree of parameters or optimizer state."""

    def sharding(path, leaf) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def abstract_on(tree, mesh: Mesh | None, dtype=None):
    """Shape, type (``dtype`` for all, where given) and, with a mesh, sharding of every parameter of a tree."""

    def leaf(x, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree) if mesh is None else jax.tree.map(leaf, tree, tree_shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is prompts."""
    return NamedSharding(mesh, BATCH)


def traced_on(mesh: Mesh, function: Callable) -> Callable:
    """``function``, to be jitted for the mesh: ``spread`` knows it inside."""

    @functools.wraps(function)
    def inside(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return inside


def spread(x: jax.Array) -> jax.Array:
    """An activation whose leading axis is prompts, or rows of them, held to ``BATCH``; as it is outside ``traced_on``.

    Without this the partitioner is free to lay activations out as the weights are, every device with all prompts and a
    part of the width, and to add up all products over the devices.
    """
    ways = batch_ways()
    return x if ways == 1 or x.shape[0] % ways else jax.lax.with_sharding_constraint(x, BATCH)


def batch_ways(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Devices over which prompts are spread: those of a mesh, or of the one that ``traced_on`` has set; else 1."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def columns(x: jax.Array) -> jax.Array:
    """Activations [B, ..., D] with D spread over the fsdp axis, as the rows of the weights that they meet are."""
    return constrain(x, P("data", *(None,) * (x.ndim - 2), "fsdp"))


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """``x`` spread by ``spec`` over the mesh that is traced for; as it is where there is none."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())
