"""``jaxnr clean`` and the cleaning of a run: rules first, then a classifier, each counted apart."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from jaxnr.config import Config
from jaxnr.data.classifier import Labelled, Shown, TfidfCleaner, measure, shown_histories, split_by_user
from jaxnr.data.cleaning import CleaningReport, HistoryRules, Outcome, clean_histories, judge_text, normalise_text
from jaxnr.data.readers.events import read_labels, stream_events
from jaxnr.data.readers.report import ReadReport
from jaxnr.data.roberta_cleaner import RobertaCleaner, load_cleaner, train_roberta
from jaxnr.data.schema import EVENTS, Event, Tables, to_records, to_table
from jaxnr.errors import InputError
from jaxnr.files import read_json, write_text
from jaxnr.hosts import own_mesh
from jaxnr.mesh import make_mesh
from jaxnr.progress import progress
from jaxnr.rewards.criteria import Criterion
from jaxnr.rewards.judge import judge_of

QUESTION = (
    "The one text in the list is a search, a page title or a headline of this reader. Does it say what the reader is "
    "interested in, rather than being navigation, an advertisement or broken text?"
)
_BATCH_ROWS = 8192

DECISIONS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("timestamp", EVENTS.field("timestamp").type, nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("p_drop", pa.float32()),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""One row an event, in the order of the file. ``p_drop`` is null where no classifier was asked. ``reason``: kept, item
(a blank event on an article, which later takes its title), a rule's, or classifier."""


@dataclasses.dataclass(frozen=True)
class HistoryCleaner:
    """What cleans the histories of a run: rules, and then a classifier where there is one."""

    rules: bool = True
    classifier: RobertaCleaner | None = None

    def __call__(
        self, users: Sequence, domains: Sequence[str], texts: Sequence[str]
    ) -> tuple[list[str | None], CleaningReport]:
        """As ``clean_histories``; what the classifier drops is counted as `classifier`."""
        cleaned, report = clean_histories(users, domains, texts, self.rules)
        if self.classifier is None:
            return cleaned, report
        shown = shown_histories(users, domains, cleaned, {}, self.classifier.context)
        noise = probabilities(self.classifier, shown) >= self.classifier.calibration.threshold
        cleaned = [None if drop else text for text, drop in zip(cleaned, noise, strict=True)]
        dropped = report.dropped | {"classifier": int(noise.sum())}
        return cleaned, dataclasses.replace(report, kept=report.kept - int(noise.sum()), dropped=dropped)


def probabilities(classifier: RobertaCleaner, shown: Sequence[Shown | None]) -> np.ndarray:
    """P(noise) of each event; NaN where a rule has dropped it."""
    rows = [row for row, event in enumerate(shown) if event is not None]
    values = np.full(len(shown), np.nan)
    values[rows] = classifier.probabilities([event for event in shown if event is not None])
    return values


def open_history_cleaner(config: Config, out: Path, mesh: Mesh) -> HistoryCleaner:
    """The cleaner of a run whose data stage is done."""
    cleaning = config.cleaning
    if cleaning.classifier == "none":
        return HistoryCleaner(cleaning.rules)
    name = str(out / "cleaning" / "classifier") if cleaning.classifier == "roberta" else cleaning.classifier
    return HistoryCleaner(cleaning.rules, load_cleaner(name, cleaning, mesh))


def prepare_cleaner(config: Config, tables: Tables, out: Path, before: int) -> HistoryCleaner:
    """The cleaner of a run, trained where the config asks for that, on labels of events before ``before`` alone.

    Writes cleaning/ under ``out``: the classifier, and report.json with its figures on the test users' events.
    """
    mesh = own_mesh(make_mesh(config.mesh))
    if config.cleaning.classifier == "roberta":
        labels = str(out / "truth" / "truth_events.parquet") if config.cleaning.labels == "truth" else ""
        settings = dataclasses.replace(config.cleaning, labels=labels or config.cleaning.labels)
        events = (event for batch in tables.events.to_batches(65_536) for event in _events(batch))
        results = train(dataclasses.replace(config, cleaning=settings), events, out / "cleaning", mesh, before)
        write_text(out / "cleaning" / "report.json", json.dumps(results, indent=2))
    return open_history_cleaner(config, out, mesh)


def _events(batch: pa.RecordBatch) -> list[Event]:
    return to_records(pa.Table.from_batches([batch]), Event)


class Passed(NamedTuple):
    """An event with what the rules made of it, and what a classifier reads of it (None where a rule dropped it)."""

    event: Event
    outcome: Outcome
    shown: Shown | None


def pass_rules(events: Iterable[Event], rules: bool, context: int) -> Iterator[Passed]:
    """Events one by one through the rules. Holds each user's last few texts, whatever the number of events.

    Raises InputError where a user's events are not oldest first.
    """
    history: dict[str, HistoryRules] = {}
    recent: dict[str, tuple[str, ...]] = {}
    latest: dict[str, int] = {}
    for row, event in enumerate(events):
        if event.timestamp < latest.get(event.user_id, event.timestamp):
            raise InputError(
                f"Event {row + 1}, of user {event.user_id!r}, is earlier than that user's event before it; expected "
                "each user's events oldest first."
            )
        latest[event.user_id] = event.timestamp
        outcome = (judge_text if rules else normalise_text)(event.text)
        if rules:
            outcome = history.setdefault(event.user_id, HistoryRules())(event.domain, outcome)
        (shown,) = shown_histories([event.user_id], [event.domain], [outcome.text], recent, context)
        yield Passed(event, outcome, shown)


def train(config: Config, events: Iterable[Event], folder: Path, mesh: Mesh, before: float = math.inf) -> dict:
    """Trains the classifier into ``folder``/classifier; returns its figures, and those of TF-IDF beside it.

    Users are split; of training and validation users only events before ``before`` count.
    """
    cleaning = config.cleaning
    labelled = _labelled(config, pass_rules(events, cleaning.rules, cleaning.context_texts), folder, mesh)
    parts = split_by_user(labelled, config.seed, before)
    started = time.monotonic()
    roberta = train_roberta(parts["train"], parts["valid"], cleaning, folder / "tokenizer", mesh, config.seed)
    seconds = time.monotonic() - started
    started = time.monotonic()
    tfidf = TfidfCleaner(parts["train"], parts["valid"])
    tfidf_seconds = time.monotonic() - started
    roberta.save(folder / "classifier")
    return {
        "labelled": {
            name: {"events": len(part.noise), "noise": int(part.noise.sum()), "users": len(set(part.users))}
            for name, part in parts.items()
        },
        "roberta": {"training_seconds": round(seconds, 1), **measure(roberta, parts["test"])},
        "tfidf_logistic_regression": {"training_seconds": round(tfidf_seconds, 1), **measure(tfidf, parts["test"])},
    }


def _labelled(config: Config, passed: Iterable[Passed], folder: Path, mesh: Mesh) -> Labelled:
    """The labelled events that the rules leave."""
    cleaning = config.cleaning
    if cleaning.labels == "judge":
        return _judged(config, passed, folder, mesh)
    labels = read_labels(Path(cleaning.labels))
    rows = []
    for event, _, shown in passed:
        found = labels.get((event.user_id, event.timestamp, event.domain))
        label = found.popleft() if found else None
        if shown is not None and label is not None:
            rows.append((event, shown, label not in cleaning.keep_labels))
    return _columns(rows)


def _columns(rows: Sequence[tuple[Event, Shown, bool]]) -> Labelled:
    users, times = [event.user_id for event, _, _ in rows], np.array([event.timestamp for event, _, _ in rows])
    return Labelled(users, times, [shown for _, shown, _ in rows], np.array([drop for _, _, drop in rows], bool))


def _judged(config: Config, passed: Iterable[Passed], folder: Path, mesh: Mesh) -> Labelled:
    """Labels by the judge of the config, for a random sample of the events; those it does not answer are left out."""
    judge = judge_of(config.judge, folder, mesh)
    if judge is None:
        raise InputError('cleaning.labels is "judge"; expected judge.kind "language_model" or "http" with it.')
    rng = np.random.default_rng(config.seed)
    sample: list[Passed] = []
    candidates = (one for one in passed if one.shown is not None)
    for seen, one in enumerate(candidates, start=1):  # reservoir sampling: the number of events is not known
        if len(sample) < config.cleaning.judged_events:
            sample.append(one)
        elif (place := int(rng.integers(seen))) < len(sample):
            sample[place] = one
    yes_N1 = judge([[one.outcome.text or ""] for one in sample], [[Criterion(QUESTION, 1.0)]] * len(sample))
    answered = [(one, yes) for one, yes in zip(sample, yes_N1[:, 0], strict=True) if not np.isnan(yes)]
    return _columns([(one.event, one.shown, bool(yes < 0.5)) for one, yes in answered if one.shown is not None])


def clean(path: Path, out: Path, config: Config) -> dict:
    """Cleans a file of events into ``out``: events.parquet, decisions.parquet and, last, report.json.

    A classifier that is to be trained is trained first and kept in ``out``: a command that was killed passes over that.
    """
    cleaning = config.cleaning
    if (out / "report.json").exists():
        raise InputError(f"{out}: holds cleaned events already; give another folder with --out.")
    mesh = make_mesh(config.mesh)
    trained = out / "training.json"
    if cleaning.classifier == "roberta" and not trained.exists():
        results = train(config, stream_events(path, ReadReport()), out, mesh)
        write_text(trained, json.dumps({"settings": dataclasses.asdict(cleaning), **results}, indent=2))
    classifier, training = None, None
    if cleaning.classifier == "roberta":
        training = read_json(trained, "what `jaxnr clean` wrote")
        if training["settings"] != json.loads(json.dumps(dataclasses.asdict(cleaning))):
            raise InputError(f"{out}: holds a classifier of other [cleaning] settings; give another folder with --out.")
        classifier = load_cleaner(str(out / "classifier"), cleaning, mesh)
    elif cleaning.classifier != "none":
        classifier = load_cleaner(cleaning.classifier, cleaning, mesh)
    started, read = time.monotonic(), ReadReport()
    reasons: Counter[tuple[str, str]] = Counter()
    passed = pass_rules(stream_events(path, read), cleaning.rules, classifier.context if classifier else 1)
    row = 0
    with (
        _whole(out / "events.parquet", EVENTS) as events,
        _whole(out / "decisions.parquet", DECISIONS) as decisions,
        progress("clean", total=None) as bar,
    ):
        for batch in iter(lambda: list(itertools.islice(passed, _BATCH_ROWS)), []):
            p_drop, decided = _decide(batch, classifier)
            reasons.update((one.event.domain, reason) for one, reason in zip(batch, decided, strict=True))
            kept = [
                one.event._replace(text=one.outcome.text or "")
                for one, reason in zip(batch, decided, strict=True)
                if reason in ("kept", "item")
            ]
            events.write_table(to_table(kept, EVENTS))
            decisions.write_table(_decision_table(row, batch, p_drop, decided))
            row += len(batch)
            bar.advance(count=len(batch))
    seconds = time.monotonic() - started
    report = {
        "events": row,
        "reasons": {reason: sum(n for (_, r), n in reasons.items() if r == reason) for _, reason in sorted(reasons)},
        "by_domain": {
            domain: {reason: n for (d, reason), n in sorted(reasons.items()) if d == domain}
            for domain in sorted({domain for domain, _ in reasons})
        },
        "threshold": classifier.calibration.threshold if classifier else None,
        "seconds": round(seconds, 3),
        "events_per_second": round(row / seconds, 1),
        "devices": jax.device_count(),
        "reader": read.as_dict(),
        "training": training,
    }
    write_text(out / "report.json", json.dumps(report, indent=2))
    return report


def _decide(batch: Sequence[Passed], classifier: RobertaCleaner | None) -> tuple[np.ndarray, list[str]]:
    """P(noise), NaN where not asked, and the reason of each. A blank event on an article says what its article says."""
    p_drop = np.full(len(batch), np.nan)
    if classifier is not None:
        p_drop = probabilities(classifier, [one.shown for one in batch])
    threshold = classifier.calibration.threshold if classifier else 1.0
    reasons = []
    for one, p in zip(batch, p_drop, strict=True):
        if one.outcome.reason == "empty" and one.event.item_id is not None:
            reasons.append("item")
        else:
            reasons.append(one.outcome.reason or ("classifier" if p >= threshold else "kept"))
    return p_drop, reasons


def _decision_table(row: int, batch: Sequence[Passed], p_drop: np.ndarray, reasons: Sequence[str]) -> pa.Table:
    events = to_table([one.event for one in batch], EVENTS)
    return pa.table(
        {
            "row": np.arange(row + 1, row + 1 + len(batch)),
            **{name: events.column(name) for name in ("user_id", "timestamp", "domain")},
            "p_drop": pa.array(p_drop.astype(np.float32), mask=np.isnan(p_drop)),
            "reason": list(reasons),
        },
        schema=DECISIONS,
    )


@contextlib.contextmanager
def _whole(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet file that is there when all of it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            yield writer
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
