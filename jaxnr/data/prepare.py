"""The data stage: from a reader or the generated world to everything that the later stages load."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from jax.sharding import Mesh
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from jaxnr.config import Config, PromptConfig
from jaxnr.data.clean_events import prepare_cleaner
from jaxnr.data.dataset import prepare as write_examples
from jaxnr.data.examples import Example, ExampleSplits, build_examples, split_times
from jaxnr.data.pipeline import check_batches
from jaxnr.data.readers import read_tables
from jaxnr.data.schema import Tables, document_texts
from jaxnr.data.synthetic.world import generate_world
from jaxnr.errors import InputError
from jaxnr.files import read_json, write_text
from jaxnr.hosts import own_mesh
from jaxnr.mesh import make_mesh
from jaxnr.models.huggingface import check_tokenizer, read_decoder_config
from jaxnr.models.weights import model_folder
from jaxnr.prompting.output import format_list
from jaxnr.prompting.prompt import as_shown, encode_prompt, render_signals
from jaxnr.prompting.tokenizer import adopt_tokenizer, train_tokenizer
from jaxnr.retrieval.embedder import Embedder, TfidfSvdEmbedder, load_embedder
from jaxnr.retrieval.index import NEVER, ArticleIndex
from jaxnr.rewards.composite import RewardModel
from jaxnr.rewards.judge import judge_of
from jaxnr.rewards.rubric import FACET_WORDS, Calibration, calibrate
from jaxnr.rewards.specificity import TermStatistics, telling_words

SPLITS = ("train", "valid", "test")

_AGAIN = "which `jaxnr data CONFIG --resume` writes again once done/data.json is deleted"


def prepare_data(config: Config, out: Path) -> None:
    """Writes under ``out``: data/ (tables, examples, report.json), truth/ (generated world only), tokenizer/.

    Everything that is fitted sees only what is dated before the validation window. Raises InputError where there are
    fewer training prompts than a step of a later stage takes.
    """
    tokenizer = _pretrained_tokenizer(config, out / "tokenizer")  # first, as it takes no time to find out
    tables, reader = _tables(config, out)
    tables.save(out / "data")
    t1, t2 = split_times(tables, config.data)
    splits = build_examples(tables, config.data, config.seed, prepare_cleaner(config, tables, out, t1))
    sizes = {
        f"{section}.prompts_per_step": getattr(config, section).prompts_per_step
        for section in ("warm_start", "grpo", "supervised", "distill")
    }
    check_batches(len(splits.train), sizes)
    write_examples(splits, out / "data" / "examples")
    texts = known_texts(tables, splits.train, t1)
    terms = TermStatistics.fit(texts)
    terms.save(out / "retrieval" / "signal_terms.json")
    if tokenizer is None:
        corpus = tokenizer_corpus(splits.train, texts, terms, config.prompt)
        tokenizer = train_tokenizer(corpus, config.prompt.vocabulary_size, out / "tokenizer")
    _prepare_retrieval(config, out / "retrieval", tables, splits.train, texts, terms, t1)
    report = _report(tables, splits, reader, t1, t2)
    report["prompts_shortened"] = {
        name: shortened_prompts(getattr(splits, name), terms, config.prompt, tokenizer) for name in SPLITS
    }
    write_text(out / "data" / "report.json", json.dumps(report, indent=2))


def _pretrained_tokenizer(config: Config, folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the pretrained models, copied to ``folder``; None where both begin from nothing.

    Raises InputError where a model cannot be used here, or not with the other.
    """
    models = [model_folder(model.path) for model in (config.teacher, config.student) if model.path]
    shapes = [read_decoder_config(model) for model in models]
    if not models:
        return None
    tokenizer = adopt_tokenizer(models, folder)
    for model, shape in zip(models, shapes, strict=True):
        check_tokenizer(model, shape, tokenizer)
    return tokenizer


def _tables(config: Config, out: Path) -> tuple[Tables, dict]:
    """The tables, and what the reader counted, which is printed too; the generated world has no reader."""
    if config.data.format == "synthetic":
        world = generate_world(config.seed)
        world.truth.save(out / "truth")
        return world.tables, {}
    tables, report = read_tables(config.data)
    Console().print(f"{config.data.path}: {report.counts()}", markup=False, highlight=False, soft_wrap=True)
    return tables, report.as_dict()


def _prepare_retrieval(
    config: Config,
    folder: Path,
    tables: Tables,
    train: Sequence[Example],
    texts: Sequence[str],
    signal_terms: TermStatistics,
    t1: int,
) -> None:
    """Fits the embedder, the terms of the catalogue and the judge's threshold, and embeds the catalogue."""
    # One process embeds, so what it embeds with lies on its devices alone; no model of a later stage is there beside.
    embedder = load_embedder(config.retrieval, texts, config.seed, own_mesh(make_mesh(config.mesh)))
    if isinstance(embedder, TfidfSvdEmbedder):
        embedder.save(folder)
    TermStatistics.fit(document_texts(_published_before(tables, t1).articles)).save(folder / "terms.json")
    signals = [
        (row, telling_words(signal.text, signal_terms, FACET_WORDS))
        for row, example in enumerate(train)
        for signal in example.signals
    ]
    users, user_M = np.unique([train[row].user_id for row, _ in signals], return_inverse=True)
    del users
    calibration = calibrate(embed_unique(embedder, [text for _, text in signals]), user_M, config.seed)
    write_text(folder / "calibration.json", json.dumps(calibration._asdict()))
    embeddings_IE = embedder.embed_documents(document_texts(tables.articles))
    partial = folder / "articles.safetensors.partial"
    save_file({"embeddings": embeddings_IE}, partial)
    partial.rename(folder / "articles.safetensors")


def open_rewards(config: Config, out: Path, tables: Tables, mesh: Mesh) -> RewardModel:
    """The reward model over the catalogue, from what the data stage wrote.

    A sentence encoder and a language model are spread over ``mesh``, whichever processes it has; each process holds the
    catalogue on its own devices.
    """
    folder = out / "retrieval"
    if config.retrieval.embedder == "tfidf_svd":
        embedder = TfidfSvdEmbedder.load(folder)
    else:
        embedder = load_embedder(config.retrieval, (), config.seed, mesh)
    embeddings_IE = read_embeddings(folder / "articles.safetensors")
    times = (tables.articles[name].cast("int64") for name in ("published_at", "expires_at"))
    published_I, expires_I = (np.asarray(column.fill_null(NEVER)) for column in times)
    return RewardModel(
        embedder=embedder,
        index=ArticleIndex(embeddings_IE, published_I, expires_I, own_mesh(mesh)),
        item_ids_I=tables.articles["item_id"].to_pylist(),
        articles_IE=embeddings_IE,
        statistics=TermStatistics.load(folder / "terms.json"),
        signal_terms=TermStatistics.load(folder / "signal_terms.json"),
        calibration=_read_calibration(folder / "calibration.json"),
        config=config,
        judge=judge_of(config.judge, out, mesh),
    )


def read_embeddings(path: Path) -> np.ndarray:
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor("embeddings")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: expected the embedded articles, {_AGAIN} ({error}).") from error


def _read_calibration(path: Path) -> Calibration:
    expected = f"the calibration of the judge, {_AGAIN}"
    content = read_json(path, expected)
    try:
        return Calibration(background=float(content["background"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected {expected} ({error!r}).") from error


def read_report(out: Path) -> dict:
    """What the data stage counted. Raises InputError where its report.json is missing or damaged."""
    path = out / "data" / "report.json"
    expected = f"the report of the data stage, {_AGAIN}"
    report = read_json(path, expected)
    if missing := {"users", "clicks"} - report.keys():
        raise InputError(f"{path}: expected {expected} (no {min(missing)} in it).")
    return report


def embed_unique(embedder: Embedder, texts: Sequence[str]) -> np.ndarray:
    """Vectors [N, E] of the texts, each different text embedded once."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return embedder.embed_queries(list(row_of))[[row_of[text] for text in texts]]


def _published_before(tables: Tables, t1: int) -> Tables:
    earlier = tables.articles.filter(pc.field("published_at").cast("int64") < t1)
    return dataclasses.replace(tables, articles=earlier)


def known_texts(tables: Tables, train: Sequence[Example], t1: int) -> list[str]:
    """Articles published before t1 (title and abstract) and the signals of the training prompts, each text once."""
    documents = document_texts(_published_before(tables, t1).articles)
    signals = (signal.text for example in train for signal in example.signals)
    return list(dict.fromkeys([*documents, *signals]))


def known_words(texts: Sequence[str], terms: TermStatistics) -> list[str]:
    """The telling words of each of the ``texts``, at most six a text, each word once."""
    words = (word for text in texts for word in telling_words(text, terms, count=6).split())
    return list(dict.fromkeys(words))


def tokenizer_corpus(
    train: Sequence[Example], texts: Sequence[str], terms: TermStatistics, config: PromptConfig
) -> list[str]:
    """What prompts and lists are made of, so that both become few tokens: ``texts`` stand for what lists may say."""
    shown = [as_shown(example, terms, config.signal_words) for example in train]
    prompts = [f"user\n{config.instructions}\n\n{render_signals(example.signals)}" for example in shown]
    lists = [format_list([signal.text for signal in example.signals[-config.max_queries :]]) for example in shown]
    if config.signal_words:
        # After a blank, as in prompts and lists: without one a word is another token.
        texts = [f" {telling_words(text, terms, config.signal_words)}" for text in texts]
    return [*texts, *prompts, *lists]


def shortened_prompts(
    examples: Sequence[Example], terms: TermStatistics, config: PromptConfig, tokenizer: PreTrainedTokenizerBase
) -> int:
    """How many prompts lose their oldest signals because they would be longer than `max_prompt_tokens`."""
    shown = (as_shown(example, terms, config.signal_words) for example in examples)
    return sum(encode_prompt(tokenizer, example, config).dropped > 0 for example in shown)


def _report(tables: Tables, splits: ExampleSplits, reader: dict, t1: int, t2: int) -> dict:
    counts = {name: len({example.user_id for example in getattr(splits, name)}) for name in SPLITS}
    skipped = sum(count for reason, count in splits.skipped.items() if reason.startswith("test_"))
    return {
        "users": {**counts, "skipped": skipped},
        "skipped": splits.skipped,
        "clicks": {
            name: {**dataclasses.asdict(report), "recallable_share": report.recallable_share}
            for name, report in splits.clicks.items()
        },
        "cleaning": dataclasses.asdict(splits.cleaning),
        "reader": reader,
        "events": tables.events.num_rows,
        "articles": tables.articles.num_rows,
        "requests": tables.requests.num_rows,
        "validation_begins": datetime.fromtimestamp(t1, UTC).isoformat(),
        "test_begins": datetime.fromtimestamp(t2, UTC).isoformat(),
    }
