"""Orbax checkpoints of a training stage: parameters, optimizer and data-iterator state, restored onto any mesh."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxnr.errors import InputError
from jaxnr.training.steps import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save


class Checkpoints:
    """The checkpoints of one stage under ``folder``; the newest two are kept. Use as a context manager.

    The first save makes the folder: reading what is not there leaves nothing behind.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=False, enable_async_checkpointing=True)
        handlers = {  # without them, a process that has not saved yet reads no metadata
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Saves after ``step`` steps; Orbax writes to a temporary name and renames, so a kill leaves no half."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                data=ocp.args.JsonSave(data_state),
            ),
        )

    def latest_step(self) -> int | None:
        """Steps done in the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint in the shape and sharding of ``state``, and the data-iterator state."""
        step = self._manager.latest_step()
        self._check_shapes(step, state.params)
        optimizer = _abstract({"step": state.step, "opt_state": state.opt_state})
        with _named_errors(self.folder):
            restored = self._restore(
                step,
                params=ocp.args.StandardRestore(_abstract(state.params)),
                optimizer=ocp.args.StandardRestore(optimizer),
                data=ocp.args.JsonRestore(),
            )
        return TrainState(restored.optimizer["step"], restored.params, restored.optimizer["opt_state"]), restored.data

    def restore_params(self, params: dict) -> dict:
        """Only the parameters of the newest checkpoint, in the shape and sharding of ``params`` (may be abstract)."""
        step = self._manager.latest_step()
        if step is None:
            raise InputError(f"{self.folder}: holds no checkpoint; the stage that writes it has to run first.")
        self._check_shapes(step, params)
        with _named_errors(self.folder):
            return self._restore(step, params=ocp.args.StandardRestore(_abstract(params))).params

    def _restore(self, step: int | None, **items: ocp.args.CheckpointArgs) -> Any:
        """The named items of a checkpoint, as attributes."""
        return cast(Any, self._manager.restore(step, args=ocp.args.Composite(**items)))

    def _check_shapes(self, step: int | None, params: dict) -> None:
        """Raises InputError naming the first parameter that is missing, surplus or of another shape."""
        with _named_errors(self.folder):
            saved = _shapes(cast(Any, self._manager).item_metadata(step).params)
        wanted = _shapes(params)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise InputError(
                    f"{self.folder}: the checkpoint of step {step} does not fit the configured model: parameter "
                    f"{name} is {saved.get(name, 'absent')} there, and {wanted.get(name, 'absent')} in the model."
                )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(getattr(tree, "tree", tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _abstract(tree):
    """Shape, type and sharding of every array in a tree."""

    def leaf(x) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=x.sharding)

    return jax.tree.map(leaf, tree)


@contextlib.contextmanager
def _named_errors(folder: Path):
    """What Orbax raises on a damaged checkpoint, as an InputError that names the folder."""
    try:
        yield
    except Exception as error:  # Orbax raises a bare Exception for a damaged array
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder}: the checkpoint cannot be read: {reason}") from error
