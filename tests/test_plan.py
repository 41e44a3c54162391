"""What is on a device at once, the largest batch, and plans of small runs by the TPU compiler."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxnr.config import Config, JudgeConfig, MeshConfig, ModelConfig, PromptConfig, load_config
from jaxnr.errors import InputError
from jaxnr.mesh import check_batch_sizes, make_mesh, replicated
from jaxnr.plan import _changes, add_up
from jaxnr.planning.compile import Needs, wanted_bytes
from jaxnr.planning.programs import STAGES, Resident, Stage, bytes_a_device, plan_stages
from jaxnr.planning.slices import Slice, find_slice, slice_devices, without_a_tpu
from jaxnr.rewards.judge import WRITTEN_TOKENS

CONFIGS = Path(__file__).parents[1] / "configs"

SMALL = dataclasses.replace(
    Config(),
    mesh=MeshConfig(data=1, fsdp=8),
    prompt=PromptConfig(max_prompt_tokens=32, prompt_buckets=(32,), max_new_tokens=8, vocabulary_size=512),
    teacher=ModelConfig(compute="bfloat16", num_layers=2),
)


def needs(name: str, own: float, fits: bool = True) -> Needs:
    return Needs(program=name, sizes="", part_of="", fits=fits, peak=own, own=own, flops=1.0, compute_ms=1.0)


def resident(name: str, count: int, *spec) -> Resident:
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    sharding = NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return Resident(name, {"w": jax.ShapeDtypeStruct((count,), jnp.float32, sharding=sharding)})


def test_a_stage_needs_what_stays_and_its_most_demanding_program():
    stage = Stage("grpo", (), (resident("state", 800, "fsdp"), resident("embedder", 10)))
    part = add_up(stage, [needs("sampler", 700.0), needs("step", 300.0)], usable=1140.0)
    assert part.residents == {"state": 400.0, "embedder": 40.0}
    assert part.peak == 400 + 40 + 700
    assert part.fits
    assert not add_up(stage, [needs("sampler", 701.0)], usable=1140.0).fits
    assert not add_up(stage, [needs("step", 1.0, fits=False)], usable=1140.0).fits


def test_the_compilers_message_says_what_was_wanted():
    first = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.85G) exceeds available HBM (15G)."
    )
    assert wanted_bytes(first) == 20.85 * 2**30
    assert wanted_bytes("Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm.") == 512.5 * 2**20
    assert wanted_bytes("something else") is None


def test_programs_are_those_of_the_run_at_its_sizes():
    mesh = make_mesh(SMALL.mesh)
    stages = {stage.name: stage for stage in plan_stages(SMALL, mesh)}
    assert tuple(stages) == STAGES
    assert [program.name for program in stages["grpo"].programs] == [
        "teacher_sampler",
        "teacher_prefill",
        "teacher_decode",
        "grpo_step",
    ]
    state, batch = stages["grpo"].programs[-1].arguments
    assert batch.completion_BGT.shape == (SMALL.grpo.prompts_per_step, SMALL.grpo.group_size, 8)
    params = bytes_a_device(state.params)
    assert bytes_a_device(state) == pytest.approx(3 * params, rel=0.02)  # AdamW: two moments
    # A second teacher begins where the first does, so the state before the first step is kept.
    assert len(stages["grpo"].residents) == 2
    once = dataclasses.replace(SMALL, grpo=dataclasses.replace(SMALL.grpo, uniform_steps=0))
    assert len(plan_stages(once, mesh, ("grpo",))[0].residents) == 1
    without = dataclasses.replace(SMALL, warm_start=dataclasses.replace(SMALL.warm_start, steps=0))
    assert [stage.name for stage in plan_stages(without, mesh)] == ["grpo", "distill", "evaluate"]
    teacher_alone = dataclasses.replace(SMALL, distill=dataclasses.replace(SMALL.distill, steps=0))
    stages = {stage.name: stage for stage in plan_stages(teacher_alone, mesh)}
    assert list(stages) == ["warm_start", "grpo", "evaluate"]
    assert len(stages["warm_start"].programs) == 1


def test_planned_programs_run():
    """The abstract arguments fit the functions: each compiles here, and a step's state comes back as it went in."""
    mesh = make_mesh(SMALL.mesh)
    for stage in plan_stages(SMALL, mesh, ("distill",)):
        for program in stage.programs:
            out = jax.eval_shape(program.jitted, *program.arguments)
            if program.name.endswith("_step"):
                assert jax.tree.map(lambda x: (x.shape, x.dtype), out[0]) == jax.tree.map(
                    lambda x: (x.shape, x.dtype), program.arguments[0]
                )


def test_the_embedder_and_the_judges_are_spread_over_the_whole_slice():
    """Those of a known shape: 0.6 billion parameters, of which a device of eight holds an eighth; norms are small."""
    name = "Qwen/Qwen3-Embedding-0.6B"
    config = dataclasses.replace(
        SMALL,
        retrieval=dataclasses.replace(SMALL.retrieval, embedder="sentence_encoder", embedder_path=name),
        judge=dataclasses.replace(SMALL.judge, kind="language_model", model=name),
        second_judge=dataclasses.replace(SMALL.second_judge, kind="language_model", model=name),
    )
    (stage,) = plan_stages(config, make_mesh(SMALL.mesh), ("evaluate",))
    _, *helpers = stage.residents
    assert [resident.name for resident in helpers] == ["embedder", "judge", "second judge"]
    for resident in helpers:
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(resident.tree))
        assert bytes_a_device(resident.tree) == pytest.approx(whole / 8, rel=0.01)
    programs = {program.name: program for program in stage.programs}
    assert {"embed", "judge", "second_judge"} < programs.keys()
    for name in ("embed", "judge", "second_judge"):
        assert programs[name].arguments[1].sharding.mesh.size == 8


def test_a_judge_that_words_its_questions_has_a_program_for_it():
    mesh = make_mesh(SMALL.mesh)
    judge = JudgeConfig(kind="language_model", model="Qwen/Qwen2.5-0.5B-Instruct", lists_per_step=8)
    for rubric, expected in (("template", ["judge"]), ("language_model", ["judge", "judge_rubric"])):
        config = dataclasses.replace(SMALL, judge=dataclasses.replace(judge, rubric=rubric))
        (stage,) = plan_stages(config, mesh, ("grpo",))
        programs = {program.name: program for program in stage.programs if program.name.startswith("judge")}
        assert list(programs) == expected
        assert [resident.name for resident in stage.residents].count("judge") == 1
    writer = programs["judge_rubric"]
    assert jax.eval_shape(writer.jitted, *writer.arguments).tokens_BGT.shape == (8, 1, WRITTEN_TOKENS)


def test_a_reference_has_parameters_of_its_own_unless_adapters_can_be_taken_off():
    mesh = make_mesh(SMALL.mesh)
    config = dataclasses.replace(SMALL, grpo=dataclasses.replace(SMALL.grpo, kl_weight=0.1))
    (stage,) = plan_stages(config, mesh, ("grpo",))
    assert "reference" in [program.name for program in stage.programs]
    assert "reference's parameters" in [resident.name for resident in stage.residents]
    adapted = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, lora_rank=4))
    (stage,) = plan_stages(adapted, mesh, ("grpo",))
    assert "reference" in [program.name for program in stage.programs]
    assert "reference's parameters" not in [resident.name for resident in stage.residents]


def test_microbatches_shrink_what_is_sampled_at_once():
    mesh = make_mesh(SMALL.mesh)
    config = dataclasses.replace(SMALL, grpo=dataclasses.replace(SMALL.grpo, microbatches=2))
    sampler, *_, step = plan_stages(config, mesh, ("grpo",))[0].programs
    assert sampler.arguments[1].shape[0] == SMALL.grpo.prompts_per_step // 2
    assert step.arguments[1].prompt_BS.shape[0] == SMALL.grpo.prompts_per_step


def test_changes_that_would_help_are_proposed_where_they_are_not_made_already():
    proposed = dict(_changes(SMALL, "grpo", 8, 8))
    assert {
        'teacher.remat = "layers"',
        "grpo.microbatches = 2",
        "teacher.lora_rank = 32",
        "grpo.group_size = 4",
    } <= set(proposed)
    done = proposed['teacher.remat = "layers"']
    assert done.teacher.remat == "layers"
    assert 'teacher.remat = "layers"' not in dict(_changes(done, "grpo", 8, 8))
    student = 'student.remat = "layers"'
    alone = dataclasses.replace(SMALL, distill=dataclasses.replace(SMALL.distill, steps=0))
    assert student in dict(_changes(SMALL, "warm_start", 8, 8))
    assert student not in dict(_changes(alone, "warm_start", 8, 8))


def plan(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own, since jax's platforms are set once."""
    command = [sys.executable, "-m", "jaxnr.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_an_unknown_slice_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "run.toml").write_text("")
    done = plan(str(tmp_path / "run.toml"), "--slice", "v9-1")
    assert done.returncode == 2
    assert "v5e-64" in done.stderr


TINY_RUN = """
[prompt]
max_prompt_tokens = 32
prompt_buckets = [32]
max_new_tokens = 8
[teacher]
compute = "bfloat16"
num_layers = 2
[mesh]
data = 1
fsdp = 4
[grpo]
prompts_per_step = 4
"""


@pytest.mark.slow
@pytest.mark.parametrize("slice_name", ["v5e-4", "v4-8"])
def test_the_tpu_compiler_plans_a_small_run(tmp_path, slice_name):
    pytest.importorskip("libtpu")
    (tmp_path / "run.toml").write_text(TINY_RUN)
    options = ("--stages", "grpo", "--programs", "teacher_decode", "grpo_step", "--json", str(tmp_path / "plan.json"))
    done = plan(str(tmp_path / "run.toml"), "--slice", slice_name, *options)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "plan.json").read_text())
    decode, step = content["stages"][0]["needs"]
    assert decode["program"] == "teacher_decode"
    assert 0 < decode["peak"] < step["peak"] < content["usable"]
    # Each layer's weights are gathered, so collectives are there, and more bytes than one device holds are moved.
    assert step["collectives"]
    assert step["memory_bytes"] > step["peak"] / 10
    assert "TFLOP" in done.stdout


@pytest.mark.slow
def test_what_does_not_fit_ends_with_1_and_says_what_would(tmp_path):
    pytest.importorskip("libtpu")
    (tmp_path / "run.toml").write_text(
        TINY_RUN.replace("num_layers = 2", "num_layers = 2\nhidden_size = 16384\nintermediate_size = 65536")
    )
    done = plan(str(tmp_path / "run.toml"), "--slice", "v5e-4", "--stages", "grpo", "--programs", "grpo_step")
    assert done.returncode == 1, done.stderr
    assert "does NOT fit" in done.stdout
    assert "teacher.lora_rank = 32 it fits" in done.stdout


def test_slice_devices_of_a_topology_that_libtpu_does_not_have_is_an_input_error():
    pytest.importorskip("libtpu")
    odd = find_slice("v5e-4")
    with pytest.raises(InputError, match="topology"):
        slice_devices(Slice("odd", odd.chip, 7, "7x1x1x1"))


@pytest.mark.parametrize(
    ("name", "slice_name"),
    [
        *(("paper-full", slice_name) for slice_name in ("v5e-64", "v6e-32", "v5p-64")),
        *(("paper", slice_name) for slice_name in ("v5e-16", "v6e-8")),
    ],
)
def test_the_ready_configs_have_meshes_and_batches_for_their_slices(name, slice_name):
    pytest.importorskip("libtpu")
    without_a_tpu()
    slice_ = find_slice(slice_name)
    config = load_config(CONFIGS / f"{name}.toml")
    mesh = make_mesh(config.mesh, list(slice_devices(slice_)))
    check_batch_sizes(config, mesh)
    assert mesh.size == slice_.chips


def test_replicated_trees_take_their_whole_size_on_every_device():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    assert bytes_a_device(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16, sharding=replicated(mesh))) == 30
