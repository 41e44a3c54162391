"""Hugging Face model folders: where they are, their config.json, and their safetensors into a parameter tree.

A model gives a table with one row a kind of tensor; nothing else knows the names of both sides.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from jaxnr.errors import InputError

_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # configs, tokenizers and weights; never code or pickles


class Row(NamedTuple):
    """One kind of tensor, under its names on both sides.

    ``{layer}`` in the name stands for the layers, which are stacked along a new first axis (they are scanned here).
    ``transpose``: torch keeps the weight of a linear layer as [out, in], Flax its kernel as [in, out].
    """

    name: str
    path: str
    transpose: bool = False


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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a JSON file of a Hugging Face model ({_first_line(error)}).") from error
    if not isinstance(content, kind):
        raise InputError(f"{path}: expected a JSON {kind.__name__}, found a {type(content).__name__}.")
    return content


def load_params(folder: Path, table: Sequence[Row], abstract: dict, *, prefix: str, ignored: tuple[str, ...]) -> dict:
    """The parameters of a model from the safetensors of ``folder``, one tensor in memory beside the result.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and the files that it names.
        table: every parameter of ``abstract``, once.
        abstract: tree of the parameters' shapes and types; the result has the same.
        prefix: of all names where the model was saved inside a larger one ("bert."); left off where it was not.
        ignored: tensors of the file whose name starts with one of these belong to parts that are not used.

    Raises InputError naming the tensor that is missing, of another shape, or without a place.
    """
    wanted: dict[str, tuple[Row, np.ndarray, int | None]] = {}
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    for row in table:
        target = _leaf(params, row.path)
        layers = range(len(target)) if "{layer}" in row.name else (None,)
        wanted |= {row.name.format(layer=layer): (row, target, layer) for layer in layers}
    missing = set(wanted)
    for path in _weight_files(folder):
        with _readable(path), safe_open(path, framework="numpy") as file:
            for full_name in file.keys():  # noqa: SIM118 (not a mapping)
                name = full_name.removeprefix(prefix)
                if name in wanted:
                    _fill(path, full_name, file.get_tensor(full_name), *wanted[name])
                    missing.discard(name)
                elif not name.startswith(ignored):
                    raise InputError(f"{path}: tensor {full_name} has no place in this model; is it of another kind?")
    if missing:
        raise InputError(
            f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all) from the safetensors there."
        )
    return params


def _fill(path: Path, name: str, tensor: np.ndarray, row: Row, target: np.ndarray, layer: int | None) -> None:
    place = target if layer is None else target[layer]
    tensor = tensor.T if row.transpose else tensor
    if tensor.shape != place.shape:
        order = tuple(reversed(place.shape)) if row.transpose else place.shape
        found = tuple(reversed(tensor.shape)) if row.transpose else tensor.shape
        raise InputError(f"{path}: tensor {name} has shape {list(found)}, expected {list(order)} by config.json.")
    place[...] = tensor


def _leaf(params: dict, path: str) -> Any:
    for key in path.split("/"):
        params = params[key]
    return params


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
