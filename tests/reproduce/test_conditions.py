"""The runs behind the tables: what they share with the base run, and that nothing that has ended is done again."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_run import CONFIG, finished_run, tiny_surroundings

import jaxnr.reproduce.run
from jaxnr.config import (
    BaselinesConfig,
    CleaningConfig,
    GruConfig,
    HstuConfig,
    NrhubConfig,
    PinsageConfig,
    SasrecConfig,
    load_config,
    save_config,
)
from jaxnr.errors import InputError
from jaxnr.reproduce.conditions import best_of_many, capacities, carry_out, reward_ablations
from jaxnr.reproduce.run import needed, programs_kept, reproduce, seconds
from jaxnr.reproduce.tables import TABLES
from jaxnr.rewards.composite import REWARDS
from jaxnr.road import STAGES
from jaxnr.training.metrics import read_metrics

_LEAST = "jax_persistent_cache_min_compile_time_secs"

pytestmark = pytest.mark.xdist_group("tiny_run")


@pytest.fixture
def surroundings(tmp_path_factory):
    with tiny_surroundings(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture
def seed_dir(tmp_path, tmp_path_factory, surroundings):
    """A seed's folder with its base run."""
    shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path / "seed0" / "base")
    return tmp_path / "seed0"


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_an_ablation_differs_in_one_weight_and_starts_from_the_base_runs_teacher(seed_dir):
    before = files(seed_dir / "base")
    (condition,) = (c for c in reward_ablations(CONFIG) if c.name == "without_align")
    run = carry_out(condition, seed_dir)
    assert load_config(run / "config.toml").reward == dataclasses.replace(CONFIG.reward, align=0.0)
    assert (run / "data").resolve() == (seed_dir / "base" / "data").resolve()
    rows, base_rows = ([row for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == "grpo"]
                       for folder in (run, seed_dir / "base"))  # fmt: skip
    assert len(rows) == len(base_rows)
    assert [row["step"] for row in rows if "valid/recall@10" in row] == [0, CONFIG.grpo.steps]
    assert rows[0]["valid/recall@10"] == base_rows[0]["valid/recall@10"]
    assert rows[0]["valid/reward/total"] != base_rows[0]["valid/reward/total"]
    results = json.loads((run / "results.json").read_text())
    assert {"teacher", "prompt_only"} <= results["offline"].keys()
    assert not any(name.startswith("student") for name in results["offline"])
    assert files(seed_dir / "base") == before

    done = files(run)
    carry_out(condition, seed_dir)
    assert files(run) == done


def test_the_teachers_best_lists_are_those_of_the_base_run(seed_dir):
    config = dataclasses.replace(CONFIG, evaluation=dataclasses.replace(CONFIG.evaluation, bootstrap_resamples=50))
    run = carry_out(best_of_many(config), seed_dir)
    best = json.loads((run / "per_user.json").read_text())["best_of_n"]
    assert list(best) == ["1", "2", "4", "8", "16", "32"]
    assert (run / "checkpoints" / "grpo").is_symlink()


def test_another_config_in_the_same_folder_is_refused(seed_dir):
    changed = dataclasses.replace(CONFIG, prompt=dataclasses.replace(CONFIG.prompt, max_queries=2))
    with pytest.raises(InputError, match=r"prompt\.max_queries"):
        carry_out(next(needed("distillation", changed, ("0.5", "1"))), seed_dir)


def test_sizes_scale_the_widths_or_name_checkpoints():
    (half, named) = capacities(CONFIG, ("0.5", "1", "some/model-3B"))
    assert (half.name, half.config.teacher.hidden_size) == ("teacher_0.5", 16)
    assert half.config.teacher.num_layers == CONFIG.teacher.num_layers
    assert (named.name, named.config.teacher.path) == ("teacher_some_model-3B", "some/model-3B")


@pytest.mark.parametrize("sizes", [("1",), ("1", "1"), ("0", "1")])
def test_sizes_that_make_no_sense_are_refused(sizes, tmp_path):
    with pytest.raises(InputError, match="--sizes"):
        reproduce(["capacity"], CONFIG, (0,), sizes, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1, 0)])
def test_seeds_that_make_no_sense_are_refused(seeds, tmp_path):
    with pytest.raises(InputError, match="--seeds"):
        reproduce(["offline"], CONFIG, seeds, ("0.5", "1"), tmp_path)


def test_programs_are_kept_for_the_runs_after_and_are_gone_in_the_end():
    before = jax.config.values["jax_compilation_cache_dir"], jax.config.values[_LEAST]
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update(_LEAST, 0)
    try:
        with programs_kept():
            folder = Path(jax.config.values["jax_compilation_cache_dir"])
            assert not list(folder.iterdir())
            jax.jit(lambda x: x @ x + 3)(jnp.ones((5, 5))).block_until_ready()
            kept = set(folder.iterdir())
            assert kept
            jax.clear_caches()
            jax.jit(lambda x: x @ x + 3)(jnp.ones((5, 5))).block_until_ready()
            assert {path for path in folder.iterdir() if path.name.endswith("-cache")} <= kept
        assert not folder.exists()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update(_LEAST, before[1])


def test_programs_are_kept_where_the_user_keeps_them(tmp_path):
    with tiny_surroundings(tmp_path), programs_kept():
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "programs")


def test_seconds_are_those_of_each_run_and_baseline_once(seed_dir):
    """0.5 s for each of the base run's five stages, 2 s for the ablation's own, 4.5 s for the baseline."""
    run, base = seed_dir / "without_align" / "done", seed_dir / "base"
    run.mkdir(parents=True)
    for stage in STAGES:
        (base / "done" / f"{stage}.json").write_text('{"seconds": 0.5}')
    (run / "sft.json").symlink_to("../../base/done/sft.json")
    (run / "grpo.json").write_text('{"seconds": 2}')
    (base / "baselines").mkdir()
    taken = {"training": 2.5, "evaluation": 0.5, "all_trials": 4.0}
    (base / "baselines" / "gru.json").write_text(json.dumps({"seconds": taken}))
    assert seconds(seed_dir) == 2.5 + 2 + 4.5


@pytest.mark.slow
def test_all_tables(seed_dir, monkeypatch):
    out = seed_dir.parent
    config = dataclasses.replace(
        CONFIG,
        cleaning=CleaningConfig(hidden_size=16, layers=1, heads=2, vocabulary_size=600, epochs=1),
        baselines=BaselinesConfig(
            trials=1,
            gru=GruConfig(size=8, batch=16, negatives=16, epochs=1, length=10),
            sasrec=SasrecConfig(size=8, batch=16, negatives=8, epochs=1, length=10),
            hstu=HstuConfig(size=8, batch=16, negatives=8, epochs=1, length=10),
            nrhub=NrhubConfig(records=4, record_words=5, word_size=8, filters=8, attention_size=8, batch=16, epochs=1),
            pinsage=PinsageConfig(size=8, neighbours=3, walks=20, batch=64, negatives=8, epochs=1),
        ),
    )
    save_config(config, seed_dir / "base" / "config.toml")  # nothing that the finished run has done depends on these
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # the other tests of this process compile the same programs
    reproduce(list(TABLES), config, (0,), ("0.5", "1"), out)
    done = files(out)
    assert {path.name for path in (out / "tables").iterdir()} == {
        f"{name}.{form}" for name in TABLES for form in ("json", "csv", "md", "svg")
    }
    assert (out / "tables.md").read_text().count("###") == len(TABLES)
    tried = {name: json.loads((out / "tables" / f"{name}.json").read_text())["runs"] for name in TABLES}
    assert {name for name, facts in tried.items() if "settings tried for each baseline" in facts} == {"offline"}
    for run in (*(f"without_{reward}" for reward in REWARDS), "no_cleaning", "rules_and_roberta", "teacher_0.5"):
        assert (seed_dir / run / "report.html").exists()
    assert {"roberta", "tfidf_logistic_regression"} <= json.loads(
        (seed_dir / "rules_and_roberta" / "cleaning" / "report.json").read_text()
    ).keys()

    monkeypatch.setattr(jaxnr.reproduce.run, "run_baseline", None)
    reproduce(list(TABLES), config, (0,), ("0.5", "1"), out)
    again = files(out)
    written = {path for path in done if path.parent.name == "tables" or path.name == "tables.md"}
    assert {path for path in done if again[path] != done[path]} <= written
