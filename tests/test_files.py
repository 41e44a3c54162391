"""JSON that may be damaged is read, or named with what was expected of it."""

import json

import numpy as np
import pytest

from jaxnr.errors import InputError
from jaxnr.files import read_json, without_nan, write_text


def test_what_was_written_is_read_back(tmp_path):
    write_text(tmp_path / "a.json", '{"word": "é"}')
    assert read_json(tmp_path / "a.json", "a word") == {"word": "é"}
    write_text(tmp_path / "a.json", "[1]")
    assert read_json(tmp_path / "a.json", "numbers", list) == [1]


@pytest.mark.parametrize("content", [None, b"", b'{"word": "b', b"\xff\xfe", b"[1]", b"NULL"])
def test_anything_else_is_named_with_what_was_expected(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path, "a word")
    assert str(caught.value).startswith(f"{path}: expected a word")
    assert "\n" not in str(caught.value)


def test_numbers_that_json_does_not_know_become_null():
    value = {"a": [1, float("nan"), {"b": np.float64("inf")}], "c": (0.5, "nan", None, True)}
    cleaned = without_nan(value)
    assert cleaned == {"a": [1, None, {"b": None}], "c": [0.5, "nan", None, True]}
    json.dumps(cleaned, allow_nan=False)
