"""Weights in the Hugging Face layout: safetensors into a parameter tree and back, tensor by tensor.

A model gives a table with one row a kind of tensor; nothing else knows the names of both sides.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from huggingface_hub import snapshot_download
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxnr import files
from jaxnr.errors import InputError

_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # configs, tokenizers and weights; never code or pickles

SHARD_BYTES = 4 * 2**30
"""A saved file of weights holds at most so many bytes, unless a single tensor has more."""

_TYPES = ("F64", "F32", "F16", "BF16")


class Row(NamedTuple):
    """One kind of tensor, under its names on both sides.

    ``{layer}`` in the name stands for the layers, which are stacked along a new first axis (they are scanned here).
    ``transpose``: torch keeps the weight of a linear layer as [out, in], Flax its kernel as [in, out].
    ``outside``: of a head around the base model, and so never under the prefix of the base model ("model.", "bert.").
    """

    name: str
    path: str
    transpose: bool = False
    outside: bool = False


class _Place(NamedTuple):
    """Where in the files one tensor lies, and how it is turned."""

    file: Any
    name: str
    transpose: bool

    def read(self, index: Any, dtype: Any) -> np.ndarray:
        """The part of the tensor that stands at ``index`` (slices) of the parameter, as ``dtype``."""
        turned = tuple(reversed(index)) if self.transpose else index
        part = self.file.get_slice(self.name)[turned]
        return np.asarray(part.T if self.transpose else part).astype(dtype, copy=False)


def model_folder(name: str) -> Path:
    """A local folder as it is, or the snapshot of a model of that name on the hub.

    Raises InputError when it is neither, or the hub cannot be reached and the model is not in its cache.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: not a folder, and not to be had from the Hugging Face hub ({_first_line(error)}); expected a "
            "local folder in the Hugging Face layout, or the name of a model on the hub and a connection to it."
        ) from error


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON object (or list, by ``kind``). Raises InputError naming the file when it is not there or not one."""
    return files.read_json(path, "a JSON file of a Hugging Face model", kind)


def load_params(folder: Path, table: Sequence[Row], abstract: dict, *, prefix: str, ignored: tuple[str, ...]) -> dict:
    """The parameters of a model, from the safetensors of ``folder`` straight onto the devices.

    Each device is given its own part of one tensor at a time, cast on the way; the host never holds more than that.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and the files that it names.
        table: every parameter of ``abstract``, once.
        abstract: tree of the parameters' shapes and types, and shardings where they are to be spread over a mesh.
        prefix: of the base model's names where it was saved inside a larger one ("bert."); often left off.
        ignored: tensors of the file whose name starts with one of these belong to parts that are not used.

    Raises InputError naming the tensor that is missing, of another shape, or without a place, before reading any.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(abstract, sep="/")
    wanted = {name: row for row in table for name in _names(row, leaves[row.path])}
    with contextlib.ExitStack() as stack:
        places = _places(folder, wanted, stack, prefix, ignored)
        if missing := [name for name in wanted if name not in places]:
            raise InputError(
                f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all) from the safetensors there."
            )
        for name, row in wanted.items():
            _check(folder, places[name], row, leaves[row.path].shape)
        params = {row.path: _read_leaf(row, leaves[row.path], places) for row in table}
    return traverse_util.unflatten_dict(params, sep="/")


def _names(row: Row, leaf: jax.ShapeDtypeStruct) -> list[str]:
    """The names in the files of the tensors that make up one parameter, the first layer first."""
    layers = range(leaf.shape[0]) if "{layer}" in row.name else (None,)
    return [row.name.format(layer=layer) for layer in layers]


def _places(
    folder: Path, wanted: dict[str, Row], stack: contextlib.ExitStack, prefix: str, ignored: tuple[str, ...]
) -> dict[str, _Place]:
    """Where the wanted tensors lie. Raises InputError for a tensor that is neither wanted nor ignored."""
    places = {}
    for path in _weight_files(folder):
        with _readable(path):
            file = stack.enter_context(safe_open(path, framework="numpy"))
        for full_name in file.keys():  # noqa: SIM118 (not a mapping)
            name = _current_name(full_name.removeprefix(prefix))
            if name in wanted:
                places[name] = _Place(file, full_name, wanted[name].transpose)
            elif not name.startswith(ignored):
                raise InputError(f"{path}: tensor {full_name} has no place in this model; is it of another kind?")
    return places


def _current_name(name: str) -> str:
    """The first BERTs (bert-base-uncased among them) call what is now weight and bias of a norm gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _check(folder: Path, place: _Place, row: Row, shape: tuple[int, ...]) -> None:
    """Raises InputError where a tensor has another shape than config.json asks for, or is quantised."""
    found = place.file.get_slice(place.name)
    one = shape[1:] if "{layer}" in row.name else shape
    expected = [*reversed(one)] if row.transpose else [*one]
    if list(found.get_shape()) != expected:
        raise InputError(
            f"{folder}: tensor {place.name} has shape {found.get_shape()}, expected {expected} by config.json."
        )
    if found.get_dtype() not in _TYPES:
        raise InputError(f"{folder}: tensor {place.name} is {found.get_dtype()}, expected one of {', '.join(_TYPES)}.")


def _read_leaf(row: Row, leaf: jax.ShapeDtypeStruct, places: dict[str, _Place]) -> jax.Array:
    """One parameter; the tensors of layers go one after the other into an array that lies on the devices."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    if "{layer}" not in row.name:
        place = places[row.name]
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: place.read(index, leaf.dtype))
    stacked = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    insert = _inserter(sharding)
    for layer, name in enumerate(_names(row, leaf)):
        read = places[name].read
        tensor = jax.make_array_from_callback(
            leaf.shape[1:], _of_one_layer(sharding), lambda index, read=read: read(index, leaf.dtype)
        )
        stacked = insert(stacked, tensor, layer)
    return stacked


def _of_one_layer(sharding: Any) -> Any:
    """The sharding of one layer of a stacked parameter."""
    return NamedSharding(sharding.mesh, P(*sharding.spec[1:])) if isinstance(sharding, NamedSharding) else sharding


def _inserter(sharding: Any) -> Callable[..., jax.Array]:
    """``(stacked, tensor, layer) -> stacked``, in place."""

    def insert(stacked: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, tensor, layer, 0)

    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def save_params(folder: Path, table: Sequence[Row], params: dict, *, prefix: str) -> None:
    """Writes safetensors under the table's names, base model under ``prefix``, in files of at most ``SHARD_BYTES``.

    One file's tensors are on the host at a time. Arrays keep their type.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    shards: list[list[_Piece]] = [[]]
    held = 0
    for piece in _pieces(table, leaves, prefix):
        if shards[-1] and held + piece.bytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.bytes
    several = len(shards) > 1
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
        tensors = {piece.name: piece.tensor(leaves) for piece in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})  # transformers refuses files without a format
        weight_map |= dict.fromkeys(tensors, file)
    if several:
        index = {"metadata": {"total_size": sum(piece.bytes for shard in shards for piece in shard)}}
        text = json.dumps(index | {"weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


class _Piece(NamedTuple):
    """One tensor to be written."""

    name: str
    row: Row
    layer: int | None
    bytes: int

    def tensor(self, leaves: dict[str, Any]) -> np.ndarray:
        leaf = leaves[self.row.path]
        array = np.asarray(leaf if self.layer is None else leaf[self.layer])
        # safetensors writes the memory of an array as it lies.
        return np.ascontiguousarray(array.T if self.row.transpose else array)


def _pieces(table: Sequence[Row], leaves: dict[str, Any], prefix: str) -> Iterator[_Piece]:
    for row in table:
        leaf = leaves[row.path]
        names = _names(row, leaf)
        for layer, name in enumerate(names):
            stacked = "{layer}" in row.name
            full_name = name if row.outside else prefix + name
            yield _Piece(full_name, row, layer if stacked else None, leaf.nbytes // len(names))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name that becomes ``folder`` when all went well.

    Raises InputError where there is something of that name already.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists already; give the name of a new folder.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(folder)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model. Raises InputError when there are none."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise InputError(
            f"{folder}: expected model.safetensors or {index.name}. Weights in other formats (pytorch_model.bin, h5) "
            "are not read; transformers' save_pretrained writes safetensors."
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: expected the key weight_map, from tensor names to files.")
    return [folder / name for name in sorted(set(names.values()))]


@contextlib.contextmanager
def _readable(path: Path):
    """Turns what safetensors says about a broken or absent file into an InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
