"""The decoder: causality, padding, batches, shared prompts, the cache, depth, and parity with transformers."""

import dataclasses
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, UNOPTIMISED, left_padded, random_params, relative_gap, tiny_decoder

from jaxnr.config import Remat
from jaxnr.models.decoder import (
    Cache,
    Decoder,
    DecoderConfig,
    KeyValues,
    attend,
    attend_causally,
    head_VD,
    init_params,
    parameter_count,
)
from jaxnr.training.losses import token_logprobs

MODEL = tiny_decoder()
PARAMS = random_params(MODEL)


quick_jit = partial(jax.jit, compiler_options=UNOPTIMISED)


@quick_jit
def plain(params, tokens_BS, mask_BS):
    return MODEL.apply({"params": params}, tokens_BS, mask_BS)


def shared(params, prompt_BS, mask_BS, completion_BGT):
    return MODEL.apply({"params": params}, prompt_BS, mask_BS, completion_BGT, method="shared")


def flattened(params, prompt_BS, mask_BS, completion_BGT):
    """What ``shared`` has to equal: every completion behind its own copy of the prompt, [B, G, T, D]."""
    B, G, T = completion_BGT.shape
    S = prompt_BS.shape[1]
    prompt = jnp.repeat(prompt_BS, G, axis=0)
    tokens = jnp.concatenate([prompt, completion_BGT.reshape(B * G, T)], axis=1)
    mask = jnp.concatenate([jnp.repeat(mask_BS, G, axis=0), jnp.ones((B * G, T), bool)], axis=1)
    hidden = MODEL.apply({"params": params}, tokens, mask)[:, S - 1 : S + T - 1]
    return hidden.reshape(B, G, T, -1)


def shared_batch(B=3, G=4, S=7, T=5):
    prompt_BS, mask_BS = left_padded([7, 3, 1][:B], S)
    completion_BGT = np.random.default_rng(5).integers(0, 61, (B, G, T)).astype(np.int32)
    return prompt_BS, mask_BS, completion_BGT


def test_a_hidden_state_depends_on_its_own_and_earlier_tokens_alone():
    tokens_BS, mask_BS = np.arange(6, dtype=np.int32)[None], np.ones((1, 6), bool)

    def gradient(position):  # of one position's state by the embedding of each token; token id = its position
        def output(params):
            return jnp.sum(jnp.sin(MODEL.apply({"params": params}, tokens_BS, mask_BS)[0, position]))

        return jnp.abs(jax.grad(output)(PARAMS)["embed_tokens"]["embedding"][:6]).max(-1)

    reach = np.asarray(quick_jit(jax.vmap(gradient))(jnp.arange(6))) > 0
    np.testing.assert_array_equal(reach, np.tril(np.ones((6, 6), bool)))


def test_a_shared_prompts_completions_see_the_prompt_and_their_own_past_alone():
    prompt_BS, mask_BS = np.arange(3, dtype=np.int32)[None], np.ones((1, 3), bool)
    completion_BGT = np.arange(3, 11, dtype=np.int32).reshape(1, 2, 4)

    def gradient(position):
        def output(params):
            hidden = MODEL.apply({"params": params}, prompt_BS, mask_BS, completion_BGT, method="shared")
            return jnp.sum(jnp.sin(hidden.reshape(8, -1)[position]))

        return jnp.abs(jax.grad(output)(PARAMS)["embed_tokens"]["embedding"][:11]).max(-1)

    reach = np.asarray(quick_jit(jax.vmap(gradient))(jnp.arange(8))) > 0
    earlier = np.tril(np.ones((4, 4), bool), -1)  # the state that predicts a token does not see it
    assert reach[:, :3].all()
    np.testing.assert_array_equal(reach[:, 3:], np.kron(np.eye(2, dtype=bool), earlier))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_hidden_state(side):
    tokens_BS = np.random.default_rng(1).integers(0, 61, (1, 5)).astype(np.int32)
    alone = plain(PARAMS, tokens_BS, np.ones((1, 5), bool))
    padding = np.full((1, 4), 7, np.int32)
    parts = [padding, tokens_BS] if side == "left" else [tokens_BS, padding]
    mask = np.concatenate(
        [np.zeros_like(part, bool) if part is padding else np.ones_like(part, bool) for part in parts], 1
    )
    padded = plain(PARAMS, np.concatenate(parts, 1), mask)
    assert relative_gap(padded[mask], alone[0]) < 1e-5
    parts[parts.index(padding) if side == "left" else 1] = padding + 3
    assert (plain(PARAMS, np.concatenate(parts, 1), mask)[mask] == padded[mask]).all()


def test_a_row_does_not_depend_on_the_others_of_its_batch():
    tokens_BS, mask_BS = left_padded([6, 2, 4, 5], 6)
    together = np.asarray(plain(PARAMS, tokens_BS, mask_BS))
    order = np.array([2, 0, 3, 1])
    assert relative_gap(plain(PARAMS, tokens_BS[order], mask_BS[order]), together[order]) < 1e-6
    alone = plain(PARAMS, tokens_BS[1:2], mask_BS[1:2])
    assert relative_gap(alone[0, -2:], together[1, -2:]) < 1e-5


@pytest.mark.parametrize("T", [1, 5])
def test_shared_prompts_give_the_loss_and_gradients_of_the_flattened_batch(T):
    prompt_BS, mask_BS, completion_BGT = shared_batch(T=T)
    weight_BGT = np.random.default_rng(2).normal(size=completion_BGT.shape)

    def loss(params, hidden_states):
        hidden = hidden_states(params, prompt_BS, mask_BS, completion_BGT)
        return jnp.sum(weight_BGT * token_logprobs(hidden, head_VD(params), completion_BGT, vocabulary_size=61))

    shared_result = quick_jit(jax.value_and_grad(lambda params: loss(params, shared)))(PARAMS)
    flattened_result = quick_jit(jax.value_and_grad(lambda params: loss(params, flattened)))(PARAMS)
    assert relative_gap(shared_result, flattened_result) < 1e-5


def test_a_long_prompt_in_chunks_of_queries_gives_the_attention_and_gradients_of_the_whole():
    B, S, N, K, H = 2, 300, 4, 2, 8
    rng = np.random.default_rng(0)
    query, key, value, weight = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((B, S, N, H), (B, K, H, S), (B, K, S, H), (B, S, N, H))
    )
    _, mask_BS = left_padded([300, 170], S)  # the first chunk of the second row is padding alone

    def whole(query, key, value):
        visible = np.tril(np.ones((S, S), bool))[None] & mask_BS[:, None]
        return attend(query[:, None], (KeyValues(key, value, jnp.asarray(visible), True),))[:, 0]

    def loss(attended, *arrays):
        return jnp.sum(weight * jnp.where(mask_BS[..., None, None], attended(*arrays), 0.0))

    def chunked(query, key, value):
        return attend_causally(query, key, value, jnp.asarray(mask_BS))

    actual, expected = (
        quick_jit(jax.value_and_grad(partial(loss, attended), argnums=(0, 1, 2)))(query, key, value)
        for attended in (chunked, whole)
    )
    assert relative_gap(actual, expected) < 1e-5
    scores = [line for line in jax.jit(chunked).lower(query, key, value).as_text().splitlines() if "x300x300x" in line]
    assert not scores  # what no query may see is not computed


def test_decoding_with_the_cache_gives_the_full_forward_pass():
    prompt_BS, mask_BS, completion_BGT = shared_batch()
    B, G, T = completion_BGT.shape
    expected = quick_jit(shared)(PARAMS, prompt_BS, mask_BS, completion_BGT)
    variables = {"params": PARAMS}
    prefill = quick_jit(lambda *arrays: MODEL.apply(variables, *arrays, method="prefill"))
    hidden_BD, key, value = prefill(prompt_BS, mask_BS)
    c = TINY
    own_key = np.zeros((c.num_hidden_layers, B, c.num_key_value_heads, G, c.head_dim, T), np.float32)
    own_value = own_key.swapaxes(-1, -2).copy()
    assert relative_gap(np.broadcast_to(hidden_BD[:, None], (B, G, c.hidden_size)), expected[:, :, 0]) < 1e-5
    decode = quick_jit(lambda *arrays: MODEL.apply(variables, *arrays, method="decode"))
    for t in range(T - 1):
        cache = Cache(key, value, jnp.asarray(own_key), jnp.asarray(own_value))
        hidden_BGD, new_key, new_value = decode(completion_BGT[:, :, t], t, cache, mask_BS)
        own_key[..., t], own_value[..., t, :] = new_key[..., 0], new_value[..., 0, :]
        assert relative_gap(hidden_BGD, expected[:, :, t + 1]) < 1e-5


def test_the_head_is_the_embedding_when_tied_and_its_own_matrix_otherwise():
    assert head_VD(PARAMS) is PARAMS["embed_tokens"]["embedding"]
    untied = random_params(tiny_decoder(tie_word_embeddings=False))
    assert head_VD(untied) is untied["lm_head"]
    assert parameter_count(untied) - parameter_count(PARAMS) == TINY.vocab_size * TINY.hidden_size


@pytest.mark.parametrize(
    ("shape", "count"),
    [  # layers, hidden, feed-forward, query heads, key/value heads, head size, vocabulary rows, tied
        ((24, 896, 4864, 14, 2, 64, 151936, True), 494_032_768),
        ((28, 1536, 8960, 12, 2, 128, 151936, True), 1_543_714_304),
        ((36, 2048, 11008, 16, 2, 128, 151936, True), 3_085_938_688),
        ((28, 3584, 18944, 28, 4, 128, 152064, False), 7_615_616_512),
        ((48, 5120, 13824, 40, 8, 128, 152064, False), 14_770_033_664),
        ((64, 5120, 27648, 40, 8, 128, 152064, False), 32_763_876_352),
    ],
)
def test_the_published_shapes_have_the_published_parameter_counts(shape, count):
    L, D, F, N, K, H, V, tied = shape
    config = DecoderConfig(
        num_hidden_layers=L,
        hidden_size=D,
        intermediate_size=F,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        vocab_size=V,
        tie_word_embeddings=tied,
    )
    assert parameter_count(jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0)))) == count


def test_the_program_does_not_grow_with_depth():
    def lines(depth: int) -> int:
        model = tiny_decoder(num_hidden_layers=depth)
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

        def loss(params):
            return model.apply({"params": params}, *shared_batch(), method="shared").sum()

        return len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines())

    assert lines(2) == lines(40)


def test_the_backward_pass_keeps_little_more_than_the_residual_stream_of_each_layer():
    tokens_BS, mask_BS = left_padded([64] * 4, 64)

    def kept(remat: Remat) -> int:  # scalars saved for the backward pass, beyond the parameters
        model = Decoder(dataclasses.replace(TINY, num_hidden_layers=16), remat=remat)
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        _, backward = jax.eval_shape(
            lambda params: jax.vjp(lambda params: model.apply({"params": params}, tokens_BS, mask_BS), params), params
        )
        return parameter_count(backward) - parameter_count(params)

    stream = 16 * tokens_BS.size * TINY.hidden_size
    projected = 16 * tokens_BS.size * 2 * (TINY.hidden_size + TINY.intermediate_size)  # a lower bound
    assert kept("layers") < 2 * stream < stream + projected < kept("dots") < kept("none")
    assert kept("none") > 8 * stream


def test_remat_policies_give_the_same_gradients_and_need_the_less_memory_the_more_they_recompute():
    batch = (*left_padded([48, 31], 48), np.random.default_rng(0).integers(0, 61, (2, 4, 24)).astype(np.int32))
    params = random_params(tiny_decoder(num_hidden_layers=12))
    found, memory = {}, {}
    for remat in get_args(Remat):
        model = Decoder(dataclasses.replace(TINY, num_hidden_layers=12), remat=remat)

        def loss(params, model=model):
            return jnp.mean(model.apply({"params": params}, *batch, method="shared") ** 2)

        program = jax.jit(jax.value_and_grad(loss)).lower(params).compile(UNOPTIMISED)
        found[remat], memory[remat] = program(params), program.memory_analysis().temp_size_in_bytes
    assert relative_gap(found["dots"], found["none"]) < 1e-5
    assert relative_gap(found["layers"], found["none"]) < 1e-5
    assert memory["none"] > 2 * memory["dots"] > 4 * memory["layers"]


def test_bfloat16_compute_keeps_float32_parameters_and_is_near_float32():
    prompt_BS, mask_BS, completion_BGT = shared_batch()
    model = Decoder(TINY, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(init_params(model, jax.random.key(0)))} == {jnp.dtype("float32")}
    hidden = quick_jit(lambda params: model.apply({"params": params}, *shared_batch(), method="shared"))(PARAMS)
    assert hidden.dtype == jnp.bfloat16
    assert relative_gap(hidden, quick_jit(shared)(PARAMS, prompt_BS, mask_BS, completion_BGT)) < 0.03


@pytest.mark.parametrize(("kv_heads", "tied"), [(2, True), (1, False), (4, False)])
def test_logits_are_those_of_transformers_qwen2(kv_heads, tied):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = dataclasses.replace(
        TINY, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=1e6, rms_norm_eps=1e-5
    )
    model = Decoder(config)
    params = random_params(model)
    reference = Qwen2ForCausalLM(
        Qwen2Config(
            **{
                name: value
                for name, value in dataclasses.asdict(config).items()
                if name not in ("rope_theta", "head_dim")
            },
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
        )
    ).eval()
    missing, surplus = reference.load_state_dict(
        {name: torch.tensor(np.array(value)) for name, value in hugging_face_names(params)}, strict=False
    )
    assert surplus == []
    assert missing == (["lm_head.weight"] if tied else [])
    tokens_BS, mask_BS = left_padded([9, 4], 9)
    position_BS = np.maximum(mask_BS.cumsum(-1) - 1, 0)
    with torch.no_grad():
        expected = reference(
            torch.tensor(tokens_BS).long(), torch.tensor(mask_BS).long(), torch.tensor(position_BS).long()
        ).logits.numpy()
    hidden = quick_jit(lambda params: model.apply({"params": params}, tokens_BS, mask_BS))(params)
    logits = hidden @ head_VD(params).T
    assert np.abs(expected[mask_BS]).max() > 1
    assert relative_gap(logits[mask_BS], expected[mask_BS]) < 1e-5


def hugging_face_names(params):
    """(name, array) in the layout of transformers: a row of layers apart, matrices [out, in]."""
    yield "model.embed_tokens.weight", params["embed_tokens"]["embedding"]
    yield "model.norm.weight", params["norm"]["weight"]
    if "lm_head" in params:
        yield "lm_head.weight", params["lm_head"]
    for module, leaves in params["layers"].items():
        parent = {"q": "self_attn.", "k": "self_attn.", "v": "self_attn.", "o": "self_attn."}.get(module[0], "mlp.")
        parent = "" if module.endswith("layernorm") else parent
        for leaf, stacked in leaves.items():
            for layer, array in enumerate(stacked):
                name = "bias" if leaf == "bias" else "weight"
                yield f"model.layers.{layer}.{parent}{module}.{name}", array.T if leaf == "kernel" else array
