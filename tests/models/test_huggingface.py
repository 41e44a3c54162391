"""Checkpoints in the Hugging Face layout, in and out: parity with transformers, sharded loads, what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import UNOPTIMISED, left_padded, random_params, relative_gap, tiny_decoder

from jaxnr.config import MeshConfig
from jaxnr.errors import InputError
from jaxnr.mesh import make_mesh, tree_shardings
from jaxnr.models import weights
from jaxnr.models.decoder import Decoder, DecoderConfig, head_VD, init_params, parameter_count
from jaxnr.models.encoder import Classifier, Encoder, EncoderConfig
from jaxnr.models.encoder import init_params as init_encoder
from jaxnr.models.huggingface import load, save
from jaxnr.models.lora import LoraConfig, merge, trainable
from jaxnr.models.weights import load_params
from jaxnr.prompting.tokenizer import train_tokenizer
from jaxnr.sampling.sampler import SamplingSettings, make_sampler

KINDS = {
    "qwen2 tied": {"rope_theta": 1e6},
    "qwen2 untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "qwen3 tied": {"model_type": "qwen3", "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "qwen3 untied": {"model_type": "qwen3", "tie_word_embeddings": False},
}
ROWS = 320
"""Of the embedding: more than the tokenizer has tokens."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["storm over florida", "the storm of the year"] * 3, 300, tmp_path_factory.mktemp("tokens"))


def saved(folder, tokenizer, lora=None, **changes):
    """A tiny checkpoint with random parameters: the model and its parameters as they were saved in ``folder``."""
    model = tiny_decoder(vocab_size=ROWS, **changes)
    model = model if lora is None else model.clone(lora=lora)
    params = random_params(model)
    save(folder, model, params, tokenizer)
    return model, params


def logits(model, params, tokens_BS, mask_BS):
    def apply(params):
        return model.apply({"params": params}, tokens_BS, mask_BS) @ head_VD(params).T

    return np.asarray(jax.jit(apply, compiler_options=UNOPTIMISED)(params))


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_what_is_saved_loads_to_the_same_bits(tmp_path, tokenizer, changes):
    model, params = saved(tmp_path / "model", tokenizer, **changes)
    loaded = load(tmp_path / "model")
    assert loaded.model.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded.params, params))
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_transformers_gives_the_logits_of_what_was_saved_here(tmp_path, tokenizer, changes, padding):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, params = saved(tmp_path / "model", tokenizer, **changes)
    reference, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens_BS, mask_BS = left_padded([9, 4], 9)
    if padding == "right":
        tokens_BS, mask_BS = tokens_BS[:, ::-1], mask_BS[:, ::-1]
    position_BS = np.maximum(mask_BS.cumsum(-1) - 1, 0)
    with torch.no_grad():
        arrays = (torch.tensor(array.copy()).long() for array in (tokens_BS, mask_BS, position_BS))
        expected = reference.eval()(*arrays).logits.numpy()
    assert relative_gap(logits(model, params, tokens_BS, mask_BS)[mask_BS], expected[mask_BS]) < 1e-4


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saved_gives_its_logits_here(tmp_path, tokenizer, kind, tied):
    torch = pytest.importorskip("torch")
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=ROWS,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        **({"head_dim": 8} if kind == "Qwen3" else {}),
    )
    torch.manual_seed(0)
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # biases and norms too
            parameter += 0.1 * torch.randn_like(parameter)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load(tmp_path)
    tokens_BS, mask_BS = left_padded([9, 5], 9)
    position_BS = np.maximum(mask_BS.cumsum(-1) - 1, 0)
    with torch.no_grad():
        arrays = (torch.tensor(array).long() for array in (tokens_BS, mask_BS, position_BS))
        expected = reference(*arrays).logits.numpy()
    assert relative_gap(logits(loaded.model, loaded.params, tokens_BS, mask_BS)[mask_BS], expected[mask_BS]) < 1e-4


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)], ids=str)
def test_a_sharded_load_is_the_plain_one_and_each_device_holds_its_part(tmp_path, tokenizer, mesh):
    saved(tmp_path / "model", tokenizer, num_hidden_layers=3, tie_word_embeddings=False)
    plain = load(tmp_path / "model").params
    mesh = make_mesh(MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]))
    loaded = load(tmp_path / "model", mesh=mesh).params
    wanted = tree_shardings(plain, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), loaded, wanted))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), loaded, plain))
    kernel = loaded["layers"]["gate_proj"]["kernel"]
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // ways}


def test_the_host_holds_one_tensor_at_a_time(tmp_path, tokenizer, monkeypatch):
    saved(tmp_path / "model", tokenizer, num_hidden_layers=4)
    sizes = []
    read = weights._Place.read

    def counting(self, index, dtype):
        part = read(self, index, dtype)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(weights._Place, "read", counting)
    load(tmp_path / "model", mesh=make_mesh(MeshConfig(fsdp=4, tensor=2, data=1)))
    assert max(sizes) == ROWS * 32 // 8  # the embedding's part on one device; every layer's tensor is smaller


def test_bfloat16_parameters_stay_bfloat16_in_the_file(tmp_path, tokenizer):
    model, params = saved(tmp_path / "wide", tokenizer)
    narrow = load(tmp_path / "wide", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {jnp.dtype("bfloat16")}
    assert narrow.model.dtype == jnp.bfloat16
    save(tmp_path / "narrow", narrow.model, narrow.params, tokenizer)
    with safe_open(tmp_path / "narrow" / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    tokens_BS, mask_BS = left_padded([5, 9], 9)
    wide = logits(model, params, tokens_BS, mask_BS)
    assert relative_gap(logits(narrow.model, narrow.params, tokens_BS, mask_BS)[mask_BS], wide[mask_BS]) < 0.03


def test_large_models_are_saved_in_several_files(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    _, params = saved(tmp_path / "model", tokenizer)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    tensors = [load_file(file) for file in files]
    assert all(len(part) == 1 or sum(x.nbytes for x in part.values()) <= 20_000 for part in tensors)
    loaded = load(tmp_path / "model").params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, params))


def test_adapters_are_merged_on_export(tmp_path, tokenizer):
    lora = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
    model, params = saved(tmp_path / "model", tokenizer, lora=lora)
    assert {path[1] for path in _paths(trainable(params))} == {"q_proj", "down_proj"}
    loaded = load(tmp_path / "model")
    assert _paths(loaded.params) == _paths(merge(params, lora))
    tokens_BS, mask_BS = left_padded([9, 4], 9)
    merged = logits(loaded.model, loaded.params, tokens_BS, mask_BS)
    assert relative_gap(merged[mask_BS], logits(model, params, tokens_BS, mask_BS)[mask_BS]) < 1e-4
    bare = {path: leaf for path, leaf in _flat(params).items() if not path[-1].startswith("lora_")}
    without = logits(loaded.model, _nested(bare), tokens_BS, mask_BS)
    assert relative_gap(without[mask_BS], merged[mask_BS]) > 0.01


def test_a_checkpoint_that_embeds_loads_without_its_head(tmp_path, tokenizer):
    model, params = saved(tmp_path / "model", tokenizer, model_type="qwen3", tie_word_embeddings=False)
    (tmp_path / "model" / "modules.json").write_text("[]")
    loaded = load(tmp_path / "model")
    assert "lm_head" not in loaded.params
    assert "lm_head" in params
    path = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix("model."): x for name, x in load_file(path).items() if name != "lm_head.weight"}
    save_file(tensors, path)  # as sentence-transformers writes it
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), load(tmp_path / "model").params, loaded.params))
    assert model.config.num_hidden_layers == loaded.model.config.num_hidden_layers


def _change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _change_tensors(change):
    def apply(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: expected a JSON file"),
    "unsupported": (_change_config(model_type="llama"), "model_type is 'llama'; expected one of qwen2, qwen3"),
    "scaled rope": (_change_config(rope_scaling={"type": "yarn"}), "rope_scaling is"),
    "sliding window": (_change_config(use_sliding_window=True), "use_sliding_window is True"),
    "a key less": (_change_config(num_hidden_layers=None), "expected the key num_hidden_layers"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"expected model\.safetensors or"),
    "truncated": (_truncate, r"model\.safetensors: not a readable safetensors file"),
    "missing": (_change_tensors(lambda t: t.pop(Q)), r"layers\.1\.self_attn\.q_proj\.weight is missing \(1 in all\)"),
    "surplus": (_change_tensors(lambda t: t.update({"model.layers.2.x": t[Q]})), r"model\.layers\.2\.x has no place"),
    "misshaped": (_change_tensors(lambda t: t.update({Q: t[Q][:5]})), rf"{Q} has shape \[5, 32\], expected \[32, 32\]"),
    "quantised": (_change_tensors(lambda t: t.update({Q: t[Q].astype(np.int8)})), rf"{Q} is I8"),
    "other tokenizer": (_change_config(vocab_size=100), "the tokenizer has [0-9]+ tokens, more than the 100 rows"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "expected a tokenizer there"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("good") / "model"
    saved(folder, tokenizer)
    return folder


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_folder_that_does_not_fit_says_what_was_expected(tmp_path, good, change, message):
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    change(folder)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_a_name_that_is_no_folder_and_not_on_the_hub_is_an_input_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="not a folder, and not to be had"):
        load("nobody/nothing-of-this-name")


def test_saving_never_overwrites_and_leaves_nothing_half_written(tmp_path, tokenizer, monkeypatch):
    model, params = saved(tmp_path / "model", tokenizer)
    with pytest.raises(InputError, match="exists already"):
        save(tmp_path / "model", model, params, tokenizer)

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "other", model, params, tokenizer)
    assert not (tmp_path / "other").exists()


def test_the_table_names_every_parameter_once(good):
    loaded = load(good)
    from jaxnr.models.decoder import table

    paths = [row.path for row in table(loaded.model.config)]
    assert sorted(paths) == sorted("/".join(path) for path in _paths(loaded.params))
    with pytest.raises(KeyError):
        load_params(good, table(loaded.model.config), {}, prefix="model.", ignored=())


def _flat(params):
    from flax import traverse_util

    return traverse_util.flatten_dict(params)


def _nested(flat):
    from flax import traverse_util

    return traverse_util.unflatten_dict(flat)


def _paths(params):
    return set(_flat(params))


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_greedy_generation_is_that_of_transformers_token_for_token(tmp_path, tokenizer, kind):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, _ = saved(tmp_path / "model", tokenizer, model_type=kind.lower(), num_hidden_layers=3)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    loaded = load(tmp_path / "model")
    lengths, budget = (11, 3, 7), 64
    prompt_BS, mask_BS = left_padded(lengths, 11)
    sampler = make_sampler(loaded.model, max_new_tokens=budget, vocabulary_size=ROWS, pad_id=0)
    completions = sampler(
        loaded.params,
        prompt_BS,
        mask_BS,
        np.arange(3, dtype=np.int32),
        np.arange(1, dtype=np.int32),
        np.int32(0),
        np.int32(0),
        SamplingSettings(temperature=0.0),
        np.array([-1], np.int32),  # no token ends a completion
    )
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor(prompt_BS).long(),
            attention_mask=torch.tensor(mask_BS).long(),
            max_new_tokens=budget,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 11:].numpy()
    np.testing.assert_array_equal(completions.tokens_BGT[:, 0], expected)
    assert len({tuple(row) for row in expected.tolist()}) == 3
    assert model.config.model_type == kind.lower()


@pytest.mark.parametrize("kind", ["bert", "roberta", "classifier"])
def test_encoders_are_saved_and_loaded_through_the_same_door(tmp_path, tokenizer, kind):
    config = EncoderConfig(
        model_type="bert" if kind == "bert" else "roberta",
        vocab_size=ROWS,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=40,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        initializer_range=0.02,
        pad_token_id=1,
    )
    model = Classifier(config, ("drop", "keep", "unsure")) if kind == "classifier" else Encoder(config)
    params = init_encoder(model, jax.random.key(0))
    save(tmp_path / "model", model, params, tokenizer)
    loaded = load(tmp_path / "model", mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert loaded.model == model
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), loaded.params, params))
    torch = pytest.importorskip("torch")
    import transformers

    auto = transformers.AutoModelForSequenceClassification if kind == "classifier" else transformers.AutoModel
    reference = auto.from_pretrained(tmp_path / "model").eval()
    tokens_BS, mask_BS = np.arange(2, 20, dtype=np.int32).reshape(2, 9), np.ones((2, 9), bool)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens_BS).long(), torch.tensor(mask_BS).long())[0].numpy()
    assert relative_gap(model.apply({"params": params}, tokens_BS, mask_BS), expected) < 1e-4


@pytest.mark.parametrize(
    ("shape", "count"),
    [  # layers, hidden, feed-forward, query heads, vocabulary rows, tied
        ((28, 1024, 3072, 16, 151669, True), 595_776_512),
        ((36, 2560, 9728, 32, 151665, True), 4_021_774_336),
        ((36, 4096, 12288, 32, 151665, False), 8_188_515_328),
    ],
)
def test_qwen3_embedding_has_the_published_parameter_counts(shape, count):
    L, D, F, N, rows, tied = shape
    config = DecoderConfig(
        model_type="qwen3",
        num_hidden_layers=L,
        hidden_size=D,
        intermediate_size=F,
        num_attention_heads=N,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=rows,
        tie_word_embeddings=tied,
    )
    assert parameter_count(jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0)))) == count
