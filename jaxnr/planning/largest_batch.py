"""The largest batch of a stage that fits a slice, found with few compilations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxnr.config import Config
from jaxnr.mesh import batch_ways
from jaxnr.planning.compile import Needs
from jaxnr.planning.programs import SECTIONS, Program, Stage, bytes_a_device, plan_stages, replaced

_MOST_QUESTIONS = 8
"""In the search of one stage: a compilation takes a large model minutes."""
_PRECISION = 32
"""The search ends when what fits and what does not are a 32nd apart."""


class LargestBatch(NamedTuple):
    """Prompts a step of a stage, with the config's group size and microbatches."""

    fits: int
    """Compiled, and found to fit; 0 where the smallest does not."""
    too_large: int | None
    """The smallest that was compiled and did not fit; None where the search ended before there was one."""


def largest_batch_of(
    config: Config,
    stage: Stage,
    usable: float,
    mesh: Mesh,
    names: list[str],
    compiled: Callable[[Program], Needs],
) -> LargestBatch | None:
    """The largest batch of a stage with which the named programs fit into ``usable`` bytes, beside what stays.

    ``stage`` is that of the config's own batch, with which the search begins. None where no named program grows with
    the batch, as the embedder's and the judge's do not.
    """
    settings = getattr(config, SECTIONS[stage.name])
    unit = batch_ways(mesh) * getattr(settings, "microbatches", 1)
    own_units = settings.prompts_per_step // unit
    budget = usable - sum(bytes_a_device(resident.tree) for resident in stage.residents)

    @functools.cache
    def programs(units: int) -> dict[str, Program]:
        if units == own_units:
            planned = stage
        else:
            changed = replaced(config, SECTIONS[stage.name], prompts_per_step=unit * units)
            (planned,) = plan_stages(changed, mesh, (stage.name,))
        return {program.name: program for program in planned.programs}

    def own(name: str, units: int) -> float:
        needs = compiled(programs(units)[name])
        return needs.own if needs.fits else max(needs.own, 1.01 * budget)

    other = own_units if own_units > 1 else 2
    growing = [name for name in names if _shapes(programs(1)[name]) != _shapes(programs(other)[name])]
    if not growing:
        return None
    if any(own(name, own_units) > budget for name in names if name not in growing):
        return LargestBatch(0, None)
    if len(growing) > 1:
        growing.sort(key=lambda name: -own(name, other))  # the first to reach the limit, the first to be asked for

    def need(units: int) -> float:
        most = 0.0
        for name in growing:
            most = max(most, own(name, units))
            if most > budget:
                break
        return most

    fits, too_large = search(need, budget, other)
    return LargestBatch(unit * fits, None if too_large is None else unit * too_large)


def search(need: Callable[[int], float], limit: float, other: int) -> tuple[int, int | None]:
    """The largest number found whose ``need`` is within the limit, and the smallest found whose is not.

    ``need`` is dear to ask for and about linear: where the line through two answers meets the limit it is asked for
    next, until the answers close in or have been too many.
    """
    known = {1: need(1)}
    if known[1] > limit:
        return 0, 1
    known[other] = need(other)
    while True:
        low = max(number for number in known if known[number] <= limit)
        high = min((number for number in known if known[number] > limit), default=None)
        step = max(1, low // _PRECISION)
        if len(known) >= _MOST_QUESTIONS or (high is not None and high - low <= step):
            return low, high
        begin, end = sorted(known)[-2:] if high is None else (low, high)
        slope = (known[end] - known[begin]) / (end - begin)
        guess = begin + int((limit - known[begin]) / slope) if slope > 0 else 2 * low
        if high is not None:
            guess += step if next(reversed(known)) == low else 0  # beyond the limit now: the answers close in
            guess = min(guess, high - step)
        guess = max(low + step, guess)
        known[guess] = need(guess)


def _shapes(program: Program) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(program.arguments)]
