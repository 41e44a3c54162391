"""The search of the largest batch: on made-up needs, on a stage's programs, and with the TPU compiler."""

import dataclasses

import pytest

from jaxnr.config import Config, EvaluationConfig, MeshConfig, ModelConfig, PromptConfig
from jaxnr.mesh import make_mesh
from jaxnr.planning.compile import Needs, compile_program
from jaxnr.planning.largest_batch import LargestBatch, largest_batch_of, search
from jaxnr.planning.programs import Program, Resident, bytes_a_device, plan_stages
from jaxnr.planning.slices import find_slice, slice_devices, without_a_tpu

SMALL = dataclasses.replace(
    Config(),
    mesh=MeshConfig(data=1, fsdp=4),
    prompt=PromptConfig(max_prompt_tokens=32, prompt_buckets=(32,), max_new_tokens=8, vocabulary_size=512),
    teacher=ModelConfig(compute="bfloat16", num_layers=2),
    evaluation=EvaluationConfig(prompts_per_step=8, best_of_n=(1, 4)),
)


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (11.0, (0, 1)),
        (12.0, (1, 2)),
        (29.0, (9, 10)),
        (30.0, (10, 11)),
        (31.9, (10, 11)),
        (1e3, (495, 510)),  # a 32nd apart
    ],
)
@pytest.mark.parametrize("other", [2, 4, 32])
def test_the_largest_number_is_found_with_few_questions(limit, found, other):
    asked = []

    def need(number: int) -> float:
        asked.append(number)
        return 10.0 + 2 * number

    assert search(need, limit, other) == found
    assert len(asked) == len(set(asked)) <= 5


@pytest.mark.parametrize("power", [0.5, 0.8, 1.2, 2.0])
def test_what_fits_and_what_does_not_were_asked_for_where_needs_are_not_linear(power):
    asked = {}

    def need(number: int) -> float:
        asked[number] = 10.0 + number**power
        return asked[number]

    fits, too_large = search(need, 30.0, 2)
    assert asked[fits] <= 30.0
    assert too_large is not None
    assert asked[too_large] > 30.0
    assert len(asked) <= 8


def needs(program: Program, own: float) -> Needs:
    return Needs(program=program.name, sizes="", part_of="", fits=True, peak=own, own=own, flops=1.0, compute_ms=1.0)


def test_each_program_that_grows_fits_and_each_that_does_not_is_compiled_once():
    mesh = make_mesh(dataclasses.replace(SMALL.mesh, data=2))
    (stage,) = plan_stages(SMALL, mesh, ("distill",))
    names = [program.name for program in stage.programs if not program.part_of]
    asked = []

    def compiled(program: Program) -> Needs:
        asked.append(program.name)
        if program.name in ("teacher_lists", "supervised_step"):  # of another section's batch
            return needs(program, 90.0)
        prompts = program.arguments[-1].prompt_BS.shape[0] if program.name == "distill_step" else 0
        return needs(program, 2.0 * prompts)

    stays = sum(bytes_a_device(resident.tree) for resident in stage.residents)
    assert largest_batch_of(SMALL, stage, stays + 100.0, mesh, names, compiled) == LargestBatch(48, 56)
    assert asked.count("teacher_lists") == asked.count("supervised_step") == 1
    # What stays is beside every batch, and what does not grow may be too large by itself.
    assert largest_batch_of(SMALL, stage, stays + 80.0, mesh, names, compiled) == LargestBatch(0, None)
    assert largest_batch_of(SMALL, stage, stays + 100.0, mesh, ["teacher_lists"], compiled) is None
    more = dataclasses.replace(stage, residents=(*stage.residents, Resident("again", stage.residents[0].tree)))
    assert largest_batch_of(SMALL, more, stays + 100.0, mesh, names, compiled) == LargestBatch(0, None)


@pytest.mark.slow
def test_the_largest_batch_that_is_found_fits_by_the_tpu_compiler():
    """With so little memory that the batch stays small: to compile one that fills a chip takes minutes."""
    pytest.importorskip("libtpu")
    without_a_tpu()
    slice_ = find_slice("v5e-4")
    mesh = make_mesh(SMALL.mesh, list(slice_devices(slice_)))
    (stage,) = plan_stages(SMALL, mesh, ("evaluate",))
    peaks = {}

    def compiled(program: Program) -> Needs:
        found = compile_program(program, slice_, mesh.size, 7)
        peaks[program.arguments[1].shape[0]] = found.peak
        return found

    usable = 4 * 2.0**20
    found = largest_batch_of(SMALL, stage, usable, mesh, ["best_of_n"], compiled)
    assert found is not None
    assert peaks[found.fits] <= usable < peaks[found.too_large]
    assert found.fits < found.too_large <= found.fits * 2
