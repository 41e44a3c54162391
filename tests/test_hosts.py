"""Several processes on this machine are one run: they give what one process gives on the same mesh, files and all."""

import contextlib
import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import random_params, relative_gap, tiny_decoder
from tiny_run import CONFIG, WORLD

from jaxnr.checkpoint import Checkpoints
from jaxnr.config import Config, DataConfig, JudgeConfig, MeshConfig, SecondJudgeConfig, save_config
from jaxnr.data.schema import document_texts
from jaxnr.data.synthetic.world import generate_world
from jaxnr.errors import InputError
from jaxnr.hosts import join, together, union
from jaxnr.mesh import make_mesh
from jaxnr.models.decoder import init_params
from jaxnr.models.huggingface import save
from jaxnr.prompting.tokenizer import load_tokenizer, train_tokenizer
from jaxnr.rewards.criteria import text_rubric
from jaxnr.rewards.judge import request
from jaxnr.training.metrics import read_metrics
from jaxnr.training.start import make_decoder
from jaxnr.training.steps import create_state, make_optimizer

pytestmark = pytest.mark.xdist_group("tiny_run")

STREAMS = ("stdout", "stderr")

SMALL = dataclasses.replace(
    CONFIG,
    student=CONFIG.teacher,  # of one shape, so that they share their programs
    warm_start=dataclasses.replace(CONFIG.warm_start, prompts_per_step=8),
    grpo=dataclasses.replace(CONFIG.grpo, uniform_steps=0, validate_every=2, microbatches=2),
    supervised=dataclasses.replace(CONFIG.supervised, prompts_per_step=8),
)


@contextlib.contextmanager
def started(config: Config, out: Path, stages: str, processes: int, devices: int) -> Iterator[list[subprocess.Popen]]:
    """Begins to walk the stages in so many processes with so many devices each, which are killed in the end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    path = out.parent / f"{out.name}.toml"
    save_config(config, path)
    script = [sys.executable, str(Path(__file__).with_name("one_process.py"))]
    arguments = [str(devices), str(path), str(out), stages]
    with contextlib.ExitStack() as files:
        running = []
        for index in range(processes):
            place = [f"{index}/{processes}@localhost:{port}"] if processes > 1 else []
            stdout, stderr = (
                files.enter_context(open(out.parent / f"{out.name}.{index}.{name}", "w")) for name in STREAMS
            )
            running.append(subprocess.Popen([*script, *arguments, *place], stdout=stdout, stderr=stderr))
        try:
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()


def said(out: Path, index: int) -> tuple[str, str]:
    """What a process that walked into ``out`` wrote to stdout and stderr."""
    stdout, stderr = ((out.parent / f"{out.name}.{index}.{name}").read_text() for name in STREAMS)
    return stdout, stderr


def walk(
    config: Config, out: Path, stages: str, processes: int, devices: int, code: int = 0, limit: float = 1800
) -> list[tuple[str, str]]:
    """Walks the stages in so many processes with so many devices each; returns what each wrote to stdout and stderr.

    They are killed after ``limit`` seconds.
    """
    deadline = time.monotonic() + limit
    with started(config, out, stages, processes, devices) as running:
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            if any(process.poll() not in (None, code) for process in running):
                break  # the others would wait for it
            time.sleep(0.1)
    wrote = [said(out, index) for index in range(processes)]
    assert [process.returncode for process in running] == [code] * processes, wrote
    return wrote


def assert_same_metrics(folder: Path, expected: Path) -> set[str]:
    """Up to rounding; returns the stages that have some."""
    logs = (read_metrics(out / "metrics.jsonl") for out in (folder, expected))
    rows, wanted = (sorted(log, key=lambda row: (row["stage"], row["step"])) for log in logs)
    assert [(row["stage"], row["step"]) for row in rows] == [(row["stage"], row["step"]) for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"stage", "time"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (row["stage"], row["step"], name)
    return {row["stage"] for row in wanted}


def assert_same_run(folder: Path, expected: Path, config: Config) -> None:
    """Metrics and parameters up to rounding, samples exactly."""
    stages = assert_same_metrics(folder, expected)
    lists = [(out / "teacher_lists.jsonl").read_text() for out in (folder, expected)]
    assert lists[0] == lists[1]
    assert '["' in lists[0]  # some are not empty
    for stage in stages:
        state, other = (final_state(out, stage, config) for out in (folder, expected))
        assert relative_gap(state.params, other.params) < 1e-4, stage
        assert relative_gap(state.opt_state[1][0].mu, other.opt_state[1][0].mu) < 1e-3, stage


def final_state(out: Path, stage: str, config: Config):
    """What a stage ended with, restored by this process onto a single device."""
    shape = config.teacher if stage in ("warm_start_teacher", "grpo", "grpo_uniform") else config.student
    model = make_decoder(shape, load_tokenizer(str(out / "tokenizer")))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_state(init_params(model, jax.random.key(0)), make_optimizer(config.grpo.optimizer, 4), mesh)
    with Checkpoints(out / "checkpoints" / stage) as checkpoints:
        restored, _ = checkpoints.restore(state)
    return jax.tree.map(np.asarray, restored)


@pytest.mark.slow
def test_two_processes_go_on_from_the_checkpoint_of_one_and_give_its_numbers(run, tmp_path):
    """From the middle of Dr.GRPO, with its optimizer state and place in the data, to the end of distillation.

    The one has a single device, so sums over the prompts are in another order.
    """
    two = shutil.copytree(run, tmp_path / "two")
    for name in ("grpo/4", "supervised", "distill"):
        shutil.rmtree(two / "checkpoints" / name)
    for name in ("teacher_lists.jsonl", "done/grpo.json", "done/distill.json"):
        (two / name).unlink()
    (first, _), (second, _) = walk(CONFIG, two, "data,sft,grpo,distill", processes=2, devices=1)
    assert_same_run(two, run, CONFIG)
    assert "grpo: 4/4" in first
    assert "warm_start" not in first  # that stage had ended
    assert "grpo" not in second  # only one of them shows progress
    assert not [path for path in two.rglob("*") if "partial" in path.name or "tmp" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "processes", "devices"),
    [
        (MeshConfig(data=2), 2, 1),
        (MeshConfig(data=2, fsdp=2, tensor=2), 4, 2),
        (MeshConfig(data=1, fsdp=2, tensor=2), 4, 1),  # two processes each have the same prompts
    ],
)
def test_a_whole_run_of_several_processes_is_that_of_one(tmp_path, mesh, processes, devices):
    """Data, training with validation, and evaluation: everything that a run writes."""
    config = dataclasses.replace(SMALL, mesh=mesh)
    stages = "data,sft,grpo,distill,evaluate"
    walk(config, tmp_path / "one", stages, processes=1, devices=processes * devices)
    walk(config, tmp_path / "several", stages, processes, devices)
    assert_same_run(tmp_path / "several", tmp_path / "one", config)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("several", "one")]
    timed = {"seconds", "throughput"}
    for name in results[1].keys() - timed:
        assert results[0][name] == results[1][name], name
    shown = [(tmp_path / name / "showcase.json").read_text() for name in ("several", "one")]
    assert shown[0] == shown[1]


@pytest.fixture(scope="module")
def helpers(tmp_path_factory):
    """The folders of two tiny decoders with a tokenizer, which can embed as well as judge."""
    folder = tmp_path_factory.mktemp("helpers")
    articles = document_texts(generate_world(0, WORLD).tables.articles)
    questions = [request(criterion) for criterion in text_rubric(("storm",), (1.0,)).specificity]
    tokenizer = train_tokenizer([*articles, *questions * 9], 600, folder / "tokenizer")
    model = tiny_decoder(vocab_size=len(tokenizer) + 4)
    names = ("first", "second")
    for seed, name in enumerate(names):
        save(folder / name, model, random_params(model, seed, scale=0.3), tokenizer)
    return [str(folder / name) for name in names]


@pytest.mark.slow
def test_models_that_embed_and_judge_are_held_by_all_processes_together(tmp_path, helpers):
    """Over four devices of two processes, each with prompts of its own: Dr.GRPO in microbatches with validation, and
    evaluation, under a second judge as well."""
    first, second = helpers
    config = dataclasses.replace(
        SMALL,
        seed=1,  # with seed 0 one draw of the last validation lies between two tokens, nearer than sums are rounded
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
        retrieval=dataclasses.replace(SMALL.retrieval, embedder="sentence_encoder", embedder_path=first),
        judge=JudgeConfig(
            kind="language_model", model=first, lists_per_step=4, rubric="language_model", max_failed_share=1.0
        ),
        second_judge=SecondJudgeConfig(kind="language_model", model=second, lists_per_step=4),
    )
    stages = "data,sft,grpo,evaluate"
    walk(config, tmp_path / "one", stages, processes=1, devices=4, limit=600)
    walk(config, tmp_path / "several", stages, processes=2, devices=2, limit=600)
    assert_same_metrics(tmp_path / "several", tmp_path / "one")
    several, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("several", "one"))
    for name in ("offline", "merging"):
        assert several[name] == one[name]
    assert one["judges"]["training"] == "language_model"
    for name, rewards in one["rewards"].items():
        assert several["rewards"][name] == pytest.approx(rewards, rel=1e-4, abs=1e-5)
    assert 0 < one["rewards"]["teacher"]["second/coverage"] < 1


FAULTY = dataclasses.replace(
    SMALL,
    mesh=MeshConfig(data=2),
    warm_start=dataclasses.replace(SMALL.warm_start, steps=4),
    grpo=dataclasses.replace(SMALL.grpo, steps=12, validate_every=0),
)


def wait_for_step(out: Path, step: int, running: list[subprocess.Popen]) -> None:
    """Until a step of Dr.GRPO is in the log."""
    while not any(row["stage"] == "grpo" and row["step"] >= step for row in read_metrics(out / "metrics.jsonl")):
        assert [process.poll() for process in running] == [None, None], [said(out, index) for index in range(2)]
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_on_one_of_two_processes_stops_both_and_the_resumed_run_is_bit_equal(tmp_path):
    stages = "data,sft,grpo"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    walk(FAULTY, whole, stages, processes=2, devices=1)
    with started(FAULTY, stopped, stages, processes=2, devices=1) as running:
        wait_for_step(stopped, 1, running)
        running[1].terminate()
        assert [process.wait(timeout=300) for process in running] == [128 + signal.SIGTERM] * 2
    done = read_metrics(stopped / "metrics.jsonl")[-1]["step"]
    assert 1 <= done < FAULTY.grpo.steps
    assert (stopped / "checkpoints" / "grpo" / str(done)).is_dir()
    for index in range(2):
        assert f"stopped by SIGTERM after step {done} of 12 of grpo, which is saved" in said(stopped, index)[1]
    walk(FAULTY, stopped, stages, processes=2, devices=1)
    logs = [read_metrics(out / "metrics.jsonl") for out in (stopped, whole)]
    timeless = [[{name: value for name, value in row.items() if name != "time"} for row in log] for log in logs]
    assert timeless[0] == timeless[1]
    states = [final_state(out, "grpo", FAULTY) for out in (stopped, whole)]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "why"),
    [
        (0, "Either the leader task was preempted/died/restarted"),
        (1, "Task 1 heartbeat timeout. This indicates that the remote task has failed"),
    ],
)
def test_where_one_of_two_processes_is_killed_the_other_ends_within_two_minutes_and_says_why(tmp_path, killed, why):
    out = tmp_path / "run"
    with started(FAULTY, out, "data,sft,grpo", processes=2, devices=1) as running:
        wait_for_step(out, 1, running)
        running[killed].kill()
        assert running[1 - killed].wait(timeout=150) not in (0, None)
    _, problem = said(out, 1 - killed)
    assert why in problem


def test_what_the_first_process_cannot_use_stops_all_of_them(tmp_path):
    config = dataclasses.replace(SMALL, data=DataConfig(format="events", path=str(tmp_path / "absent")))
    (_, first), (_, second) = walk(config, tmp_path / "run", "data", processes=2, devices=1, code=2)
    assert "absent" in first
    assert "Process 0 stopped" in second
    assert not (tmp_path / "run").exists()


def test_the_texts_of_all_processes_are_put_together_in_one_order(monkeypatch):
    """Of three processes, the second without any; each sends as many bytes as the one with most needs."""
    sent = []

    def gather(own, rows=(["storm", "東京", '"\\'], [], ["rowing " * 1000, "storm"])):
        if np.ndim(own):
            sent.append(own)
            messages = [json.dumps(texts).encode() for texts in rows]
            return np.stack([np.frombuffer(message.ljust(len(own)), np.uint8) for message in messages])
        return np.array([len(json.dumps(texts)) for texts in rows])

    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr("jaxnr.hosts.multihost_utils.process_allgather", gather)
    assert union(["storm", "東京", '"\\']) == ["storm", "東京", '"\\', "rowing " * 1000]
    assert len(sent[0]) == 8192
    assert json.loads(sent[0].tobytes()) == ["storm", "東京", '"\\']


def test_what_stops_one_process_stops_all_of_them(monkeypatch):
    def fail():
        raise KeyError("here")

    assert together(lambda: 3) == 3
    with pytest.raises(KeyError, match="here"):
        together(fail)
    monkeypatch.setattr("jaxnr.hosts.largest", lambda number: max(number, 2))
    with pytest.raises(InputError, match="Process 1 stopped"):
        together(lambda: 3)
    with pytest.raises(KeyError, match="here"):
        together(fail)


@pytest.mark.parametrize("place", ["yes", "2/2@localhost:1234", "0/2@localhost", "-1/2@localhost:1234"])
def test_a_place_among_the_processes_that_is_none_is_an_input_error(place):
    with pytest.raises(InputError, match="expected auto, or I/N@HOST:PORT"):
        join(place)
