"""The Flax BERT against transformers' own, and what a model folder that does not fit says."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from jaxnr.errors import InputError
from jaxnr.models.encoder import load_encoder, mean_pool
from jaxnr.models.weights import model_folder

torch = pytest.importorskip("torch", reason="parity needs torch (pip install -e .[parity])")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random tiny BERT as transformers saves it; every number of its shape differs from every default."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=20,
        layer_norm_eps=1e-3,
        initializer_range=0.5,
    )
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    return tmp_path


def tokens_and_mask(seed=0, lengths=(1, 4, 11, 16), width=16, vocabulary=61):
    rng = np.random.default_rng(seed)
    mask_BS = np.arange(width) < np.array(lengths)[:, None]
    return np.where(mask_BS, rng.integers(1, vocabulary, mask_BS.shape), 0), mask_BS


def torch_hidden(folder, tokens_BS, mask_BS):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens_BS), attention_mask=torch.tensor(mask_BS.astype(np.int64)))
    return out.last_hidden_state.numpy()


def hidden(folder, tokens_BS, mask_BS):
    model, params = load_encoder(folder)
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens_BS, mask_BS))


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_parity_with_transformers_on_a_random_bert(copy, act):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": act}))
    tokens_BS, mask_BS = tokens_and_mask()
    ours, theirs = hidden(copy, tokens_BS, mask_BS), torch_hidden(copy, tokens_BS, mask_BS)
    np.testing.assert_allclose(ours[mask_BS], theirs[mask_BS], rtol=0, atol=2e-5)


def test_a_text_does_not_depend_on_its_padding_nor_on_the_batch(tiny):
    tokens_BS, mask_BS = tokens_and_mask()
    together = hidden(tiny, tokens_BS, mask_BS)
    garbage_BS = np.where(mask_BS, tokens_BS, 7)
    np.testing.assert_allclose(hidden(tiny, garbage_BS, mask_BS)[mask_BS], together[mask_BS], atol=1e-6)
    alone = hidden(tiny, tokens_BS[2:3, :11], mask_BS[2:3, :11])  # a text of 11 tokens
    np.testing.assert_allclose(alone[0], together[2, :11], atol=2e-5)


def test_every_attended_token_counts_for_the_first(tiny):
    """Row j has another token at place j; of 8 places 6 are attended."""
    tokens_BS, mask_BS = tokens_and_mask(lengths=(6,) * 9, width=8)
    tokens_BS = np.repeat(tokens_BS[:1], 9, axis=0)
    tokens_BS[np.arange(8), np.arange(8)] += 1
    first_BD = hidden(tiny, tokens_BS, mask_BS)[:, 0]
    moved_B = np.abs(first_BD - first_BD[8]).max(axis=1)
    assert (moved_B[:6] > 1e-3).all()
    assert (moved_B[6:] < 1e-6).all()


def test_mean_pool_is_over_attended_tokens_only():
    hidden_BSD = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    pooled_BD = mean_pool(hidden_BSD, np.array([[True, True, False], [False, False, False]]))
    np.testing.assert_array_equal(pooled_BD, [[1, 2], [0, 0]])


def test_names_prefixed_by_a_larger_model_and_sharded_files_load_the_same(copy, tiny):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    shards: dict[str, dict] = {"a.safetensors": {}, "b.safetensors": {}}
    for count, (name, tensor) in enumerate(tensors.items()):
        shards["ab"[count % 2] + ".safetensors"][f"bert.{name}"] = tensor
    for name, shard in shards.items():
        save_file(shard, copy / name)
    weight_map = {tensor: name for name, shard in shards.items() for tensor in shard}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, load_encoder(copy)[1], load_encoder(tiny)[1])


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"tensor {QUERY} is missing"),
        (
            lambda t: t.update({QUERY: np.zeros((24, 5), np.float32)}),
            rf"{QUERY} has shape \[24, 5\], expected \[24, 24\]",
        ),
        (
            lambda t: t.update({"encoder.layer.3.output.dense.bias": np.zeros(24)}),
            "encoder.layer.3.output.dense.bias has no",
        ),
    ],
    ids=["missing", "misshaped", "surplus"],
)
def test_a_tensor_that_does_not_fit_is_named(copy, change, message):
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_encoder(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "'t5'.*expected 'bert'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "swish9"}, "hidden_act 'swish9'"),
    ],
)
def test_a_config_of_another_model_is_an_input_error(copy, change, message):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        load_encoder(copy)


def test_broken_files_are_input_errors(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable safetensors"):
        load_encoder(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"expected model\.safetensors"):
        load_encoder(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: expected a JSON file"):
        load_encoder(copy)


def test_a_name_that_is_no_folder_and_not_on_a_reachable_hub_is_an_input_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/no-such-model: not a folder"):
        model_folder("nobody/no-such-model")
    with pytest.raises(InputError, match="not a folder"):
        model_folder("/no/such/folder/at all")


def test_the_shape_comes_from_the_config(tiny):
    model, params = load_encoder(tiny)
    assert dataclasses.asdict(model.config)["layer_norm_eps"] == 1e-3
    assert params["layers"]["query"]["kernel"].shape == (3, 24, 24)
