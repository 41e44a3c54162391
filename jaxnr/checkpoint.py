"""Orbax checkpoints of a training stage: parameters, optimizer and data-iterator state, restored onto any mesh.

A checkpoint is finished when Orbax has renamed it and the manifest of its files' checksums has been written into it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxnr import manifest
from jaxnr.errors import InputError
from jaxnr.hosts import first_says, is_first
from jaxnr.training.steps import TrainState

logger = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates every save, and its errors are raised as well

_PARTIAL = ".orbax-checkpoint-tmp"
"""In the name of a folder that Orbax has not finished writing."""

_NONE, _DAMAGED = -1, -2
"""In place of a step: there is no finished checkpoint yet; or there are, and none is whole."""


class DamagedCheckpoint(InputError):
    """The newest checkpoint of a stage is damaged or unfinished; training can go on from the one before."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """No: the host loop asks, by a count of its own, and jax takes the last number that it was asked about."""
        del step
        return False


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
        self._manager = _Manager(self.folder, options=options, item_handlers=handlers)
        self._sealer = ThreadPoolExecutor(1)
        self._saving: tuple[int, Future[None]] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            self._finish()
        except InputError as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # what ended the training is what the user has to hear
        finally:
            self._sealer.shutdown()
            with contextlib.suppress(Exception):  # Orbax raises the error of a save once more
                self._manager.close()

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Saves after ``step`` steps, in the background; a kill leaves the checkpoints before as they are.

        Raises InputError where this one, or the one before, cannot be written.
        """
        self._finish()
        with self._named_save(step):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                    data=ocp.args.JsonSave(data_state),
                ),
            )
        self._saving = step, self._sealer.submit(self._seal, step)

    def _seal(self, step: int) -> None:
        self._manager.wait_until_finished()
        if is_first():
            manifest.seal(self.folder / str(step))

    def _finish(self) -> None:
        """Waits for the save that is under way. Raises InputError where it failed."""
        if self._saving:
            (step, sealed), self._saving = self._saving, None
            with self._named_save(step):
                sealed.result()

    @contextlib.contextmanager
    def _named_save(self, step: int):
        """What Orbax or the disk raises in a save, as an InputError that names the folder and what is left there."""
        try:
            yield
        except Exception as error:
            left = [old for old in self._steps() if old != step and self._is_sealed(old)]
            going_on = f"the same command with --resume goes on from step {left[0]}" if left else "there is none before"
            raise InputError(
                f"{self.folder}: the checkpoint of step {step} cannot be written: {_reason(error)}. Make room there; "
                f"{going_on}."
            ) from error

    def latest_step(self) -> int | None:
        """Steps done in the newest checkpoint, whole or not, or None."""
        return max(self._steps(), default=None)

    def newest_whole(self) -> int | None:
        """Steps done in the newest checkpoint whose files are as they were written, or None where there is none yet.

        Warns of newer ones that are not. A newest one without a manifest is one that a kill left unfinished. Raises
        InputError where there are checkpoints and all are damaged. On several hosts the first one reads for all.
        """
        whole, problems = _DAMAGED, {}
        if is_first():
            for step in self._steps():
                problem = self._problem(step)
                if problem is None:
                    whole = step
                    break
                problems[step] = problem
            if whole == _DAMAGED and len(problems) <= 1 and not any(map(self._is_sealed, problems)):
                whole = _NONE
        whole = first_says(whole)
        named = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
        if whole == _DAMAGED:
            raise InputError(
                f"{self.folder}: none of the checkpoints is whole ({named}). Move the folder away, and the "
                "stage begins again."
            )
        if problems:
            instead = f"the one of step {whole} is used" if whole != _NONE else "the stage begins again"
            logger.warning("%s: a checkpoint is not whole (%s); %s.", self.folder, named, instead)
        return None if whole == _NONE else whole

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, and what kills left half-written: a resumed run writes them again."""
        for later in self._steps():
            if later > step:
                self._manager.delete(later)
        if is_first():
            for partial in self.folder.glob(f"*{_PARTIAL}*"):
                shutil.rmtree(partial)

    def restore(self, state: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """A whole checkpoint in the shape and sharding of ``state``, and the data-iterator state.

        That of ``step``, where ``newest_whole`` has been asked already.
        """
        step = self.newest_whole() if step is None else step
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
        """Only the parameters of the newest checkpoint, in the shape and sharding of ``params`` (may be abstract).

        Raises DamagedCheckpoint where it is not whole: what was trained less is not taken in its place.
        """
        step = self.latest_step()
        if step is None:
            raise InputError(f"{self.folder}: holds no checkpoint; the stage that writes it has to run first.")
        problem = self._problem(step, "params/") if is_first() else None
        if first_says(int(problem is not None)):
            raise DamagedCheckpoint(f"{self.folder}: the checkpoint of step {step} is not whole ({problem}).")
        self._check_shapes(step, params)
        with _named_errors(self.folder):
            return self._restore(step, params=ocp.args.StandardRestore(_abstract(params))).params

    def _steps(self) -> list[int]:
        """Of all checkpoints in the folder, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def _is_sealed(self, step: int) -> bool:
        return manifest.is_sealed(self.folder / str(step))

    def _problem(self, step: int, under: str = "") -> str | None:
        """Why a checkpoint, or what is ``under`` a folder of it, is not whole; None where it is."""
        if not self._is_sealed(step):
            return f"it has no {manifest.NAME}; a kill left it unfinished, or another version of jaxnr wrote it"
        return manifest.damage(self.folder / str(step), under)

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
        raise InputError(f"{folder}: the checkpoint cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
