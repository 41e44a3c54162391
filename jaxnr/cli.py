"""The command line: one subcommand for each stage of the road, and ``run`` and ``quickstart``, which walk all of it.

Nothing here imports jax before a command runs, so that ``--help`` and a misspelt option answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from jaxnr import __version__
from jaxnr.claim import claim
from jaxnr.config import Config, load_config
from jaxnr.config_rules import validate
from jaxnr.errors import InputError, Preempted
from jaxnr.files import read_json
from jaxnr.memory import keep_freed_memory

_DEFAULTS = Config()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Walk the whole road on the generated world: minutes on a laptop, no downloads."""

    out: Path | None = None
    """Folder of the run; runs/quickstart-seed<N> when not given."""
    seed: int = 0
    """Seed of the world, the models and every draw."""
    resume: bool = False
    """Go on with the run in the folder, from its last checkpoint."""
    distributed: str = ""
    """Where the run has several processes, each started by this command: `auto` on Cloud TPU or under Slurm; elsewhere
    I/N@HOST:PORT for process I, from 0, of N, the first of which is at HOST:PORT. See docs/scaling.md."""

    def __call__(self) -> None:
        config = dataclasses.replace(_DEFAULTS, seed=self.seed)
        out = self.out or Path("runs") / f"quickstart-seed{self.seed}"
        _walk(config, out, Run.stages, self.resume, self.distributed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnConfig:
    """A part of the road, on a config file whose settings the options below override."""

    stages: ClassVar[tuple[str, ...]]

    config_file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="CONFIG", metavar="CONFIG")]
    """TOML file with the settings; what it leaves out keeps the default shown here."""
    out: Path | None = None
    """Folder of the run; runs/<name of CONFIG>-seed<N> when not given."""
    resume: bool = False
    """Go on with the run in the folder: pass over stages that have ended, take others up at their last checkpoint."""
    distributed: str = ""
    """Where the run has several processes, each started by this command: `auto` on Cloud TPU or under Slurm; elsewhere
    I/N@HOST:PORT for process I, from 0, of N, the first of which is at HOST:PORT. See docs/scaling.md."""
    config: Annotated[Config, tyro.conf.arg(name="")] = _DEFAULTS

    def __call__(self) -> None:
        out = self.out or Path("runs") / f"{self.config_file.stem}-seed{self.config.seed}"
        _walk(self.config, out, self.stages, self.resume, self.distributed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs on a TPU slice, by the TPU compiler, without the slice: memory, collectives, estimated times.

    Needs `pip install 'jaxnr[tpu]'`. No weights are loaded. Exits with 1 where the run does not fit.
    """

    config_file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="CONFIG", metavar="CONFIG")]
    """TOML file with the settings; what it leaves out keeps the default shown here."""
    slice: str
    """The slice, as in v5e-64: v4, v5e, v5p, v6e or tpu7x with the number of its name."""
    stages: tuple[Literal["warm_start", "grpo", "distill", "evaluate"], ...] = (
        "warm_start",
        "grpo",
        "distill",
        "evaluate",
    )
    """Stages to plan."""
    programs: tuple[str, ...] = ()
    """Of these the programs to compile, by name; all, when not given."""
    largest_batch: bool = False
    """Search the largest batch of each stage too, of the named programs: up to seven compilations more of each."""
    json: Path | None = None
    """File for the numbers."""
    config: Annotated[Config, tyro.conf.arg(name="")] = _DEFAULTS

    def __call__(self) -> None:
        # No data is read: the config may be planned before there is any.
        data = dataclasses.replace(self.config.data, path=self.config.data.path or "data")
        validate(dataclasses.replace(self.config, data=data))
        from jaxnr.planning.slices import find_slice, without_a_tpu

        find_slice(self.slice)
        without_a_tpu()
        from jaxnr.plan import plan

        fits = plan(
            self.config,
            self.slice,
            stages=self.stages,
            programs=self.programs,
            largest_batch=self.largest_batch,
            json_file=self.json,
        )
        if not fits:
            sys.exit(1)


class Run(_OnConfig):
    """Walk the whole road on any config."""

    stages = ("data", "sft", "grpo", "distill", "evaluate")


class Data(_OnConfig):
    """Begin a run: read and clean the events, split them, build the tokenizer and the article index."""

    stages = ("data",)


class Sft(_OnConfig):
    """Warm start: teach the fresh teacher and student the output format on lists made from the users' own signals."""

    stages = ("sft",)


class Grpo(_OnConfig):
    """Train the warm-started teacher with Dr.GRPO on the five rewards."""

    stages = ("grpo",)


class Distill(_OnConfig):
    """Distil the teacher into the student, on the student's own samples and, for comparison, supervised."""

    stages = ("distill",)


class Evaluate(_OnConfig):
    """Measure every method on the test users; write results.json and report.html."""

    stages = ("evaluate",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """Train a published recommender on a run's data and measure it on the run's test users, beside the road's models.

    Settings are tried out on validation users, the same number for each baseline. Killed or interrupted, the same
    command goes on where it stopped.
    """

    name: Annotated[
        tyro.conf.Positional[Literal["gru", "sasrec", "hstu", "nrhub", "pinsage"]], tyro.conf.arg(metavar="NAME")
    ]
    """gru, sasrec, hstu, nrhub or pinsage."""
    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="RUN_DIR", metavar="RUN_DIR")]
    """Folder of a run whose data stage is done; the results go to its baselines/NAME.json."""
    trials: int | None = None
    """Settings to try; baselines.trials of the run when not given."""
    movielens: Path | None = None
    """Instead, the folder of MovieLens-1M (ratings.dat, movies.dat): trains gru, sasrec or hstu by the settings of the
    published figures, with one rating of each user left out; RUN_DIR is for the results alone."""
    stable_sort: bool = False
    """Leave ratings of one second in the order of the file; the published figures of sasrec and hstu did not."""

    def __call__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise InputError(f"--trials is {self.trials}; expected at least 1.")
        if self.movielens is None:
            if self.stable_sort:
                raise InputError("--stable-sort is about MovieLens; expected --movielens FOLDER with it.")
            _require_run(self.run_dir)
        elif self.trials is not None:
            raise InputError("--movielens has no validation users to choose by; expected no --trials beside it.")
        with _goes_on_by_itself():
            if self.movielens is None:
                from jaxnr.baselines.run import run_baseline

                run_baseline(self.name, self.run_dir, self.trials)
            else:
                from jaxnr.baselines.movielens import run_movielens

                run_movielens(self.name, self.movielens, self.run_dir, "stable" if self.stable_sort else "quicksort")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Fill one of the paper's tables, or all, with this project's numbers over several seeds, the paper's beside them.

    Each seed is a whole run; the tables' other runs share its first stages. Killed or interrupted, the same command
    goes on where it stopped.
    """

    table: Annotated[
        tyro.conf.Positional[
            Literal["offline", "rewards", "distillation", "capacity", "sampling", "efficiency", "cleaning", "all"]
        ],
        tyro.conf.arg(metavar="TABLE"),
    ]
    """offline, rewards, distillation, capacity, sampling, efficiency, cleaning, or all of them."""
    config_file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="CONFIG", metavar="CONFIG")]
    """TOML file with the settings; what it leaves out keeps the default shown here."""
    out: Path | None = None
    """Folder of the runs and tables; runs/reproduce-<name of CONFIG> when not given."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs; `--seed` is not used."""
    sizes: tuple[str, ...] = ("0.25", "0.5", "1", "2")
    """Teachers of the capacity study, smallest first: factors of the widths in the config, or folders or hub names of
    pretrained models; `1` is the config's own."""
    config: Annotated[Config, tyro.conf.arg(name="")] = _DEFAULTS

    def __call__(self) -> None:
        validate(self.config)
        from jaxnr.reproduce.run import reproduce
        from jaxnr.reproduce.tables import TABLES

        out = self.out or Path("runs") / f"reproduce-{self.config_file.stem}"
        names = list(TABLES) if self.table == "all" else [self.table]
        with _goes_on_by_itself():
            reproduce(names, self.config, self.seeds, self.sizes, out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impressions:
    """MIND's own task on a run: rank the candidates of each logged impression; AUC, MRR, nDCG@5 and nDCG@10."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="RUN_DIR", metavar="RUN_DIR")]
    """Folder of a run whose data stage is done; the results go to its impressions/results.json."""
    methods: tuple[str, ...] = ()
    """By their names in results.json, and of trained baselines; when not given, those that learn nothing, teacher,
    student_on_policy and all baselines, as far as they are there."""
    at_most: int = 0
    """So many impressions, drawn by seed; 0 for all."""
    predictions: bool = False
    """Write a submission too, impressions/METHOD-SPLIT.txt: every impression with the ranks of its candidates."""

    def __call__(self) -> None:
        if self.at_most < 0:
            raise InputError(f"--at-most is {self.at_most}; expected 0 or more.")
        _require_run(self.run_dir)
        from jaxnr.impressions import impressions

        impressions(self.run_dir, self.methods, self.at_most, self.predictions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clean:
    """Keep or drop each event of a file: cheap rules, then a RoBERTa classifier, which can be trained here first.

    Writes the cleaned events, every event's probability and reason, and a report. Killed or interrupted, the same
    command keeps a classifier that it had trained.
    """

    events: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="EVENTS", metavar="EVENTS")]
    """Events of the neutral schema (.jsonl, .jsonl.gz or .parquet), each user's oldest first."""
    out: Path
    """Folder for what is written."""
    classifier: str | None = None
    """`none` for rules alone, `roberta` to train a small one on the labels, or a folder or hub name; when not given,
    the config's, and `none` without one."""
    labels: str | None = None
    """For `roberta`: a file with the columns user_id, timestamp, domain and label, which may be EVENTS itself, or
    `judge`, the language model of the config's [judge]; when not given, the config's."""
    config: Path | None = None
    """TOML file for other settings: [cleaning], [judge], [mesh], seed."""

    def __call__(self) -> None:
        settings = _DEFAULTS if self.config is None else load_config(self.config)
        given = {"classifier": self.classifier, "labels": self.labels}
        cleaning = dataclasses.replace(
            settings.cleaning, **{name: value for name, value in given.items() if value is not None}
        )
        if cleaning.classifier == "roberta" and cleaning.labels == "truth":
            raise InputError("The classifier `roberta` needs --labels: a file, or judge.")
        settings = dataclasses.replace(settings, cleaning=cleaning)
        validate(settings)
        from jaxnr.data.clean_events import clean

        report = clean(self.events, self.out, settings)
        counts = ", ".join(f"{count:,} {reason}" for reason, count in report["reasons"].items())
        print(f"{self.out}: {report['events']:,} events: {counts}; {report['events_per_second']:,.0f} events/s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Print the queries that a trained model writes for one user, and the articles they retrieve."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="RUN_DIR", metavar="RUN_DIR")]
    """Folder of a run whose model has been trained."""
    user: str | None = None
    """A user of the run's data, by id."""
    events: Path | None = None
    """Or one user's events, as JSON lines with `user_id`, `timestamp`, `domain` and `text`."""
    model: Literal["teacher", "student"] = "student"
    """Which of the run's models writes."""
    samples: int = 1
    """Lists to sample."""
    index: Path | None = None
    """Find the articles of this index (`jaxnr index --run RUN_DIR`) instead of the run's own."""

    def __call__(self) -> None:
        if (self.user is None) == (self.events is None):
            raise InputError("generate needs one of --user USER_ID and --events FILE.jsonl: whose queries to write.")
        if self.samples < 1:
            raise InputError(f"--samples is {self.samples}; expected at least 1.")
        _require_run(self.run_dir)
        from jaxnr.generate import generate

        generate(self.run_dir, self.user, self.events, self.model, self.samples, self.index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Embed a catalogue into an index that opens by memory map, or add new and changed articles to one.

    Killed or interrupted, the same command goes on where it stopped. No text is embedded twice.
    """

    articles: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="ARTICLES", metavar="ARTICLES")]
    """Articles of the neutral schema (.jsonl, .jsonl.gz or .parquet), or the folder of a run, for those it has."""
    out: Path
    """Folder of the index."""
    run: Path | None = None
    """Embed as the run in this folder does, so that its models can search the index."""
    embedder: Literal["tfidf_svd", "sentence_encoder"] | None = None
    """When not given, that of the index; tfidf_svd for a new one."""
    embedder_path: str = ""
    """Folder or hub name of the encoder; of tfidf_svd, a folder with a fitted one. Without, tfidf_svd is fitted to the
    articles that the index begins with."""
    embedding_size: int = _DEFAULTS.retrieval.embedding_size
    """Of a tfidf_svd that is to be fitted."""
    seed: int = 0
    """Of a tfidf_svd that is to be fitted."""

    def __call__(self) -> None:
        if self.embedding_size < 1 or self.seed < 0:
            raise InputError(
                f"--embedding-size is {self.embedding_size} and --seed {self.seed}; expected 1 or more, 0."
            )
        if self.run is not None:
            if self.embedder is not None or self.embedder_path:
                raise InputError(
                    "--run says which embedder is used; expected no --embedder and --embedder-path beside."
                )
            _require_run(self.run)
        elif self.embedder_path and self.embedder is None:
            raise InputError(f"--embedder-path is {self.embedder_path!r}; expected --embedder with it.")
        from jaxnr.indexing import index, run_embedder

        kind, path = (self.embedder, self.embedder_path) if self.run is None else run_embedder(self.run)
        try:
            index(self.articles, self.out, kind, path, self.embedding_size, self.seed)
        except KeyboardInterrupt:
            print("jaxnr: interrupted; the same command goes on from the last finished part", file=sys.stderr)
            sys.exit(130)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained model as a Hugging Face checkpoint: config, tokenizer, safetensors."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="RUN_DIR", metavar="RUN_DIR")]
    """Folder of a run whose model has been trained."""
    out: Path
    """New folder for the checkpoint."""
    model: Literal["teacher", "teacher_uniform", "prompt_only", "student_on_policy", "student_supervised"] = (
        "student_on_policy"
    )
    """Which model, by its name in results.json."""

    def __call__(self) -> None:
        _require_run(self.run_dir)
        from jaxnr.export import export

        export(self.run_dir, self.model, self.out)
        print(f"{self.model} of {self.run_dir} is in {self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measure how many users a second a run's teacher and student serve on this machine."""

    what: Annotated[tyro.conf.Positional[Literal["serve"]], tyro.conf.arg(name="WHAT", metavar="serve")]
    """`serve`: from prompts to merged rankings."""
    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="RUN_DIR", metavar="RUN_DIR")]
    """Folder of a run whose students have been trained."""
    users: int = 64
    """Test users to serve."""
    best_of: int = 32
    """Lists a user, where the best of several is served."""
    repeats: int = 3
    """Times that each way is measured; the median is shown."""

    def __call__(self) -> None:
        if min(self.users, self.repeats) < 1 or self.best_of < 2:
            raise InputError("benchmark needs --users and --repeats of 1 at least, and --best-of of 2 at least.")
        _require_run(self.run_dir)
        from jaxnr.benchmark import benchmark_serving

        benchmark_serving(self.run_dir, self.users, self.best_of, self.repeats)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html again from a run's results, and print the table."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="RUN_DIR", metavar="RUN_DIR")]
    """Folder of a run that has been evaluated."""

    def __call__(self) -> None:
        _require_run(self.run_dir)
        from rich.console import Console

        from jaxnr.evaluation.report import console_table, write_report
        from jaxnr.training.metrics import read_metrics

        results = read_json(self.run_dir / "results.json", "what `jaxnr evaluate` writes")
        showcase = read_json(self.run_dir / "showcase.json", "what `jaxnr evaluate` writes", list)
        write_report(self.run_dir / "report.html", results, read_metrics(self.run_dir / "metrics.jsonl"), showcase)
        Console().print(console_table(results))


Command = (
    Quickstart
    | Run
    | Data
    | Sft
    | Grpo
    | Distill
    | Evaluate
    | Plan
    | Baseline
    | Reproduce
    | Impressions
    | Clean
    | Generate
    | Index
    | Export
    | Benchmark
    | Report
)

_ABOUT = "From what a person searches, browses and reads to news search queries, and from those to news."
_STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)


def main() -> None:
    """Entry point: exits with 0 when all went well, 2 for what the user can set right, 130 when interrupted.

    With 143 when SIGTERM came: in training the step was finished and saved, elsewhere the process ended at once.
    """
    keep_freed_memory()
    try:
        try:
            _parse(sys.argv[1:])()
        finally:
            sys.stdout.flush()
    except InputError as error:
        print(f"jaxnr: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has enough: `jaxnr run --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
    except KeyboardInterrupt:
        print("jaxnr: interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Preempted as notice:
        print(f"jaxnr: {notice}; the same command with --resume goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def _parse(args: list[str]) -> Command:
    """The command with its settings: the defaults, then the config file, then the options."""
    if args == ["--version"]:
        print(f"jaxnr {__version__}")
        sys.exit(0)
    command = tyro.cli(Command, args=args, prog="jaxnr", description=_ABOUT, config=_STYLE)
    if isinstance(command, _OnConfig | Plan | Reproduce):
        # Options come again; a flag that is set already could not be given a second time.
        unset = {field.name: False for field in dataclasses.fields(command) if getattr(command, field.name) is True}
        with_file = dataclasses.replace(command, config=load_config(command.config_file), **unset)
        command = tyro.cli(type(command), args=args[1:], prog=f"jaxnr {args[0]}", default=with_file, config=_STYLE)
    return command


def _walk(config: Config, out: Path, stages: tuple[str, ...], resume: bool, distributed: str) -> None:
    """Claims the folder, then runs the stages there; input that cannot be used leaves no empty run behind."""
    validate(config)
    fresh = False

    def begin() -> None:
        nonlocal fresh
        fresh = claim(config, out, begin="data" in stages, resume=resume)

    if distributed:
        from jaxnr.hosts import join, on_first

        join(distributed)
        on_first(begin)
    else:
        begin()
    from jaxnr.road import run_stages

    try:
        run_stages(config, out, stages, resume)
    except InputError:
        if fresh and not (out / "done" / "data.json").exists():
            shutil.rmtree(out)
        raise


@contextlib.contextmanager
def _goes_on_by_itself() -> Iterator[None]:
    """Says of a command that is stopped that it goes on without `--resume`; exits as ``main`` does."""
    try:
        yield
    except KeyboardInterrupt:
        print("jaxnr: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Preempted as notice:
        print(f"jaxnr: {notice}; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def _require_run(run_dir: Path) -> None:
    if not (run_dir / "config.toml").is_file():
        raise InputError(f"{run_dir} holds no run: there is no config.toml in it.")


if __name__ == "__main__":
    main()
