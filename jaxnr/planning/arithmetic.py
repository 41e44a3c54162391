"""Arithmetic operations of a program, counted from its jaxpr.

The compiler's own account counts the body of a loop once, so that a model of 64 scanned layers seems to have one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax


def count_flops(traced: Any, trips: int) -> float:
    """Multiplications and additions of all matrix products of a traced program (``jitted.trace(...)``), on all devices.

    What rematerialisation computes twice counts twice. A ``scan`` counts its length, a ``while_loop``, whose end the
    data decides, ``trips`` times, and of a ``cond`` the dearest branch.
    """
    return _flops(traced.jaxpr.jaxpr, trips)


def _flops(jaxpr: Any, trips: int) -> float:
    return sum(_equation_flops(equation, trips) for equation in jaxpr.eqns)


def _equation_flops(equation: Any, trips: int) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        return _product_flops(equation)
    inner = [_flops(jaxpr, trips) for jaxpr in _jaxprs(equation.params)]
    if name == "cond":
        return max(inner)
    return {"scan": equation.params.get("length"), "while": trips}.get(name, 1) * sum(inner)


def _product_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    return 2.0 * equation.outvars[0].aval.size * math.prod(left.shape[axis] for axis in contracted)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs within an equation: bodies, branches, what is called."""
    for leaf in jax.tree.leaves(
        list(params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
    ):
        jaxpr = getattr(leaf, "jaxpr", leaf)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr
