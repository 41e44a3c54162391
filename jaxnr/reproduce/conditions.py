"""The runs that tables are made of: a whole one a seed, and ones that change a setting and share its first stages."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxnr.claim import claim
from jaxnr.config import Config, ModelConfig
from jaxnr.config_rules import validate
from jaxnr.errors import InputError
from jaxnr.rewards.composite import REWARDS
from jaxnr.road import STAGES, run_stages

BASE = "base"
"""The whole run of a seed, under the config as it is given."""

BEST_OF = (1, 2, 4, 8, 16, 32)
"""The paper's N."""

_DATA = ("data", "truth", "tokenizer", "retrieval", "done/data.json")
_WARM_STARTED_TEACHER = ("checkpoints/warm_start_teacher", "done/sft.json")
_TEACHER = ("checkpoints/grpo", "done/grpo.json")


class Condition(NamedTuple):
    """A run of one seed."""

    name: str
    """Of its folder, beside that of the base run."""
    config: Config
    shares: tuple[str, ...]
    """What it takes over from the base run's folder."""
    stages: tuple[str, ...]
    """What it then does itself."""


def base(config: Config) -> Condition:
    return Condition(BASE, config, (), STAGES)


def without(reward: str) -> str:
    """Name of the run whose teacher is trained without a reward."""
    return f"without_{reward}"


def reward_ablations(config: Config) -> Iterator[Condition]:
    """For each of the five rewards, the base run's warm-started teacher trained with a weight of 0 for it."""
    for reward in REWARDS:
        weights = dataclasses.replace(config.reward, **{reward: 0.0})
        changed = _teacher_alone(config, reward=weights)
        yield Condition(without(reward), changed, (*_DATA, *_WARM_STARTED_TEACHER), ("grpo", "evaluate"))


def best_of_many(config: Config) -> Condition:
    """The base run's teacher, with as many lists a user as the paper samples."""
    evaluation = dataclasses.replace(config.evaluation, best_of_n=BEST_OF)
    changed = dataclasses.replace(config, evaluation=evaluation)
    return Condition("best_of_32", changed, (*_DATA, *_TEACHER), ("evaluate",))


def size_name(size: str) -> str:
    """Name of the run whose teacher has another size."""
    return BASE if size == "1" else "teacher_" + "".join(c if c.isalnum() or c in ".-" else "_" for c in size)


def capacities(config: Config, sizes: Sequence[str]) -> Iterator[Condition]:
    """Teachers of other sizes on the base run's data: factors of its widths, or pretrained models by folder or name."""
    for size in sizes:
        if size == "1":
            continue
        changed = _teacher_alone(config, teacher=_sized(config, size))
        yield Condition(size_name(size), changed, _DATA, ("sft", "grpo", "evaluate"))


def _sized(config: Config, size: str) -> ModelConfig:
    """The teacher in another size. Raises InputError for a factor that makes no sense."""
    try:
        factor = float(size)
    except ValueError:
        return dataclasses.replace(config.teacher, path=size)
    if config.teacher.path:
        raise InputError(
            f"--sizes has {size!r}, but the teacher is pretrained; expected folders or hub names of models."
        )
    if not factor > 0:
        raise InputError(f"--sizes has {size!r}; expected factors above 0.")

    def scaled(width: int) -> int:
        return max(8, round(width * factor / 8) * 8)

    teacher = config.teacher
    return dataclasses.replace(
        teacher, hidden_size=scaled(teacher.hidden_size), intermediate_size=scaled(teacher.intermediate_size)
    )


CLEANING = {
    "no_cleaning": {"rules": False, "classifier": "none"},
    "rules": {"rules": True, "classifier": "none"},
    "rules_and_roberta": {"rules": True, "classifier": "roberta"},
}
"""What cleans the events, by the name of the run."""


def cleaning_name(config: Config, cleaning: str) -> str:
    """Name of the run under one of ``CLEANING``: the base run, where it is cleaned so."""
    return BASE if _cleaned(config, cleaning).cleaning == config.cleaning else cleaning


def cleanings(config: Config) -> Iterator[Condition]:
    """Teachers on the same log, cleaned in other ways from the start."""
    for cleaning in CLEANING:
        if cleaning_name(config, cleaning) != BASE:
            changed = _teacher_alone(_cleaned(config, cleaning))
            yield Condition(cleaning, changed, (), ("data", "sft", "grpo", "evaluate"))


def _cleaned(config: Config, cleaning: str) -> Config:
    # A classifier that the config names, by its folder for instance, is the one that is compared.
    changes = dict(CLEANING[cleaning])
    if changes["classifier"] != "none" and config.cleaning.classifier != "none":
        changes["classifier"] = config.cleaning.classifier
    return dataclasses.replace(config, cleaning=dataclasses.replace(config.cleaning, **changes))


def _teacher_alone(config: Config, **changes) -> Config:
    """Without student and second teacher, with no more lists a user than any other model has, and validated before and
    after training alone."""
    grpo = config.grpo
    return dataclasses.replace(
        config,
        **changes,
        grpo=dataclasses.replace(grpo, uniform_steps=0, validate_every=grpo.validate_every and grpo.steps),
        distill=dataclasses.replace(config.distill, steps=0),
        evaluation=dataclasses.replace(config.evaluation, best_of_n=tuple(sorted({1, config.evaluation.samples}))),
    )


def carry_out(condition: Condition, seed_dir: Path) -> Path:
    """The folder of the run, finished: what an earlier process did of it is not done again.

    What it shares is linked, not copied: the folder is of use beside the base run's alone. Raises InputError where the
    folder holds a run of another config.
    """
    validate(condition.config)
    folder = seed_dir / condition.name
    claim(condition.config, folder, begin=True, resume=True)
    for path in condition.shares:
        origin, link = seed_dir / BASE / path, folder / path
        if origin.exists() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(origin, link.parent))
    run_stages(condition.config, folder, condition.stages, resume=True)
    jax.clear_caches()  # the next run compiles programs of its own
    return folder
