"""Compiles a planned program for a slice that is not there, and says what it needs."""

from __future__ import annotations

import dataclasses
import re
import time

import jax

from jaxnr.planning import hlo
from jaxnr.planning.arithmetic import count_flops
from jaxnr.planning.programs import Program, bytes_a_device
from jaxnr.planning.slices import Slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What a compiled program needs of every device. Bytes are the compiler's; times are estimates.

    Of a program that does not fit the compiler says no more than its ``peak``.
    """

    program: str
    sizes: str
    part_of: str
    fits: bool
    peak: float
    """Bytes: the most that are in use at once, arguments and results among them."""
    own: float
    """Bytes of the peak beside what lasts: parameters and optimizer state."""
    flops: float
    """Of matrix products, what is rematerialised among them, an equal share of all devices."""
    memory_bytes: float = 0.0
    """Read and written."""
    collectives: dict[str, hlo.Collective] = dataclasses.field(default_factory=dict)
    compute_ms: float
    memory_ms: float = 0.0
    compile_seconds: float = 0.0

    @property
    def least_ms(self) -> float:
        """Milliseconds at the published peaks, whichever of compute and memory takes longer; no interconnect."""
        return max(self.compute_ms, self.memory_ms)


def compile_program(program: Program, slice_: Slice, devices: int, trips: int) -> Needs:
    """Compiles with the TPU compiler. ``trips``: how often a loop whose end the data decides is taken to run."""
    lasting = bytes_a_device([program.arguments[place] for place in program.lasting])
    flops = count_flops(program.traced, trips) / devices
    known = {"program": program.name, "sizes": program.what, "part_of": program.part_of, "flops": flops}
    known["compute_ms"] = 1e3 * flops / slice_.flops
    started = time.monotonic()
    try:
        compiled = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := wanted_bytes(str(error))) is None:
            raise
        seconds = time.monotonic() - started
        return Needs(**known, fits=False, peak=needed, own=needed - lasting, compile_seconds=seconds)
    peak = float(compiled.memory_analysis().peak_memory_in_bytes)
    text = hlo.Program(compiled.as_text())
    moved = text.memory_bytes()
    return Needs(
        **known,
        fits=True,
        peak=peak,
        own=peak - lasting,
        memory_bytes=moved,
        memory_ms=1e3 * moved / slice_.bandwidth,
        collectives=text.collectives(),
        compile_seconds=time.monotonic() - started,
    )


def wanted_bytes(message: str) -> float | None:
    """What a program needs in all, as the compiler says when that is too much; None for any other message."""
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])\b", message)
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]] if found else None
