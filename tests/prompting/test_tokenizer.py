"""Byte-level tokenizers trained from scratch, in the Hugging Face layout."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxnr.errors import InputError
from jaxnr.prompting.output import format_list
from jaxnr.prompting.prompt import encode_completion
from jaxnr.prompting.tokenizer import END, PAD, PIECES, START, load_tokenizer, train_tokenizer

TEXTS = [f"search: {a} {b}" for a in ("storm", "rowing", "electric car") for b in ("florida", "results", "prices")]
TEXTS += [format_list([text, "news café 2026"]) for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 400, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_but_for_case_and_the_blank_after_an_opening_quote(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == normal(tokenizer, text)


def test_what_is_normalised(tokenizer):
    assert normal(tokenizer, 'A ["Storm Florida", "É"] of "') == 'a [" storm florida", " é"] of "'


def normal(tokenizer, text: str) -> str:
    return tokenizer.backend_tokenizer.normalizer.normalize_str(text)


@settings(deadline=None)
@given(st.text(st.sampled_from('a ["<|im_end>|start,é\n')) | st.sampled_from([PAD, START, END, f"{END}{END} {START}"]))
def test_completion_holds_the_end_token_once_and_last(tokenizer, text):
    ids = encode_completion(tokenizer, text)
    assert ids[-1] == tokenizer.eos_token_id
    assert not set(ids[:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[:-1]) == normal(tokenizer, text)


def test_special_tokens_are_the_first_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids([PAD, START, END]) == [0, 1, 2]
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert len(tokenizer) <= 400


def test_frequent_words_are_one_token(tokenizer):
    assert len(tokenizer(" florida")["input_ids"]) == 1


def test_the_vocabulary_is_bytes_pieces_and_whole_words(tmp_path):
    words = [f"{a}{b}{c}" for a in ("storm", "river", "market") for b in ("light", "house", "fall") for c in "abcdefgh"]
    texts = [f" {one} {two}" for one in words for two in words]
    tokenizer = train_tokenizer(texts, 256 + 3 + PIECES + len(words), tmp_path)
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in words)
    assert len(tokenizer(" stormlightz")["input_ids"]) > 1


def test_chat_template_is_chatml(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


def test_what_a_killed_save_left_is_gone_after_the_next(folder, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jaxnr.prompting.tokenizer.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(TEXTS, 400, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".partial"]
    (tmp_path / ".partial" / "half_written.json").touch()
    train_tokenizer(TEXTS, 400, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in folder.iterdir())


def test_same_texts_give_the_same_files(folder, tmp_path):
    train_tokenizer(iter(TEXTS), 400, tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    train_tokenizer(TEXTS, 300, tmp_path)
    train_tokenizer(TEXTS, 400, tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "weights"
    assert len(AutoTokenizer.from_pretrained(tmp_path)) > 300


def test_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(InputError, match="vocabulary_size is 258"):
        train_tokenizer(TEXTS, 258, tmp_path)
    assert not list(tmp_path.iterdir())


def test_absent_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("key", "message"), [("eos_token", "no end token"), ("chat_template", "no chat template")])
def test_what_a_tokenizer_must_have(folder, tmp_path, key, message):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config[key]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)
