"""Shapes of models that are not at hand."""

import json

import jax
import pytest

from jaxnr.errors import InputError
from jaxnr.models.decoder import Decoder, init_params, parameter_count
from jaxnr.planning.shapes import KNOWN, as_embedder, decoder_shape, find_shape


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-Embedding-0.6B", 595_776_512),
        ("Qwen/Qwen3-Embedding-4B", 4_021_774_336),
        ("Qwen/Qwen3-Embedding-8B", 8_188_515_328 - 151_665 * 4096),  # without its head
    ],
)
def test_known_shapes_have_the_published_number_of_parameters(name, parameters):
    model = Decoder(decoder_shape(name)[0])
    assert parameter_count(jax.eval_shape(lambda: init_params(model, jax.random.key(0)))) == parameters


def test_every_known_model_has_no_more_tokens_than_rows():
    assert all(known.tokens <= known.shape.vocab_size for known in KNOWN.values())


def test_a_folder_needs_no_weights_and_no_tokenizer(tmp_path):
    shape, _ = decoder_shape("Qwen/Qwen2.5-0.5B-Instruct")
    (tmp_path / "config.json").write_text(json.dumps(shape.to_json()))
    assert find_shape(str(tmp_path)) == (shape, shape.vocab_size)
    assert as_embedder(shape).tie_word_embeddings


def test_what_is_not_to_be_found_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"Qwen2\.5-32B"):
        find_shape("someone/not-a-model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="llama"):
        find_shape(str(tmp_path))
