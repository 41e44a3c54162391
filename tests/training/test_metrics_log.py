"""Properties of metrics.jsonl: always valid JSON lines, and no step twice after a kill and a resume."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr.errors import InputError
from jaxnr.training.metrics import MetricsLog, read_metrics

ROWS = st.lists(st.tuples(st.sampled_from(["sft", "grpo"]), st.integers(0, 20)), max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("metrics")


def fresh_log(folder) -> MetricsLog:
    path = folder / "metrics.jsonl"
    path.unlink(missing_ok=True)
    return MetricsLog(path)


def test_row_holds_stage_step_time_and_numbers(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write("grpo", np.int64(4), {"loss": np.float32(0.5), "cut": 2, "ended": np.bool_(True)})
    (row,) = read_metrics(log.path)
    assert row.pop("time") > 1.7e9
    assert row == {"stage": "grpo", "step": 4, "loss": 0.5, "cut": 2.0, "ended": 1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_what_is_not_finite_becomes_null(tmp_path, value):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("sft", 1, {"loss": value})

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    assert json.loads(log.path.read_text(), parse_constant=refuse)["loss"] is None


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, stage=st.sampled_from(["sft", "grpo", "distill"]), step=st.integers(-1, 20))
def test_truncation_removes_the_later_steps_of_one_stage_and_nothing_else(folder, rows, stage, step):
    log = fresh_log(folder)
    for row in rows:
        log.write(*row, {"loss": 1.0})
    log.truncate_after(stage, step)
    assert [(row["stage"], row["step"]) for row in read_metrics(log.path)] == [
        row for row in rows if row[0] != stage or row[1] <= step
    ]


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 6), checkpoint=st.integers(0, 6), cut=st.integers(0, 200))
def test_killed_anywhere_and_resumed_no_step_stands_twice_or_is_missing(folder, steps, checkpoint, cut):
    log = fresh_log(folder)
    for step in range(1, steps + 1):
        log.write("sft", step, {"loss": 1 / step})
    text = log.path.read_bytes()
    left = text[: max(len(text) - cut, 0)]
    log.path.write_bytes(left)
    done = min(checkpoint, left.count(b"\n"))

    resumed = MetricsLog(log.path)
    resumed.truncate_after("sft", done)
    for step in range(done + 1, steps + 1):
        resumed.write("sft", step, {"loss": 1 / step})
    assert [row["step"] for row in read_metrics(log.path)] == list(range(1, steps + 1))


def test_half_written_last_line_is_not_read_and_not_joined_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1}\n{"stage": "sft", "st')
    assert [row["step"] for row in read_metrics(path)] == [1]
    MetricsLog(path).write("sft", 2, {})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_no_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"step": 1}', '{"stage": "sft", "step": "one"}'])
def test_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
