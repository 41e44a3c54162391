"""The command line: exit codes and messages, who may use a folder, and the order of defaults, file and options."""

import dataclasses
import json
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxnr import cli
from jaxnr.config import Config, load_config, save_config
from jaxnr.errors import InputError, Preempted


def jaxnr(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """The installed command in its own process, as a user runs it."""
    command = [sys.executable, "-c", "from jaxnr.cli import main; main()", *args]
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=60, env={"PYTHONPATH": root, "COLUMNS": "200"}
    )


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text("seed = 3\n[grpo]\nsteps = 7\n", encoding="utf-8")
    return path


@pytest.fixture
def walked(monkeypatch) -> list:
    """Stands in for the road: the calls of ``run_stages``."""
    calls = []
    road = types.ModuleType("jaxnr.road")
    road.run_stages = lambda *args: calls.append(args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jaxnr.road", road)
    return calls


def call(*args: object) -> None:
    cli._parse([str(arg) for arg in args])()


def test_version_and_help_need_no_jax():
    code = "import sys; from jaxnr import cli; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    root = str(Path(__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
    assert jaxnr("--version").stdout.startswith("jaxnr 0.")


def test_help_explains_settings():
    shown = jaxnr("run", "--help")
    assert shown.returncode == 0
    assert "--data.path" in shown.stdout
    assert "Folder with the data" in shown.stdout


def test_a_reader_that_has_enough_is_no_error():
    command = f"{shlex.quote(sys.executable)} -c 'from jaxnr.cli import main; main()' run --help | head -1"
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=root, timeout=60)
    assert "jaxnr run" in done.stdout
    assert done.stderr == ""


def test_unknown_key_in_a_config_is_one_paragraph_and_exit_code_2(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[grpo]\ngroupsize = 4\n")
    failed = jaxnr("run", str(path), cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr == (
        f"jaxnr: error: {path}: unknown key `grpo.groupsize`; the nearest known key is `grpo.group_size`.\n"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.toml"]


def test_misspelt_option_names_the_nearest_and_exits_with_2(config_file):
    failed = jaxnr("run", str(config_file), "--grpo.stesp", "3")
    assert failed.returncode == 2
    assert "--grpo.steps" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_options_override_the_file_which_overrides_the_defaults(walked, config_file, tmp_path):
    longest = Config().prompt.max_prompt_tokens
    call("run", config_file, "--out", tmp_path / "out", "--data.max-signals", 9, "--prompt.prompt-buckets", 8, longest)
    ((config, out, stages, resume),) = walked
    assert (config.seed, config.grpo.steps) == (3, 7)
    assert (config.data.max_signals, config.prompt.prompt_buckets) == (9, (8, longest))
    assert config.distill == Config().distill
    assert (out, stages, resume) == (tmp_path / "out", ("data", "sft", "grpo", "distill", "evaluate"), False)
    assert load_config(tmp_path / "out" / "config.toml") == config


def test_options_may_stand_before_the_config(walked, config_file, tmp_path):
    call("run", "--grpo.steps", 5, "--seed", 4, config_file, "--out", tmp_path / "out")
    assert (walked[0][0].grpo.steps, walked[0][0].seed) == (5, 4)


def test_default_folders_carry_the_seed(walked, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("quickstart", "--seed", 2)
    call("run", config_file, "--seed", 5)
    assert [out for _, out, _, _ in walked] == [Path("runs/quickstart-seed2"), Path("runs/small-seed5")]
    assert walked[0][0] == dataclasses.replace(Config(), seed=2)


def test_stages_by_themselves_walk_one_after_another_in_one_folder(walked, config_file, tmp_path):
    for stage in cli.Run.stages:
        call(stage, config_file, "--out", tmp_path / "out")
    assert [stages for _, _, stages, _ in walked] == [(stage,) for stage in cli.Run.stages]


def test_later_stage_needs_a_run(walked, config_file, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        call("grpo", config_file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not walked


def test_a_run_is_never_overwritten(walked, config_file, tmp_path):
    call("run", config_file, "--out", tmp_path / "out")
    with pytest.raises(InputError, match="already holds a run"):
        call("run", config_file, "--out", tmp_path / "out")
    call("run", config_file, "--out", tmp_path / "out", "--resume")
    assert [resume for *_, resume in walked] == [False, True]


@pytest.mark.parametrize("stage", ["run", "sft"])
def test_a_changed_config_is_named(walked, config_file, tmp_path, stage):
    save_config(load_config(config_file), tmp_path / "out" / "config.toml")
    with pytest.raises(InputError, match=r"`seed` was 3, now 4; `data\.max_signals` was \d+, now 9\."):
        call(stage, config_file, "--out", tmp_path / "out", "--resume", "--seed", 4, "--data.max-signals", 9)
    assert not walked


def test_other_folders_are_left_alone(walked, config_file, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        call("run", config_file, "--out", tmp_path / "thesis")
    with pytest.raises(InputError, match="cannot be the folder"):
        call("run", config_file, "--out", tmp_path / "thesis" / "draft.txt")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["draft.txt"]
    assert not walked


def test_input_that_cannot_be_used_leaves_no_empty_run(walked, config_file, tmp_path, monkeypatch):
    def refuse(*_):
        raise InputError("events.jsonl:3: not JSON")

    monkeypatch.setattr(sys.modules["jaxnr.road"], "run_stages", refuse)
    with pytest.raises(InputError, match="not JSON"):
        call("run", config_file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupted_run_exits_with_130_and_says_how_to_go_on(walked, config_file, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["jaxnr.road"], "run_stages", interrupt)
    monkeypatch.setattr(sys, "argv", ["jaxnr", "run", str(config_file), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130
    assert "--resume" in capsys.readouterr().err


def test_a_preempted_run_exits_with_143_and_says_how_to_go_on(walked, config_file, tmp_path, monkeypatch, capsys):
    def preempt(*_):
        raise Preempted("stopped by SIGTERM after step 3 of 9 of grpo, which is saved")

    monkeypatch.setattr(sys.modules["jaxnr.road"], "run_stages", preempt)
    monkeypatch.setattr(sys, "argv", ["jaxnr", "run", str(config_file), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 143
    message = capsys.readouterr().err
    assert "after step 3 of 9 of grpo, which is saved; the same command with --resume goes on" in message


def test_generate_wants_one_user_and_a_run(tmp_path):
    with pytest.raises(InputError, match="--user"):
        call("generate", tmp_path)
    with pytest.raises(InputError, match="--user"):
        call("generate", tmp_path, "--user", "u1", "--events", "some.jsonl")
    with pytest.raises(InputError, match="holds no run"):
        call("generate", tmp_path, "--user", "u1")


def test_report_is_written_again_from_the_results(tmp_path, capsys):
    save_config(Config(), tmp_path / "config.toml")
    with pytest.raises(InputError, match="jaxnr evaluate"):
        call("report", tmp_path)
    metric = {"mean": 0.25, "low": 0.2, "high": 0.3}
    offline = {"teacher": dict.fromkeys(("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"), metric)}
    (tmp_path / "results.json").write_text(json.dumps({"seed": 0, "offline": offline}))
    (tmp_path / "showcase.json").write_text("[]")
    call("report", tmp_path)
    assert "0.25" in (tmp_path / "report.html").read_text(encoding="utf-8").replace(".250", "0.25")
    assert "Teacher" in capsys.readouterr().out


@pytest.fixture
def baselines(monkeypatch) -> list:
    """Stands in for the baselines: the calls of both commands."""
    calls = []
    for module, function in (("run", "run_baseline"), ("movielens", "run_movielens")):
        stand_in = types.ModuleType(f"jaxnr.baselines.{module}")
        setattr(stand_in, function, lambda *args: calls.append(args))
        monkeypatch.setitem(sys.modules, f"jaxnr.baselines.{module}", stand_in)
    return calls


def test_baseline_wants_a_run_or_movielens(baselines, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        call("baseline", "gru", tmp_path)
    save_config(Config(), tmp_path / "config.toml")
    call("baseline", "gru", tmp_path, "--trials", 3)
    call("baseline", "hstu", tmp_path / "new", "--movielens", tmp_path, "--stable-sort")
    call("baseline", "sasrec", tmp_path / "new", "--movielens", tmp_path)
    new = tmp_path / "new"
    assert baselines == [
        ("gru", tmp_path, 3),
        ("hstu", tmp_path, new, "stable"),
        ("sasrec", tmp_path, new, "quicksort"),
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--trials", 0), "--trials is 0"),
        (("--stable-sort",), "expected --movielens"),
        (("--movielens", "ml-1m", "--trials", 2), "expected no --trials"),
    ],
)
def test_options_of_baseline_that_say_nothing_are_refused(baselines, tmp_path, options, says):
    save_config(Config(), tmp_path / "config.toml")
    with pytest.raises(InputError, match=says):
        call("baseline", "gru", tmp_path, *options)
    assert baselines == []


def test_options_of_clean_override_the_config(monkeypatch, tmp_path):
    calls = []

    def clean(events: Path, out: Path, config: Config) -> dict:
        calls.append((config.cleaning.classifier, config.cleaning.labels))
        return {"reasons": {}, "events": 0, "events_per_second": 0.0}

    stand_in = types.ModuleType("jaxnr.data.clean_events")
    stand_in.clean = clean  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jaxnr.data.clean_events", stand_in)
    config = tmp_path / "cleaning.toml"
    config.write_text('[cleaning]\nclassifier = "roberta"\nlabels = "own.parquet"\n')
    here = ("clean", "events.parquet", "--out", tmp_path / "out")
    call(*here)
    call(*here, "--config", config)
    call(*here, "--config", config, "--labels", "judge")
    call(*here, "--config", config, "--classifier", "folder")
    assert calls == [("none", "truth"), ("roberta", "own.parquet"), ("roberta", "judge"), ("folder", "own.parquet")]
    with pytest.raises(InputError, match="--labels"):
        call(*here, "--classifier", "roberta")


def test_a_command_without_resume_says_that_it_goes_on_as_it_is(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise Preempted("stopped by SIGTERM after step 3 of 5 of grpo, which is saved")

    monkeypatch.setattr("jaxnr.reproduce.run.reproduce", stopped)
    config = tmp_path / "config.toml"
    config.write_text("")
    monkeypatch.setattr("sys.argv", ["jaxnr", "reproduce", "offline", str(config), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 143
    assert "which is saved; the same command goes on\n" in capsys.readouterr().err
