"""The Flax BERT and RoBERTa against transformers' own, on a mesh, and what a model folder that does not fit says."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from tiny import UNOPTIMISED, relative_gap

from jaxnr.config import MeshConfig
from jaxnr.errors import InputError
from jaxnr.mesh import batch_sharding, make_mesh, tree_shardings
from jaxnr.models.decoder import parameter_count
from jaxnr.models.encoder import (
    CLASSIFIER_TABLE,
    ENCODER_TABLE,
    Classifier,
    Encoder,
    EncoderConfig,
    init_params,
    load_classifier,
    load_encoder,
    mean_pool,
    positions,
)
from jaxnr.models.weights import model_folder

torch = pytest.importorskip("torch", reason="parity needs torch (pip install -e .[parity])")

SHAPE = {  # every number differs from every default
    "vocab_size": 62,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-3,
    "initializer_range": 0.5,
}
PAD = {"bert": 0, "roberta": 3}
ROBERTA = {**SHAPE, "type_vocab_size": 1, "pad_token_id": PAD["roberta"]}
LABELS = ["sport", "politics", "culture", "science"]


def tiny_models():
    """Of each kind, its random tiny torch model."""
    yield "bert", transformers.BertModel(transformers.BertConfig(**SHAPE, type_vocab_size=3))
    yield "roberta", transformers.RobertaModel(transformers.RobertaConfig(**ROBERTA))
    yield "masked_lm", transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ROBERTA))
    config = transformers.RobertaConfig(**ROBERTA, id2label=dict(enumerate(LABELS)))
    yield "classifier", transformers.RobertaForSequenceClassification(config)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """The tiny models as transformers saves them."""
    torch.manual_seed(0)
    folders = {}
    for kind, model in tiny_models():
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
                parameter.add_(0.1 * torch.randn_like(parameter))
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders[kind])
    return folders


@pytest.fixture
def copy(request, tiny, tmp_path) -> Path:
    """A copy that a test may change of the model whose kind is the fixture's parameter, else of the BERT."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny[getattr(request, "param", "bert")] / name).read_bytes())
    return tmp_path


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def tokens_and_mask(kind="bert", lengths=(1, 4, 11, 16), width=16, side="right"):
    """Random texts; now and then the token of padding is in one."""
    rng = np.random.default_rng(0)
    mask_BS = np.arange(width) < np.array(lengths)[:, None]
    mask_BS = mask_BS if side == "right" else mask_BS[:, ::-1]
    tokens_BS = rng.integers(4, SHAPE["vocab_size"], mask_BS.shape)
    tokens_BS[:, 5] = PAD[kind]
    return np.where(mask_BS, tokens_BS, PAD[kind]), mask_BS


def torch_output(model, tokens_BS, mask_BS, **more):
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens_BS), attention_mask=torch.tensor(mask_BS.astype(np.int64)), **more)


def torch_hidden(folder, tokens_BS, mask_BS, **more):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return torch_output(model, tokens_BS, mask_BS, **more).last_hidden_state.numpy()


@partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMISED)
def apply(model, params, *arrays):
    return model.apply({"params": params}, *arrays)


def hidden(folder, *arrays):
    return np.asarray(apply(*load_encoder(folder), *arrays))


@pytest.mark.parametrize(
    ("copy", "act"),
    [("bert", "gelu"), ("bert", "gelu_new"), ("bert", "relu"), ("roberta", "gelu")],
    indirect=["copy"],
)
def test_hidden_states_are_those_of_transformers_with_padding_on_either_side(copy, act):
    change_config(copy, hidden_act=act)
    kind = EncoderConfig.read(copy / "config.json").model_type
    for side in ("right", "left"):
        tokens_BS, mask_BS = tokens_and_mask(kind, side=side)
        assert (tokens_BS[mask_BS] == PAD[kind]).any()
        ours, theirs = hidden(copy, tokens_BS, mask_BS)[mask_BS], torch_hidden(copy, tokens_BS, mask_BS)[mask_BS]
        assert relative_gap(ours, theirs) < 1e-5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_token_types_are_those_of_transformers(tiny):
    tokens_BS, mask_BS = tokens_and_mask()
    segment_BS = np.random.default_rng(1).integers(0, 3, mask_BS.shape)
    ours = hidden(tiny["bert"], tokens_BS, mask_BS, segment_BS)[mask_BS]
    theirs = torch_hidden(tiny["bert"], tokens_BS, mask_BS, token_type_ids=torch.tensor(segment_BS))[mask_BS]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    assert relative_gap(hidden(tiny["bert"], tokens_BS, mask_BS)[mask_BS], theirs) > 0.1


@pytest.mark.parametrize("kind", PAD)
def test_a_text_does_not_depend_on_its_padding_nor_on_the_batch(tiny, kind):
    tokens_BS, mask_BS = tokens_and_mask(kind)
    together = hidden(tiny[kind], tokens_BS, mask_BS)
    garbage_BS = np.where(mask_BS, tokens_BS, 7)
    np.testing.assert_allclose(hidden(tiny[kind], garbage_BS, mask_BS)[mask_BS], together[mask_BS], atol=1e-6)
    alone = hidden(tiny[kind], tokens_BS[2:3, :11], mask_BS[2:3, :11])  # a text of 11 tokens
    np.testing.assert_allclose(alone[0], together[2, :11], atol=2e-5)


@pytest.mark.parametrize("kind", PAD)
def test_texts_grouped_by_length_come_out_as_all_of_them_together(tiny, kind):
    lengths = np.array([9, 2, 9, 2])
    tokens_BS, mask_BS = tokens_and_mask(kind, lengths)
    together = hidden(tiny[kind], tokens_BS, mask_BS)
    for length in set(lengths):
        rows = lengths == length
        group = hidden(tiny[kind], tokens_BS[rows, :length], mask_BS[rows, :length])
        assert relative_gap(group, together[rows, :length]) < 1e-5


@pytest.mark.parametrize("kind", PAD)
def test_every_attended_token_counts_for_the_first(tiny, kind):
    """Row j has another token at place j; of 8 places 6 are attended."""
    tokens_BS, mask_BS = tokens_and_mask(kind, lengths=(6,) * 9, width=8)
    tokens_BS = np.repeat(tokens_BS[:1], 9, axis=0)
    tokens_BS[np.arange(8), np.arange(8)] += 1
    first_BD = hidden(tiny[kind], tokens_BS, mask_BS)[:, 0]
    moved_B = np.abs(first_BD - first_BD[8]).max(axis=1)
    assert (moved_B[:6] > 1e-3).all()
    assert (moved_B[6:] < 1e-6).all()


def test_roberta_counts_its_tokens_from_behind_the_positions_of_padding(tiny):
    config = dataclasses.replace(EncoderConfig.read(tiny["roberta"] / "config.json"), pad_token_id=1)
    tokens_BS = np.array([[0, 9, 1, 8, 1], [1, 1, 0, 9, 2], [0, 9, 9, 9, 9]])
    mask_BS = np.array([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    expected = [[2, 3, 1, 4, 1], [1, 1, 2, 3, 4], [2, 3, 1, 1, 1]]
    np.testing.assert_array_equal(positions(config, tokens_BS, mask_BS), expected)


@pytest.mark.parametrize(("kind", "longest"), [("bert", 20), ("roberta", 16)])
def test_the_longest_text_is_as_in_transformers_and_a_longer_one_an_input_error(tiny, kind, longest):
    assert EncoderConfig.read(tiny[kind] / "config.json").max_tokens == longest
    tokens_BS = np.random.default_rng(2).integers(4, SHAPE["vocab_size"], (2, longest + 1))
    mask_BS = np.ones_like(tokens_BS, bool)
    ours = hidden(tiny[kind], tokens_BS[:, 1:], mask_BS[:, 1:])
    theirs = torch_hidden(tiny[kind], tokens_BS[:, 1:], mask_BS[:, 1:])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    with pytest.raises(InputError, match=f"Texts of {longest + 1} tokens.*positions for {longest}"):
        hidden(tiny[kind], tokens_BS, mask_BS)


def test_bfloat16_parameters_give_bfloat16_states_near_the_float32_ones(tiny):
    tokens_BS, mask_BS = tokens_and_mask("roberta")
    model, params = load_encoder(tiny["roberta"])
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    states = apply(model, half, tokens_BS, mask_BS)
    assert states.dtype == jnp.bfloat16
    assert relative_gap(states[mask_BS], hidden(tiny["roberta"], tokens_BS, mask_BS)[mask_BS]) < 0.05


def logits(folder, tokens_BS, mask_BS):
    return np.asarray(apply(*load_classifier(folder), tokens_BS, mask_BS))


@pytest.mark.parametrize("copy", ["classifier"], indirect=True)
def test_logits_of_the_classification_head_are_those_of_transformers(copy):
    tokens_BS, mask_BS = tokens_and_mask("roberta")
    theirs = transformers.RobertaForSequenceClassification.from_pretrained(copy).eval()
    expected = torch_output(theirs, tokens_BS, mask_BS).logits.numpy()
    ours = logits(copy, tokens_BS, mask_BS)
    assert ours.shape == (4, len(LABELS))
    assert expected.std(axis=0).min() > 0.1
    assert relative_gap(ours, expected) < 1e-5
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ours, logits(copy, tokens_BS, mask_BS))


def test_labels_are_in_the_order_of_their_logits(tiny):
    assert load_classifier(tiny["classifier"])[0].labels == tuple(LABELS)


def test_a_classifier_whose_config_names_no_labels_has_the_two_of_transformers(tmp_path):
    theirs = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**ROBERTA)).eval()
    theirs.save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert load_classifier(tmp_path)[0].labels == tuple(theirs.config.id2label.values())
    tokens_BS, mask_BS = tokens_and_mask("roberta")
    assert relative_gap(logits(tmp_path, tokens_BS, mask_BS), torch_output(theirs, tokens_BS, mask_BS).logits) < 1e-5


def published(layers, width, inner, heads):
    """The shape of a published RoBERTa."""
    return {
        "vocab_size": 50_265,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    }


@pytest.mark.parametrize(
    ("shape", "encoder", "with_pooler"),
    [
        (published(12, 768, 3072, 12), 124_055_040, 124_645_632),
        (published(24, 1024, 4096, 16), 354_310_144, 355_359_744),
    ],
    ids=["base", "large"],
)
def test_the_published_shapes_have_the_published_parameter_counts(tmp_path, shape, encoder, with_pooler):
    theirs_config = transformers.RobertaConfig(**shape, num_labels=3)
    theirs_config.save_pretrained(tmp_path)
    config = EncoderConfig.read(tmp_path / "config.json")
    assert config.max_tokens == 512

    def count(model) -> int:
        return parameter_count(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))

    assert count(Encoder(config)) == encoder
    with torch.device("meta"):
        theirs = transformers.RobertaForSequenceClassification(theirs_config)
        pooled = transformers.RobertaModel(theirs_config)
    assert count(Classifier(config, ("a", "b", "c"))) == sum(tensor.numel() for tensor in theirs.parameters())
    assert (
        sum(tensor.numel() for tensor in pooled.parameters())
        == with_pooler
        == encoder + config.hidden_size * (config.hidden_size + 1)
    )


def test_each_parameter_has_one_row_and_the_rows_have_the_names_of_transformers(tiny):
    for kind, load, table in (
        ("roberta", load_encoder, ENCODER_TABLE),
        ("classifier", load_classifier, CLASSIFIER_TABLE),
    ):
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(load(tiny[kind])[1])
        ]
        assert sorted(row.path for row in table) == sorted(paths)
        names = {row.name.format(layer=layer) for row in table for layer in range(SHAPE["num_hidden_layers"])}
        theirs = load_file(tiny[kind] / "model.safetensors")
        assert names == {name for name in theirs if not name.startswith("pooler.")}


def test_eight_devices_give_the_logits_and_states_of_one(tiny):
    tokens_BS, mask_BS = tokens_and_mask("roberta")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for model, params in (load_classifier(tiny["classifier"]), load_encoder(tiny["bert"])):
        alone = apply(model, params, tokens_BS, mask_BS)
        placed = jax.device_put(params, tree_shardings(params, mesh))
        layers = placed.get("encoder", placed)["layers"]
        assert layers["query"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
        assert layers["output"]["kernel"].addressable_shards[0].data.shape == (3, 20, 12)
        batch = jax.device_put((tokens_BS, mask_BS), batch_sharding(mesh))
        together = apply(model, placed, *batch)
        assert len(together.sharding.device_set) == 8
        assert relative_gap(together, alone) < 1e-5


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
    jax.tree.map(np.testing.assert_array_equal, load_encoder(copy)[1], load_encoder(tiny["bert"])[1])


@pytest.mark.parametrize("copy", ["masked_lm", "classifier"], indirect=True)
def test_the_encoder_of_a_roberta_with_a_head_loads_without_it(copy):
    """Names as transformers writes them ("roberta." before the encoder's), then as a RobertaModel has them."""
    tokens_BS, mask_BS = tokens_and_mask("roberta")
    prefixed = hidden(copy, tokens_BS, mask_BS)
    theirs = torch_hidden(copy, tokens_BS, mask_BS)
    np.testing.assert_allclose(prefixed[mask_BS], theirs[mask_BS], rtol=0, atol=2e-5)
    tensors = load_file(copy / "model.safetensors")
    assert "roberta.embeddings.word_embeddings.weight" in tensors
    save_file({name.removeprefix("roberta."): tensor for name, tensor in tensors.items()}, copy / "model.safetensors")
    np.testing.assert_array_equal(hidden(copy, tokens_BS, mask_BS), prefixed)


def test_norms_under_the_names_of_the_first_berts_load_the_same(copy, tiny):
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(copy / "model.safetensors")
    for name in list(tensors):
        stem, _, end = name.rpartition("LayerNorm.")
        if stem:
            tensors[f"bert.{stem}{old['LayerNorm.' + end]}"] = tensors.pop(name)
    save_file(tensors, copy / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_encoder(copy)[1], load_encoder(tiny["bert"])[1])


def row(name):
    return f"encoder.layer.1.attention.self.{name}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p: t.pop(p + row("query.weight")), rf"tensor \S*{row('query.weight')} is missing"),
        (
            lambda t, p: t.update({p + row("query.weight"): np.zeros((24, 5), np.float32)}),
            rf"{row('query.weight')} has shape \[24, 5\], expected \[24, 24\]",
        ),
        (
            lambda t, p: t.update({p + "encoder.layer.3.output.dense.bias": np.zeros(24)}),
            "encoder.layer.3.output.dense.bias has no place",
        ),
    ],
    ids=["missing", "misshaped", "surplus"],
)
@pytest.mark.parametrize(
    ("copy", "load", "prefix"),
    [
        ("bert", load_encoder, ""),
        ("roberta", load_encoder, ""),
        ("masked_lm", load_encoder, "roberta."),
        ("classifier", load_classifier, "roberta."),
    ],
    indirect=["copy"],
)
def test_a_tensor_that_does_not_fit_is_named(copy, load, prefix, change, message):
    tensors = load_file(copy / "model.safetensors")
    load(copy)
    change(tensors, prefix)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load(copy)


def test_a_head_that_does_not_fit_is_named(tiny, tmp_path):
    with pytest.raises(InputError, match=r"tensor classifier\.dense\.bias is missing \(4 in all\)"):
        load_classifier(tiny["masked_lm"])
    (tmp_path / "config.json").write_bytes((tiny["classifier"] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny["classifier"] / "model.safetensors").read_bytes())
    change_config(tmp_path, id2label={"0": "no", "1": "yes"})
    with pytest.raises(InputError, match=r"classifier\.out_proj\.\w+ has shape \[4.*expected \[2"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("copy", "change", "message"),
    [
        ("bert", {"model_type": "t5"}, "'t5'; expected 'bert' or 'roberta'"),
        ("bert", {"model_type": "xlm-roberta"}, "'xlm-roberta'; expected"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("roberta", {"is_decoder": True}, "is_decoder True; expected False"),
        ("bert", {"hidden_act": "swish9"}, "hidden_act 'swish9'"),
        ("roberta", {"pad_token_id": None}, "expected the key pad_token_id of a roberta encoder"),
        ("bert", {"layer_norm_eps": None}, "expected the key layer_norm_eps of a bert encoder"),
    ],
    indirect=["copy"],
)
def test_a_config_of_another_model_is_an_input_error(copy, change, message):
    load_encoder(copy)
    change_config(copy, **change)
    with pytest.raises(InputError, match=message):
        load_encoder(copy)


@pytest.mark.parametrize("copy", ["classifier"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "'bert'; expected 'roberta'"),
        ({"problem_type": "regression"}, "problem_type 'regression'; expected 'single_label_classification'"),
        ({"id2label": {"0": "score"}}, "two or more labels"),
        ({"id2label": {"0": "no", "2": "yes"}}, "from '0' on"),
        ({"id2label": ["no", "yes"]}, "id2label"),
    ],
)
def test_a_config_of_another_classifier_is_an_input_error(copy, change, message):
    change_config(copy, **change)
    with pytest.raises(InputError, match=message):
        load_classifier(copy)


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
    for kind, pad in PAD.items():
        model, params = load_encoder(tiny[kind])
        assert SHAPE.items() <= dataclasses.asdict(model.config).items()
        assert model.config.pad_token_id == pad
        assert params["layers"]["query"]["kernel"].shape == (3, 24, 24)
