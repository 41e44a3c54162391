"""Examples on disk: what was written comes back, whole or not at all, without TensorFlow, noise or network."""

import os
import socket
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from jaxnr.data.cleaning import CleaningReport
from jaxnr.data.dataset import UserHistories, load, prepare
from jaxnr.data.examples import Example, ExampleSplits, Signal
from jaxnr.errors import InputError


def make_splits(text="oil price"):
    """Three splits with what could go wrong: empty and single lists, other scripts, no item, times beyond 32 bits."""
    signals = (
        Signal(2**33, "search", text, None),
        Signal(2**33 + 1, "news", "eleições 日本の経済", "n1"),
    )
    examples = [
        Example(0, "ü", 2**33 + 2, signals, (), ("n1", "n2")),
        Example(7, "u1", 5, (), (), ()),
        Example(3, "u2", 6, signals[:1], ("n3",), ("n9",)),
        Example(2**31 - 1, "u3", 7, signals * 30, ("n3", "n4"), ()),
    ]
    cleaning = CleaningReport(total=0, kept=0, cut=0, dropped={})
    return ExampleSplits(
        train=examples[:2], valid=examples[2:3], test=examples[3:], skipped={}, cleaning=cleaning, clicks={}
    )


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_what_was_written_comes_back_in_order(tmp_path, split):
    splits = make_splits()
    prepare(splits, tmp_path / "examples")
    source = load(tmp_path / "examples", split)
    assert list(source) == getattr(splits, split)
    assert source[-1] == getattr(splits, split)[-1]
    assert source[0:1] == getattr(splits, split)[0:1]
    with pytest.raises(IndexError):
        source[len(source)]
    first = source[0]
    assert [type(value) for value in first] == [int, str, int, tuple, tuple, tuple]
    assert all(type(signal) is Signal and type(signal.text) is str for signal in first.signals)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples"]


def test_order_survives_many_examples(tmp_path):
    splits = make_splits()
    many = [splits.train[0]._replace(example_id=i, user_id=f"u{i}") for i in range(300)]
    prepare(ExampleSplits(**{**vars(splits), "train": many}), tmp_path / "examples")
    assert list(load(tmp_path / "examples", "train")) == many


def test_preparing_again_replaces_what_was_there(tmp_path):
    prepare(make_splits("oil price"), tmp_path / "examples")
    prepare(make_splits("chess final"), tmp_path / "examples")
    assert load(tmp_path / "examples", "train")[0].signals[0].text == "chess final"


@pytest.mark.parametrize("before", [False, True])
def test_a_preparation_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch, before):
    if before:
        prepare(make_splits("oil price"), tmp_path / "examples")
    generate = UserHistories._generate_examples

    def break_off(self, examples):
        if examples is self._examples["test"]:
            raise KeyboardInterrupt
        yield from generate(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(UserHistories, "_generate_examples", break_off)
        with pytest.raises(KeyboardInterrupt):
            prepare(make_splits("chess final"), tmp_path / "examples")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["examples"] if before else [])
    if before:
        assert load(tmp_path / "examples", "train")[0].signals[0].text == "oil price"


def test_what_a_killed_preparation_left_is_cleared(tmp_path):
    (tmp_path / "examples.partial" / "user_histories" / "1.0.0").mkdir(parents=True)
    prepare(make_splits(), tmp_path / "examples")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples"]
    assert len(load(tmp_path / "examples", "train")) == 2


def test_quiet_offline_and_any_working_directory(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    prepare(make_splits(), tmp_path / "examples")
    assert len(load(tmp_path / "examples", "test")) == 1
    assert capfd.readouterr() == ("", "")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(load(tmp_path / "examples", "test")) == 1


def test_plain_tfds_reads_the_folder(tmp_path):
    prepare(make_splits(), tmp_path / "examples")
    source = tfds.builder_from_directory(tmp_path / "examples").as_data_source("valid")
    assert source[0]["user_id"] == b"u2"


def test_tensorflow_is_not_imported(tmp_path):
    program = (
        "import sys; from pathlib import Path; from jaxnr.data.dataset import load; "
        f"print(load(Path({str(tmp_path / 'examples')!r}), 'valid')[0].user_id, 'tensorflow' in sys.modules)"
    )
    prepare(make_splits(), tmp_path / "examples")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.split() == ["u2", "False"]


def test_a_missing_folder_or_split_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.*not a folder of prepared examples"):
        load(tmp_path / "nowhere", "train")
    prepare(make_splits(), tmp_path / "examples")
    with pytest.raises(InputError, match=r"no split 'dev'; it has test, train, valid"):
        load(tmp_path / "examples", "dev")


@pytest.mark.parametrize("name", ["features.json", "user_histories-train.array_record-00000-of-00001"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_an_input_error(tmp_path, name, share):
    prepare(make_splits(), tmp_path / "examples")
    whole = (tmp_path / "examples" / name).read_bytes()
    (tmp_path / "examples" / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="not a folder of prepared examples"):
        load(tmp_path / "examples", "train")
