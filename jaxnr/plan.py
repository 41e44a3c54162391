"""What a run needs on a TPU slice, from the real compiler, without the slice: ``jaxnr plan``.

Every program of the run is compiled for the slice with the TPU compiler, from shapes alone. Of each stage of the road
the plan adds up what is on a device at the same time: the trees that stay, and the program that needs most beside them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxnr.config import Config, MeshConfig
from jaxnr.errors import InputError
from jaxnr.files import write_text
from jaxnr.mesh import batch_ways, check_batch_sizes, make_mesh
from jaxnr.planning.compile import Needs, compile_program
from jaxnr.planning.largest_batch import LargestBatch, largest_batch_of
from jaxnr.planning.programs import SECTIONS, STAGES, Program, Stage, bytes_a_device, plan_stages, replaced
from jaxnr.planning.slices import Slice, find_slice, slice_devices

_GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What is on a device in one stage. Bytes a device."""

    stage: str
    residents: dict[str, float]
    """What stays all along, by name, without the padding that the compiler adds."""
    needs: list[Needs]
    peak: float
    """The residents and the largest ``own`` of the programs."""
    fits: bool


def plan(
    config: Config,
    slice_name: str,
    *,
    stages: tuple[str, ...] = STAGES,
    programs: tuple[str, ...] = (),
    largest_batch: bool = False,
    json_file: Path | None = None,
) -> bool:
    """Prints the plan of a run on a slice; returns whether it fits.

    Compiles the named ``stages``, of these the named ``programs`` (all, if none is named). Raises InputError for a
    slice, a stage or a program that is not known, and where the mesh or the batches do not fit the slice.
    """
    slice_ = find_slice(slice_name)
    if unknown := [name for name in stages if name not in STAGES]:
        raise InputError(f"--stages has {unknown[0]!r}; expected some of {', '.join(STAGES)}.")
    console = Console()
    console.width = max(console.width, 120)  # the tables, into a file too
    devices = list(slice_devices(slice_))
    mesh = make_mesh(config.mesh, devices)
    check_batch_sizes(config, mesh)
    console.print(
        f"{slice_.name}: {slice_.chips} chips ({slice_.topology}) of {_gib(slice_.chip.memory)} GiB; "
        f"mesh data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']}, tensor {mesh.shape['tensor']}",
        highlight=False,
    )
    started = time.monotonic()
    done: list[tuple[Program, Needs]] = []

    def compiled(program: Program) -> Needs:
        """Of a program that several stages share, the embedder's and the judge's, once."""
        for same, needs in done:
            if same is program:
                return needs
        trips = config.prompt.max_new_tokens - 1
        needs = compile_program(program, slice_, mesh.size, trips)
        done.append((program, needs))
        verdict = f"{_gib(needs.peak)} GiB" if needs.fits else f"does not fit ({_gib(needs.peak)} GiB)"
        console.print(f"[{time.monotonic() - started:5.0f} s] {program.name}: {verdict}", markup=False, highlight=False)
        return needs

    planned = plan_stages(config, mesh, stages)
    names = {program.name for stage in planned for program in stage.programs}
    if unknown := [name for name in programs if name not in names]:
        raise InputError(f"--programs has {unknown[0]!r}; expected some of {', '.join(sorted(names))}.")
    plans = [plan_stage(stage, slice_, compiled, programs) for stage in planned]
    for part in plans:
        _print_stage(part, slice_, console)
    largest = {}
    if largest_batch:
        for stage, part in zip(planned, plans, strict=True):
            chosen = [need.program for need in part.needs]
            wholes = [need.program for need in part.needs if need.part_of not in chosen]
            found = largest_batch_of(config, stage, slice_.usable, mesh, wholes, compiled)
            if found is not None:
                largest[stage.name] = found._asdict()
                console.print(f"{stage.name}: {_in_words(found, SECTIONS[stage.name])}", highlight=False)
    advice = {}
    for part in plans:
        if not part.fits:
            advice[part.stage] = list(what_would_fit(config, part, slice_, devices, compiled))
            for line in advice[part.stage]:
                console.print(f"{part.stage}: {line}", highlight=False)
    fits = all(part.fits for part in plans)
    if json_file is not None:
        content = {
            "slice": {"name": slice_.name, "chips": slice_.chips, "topology": slice_.topology},
            "memory": slice_.memory,
            "usable": slice_.usable,
            "mesh": dict(mesh.shape),
            "fits": fits,
            "stages": [dataclasses.asdict(part) for part in plans],
            "largest_batch": largest,
            "what_would_fit": advice,
        }
        write_text(json_file, json.dumps(content, indent=2))
    return fits


def plan_stage(
    stage: Stage, slice_: Slice, compiled: Callable[[Program], Needs], programs: tuple[str, ...] = ()
) -> StagePlan:
    """Compiles a stage's programs (the named ones, if any) and adds up what is on a device at once."""
    chosen = [program for program in stage.programs if not programs or program.name in programs]
    return add_up(stage, [compiled(program) for program in chosen], slice_.usable)


def add_up(stage: Stage, needs: list[Needs], usable: float) -> StagePlan:
    """The peak of a stage: what stays, and beside it the program that needs most of its own."""
    residents = {resident.name: bytes_a_device(resident.tree) for resident in stage.residents}
    peak = sum(residents.values()) + max((need.own for need in needs), default=0.0)
    fits = peak <= usable and all(need.fits for need in needs)
    return StagePlan(stage=stage.name, residents=residents, needs=needs, peak=peak, fits=fits)


def what_would_fit(
    config: Config, part: StagePlan, slice_: Slice, devices: list, compiled: Callable[[Program], Needs]
) -> Iterator[str]:
    """Changes of the settings, one at a time, each compiled; the first that fits is the last that is tried."""
    mesh = make_mesh(config.mesh, devices)
    wanted = tuple(need.program for need in part.needs if not need.part_of)
    for words, changed in _changes(config, part.stage, batch_ways(mesh), len(devices)):
        try:
            other = make_mesh(changed.mesh, devices)
            check_batch_sizes(changed, other)
            (stage,) = plan_stages(changed, other, (part.stage,))
        except InputError:
            continue
        found = plan_stage(stage, slice_, compiled, wanted)
        yield f"with {words} it {'fits' if found.fits else 'does not fit either'} ({_gib(found.peak)} GiB)"
        if found.fits:
            return
    yield "not tried: a larger slice, a smaller model, shorter prompts"


def _changes(config: Config, stage: str, ways: int, devices: int) -> Iterator[tuple[str, Config]]:
    section = SECTIONS[stage]
    settings: Any = getattr(config, section)
    shapes = config.policies if stage == "warm_start" else ("student" if stage == "distill" else "teacher",)

    for shape in shapes:
        if getattr(config, shape).remat != "layers":
            yield f'{shape}.remat = "layers"', replaced(config, shape, remat="layers")
    parts = getattr(settings, "microbatches", 0)
    most = settings.prompts_per_step // ways
    if parts and parts < most:
        yield f"{section}.microbatches = {most}", replaced(config, section, microbatches=most)
    for tensor in (1, 2, 4):
        axes = MeshConfig(data=1, fsdp=devices // tensor, tensor=tensor)
        if axes != config.mesh and devices % tensor == 0:
            yield f"mesh.fsdp = {axes.fsdp}, mesh.tensor = {tensor}", dataclasses.replace(config, mesh=axes)
    for shape in shapes:
        if stage != "evaluate" and not getattr(config, shape).lora_rank:
            yield f"{shape}.lora_rank = 32", replaced(config, shape, lora_rank=32)
    if stage != "evaluate" and settings.group_size > 3:
        yield (
            f"{section}.group_size = {settings.group_size // 2}",
            replaced(config, section, group_size=settings.group_size // 2),
        )
    if settings.prompts_per_step > ways:
        yield (
            f"{section}.prompts_per_step = {ways}",
            replaced(config, section, prompts_per_step=ways)
            if not parts
            else replaced(config, section, prompts_per_step=ways, microbatches=1),
        )


def _in_words(found: LargestBatch, section: str) -> str:
    if not found.fits:
        return "not even the smallest batch fits"
    end = "nothing larger was tried" if found.too_large is None else f"with {found.too_large} it does not"
    return f"with {section}.prompts_per_step = {found.fits} it fits; {end}"


def _print_stage(part: StagePlan, slice_: Slice, console: Console) -> None:
    table = Table(title=f"{part.stage}: bytes a device, and estimates at the published peaks", title_justify="left")
    for column in ("program", "GiB", "TFLOP", "GB moved", "ms at least", "collectives (GB)"):
        table.add_column(column, justify="left" if column in ("program", "collectives (GB)") else "right")
    for need in part.needs:
        name = f"  {need.program}" if need.part_of else need.program
        if not need.fits:
            table.add_row(
                f"{name}\n{need.sizes}", f"{_gib(need.peak)} !", f"{need.flops / 1e12:.3g}", "", "", "does not fit"
            )
            continue
        bound = "compute" if need.compute_ms >= need.memory_ms else "memory"
        moved = "\n".join(f"{each.count} {kind} ({each.bytes / 1e9:.3g})" for kind, each in need.collectives.items())
        table.add_row(
            f"{name}\n{need.sizes}",
            _gib(need.peak),
            f"{need.flops / 1e12:.3g}",
            f"{need.memory_bytes / 1e9:.3g}",
            f"{need.least_ms:.3g} ({bound})",
            moved or "none",
        )
    console.print(table)
    stays = ", ".join(f"{name} {_gib(size)}" for name, size in part.residents.items())
    verdict = "fits" if part.fits else "does NOT fit"
    console.print(
        f"{part.stage}: {_gib(part.peak)} GiB at once ({stays}; the rest is the largest program's own) of "
        f"{_gib(slice_.memory)}, {_gib(slice_.usable)} of them usable: {verdict}\n",
        highlight=False,
    )


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"
