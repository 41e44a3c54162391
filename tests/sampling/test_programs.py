"""What is compiled for sampling: how many programs, how large, what they hold in memory and what they read."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from tiny import TINY, random_params, tiny_decoder

from jaxnr.config import MeshConfig, PromptConfig
from jaxnr.data.examples import Example, Signal
from jaxnr.mesh import make_mesh
from jaxnr.models.decoder import Cache, Decoder, DecoderConfig, init_params
from jaxnr.planning import hlo
from jaxnr.planning.slices import find_slice, slice_devices, without_a_tpu
from jaxnr.prompting.tokenizer import train_tokenizer
from jaxnr.rewards.specificity import TermStatistics
from jaxnr.sampling.sampler import SamplingSettings, make_sampler
from jaxnr.training.rollout import make_policy, padded_chunks, roll_out

BENCHMARK = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""The shape of tests/benchmarks/rollouts.py."""

WORDS = ["storm", "florida", "rowing", "cup", "final", "electric", "car", "prices", "oil", "market", "election"]


def example_of(example_id: int, words: int) -> Example:
    """An example whose only signal has so many words."""
    text = " ".join(WORDS[(example_id + word) % len(WORDS)] for word in range(words))
    return Example(example_id, "u", 9, (Signal(1, "search", text, None),), (), ())


@pytest.fixture
def compiled():
    """The names of the compilations since the test began."""
    names = []

    def note(event: str, duration: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_twenty_mixed_calls_compile_nothing_after_warm_up(tmp_path, compiled):
    """Temperatures, filters, seeds, chunks that are not full, and prompts of many lengths within two buckets."""
    config = PromptConfig(signal_words=0, max_prompt_tokens=120, prompt_buckets=(60, 120), max_new_tokens=6)
    tokenizer = train_tokenizer([" ".join(WORDS), config.instructions] * 2, 500, tmp_path)
    model = tiny_decoder(vocab_size=len(tokenizer))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    policy = make_policy(model, tokenizer, config, mesh, TermStatistics.fit([" ".join(WORDS)]))
    params = random_params(model)
    sampled, buckets = set(), set()

    def call(number: int, lengths: list[int], **settings) -> None:
        for chunk in padded_chunks([example_of(number + row, words) for row, words in enumerate(lengths)], 3):
            rollout = roll_out(
                policy, params, chunk.padded, samples=2, seed=number, step=number, settings=SamplingSettings(**settings)
            )
            buckets.add(rollout.batch.prompt_BS.shape[1])
            sampled.add(np.asarray(rollout.completions.tokens_BGT).tobytes())

    call(0, [1, 1, 1])
    call(0, [60, 1, 1])
    assert buckets == {60, 120}
    assert len(compiled) >= 2  # one a bucket
    compiled.clear()
    for number in range(20):
        filters = [{}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 0.0}][number % 4]
        call(number, [1 + (7 * number + row) % 60 for row in range(1 + number % 5)], **{"temperature": 0.5, **filters})
    assert compiled == []
    assert len(sampled) > 20


def abstract(tree, dtype=None):
    """Shapes and types alone, floats as ``dtype``."""

    def leaf(x) -> jax.ShapeDtypeStruct:
        floats = dtype is not None and jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, dtype if floats else x.dtype)

    return jax.tree.map(leaf, tree)


def abstract_params(model: Decoder, dtype=jnp.float32) -> dict:
    return abstract(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), dtype)


QWEN = DecoderConfig(  # Qwen2.5-0.5B
    vocab_size=151_936,
    hidden_size=896,
    num_hidden_layers=24,
    intermediate_size=4864,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    rope_theta=1e6,
)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        # A CPU multiplies in float32 and would cast the bfloat16 weights of all layers at once, ahead of the loop over
        # layers (1.3 GiB). Where bfloat16 is native there is no such cast, and without that step none here either.
        (jnp.bfloat16, {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}),
        (jnp.float32, {}),
    ],
)
def test_prefill_of_32_prompts_of_512_tokens_needs_less_than_one_and_a_half_gib(dtype, options):
    model = Decoder(QWEN, dtype=dtype)
    prompts = jax.ShapeDtypeStruct((32, 512), jnp.int32), jax.ShapeDtypeStruct((32, 512), bool)
    prefill = jax.jit(lambda params, *prompts: model.apply({"params": params}, *prompts, method="prefill"))
    memory = prefill.lower(abstract_params(model, dtype), *prompts).compile(options).memory_analysis()
    assert memory.argument_size_in_bytes > 494_000_000 * jnp.dtype(dtype).itemsize  # the weights, as they are
    assert memory.temp_size_in_bytes < 1.5 * 2**30


def test_the_sampler_does_not_grow_with_depth():
    def lines(depth: int) -> int:
        model = tiny_decoder(num_hidden_layers=depth)
        sampler = make_sampler(model, max_new_tokens=5, vocabulary_size=61, pad_id=0)
        rows = np.zeros((2, 7), np.int32), np.ones((2, 7), bool), np.arange(2), np.arange(3)
        lowered = sampler.lower(abstract_params(model), *rows, 0, 0, SamplingSettings(), np.zeros(2, np.int32))
        return len(lowered.as_text().splitlines())

    assert lines(2) == lines(40)


def decoding(model: Decoder, B: int, G: int, S: int, T: int, passes: int = 1):
    """One step of decoding, compiled: the new token through the layers (``passes`` times), its keys and values into the
    completions' caches, which are updated in place."""

    def through_the_layers(module: Decoder, *arguments):
        tokens_BG, t, cache, mask_BS = arguments
        hidden_BGD, key, value = module.decode(tokens_BG, t, cache, mask_BS)
        for _ in range(passes - 1):  # the same program once more, on other numbers
            again_BG = jnp.argmax(hidden_BGD, axis=-1).astype(jnp.int32)
            hidden_BGD, key, value = module.decode(again_BG, t, cache, mask_BS)
        return hidden_BGD, key, value

    def step(params, tokens_BG, t, prompt_key, prompt_value, own_key, own_value, mask_BS):
        cache = Cache(prompt_key, prompt_value, own_key, own_value)
        arguments = (tokens_BG, t, cache, mask_BS)
        hidden, key, value = model.apply({"params": params}, *arguments, method=through_the_layers)
        own_key = jax.lax.dynamic_update_slice_in_dim(own_key, key, t, axis=5)
        return hidden, own_key, jax.lax.dynamic_update_slice_in_dim(own_value, value, t, axis=4)

    c = model.config
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    L, K, H = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    prompt = shape((L, B, K, H, S)), shape((L, B, K, S, H))
    own = shape((L, B, K, G, H, T)), shape((L, B, K, G, T, H))
    tokens, t = jax.ShapeDtypeStruct((B, G), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(step, donate_argnums=(5, 6)).lower(
        abstract_params(model), tokens, t, *prompt, *own, jax.ShapeDtypeStruct((B, S), bool)
    )
    return lowered.compile()


def accessed(program) -> float:
    """Bytes that a program reads and writes, by the compiler's account. A loop's body counts once."""
    return program.cost_analysis()["bytes accessed"]


def largest_array(program) -> int:
    """Elements of the largest array that a program holds."""
    shapes = re.findall(r"\b(?:f32|s32|u32|pred)\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


def test_decoding_reads_the_keys_and_values_of_a_prompt_once_a_group():
    """16 completions, by the compiler's account: of two prompts and of sixteen, each with 256 tokens."""
    B, G, S = 2, 8, 256
    model = tiny_decoder()
    cached = 2 * TINY.num_key_value_heads * TINY.head_dim * S  # numbers a prompt and layer
    shared, apart = decoding(model, B, G, S, 4), decoding(model, B * G, 1, S, 4)
    # The loop over layers counts once. A CPU moves a layer's slice to a place of its own before it reads it.
    saved = (accessed(apart) - accessed(shared)) / (4 * cached * (B * G - B))
    assert 1 <= saved < 3.5
    # No array in it is as large as one layer's keys of every completion would be.
    assert largest_array(shared) < B * G * cached // 2 <= largest_array(apart)


def test_a_step_of_decoding_moves_less_than_four_times_the_weights_and_the_live_cache():
    """Of 8 prompts of 512 tokens with 8 completions, by the compiler's account of two programs: their difference is
    what one layer moves, as a loop's body counts once.

    On a CPU it is about 3.6 times, since every layer's weights and cache are copied (read, written, read again) out of
    the arrays of all layers. The compiler for TPUs reads most of them in place.
    """
    L, B, G, S, T = 4, 8, 8, 512, 64
    model = tiny_decoder(**BENCHMARK)
    once, twice = (accessed(decoding(model, B, G, S, T, passes)) for passes in (1, 2))
    layer = twice - once
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    cache = 2 * L * 2 * 64 * (B * S + B * G * T)
    moved = (once + (L - 1) * layer) / (4 * (weights + cache))
    assert 1 < moved < 4


def bytes_of_a_step_on_a_tpu(config: DecoderConfig, prompts: int, length: int, new_tokens: int) -> float:
    """What one step of the whole sampling loop moves to and from the memory of a v5e, 8 completions a prompt in
    bfloat16, over the bytes of the weights and the live cache. By the text that the compiler for TPUs makes."""
    pytest.importorskip("libtpu")
    without_a_tpu()
    model = Decoder(config, dtype=jnp.bfloat16)
    sampler = make_sampler(model, max_new_tokens=new_tokens, vocabulary_size=config.vocab_size - 1, pad_id=0)
    chip = SingleDeviceSharding(slice_devices(find_slice("v5e-4"))[0])
    ids = jax.ShapeDtypeStruct((prompts,), jnp.int32)
    known = jnp.ones((prompts, length), bool)
    arguments = abstract_params(model, jnp.bfloat16), ids.update(shape=(prompts, length)), known, ids
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments)
    # Constant settings: without the filters that they do not ask for, the compiler is done in seconds.
    sample = jax.jit(lambda *placed: sampler(*placed, jnp.arange(8), 0, 0, SamplingSettings(), jnp.array([1])))
    program = hlo.Program(sample.lower(*placed).compile().as_text())
    loops = [line for line in program.computations[program.entry] if line.opcode == "while"]
    (sampling,) = [loop for loop in loops if program._trips(loop) == new_tokens]
    (body,) = re.findall(r"body=(%[\w.\-]+)", sampling.attributes)
    weights = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
    cached = prompts * (length + 8 * new_tokens)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * cached
    return program._branch_bytes(body) / (2 * (weights + cache))


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [16, 64])
def test_on_a_tpu_a_step_of_sampling_moves_the_weights_and_the_live_cache_and_little_else(prompts):
    """Qwen2.5-0.5B, prompts of 1 024 tokens with completions of 128. The logits of 512 completions over 151 936 rows,
    written and read once, are a quarter as much. Of 16 prompts some of the cache stays on the chip."""
    assert 0.7 < bytes_of_a_step_on_a_tpu(QWEN, prompts, length=1024, new_tokens=128) < 1.2


@pytest.mark.slow
def test_on_a_tpu_all_of_a_small_model_and_its_cache_stay_on_the_chip():
    """The benchmark's shape: 8.5 MiB of weights and 16 MiB of cache, of which no step reads anything again."""
    config = tiny_decoder(**BENCHMARK).config
    assert bytes_of_a_step_on_a_tpu(config, prompts=8, length=512, new_tokens=64) < 0.01
