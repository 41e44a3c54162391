"""The batch of a step whose loss or gradient was not finite, in a file to look at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxnr.data.examples import Example
from jaxnr.files import write_text
from jaxnr.hosts import gather_rows, is_first
from jaxnr.training.steps import Batch


class LastBatch:
    """Remembers what the last step trained on; ``write`` puts it into ``folder``, as JSON."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, mesh: Mesh):
        self._folder, self._tokenizer, self._mesh = folder, tokenizer, mesh
        self._examples: Sequence[Example] = ()
        self._batch: Batch | None = None

    def remember(self, examples: Sequence[Example], batch: Batch) -> None:
        """Before each step, with this process's examples and the whole batch."""
        self._examples, self._batch = examples, batch

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> Path:
        """The file ``<stage>-<step>.json``: per prompt its example id, text and completions; per completion its text,
        tokens, and log-probabilities at sampling and reward where the batch has them. Numbers that are not finite are
        texts: "nan", "inf". All processes call it; the first writes.
        """
        assert self._batch is not None, "no step has been made"
        arrays = {name: array for name, array in vars(self._batch).items() if array is not None}
        arrays["example_id_B"] = np.array([example.example_id for example in self._examples])
        arrays = gather_rows(arrays, self._mesh)
        path = self._folder / f"{stage}-{step}.json"
        if is_first():
            prompts = [self._prompt(arrays, row) for row in range(len(arrays["prompt_BS"]))]
            content = {"stage": stage, "step": step, "metrics": dict(metrics), "prompts": prompts}
            write_text(path, json.dumps(_spelt(content), ensure_ascii=False, allow_nan=False))
        return path

    def _prompt(self, arrays: dict[str, np.ndarray], row: int) -> dict:
        groups = arrays["completion_BGT"][row]
        return {
            "example_id": int(arrays["example_id_B"][row]),
            "prompt": self._text(arrays["prompt_BS"][row][arrays["prompt_mask_BS"][row]]),
            "completions": [self._completion(arrays, row, column) for column in range(len(groups))],
        }

    def _completion(self, arrays: dict[str, np.ndarray], row: int, column: int) -> dict:
        mask_T = arrays["mask_BGT"][row, column]
        tokens = arrays["completion_BGT"][row, column][mask_T]
        completion = {"text": self._text(tokens), "tokens": tokens.tolist()}
        if "reward_BG" in arrays:
            completion["reward"] = float(arrays["reward_BG"][row, column])
            completion["old_logprobs"] = arrays["old_logprobs_BGT"][row, column][mask_T].tolist()
        return completion

    def _text(self, tokens: np.ndarray) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _spelt(value: Any) -> Any:
    """JSON has no word for numbers that are not finite: the name of each."""
    if isinstance(value, dict):
        return {key: _spelt(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_spelt(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
