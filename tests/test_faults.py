"""Faults in a whole tiny run: killed processes, damaged checkpoints, judges that raise, rewards that are not finite."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from benchmarks.kill_and_resume import TRAINING, WAYS, kill_and_resume, outcome, prepare
from tiny_run import CONFIG, tiny_surroundings

import jaxnr.data.prepare
from jaxnr.errors import InputError
from jaxnr.rewards.composite import RewardModel
from jaxnr.road import Road, run_stages
from jaxnr.training.metrics import read_metrics
from jaxnr.training.rollout import place_prompts

pytestmark = pytest.mark.xdist_group("tiny_run")


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def before_grpo(copy):
    shutil.rmtree(copy / "checkpoints" / "grpo")
    return copy


def rows(folder, stage):
    return [row | {"time": 0} for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == stage]


def test_a_later_stage_names_the_command_that_replaces_a_damaged_checkpoint(run, copy):
    last = copy / "checkpoints" / "grpo" / str(CONFIG.grpo.steps)
    damaged = max((last / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(damaged.read_bytes())
    content[-7] ^= 1
    damaged.write_bytes(content)
    road = Road.open(CONFIG, copy)
    with pytest.raises(InputError) as caught:
        road.trained_params(road.policy("teacher"), "grpo")
    message = str(caught.value)
    assert message.startswith(f"{last.parent}: the checkpoint of step {CONFIG.grpo.steps} is not whole (params/")
    assert f"`jaxnr grpo CONFIG --out {copy}` trains again" in message
    run_stages(CONFIG, copy, ("grpo",))  # what that command does
    redone, whole = outcome(copy, "grpo")["grpo"], outcome(run, "grpo")["grpo"]
    assert redone["rows"] == whole["rows"]
    for name, array in whole["arrays"].items():
        np.testing.assert_array_equal(redone["arrays"][name], array, err_msg=name)


class Moody:
    """A judge that raises for a quarter of the lists and has no answer for one question of another quarter."""

    always = False

    def __call__(self, lists, criteria):
        mood = [sum(map(ord, "".join(queries))) % 4 for queries in lists]
        if self.always or 0 in mood:
            raise ConnectionError("the judge has gone away")
        yes_NC = np.full((len(lists), max(map(len, criteria))), 0.5)
        yes_NC[np.array(mood) == 1, 0] = np.nan
        return yes_NC


@pytest.mark.slow
def test_a_judge_that_raises_costs_its_lists_and_one_that_is_down_stops_the_run(before_grpo, monkeypatch):
    judge = Moody()
    monkeypatch.setattr(jaxnr.data.prepare, "judge_of", lambda *_: judge)
    config = dataclasses.replace(CONFIG, reward=dataclasses.replace(CONFIG.reward, max_failed_share=0.95))
    run_stages(config, before_grpo, ("grpo",))
    logged = rows(before_grpo, "grpo")[1:]
    assert len(logged) == CONFIG.grpo.steps
    assert any(0.2 < row["reward/failed"] < 1 for row in logged)
    assert all(np.isfinite(row["loss"]) and row["skipped"] == 0 for row in logged)
    assert any(row["grad_norm"] > 0 for row in logged)
    shutil.rmtree(before_grpo / "checkpoints" / "grpo")
    judge.always = True
    with pytest.raises(InputError, match="the last error: ConnectionError"):
        run_stages(config, before_grpo, ("grpo",))


@pytest.mark.slow
def test_a_reward_that_is_not_finite_skips_its_step_and_leaves_its_batch(before_grpo, run, monkeypatch):
    score, calls = RewardModel.__call__, []

    def poisoned(self, examples, lists):
        scored = score(self, examples, lists)
        calls.append(len(examples))
        if len(calls) in (3, 5):  # after the validation before the first step: the second and the third
            scored.total_BG[0, 1] = np.inf
        return scored

    monkeypatch.setattr(RewardModel, "__call__", poisoned)
    with pytest.raises(InputError) as stopped:
        run_stages(dataclasses.replace(CONFIG, max_skipped_steps=1), before_grpo, ("grpo",))
    files = sorted(path.name for path in (before_grpo / "skipped").iterdir())
    assert len(files) == 2
    assert f"{before_grpo / 'skipped' / files[-1]}" in str(stopped.value)
    assert "2nd such step; `max_skipped_steps` allows 1" in str(stopped.value)
    logged = rows(before_grpo, "grpo")[1:]
    assert [f"grpo-{row['step']}.json" for row in logged if row["skipped"]] == files
    assert logged[0] == rows(run, "grpo")[1] | {"skipped_steps": 0}
    kept = json.loads((before_grpo / "skipped" / files[0]).read_text())
    assert (kept["stage"], kept["metrics"]["loss"]) == ("grpo", "nan")
    assert len(kept["prompts"]) == CONFIG.grpo.prompts_per_step
    road = Road.open(CONFIG, before_grpo)
    examples = {example.example_id: example for example in road.examples["train"]}
    for prompt in kept["prompts"]:
        tokens_1S, mask_1S = map(np.asarray, place_prompts(road.policy("teacher"), [examples[prompt["example_id"]]]))
        assert prompt["prompt"] == road.tokenizer.decode(tokens_1S[mask_1S])
        for completion in prompt["completions"]:
            assert len(completion["old_logprobs"]) == len(completion["tokens"]) > 0
            assert completion["text"]
    rewards = [[completion["reward"] for completion in prompt["completions"]] for prompt in kept["prompts"]]
    assert [(row, group.index("inf")) for row, group in enumerate(rewards) if "inf" in group] == [(0, 1)]


@pytest.mark.slow
def test_killed_and_resumed_runs_are_bit_equal_to_those_never_killed(tmp_path):
    """A few kills of each; tests/benchmarks/kill_and_resume.py makes more."""
    before = prepare(tmp_path)
    for stage in TRAINING:
        whole = tmp_path / f"{stage}-whole"
        kills, _, wrong = kill_and_resume(before, whole, stage, len(WAYS), seed=0)
        assert not wrong
        assert [kill.way for kill in kills] == list(WAYS)
        before = whole


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory):
    with tiny_surroundings(tmp_path_factory.getbasetemp()):
        yield
