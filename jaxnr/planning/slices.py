"""Cloud TPU slices by name: their chips, with the published figures of each, and the topology that the compiler wants.

Names of v5e and v6e count chips. Those of v4, v5p and tpu7x count TensorCores, of which a chip has two: v5p-64 is 32
chips.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from jaxnr.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU chip, by Google's published figures (Cloud TPU documentation, the page of each generation)."""

    name: str
    memory: float
    """Bytes of HBM."""
    usable: float
    """Bytes of it that the compiler gives to a program; it says so when one wants more."""
    flops: float
    """bfloat16 operations a second."""
    bandwidth: float
    """Bytes a second between HBM and the cores."""
    cores_in_name: int
    """What a slice's name counts, a chip."""
    devices: int = 1
    """What jax shows of a chip: of tpu7x both halves, each with half of the memory; of v4 and v5p one."""
    compiler_options: tuple[tuple[str, str], ...] = ()
    """Of the topology."""


_GIB = 2.0**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            memory=32 * _GIB,
            usable=30.75 * _GIB,
            flops=275e12,
            bandwidth=1228e9,
            cores_in_name=2,
            compiler_options=(("chip_config_name", "megacore"),),
        ),
        Chip(name="v5e", memory=16 * _GIB, usable=15.75 * _GIB, flops=197e12, bandwidth=819e9, cores_in_name=1),
        Chip(name="v5p", memory=95 * _GIB, usable=95 * _GIB, flops=459e12, bandwidth=2765e9, cores_in_name=2),
        Chip(name="v6e", memory=32 * _GIB, usable=31.25 * _GIB, flops=918e12, bandwidth=1638e9, cores_in_name=1),
        Chip(
            name="tpu7x",
            memory=192 * _GIB,
            usable=192 * _GIB,
            flops=2307e12,
            bandwidth=7380e9,
            cores_in_name=2,
            devices=2,
        ),
    )
}

_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
}
_TOPOLOGIES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
"""Chips of a slice to how they are wired, the usual shape of each size."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """So many chips, wired as ``topology`` says."""

    name: str
    chip: Chip
    chips: int
    topology: str

    @property
    def memory(self) -> float:
        """Bytes of HBM of a device, as jax shows it."""
        return self.chip.memory / self.chip.devices

    @property
    def usable(self) -> float:
        """Bytes of that which the compiler gives to a program."""
        return self.chip.usable / self.chip.devices

    @property
    def flops(self) -> float:
        """bfloat16 operations a second of a device."""
        return self.chip.flops / self.chip.devices

    @property
    def bandwidth(self) -> float:
        """HBM bytes a second of a device."""
        return self.chip.bandwidth / self.chip.devices


def slice_names() -> list[str]:
    """Every name that ``find_slice`` knows, smallest slices of a chip first."""
    return [f"{name}-{chips * CHIPS[name].cores_in_name}" for name, shapes in _TOPOLOGIES.items() for chips in shapes]


def find_slice(name: str) -> Slice:
    """The slice of a name (``v5e-64``, or ``v5litepod-64``, as its accelerator type is called).

    Raises InputError with the names that there are.
    """
    kind, _, number = name.replace("v5litepod", "v5e").partition("-")
    if kind in CHIPS and number.isdecimal():
        chip = CHIPS[kind]
        chips, rest = divmod(int(number), chip.cores_in_name)
        if not rest and chips in _TOPOLOGIES[kind]:
            return Slice(name, chip, chips, _TOPOLOGIES[kind][chips])
    raise InputError(f"--slice is {name!r}; expected one of {', '.join(slice_names())}.")


def without_a_tpu() -> None:
    """Tells jax and libtpu, before either is imported, that there is none to look for.

    Raises InputError where libtpu, which has the compiler, is not installed.
    """
    from importlib.util import find_spec

    if find_spec("libtpu") is None:
        raise InputError("The TPU compiler is not installed; expected `pip install 'jaxnr[tpu]'` before `jaxnr plan`.")
    # Where these are unset, libtpu asks the machine's metadata server for a TPU, and says at length that it has none.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_MIN_LOG_LEVEL="3", TPU_STDERR_LOG_LEVEL="3")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several plans at once: none of them holds a TPU
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def slice_devices(slice_: Slice) -> Sequence[Any]:
    """The devices of a slice that is not there, to compile for; ``without_a_tpu`` comes first.

    Their ``process_index`` is the host's. Raises InputError where the installed libtpu does not know the slice.
    """
    from jax.experimental.topologies import get_topology_desc

    name = f"{slice_.chip.name}:{slice_.topology}"
    try:
        return get_topology_desc(name, "tpu", **dict(slice_.chip.compiler_options)).devices
    except Exception as error:  # of many types, whatever libtpu finds wrong
        raise InputError(f"The installed libtpu does not know the topology {name}: {error}") from error
