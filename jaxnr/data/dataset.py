"""Examples on disk: a TFDS data set in array_record files, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import tensorflow_datasets as tfds

from jaxnr.data.examples import Example, ExampleSplits, Signal
from jaxnr.errors import InputError


class UserHistories(tfds.core.GeneratorBasedBuilder):
    """Requests for news with the signals before them: `jaxnr.data.examples.Example`, field by field."""

    name = "user_histories"
    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. Without this TFDS looks for a checksum file, with a package that it does not declare.
    url_infos = None

    def __init__(self, *, splits: ExampleSplits, data_dir: Path):
        self._examples = {"train": splits.train, "valid": splits.valid, "test": splits.test}
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        signal = {"timestamp": np.int64, "domain": text, "text": text, "item_id": text}
        features = tfds.features.FeaturesDict(
            {
                "example_id": np.int32,
                "user_id": text,
                "timestamp": np.int64,
                "signals": tfds.features.Sequence(signal),
                "relevant": tfds.features.Sequence(text),
                "seen": tfds.features.Sequence(text),
            }
        )
        # In the given order: the input pipeline shuffles, and tables of results stay comparable row by row.
        return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(examples) for split, examples in self._examples.items()}

    def _generate_examples(self, examples: Sequence[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        for example in examples:
            # The record format has no null; no article has an empty id.
            signals = [{**signal._asdict(), "item_id": signal.item_id or ""} for signal in example.signals]
            yield example.example_id, {**example._asdict(), "signals": signals}


class ExampleSource(Sequence[Example]):
    """One split in a prepared folder: examples by position, each read from disk when asked for."""

    def __init__(self, records: Sequence[dict[str, Any]]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return _decode(self._records[range(len(self))[index]])


def prepare(splits: ExampleSplits, folder: Path) -> None:
    """Writes the three splits to the folder, whole or not at all; what was there before is replaced.

    The folder is a TFDS data set of its own: `tfds.builder_from_directory(folder).as_data_source("train")` reads it.
    """
    folder = folder.absolute()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        builder = UserHistories(splits=splits, data_dir=partial)
        tfds.disable_progress_bar()
        # TFDS announces downloads on standard output, which belongs to the command; there are none.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                file_format=tfds.core.FileFormat.ARRAY_RECORD,
            )
        shutil.rmtree(folder, ignore_errors=True)
        Path(builder.data_dir).rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path, split: str) -> ExampleSource:
    """The examples of one split of a prepared folder. Raises InputError where there is none."""
    try:
        builder = tfds.builder_from_directory(folder.absolute())
        if split not in builder.info.splits:
            raise InputError(f"{folder}: has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}.")
        source = ExampleSource(builder.as_data_source(split))  # pyright: ignore[reportCallIssue]
        # The files are opened when first read; one that is missing or cut off is better noticed here.
        _ = source[0], source[-1]
    except (OSError, ValueError, RuntimeError, tfds.core.DatasetNotFoundError) as error:
        raise InputError(f"{folder}: not a folder of prepared examples (TFDS, array_record): {error}") from error
    return source


def _decode(record: dict[str, Any]) -> Example:
    """TFDS gives text as bytes, numbers as NumPy scalars, and a list of signals as a dict of lists."""
    signals = record["signals"]
    times, domains, texts, item_ids = (signals[name] for name in Signal._fields)
    return Example(
        example_id=int(record["example_id"]),
        user_id=_text(record["user_id"]),
        timestamp=int(record["timestamp"]),
        signals=tuple(
            Signal(int(time), _text(domain), _text(text), _text(item_id) or None)
            for time, domain, text, item_id in zip(times, domains, texts, item_ids, strict=True)
        ),
        relevant=tuple(map(_text, record["relevant"])),
        seen=tuple(map(_text, record["seen"])),
    )


def _text(value: bytes) -> str:
    return value.decode("utf-8")
