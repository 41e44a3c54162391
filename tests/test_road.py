"""The road, walked once in small: what a run leaves behind, and that a killed one goes on to the same numbers."""

import dataclasses
import json
import math
import shutil
import sys

import jax
import numpy as np
import pytest
from tiny import random_params, tiny_decoder
from tiny_run import CONFIG, finished_run, tiny_surroundings

import jaxnr
import jaxnr.road
from jaxnr import cli, manifest
from jaxnr.config import GrpoConfig, JudgeConfig, SecondJudgeConfig, save_config
from jaxnr.data.prepare import read_report
from jaxnr.errors import InputError
from jaxnr.evaluation.run import MODELS
from jaxnr.models.huggingface import save
from jaxnr.prompting.tokenizer import load_tokenizer
from jaxnr.rewards.composite import REWARDS, RewardModel
from jaxnr.rewards.written_rubric import RUBRIC_FILE
from jaxnr.road import STAGES, Road, run_stages, teacher_lists, training_reward
from jaxnr.training.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("tiny_run")

METRICS = {"recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def surroundings(tmp_path_factory):
    with tiny_surroundings(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text())


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def rows(folder, stage):
    return [row | {"time": 0} for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == stage]


def test_results_have_the_promised_keys(results):
    plain = {"popularity", "recent", "signals", "content"}
    assert results["offline"].keys() >= plain | MODELS.keys()
    assert set(results["best_of_n"]) == {str(n) for n in CONFIG.evaluation.best_of_n}
    for method in [*results["offline"].values(), *results["best_of_n"].values()]:
        assert method.keys() >= METRICS
        for value in method.values():
            assert value.keys() == {"mean", "low", "high"}
            assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
    assert results["seed"] == CONFIG.seed
    assert results["users"].keys() >= {"train", "valid", "test", "skipped"}
    assert results["users"]["test"] == CONFIG.data.max_test_users
    for clicks in results["data"]["clicks"].values():
        assert clicks["recallable_share"] == clicks["relevant"] / sum(
            clicks[name] for name in ("relevant", "repeated", "not_yet_published", "expired")
        )
    for comparison in results["comparisons"]:
        assert comparison.keys() >= {"a", "b", "metric", "difference", "p_holm"}
    for model in MODELS:
        assert results["rewards"][model].keys() == {*REWARDS, "total", "second/coverage"}
        assert 0 <= results["rewards"][model]["second/coverage"] <= 1
    assert results["judges"] == {"training": "similarity", "second": "word_overlap"}
    assert all(results["throughput"][f"{shape}_users_per_s"] > 0 for shape in ("teacher", "student"))
    assert results["environment"].keys() >= {"jax", "device_kind", "device_count"}
    assert results["environment"]["jaxnr"] == jaxnr.__version__


def test_results_say_how_long_it_took(results):
    stages = {"data", "sft", "grpo", "distill"}
    assert results["seconds"].keys() >= stages | {"total"}
    assert results["seconds"]["total"] >= sum(results["seconds"][stage] for stage in stages) > 0


def test_every_step_of_every_stage_is_logged(run):
    steps = {
        "warm_start_teacher": CONFIG.warm_start.steps,
        "warm_start_student": CONFIG.warm_start.steps,
        "grpo": CONFIG.grpo.steps,
        "supervised": CONFIG.supervised.steps,
        "distill": CONFIG.distill.steps,
    }
    for stage, count in steps.items():
        logged = [row["step"] for row in rows(run, stage)]
        assert logged[-count:] == list(range(1, count + 1)), stage
    for key in ("valid/recall@10", "valid/reward/coverage", "valid/reward/second/coverage"):
        assert [row["step"] for row in rows(run, "grpo") if key in row] == [0, 2, 4]


def test_losses_fall_and_samples_are_on_policy(run):
    for stage in ("warm_start_teacher", "warm_start_student"):
        loss = [row["loss"] for row in rows(run, stage)]
        assert loss[-1] < loss[0] - 0.5
    for row in rows(run, "grpo")[1:]:
        assert row["logprob_gap"] < 1e-4
        assert all(0 <= row[f"reward/{name}/mean"] <= 1 for name in REWARDS)
    assert all(math.isfinite(row["reverse_kl"]) and row["reverse_kl"] >= 0 for row in rows(run, "distill"))


def test_the_report_is_one_page_of_its_own(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert 'src="http' not in page
    showcase = json.loads((run / "showcase.json").read_text(encoding="utf-8"))
    assert len(showcase) == CONFIG.evaluation.showcase_users
    assert all(user["user_id"] in page for user in showcase)


def test_a_run_has_at_most_ten_sampling_programs(run):
    """Of both models, in training, validation, teacher lists, evaluation and best-of-N: the programs it has cached."""
    programs = [path.name for path in (run.parent / "programs").iterdir() if path.name.startswith("jit_sample-")]
    assert 2 <= len([name for name in programs if name.endswith("-cache")]) <= 10


def test_a_run_leaves_nothing_half_written(run):
    assert not [path for path in run.rglob("*") if "partial" in path.name or "tmp" in path.name]


def test_resuming_a_finished_run_does_nothing(run, surroundings, monkeypatch):
    def refuse(*_):
        raise AssertionError("ran again")

    for stage in STAGES[1:]:
        monkeypatch.setitem(jaxnr.road._RUN, stage, refuse)
    monkeypatch.setattr(jaxnr.road, "prepare_data", refuse)
    run_stages(CONFIG, run, STAGES, resume=True)
    with pytest.raises(AssertionError, match="ran again"):
        run_stages(CONFIG, run, ("grpo",), resume=False)


@pytest.mark.slow
def test_grpo_killed_in_a_step_and_resumed_equals_the_uninterrupted_run(run, copy, surroundings, monkeypatch):
    shutil.rmtree(copy / "checkpoints" / "grpo")
    (copy / "done" / "grpo.json").unlink()
    score, calls = RewardModel.__call__, []

    def killed_in_the_last_step(self, examples, lists):
        calls.append(len(examples))
        if len(calls) == 6:  # before it: validation, two steps, validation, a checkpoint and a step after it
            raise ZeroDivisionError
        return score(self, examples, lists)

    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "__call__", killed_in_the_last_step)
        with pytest.raises(ZeroDivisionError):
            run_stages(CONFIG, copy, ("grpo",))
    assert not (copy / "done" / "grpo.json").exists()
    assert [row["step"] for row in rows(copy, "grpo")] == [0, 1, 2, 3]
    run_stages(CONFIG, copy, ("grpo",), resume=True)
    assert rows(copy, "grpo") == rows(run, "grpo")
    expected, actual = (grpo_params(folder) for folder in (run, copy))
    assert expected.keys() == actual.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def test_grpo_by_another_loss_with_a_kl_term_holds_on_to_the_warm_started_teacher(copy, surroundings):
    shutil.rmtree(copy / "checkpoints" / "grpo")
    grpo = dataclasses.replace(CONFIG.grpo, loss="cispo", advantages="gdpo", kl_weight=0.05, overlong_tokens=8, steps=3)
    run_stages(dataclasses.replace(CONFIG, grpo=dataclasses.replace(grpo, uniform_steps=0)), copy, ("grpo",))
    _, *steps = rows(copy, "grpo")
    for row in steps[:2]:  # the warm-up begins with a rate of 0
        assert abs(row["kl_k1"]) + row["kl_k3"] < 1e-5
    assert steps[2]["kl_k3"] > 1e-6
    assert all(row["logprob_gap"] < 1e-3 and row["importance_weight"] == pytest.approx(1, abs=1e-3) for row in steps)


def test_the_training_reward_is_the_total_or_gdpos_with_the_length_penalty():
    rng = np.random.default_rng(0)
    scores = {name: rng.random((2, 4)).astype(np.float32) for name in REWARDS}
    scores["structure"][:] = 1
    scores["coverage"][0, 0] = np.nan
    scores["total"] = sum(scores.values())
    mask_BGT = np.arange(6) < np.array([[1, 2, 6, 6], [3, 3, 3, 3]])[..., None]
    weights, penalty = CONFIG.reward, np.array([[0, 0, -1, -1], [0] * 4])
    plain = training_reward(GrpoConfig(), weights, scores, mask_BGT)
    assert plain is scores["total"]
    shaped = training_reward(GrpoConfig(overlong_tokens=2), weights, scores, mask_BGT)
    np.testing.assert_allclose(shaped, plain + penalty, rtol=1e-6)

    def standardised(row):
        return (row - row.mean()) / (row.std(ddof=1) + 1e-4)

    names = [name for name in REWARDS if name != "structure"]  # constant: teaches nothing
    for overlong, terms in ((0, 0), (2, standardised(penalty[0, 1:]))):
        gdpo = training_reward(GrpoConfig(advantages="gdpo", overlong_tokens=overlong), weights, scores, mask_BGT)
        assert np.isnan(gdpo[0, 0])
        expected = sum(getattr(weights, name) * standardised(scores[name][0, 1:]) for name in names) + terms
        np.testing.assert_allclose(gdpo[0, 1:], expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, True], ids=["in training", "in validation alone"])
def test_grpo_under_a_language_model_as_judge(run, copy, surroundings, tmp_path, second):
    tokenizer = load_tokenizer(run / "tokenizer")
    model = tiny_decoder(vocab_size=len(tokenizer))
    save(tmp_path / "judge", model, random_params(model), tokenizer)
    shutil.rmtree(copy / "checkpoints" / "grpo")
    settings = {"kind": "language_model", "model": str(tmp_path / "judge"), "lists_per_step": 8}
    settings |= {"rubric": "language_model", "max_failed_share": 1.0}  # it writes nothing of use
    judge = SecondJudgeConfig(**settings) if second else JudgeConfig(**settings)
    run_stages(dataclasses.replace(CONFIG, **{"second_judge" if second else "judge": judge}), copy, ("grpo",))
    before, after = rows(run, "grpo"), rows(copy, "grpo")
    assert len(before) == len(after)
    for name in ("coverage", "specificity"):
        changed = f"valid/reward/second/{name}" if second else f"valid/reward/{name}"
        assert after[0][changed] != before[0].get(changed)
        assert 0 <= after[0][changed] <= 1
    assert (copy / RUBRIC_FILE).exists()
    assert (before[1]["loss"] == after[1]["loss"]) == second  # what training does not see changes nothing
    assert after[1]["reward/failed"] == 0


def test_a_stage_counts_the_seconds_of_the_processes_before(copy, surroundings, results):
    (copy / "done" / "grpo.json").unlink()
    for name in ("grpo", "grpo_uniform"):  # as if the checkpoints had been an hour's work
        (held,) = (copy / "checkpoints" / name / str(steps_of(name))).glob("data/metadata")
        content = json.loads(held.read_text())
        assert 0 < content["seconds"] <= results["seconds"]["grpo"]
        held.write_text(json.dumps(content | {"seconds": 3600.0}))
        manifest.seal(held.parents[1])
    run_stages(CONFIG, copy, ("grpo",), resume=True)
    assert 7200 <= json.loads((copy / "done" / "grpo.json").read_text())["seconds"] < 7300


def steps_of(stage):
    return {"grpo": CONFIG.grpo.steps, "grpo_uniform": CONFIG.grpo.uniform_steps}[stage]


def remove_training(folder, *stages):
    for stage in stages:
        shutil.rmtree(folder / "checkpoints" / stage)
    (folder / "results.json").unlink()


def test_evaluation_after_the_warm_start_measures_what_is_there(copy, surroundings):
    remove_training(copy, "grpo", "grpo_uniform", "supervised", "distill")
    run_stages(CONFIG, copy, ("evaluate",))
    results = json.loads((copy / "results.json").read_text())
    plain = {"popularity", "recent", "signals", "content"}
    assert set(results["offline"]) == plain | {"prompt_only", "student_untrained"}
    assert results["comparisons"] == []
    assert results["best_of_n"] == results["throughput"] == {}
    showcase = json.loads((copy / "showcase.json").read_text(encoding="utf-8"))
    assert all(user["lists"].keys() == user["articles"].keys() == {"prompt_only"} for user in showcase)
    assert "Prompt only" in (copy / "report.html").read_text(encoding="utf-8")
    assert not (copy / "checkpoints" / "grpo").exists()


def test_evaluation_before_distillation_compares_the_teacher(copy, surroundings):
    remove_training(copy, "supervised", "distill")
    run_stages(CONFIG, copy, ("evaluate",))
    results = json.loads((copy / "results.json").read_text())
    assert set(results["best_of_n"]) == {"1", "2"}
    assert results["throughput"].keys() == {"teacher_users_per_s"}
    assert {pair["b"] for pair in results["comparisons"]} == results["offline"].keys() - {"teacher"}
    assert {pair["a"] for pair in results["comparisons"]} == {"teacher"}


def test_without_a_student_the_teacher_alone_is_trained_and_measured(tmp_path, copy, surroundings):
    config = dataclasses.replace(CONFIG, distill=dataclasses.replace(CONFIG.distill, steps=0))
    run_stages(config, tmp_path / "alone", STAGES)
    assert {path.name for path in (tmp_path / "alone" / "checkpoints").iterdir()} == {
        "warm_start_teacher",
        "grpo",
        "grpo_uniform",
    }
    results, with_student = (
        json.loads((folder / "results.json").read_text())["offline"] for folder in (tmp_path / "alone", copy)
    )
    assert with_student.keys() - results.keys() == {name for name in MODELS if name.startswith("student")}
    assert results["teacher"] == with_student["teacher"]


@pytest.mark.parametrize(
    ("stage", "missing", "first"),
    [
        ("evaluate", MODELS, "jaxnr sft CONFIG"),
        ("grpo", MODELS, "jaxnr sft CONFIG"),
        ("distill", ["teacher"], "jaxnr grpo CONFIG"),
    ],
)
def test_a_stage_that_is_too_early_names_the_one_to_run_first(copy, surroundings, stage, missing, first):
    remove_training(copy, *(MODELS[name][1] for name in missing))
    before = sorted(copy.rglob("*"))
    with pytest.raises(InputError, match=first):
        run_stages(CONFIG, copy, (stage,))
    assert set(copy.rglob("*")) <= set(before)  # no empty folder of checkpoints


def test_a_model_of_a_stage_that_was_stopped_is_taken_with_a_warning(copy, surroundings, caplog):
    road = Road.open(CONFIG, copy)
    teacher = road.policy("teacher")
    road.trained_params(teacher, "grpo")
    assert not caplog.messages
    (copy / "done" / "grpo.json").unlink()
    road.trained_params(teacher, "grpo")
    (message,) = caplog.messages
    assert f"the one after step {CONFIG.grpo.steps}" in message
    assert f"`jaxnr grpo CONFIG --out {copy} --resume`" in message


def test_what_has_no_value_is_null_in_the_results(copy, surroundings, monkeypatch):
    remove_training(copy, "warm_start_student", "grpo", "grpo_uniform", "supervised", "distill")
    nothing = {"diversity": float("nan"), "age_hours": float("nan")}
    monkeypatch.setattr("jaxnr.evaluation.run.beyond_accuracy", lambda *_: nothing)
    run_stages(CONFIG, copy, ("evaluate",))
    text = (copy / "results.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["beyond_accuracy"]["prompt_only"] == dict.fromkeys(nothing)


def test_an_evaluation_is_not_passed_over_when_a_stage_has_run_after_it(copy, surroundings, monkeypatch):
    ran = []
    for stage in STAGES[1:]:
        monkeypatch.setitem(jaxnr.road._RUN, stage, lambda road, stage=stage: ran.append(stage))
    (copy / "done" / "distill.json").unlink()
    run_stages(CONFIG, copy, STAGES, resume=True)
    assert ran == ["distill", "evaluate"]


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("data/report.json", "jaxnr data CONFIG --resume"),
        ("retrieval/calibration.json", "jaxnr data CONFIG --resume"),
        ("retrieval/articles.safetensors", "jaxnr data CONFIG --resume"),
        ("done/grpo.json", "jaxnr grpo CONFIG --resume"),
        ("teacher_lists.jsonl", "jaxnr distill CONFIG --resume"),
    ],
)
def test_a_damaged_file_is_named_with_the_stage_that_writes_it_again(copy, surroundings, name, again):
    def read_everything():
        road = Road.open(CONFIG, copy)
        assert read_report(copy)["users"]
        assert set(road.seconds()) == set(STAGES)
        assert teacher_lists(road, road.policy("teacher"), {})

    read_everything()
    whole = (copy / name).read_bytes()
    others = [b"{}\n"] if name.endswith((".json", ".jsonl")) else []
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" + whole[1:], *others):
        if name == "teacher_lists.jsonl" and not damaged:
            continue  # no lists: distillation says that there are too few
        (copy / name).write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            read_everything()
        assert str(caught.value).startswith(f"{copy / name}: ")
        assert again in str(caught.value)


def test_evaluation_stops_at_a_damaged_report_before_it_samples(copy, surroundings, monkeypatch):
    (copy / "data" / "report.json").write_text('{"users": {"tra')
    monkeypatch.setattr("jaxnr.evaluation.run.plain_rankings", lambda *_: pytest.fail("measured something"))
    with pytest.raises(InputError, match=r"report\.json: expected the report of the data stage"):
        run_stages(CONFIG, copy, ("evaluate",))


def grpo_params(folder):
    road = Road.open(CONFIG, folder)
    params = road.trained_params(road.policy("teacher"), "grpo")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_a_checkpoint_of_another_shape_stops_with_exit_code_2(copy, surroundings, monkeypatch, capsys):
    config = dataclasses.replace(CONFIG, teacher=dataclasses.replace(CONFIG.teacher, intermediate_size=48))
    for path in (copy / "config.toml", copy.parent / "wider.toml"):
        save_config(config, path)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["jaxnr", "grpo", str(copy.parent / "wider.toml"), "--out", str(copy)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"jaxnr: error: {copy / 'checkpoints' / 'warm_start_teacher'}: ")
    assert "layers/down_proj/kernel" in message
    assert message.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before
