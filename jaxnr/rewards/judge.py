"""What a judge is, and how its answers become coverage and specificity."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from jaxnr.config import JudgeConfig
from jaxnr.errors import InputError
from jaxnr.prompting.output import ParsedList
from jaxnr.rewards.criteria import Criterion, TextRubric

WRITTEN_TOKENS = 64
"""A judge that writes does so in at most so many tokens: they hold one question."""

INSTRUCTIONS = "You check a list of news search queries that was written for one reader."


class Judge(Protocol):
    """Answers yes/no questions about lists of queries."""

    def __call__(self, lists: Sequence[Sequence[str]], criteria: Sequence[Sequence[Criterion]]) -> np.ndarray:
        """yes_NC: P(yes) of the C-th of ``criteria[n]`` for the queries ``lists[n]``.

        NaN where there is no answer: the judge failed, cannot judge such a criterion, or the list has fewer of them.
        """
        ...


class Writer(Judge, Protocol):
    """A judge that is a language model, and writes as well."""

    def write(self, messages: Sequence[str]) -> list[str]:
        """The reply to each message, of ``WRITTEN_TOKENS`` at most; empty where there is none."""
        ...


def context(queries: Sequence[str]) -> str:
    """What a language model reads before any question about a list: the same for all of its criteria."""
    return f"{INSTRUCTIONS}\n\nQueries:\n" + "".join(f"- {query}\n" for query in queries) + "\n"


def request(criterion: Criterion) -> str:
    """The question, as it follows the context."""
    return f"Question: {criterion.question}\nAnswer with yes or no alone."


def judged_rewards(
    judge: Judge, rubrics: Sequence[TextRubric], lists: Sequence[Sequence[ParsedList]]
) -> dict[str, np.ndarray]:
    """coverage and specificity of ``lists[b][g]`` under ``rubrics[b]``, each [B, G]: Σ w_j P_j(yes) / Σ w_j.

    NaN where one of a reward's answers is missing, or where the rubric has no criterion for it: the list then leaves
    its group's mean. A list without queries is not asked about and gets 0; equal lists of a user are asked about once.
    """
    row_of: dict[tuple[tuple[str, ...], TextRubric], int] = {}
    row_BG = np.array(
        [
            [row_of.setdefault((parsed.queries, rubric), len(row_of)) if parsed.queries else -1 for parsed in group]
            for rubric, group in zip(rubrics, lists, strict=True)
        ]
    )
    criteria = [(*rubric.coverage, *rubric.specificity) for _, rubric in row_of]
    yes_NC = judge([queries for queries, _ in row_of], criteria)
    weights_RNC = np.zeros((len(TextRubric._fields), *yes_NC.shape))
    for row, (_, rubric) in enumerate(row_of):
        column = 0
        for reward, part in enumerate(rubric):
            weights_RNC[reward, row, column : column + len(part)] = [criterion.weight for criterion in part]
            column += len(part)
    weighted_RNC = np.where(weights_RNC > 0, weights_RNC * yes_NC, 0.0)
    with np.errstate(invalid="ignore"):  # 0 / 0: no criterion
        reward_RN = weighted_RNC.sum(-1) / weights_RNC.sum(-1)
    reward_RBG = np.pad(reward_RN, ((0, 0), (0, 1)))[:, row_BG]  # row -1, the last: a list without queries
    return dict(zip(TextRubric._fields, reward_RBG.astype(np.float32), strict=True))


class OpenedWhenAsked:
    """A judge that is opened when it is first asked: most stages of a run ask none, and its weights take memory."""

    def __init__(self, open_it: Callable[[], Judge]):
        self._opened = functools.cache(open_it)

    def __call__(self, lists: Sequence[Sequence[str]], criteria: Sequence[Sequence[Criterion]]) -> np.ndarray:
        """See ``Judge``; raises what opening raises."""
        return self._opened()(lists, criteria)


def judge_of(config: JudgeConfig, out: Path, mesh: Mesh) -> Judge | None:
    """The judge that a config asks for, opened when asked; None for the built-in similarity and term statistics."""
    return None if config.kind == "similarity" else OpenedWhenAsked(lambda: open_judge(config, out, mesh))


def open_judge(config: JudgeConfig, out: Path, mesh: Mesh) -> Judge:
    """A judge that reads. Files are within ``out``, the run's folder.

    Raises InputError where the model cannot be loaded, or the variable that holds the endpoint's token is not set.
    """
    if config.kind == "word_overlap":
        from jaxnr.rewards.judge_word_overlap import word_overlap

        return word_overlap
    judge = _open_language_model(config, out, mesh)
    if config.rubric == "template":
        return judge
    from jaxnr.rewards.written_rubric import RUBRIC_FILE, WritingJudge

    return WritingJudge(judge, config.model, out / RUBRIC_FILE, config.max_failed_share)


def _open_language_model(config: JudgeConfig, out: Path, mesh: Mesh) -> Writer:
    if config.kind == "language_model":
        from jaxnr.models.decoder import Decoder
        from jaxnr.models.huggingface import load
        from jaxnr.rewards.judge_language_model import LanguageModelJudge

        model, params, tokenizer = load(config.model, mesh=mesh, dtype=config.compute)
        if not isinstance(model, Decoder):
            raise InputError(f"{config.model}: an encoder; expected a language model as the judge.")
        return LanguageModelJudge(model, params, tokenizer, mesh, lists_per_step=config.lists_per_step)
    from jaxnr.rewards.judge_http import HttpJudge

    cache = out / config.cache if config.cache else None
    return HttpJudge(config, token=_token(config.token_variable), cache=cache)


def _token(variable: str) -> str:
    token = os.environ.get(variable, "").strip() if variable else ""
    if variable and not token:
        raise InputError(f"The environment variable {variable} (token_variable of the judge) is not set or is empty.")
    return token
