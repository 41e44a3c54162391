"""The programs that a run compiles, as jitted functions with abstract arguments: no weights, no data.

They are made by the makers that the run itself uses, at the longest prompt bucket.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxnr.config import Config, ModelConfig, OptimizerConfig
from jaxnr.mesh import abstract_on, batch_sharding, batch_ways, replicated, traced_on
from jaxnr.models import encoder
from jaxnr.models.decoder import Cache, Decoder, DecoderConfig, head_VD, init_params
from jaxnr.models.encoder import Encoder
from jaxnr.models.lora import trainable
from jaxnr.planning.shapes import as_embedder, decoder_shape, find_shape
from jaxnr.retrieval.sentence_encoder import batch_size, make_encode
from jaxnr.rewards.criteria import SPECIFICITY
from jaxnr.rewards.judge import WRITTEN_TOKENS
from jaxnr.rewards.judge_language_model import make_scorer
from jaxnr.sampling.sampler import SamplingSettings, choose, make_sampler, next_logits
from jaxnr.training.start import decoder_of, fresh_shape
from jaxnr.training.steps import (
    Batch,
    ScoredBatch,
    TrainState,
    make_distill_step,
    make_grpo_step,
    make_logprobs,
    make_optimizer,
    make_sft_step,
)

_TOKENS_A_WORD = 1.5
"""Of a byte-level BPE of 150 000 tokens, in running English text, rounded up."""
_JUDGE_CHAT, _JUDGE_QUESTION, _JUDGE_MESSAGE = 128, 64, 512
"""Tokens of a judge's instructions with the chat's header, of a question with the header of the answer, and of a
message that asks for a question, rounded up: the texts differ from run to run."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a stage: ``jitted(*arguments)``, the arguments abstract and laid out over the mesh."""

    name: str
    what: str
    """Its sizes, in words."""
    jitted: Any
    arguments: tuple
    lasting: tuple[int, ...]
    """Arguments that are on the devices before and after it: parameters, optimizer state."""
    part_of: str = ""
    """The program that contains this one, which is compiled apart only to be looked at."""

    @functools.cached_property
    def traced(self) -> Any:
        """Its jaxpr, with a way to lower it."""
        return self.jitted.trace(*self.arguments)


class Resident(NamedTuple):
    """A tree that stays on the devices for a stage: its name and abstract arrays with their shardings."""

    name: str
    tree: Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """What runs one after the other in a stage of the road, and what is on the devices all along."""

    name: str
    programs: tuple[Program, ...]
    residents: tuple[Resident, ...]


class _Helper(NamedTuple):
    """A pretrained model that rewards: its programs and its parameters."""

    programs: tuple[Program, ...]
    resident: Resident


class _Model(NamedTuple):
    """A decoder of the run, its abstract parameters on the mesh and the number of its tokenizer's tokens."""

    decoder: Decoder
    params: dict
    tokens: int


SECTIONS = {"warm_start": "warm_start", "grpo": "grpo", "distill": "distill", "evaluate": "evaluation"}
"""The stages, and the section of the config that has the batch of each."""
STAGES = tuple(SECTIONS)


def plan_stages(config: Config, mesh: Mesh, wanted: tuple[str, ...] = STAGES) -> list[Stage]:
    """The stages of a run, in the road's order; those without a step are left out.

    Raises InputError where the shape of a model is not to be had.
    """
    teacher, student = (_model(section, config, mesh) for section in (config.teacher, config.student))
    embedder = _embedder(config, mesh)
    judge, second_judge = (_judge(config, name, mesh) for name in ("judge", "second_judge"))
    makers: dict[str, Callable[[], Stage]] = {
        "warm_start": lambda: _warm_start(config, teacher, student, mesh, embedder),
        "grpo": lambda: _grpo(config, teacher, mesh, [*embedder, *judge]),
        "distill": lambda: _distill(config, teacher, student, mesh, embedder),
        "evaluate": lambda: _evaluate(config, teacher, mesh, [*embedder, *judge, *second_judge]),
    }
    idle = {name for name in ("warm_start", "distill") if not getattr(config, name).steps}
    return [make() for name, make in makers.items() if name in wanted and name not in idle]


def _warm_start(config: Config, teacher: _Model, student: _Model, mesh: Mesh, embedder: list[_Helper]) -> Stage:
    """The models are trained one after the other; the teacher's state, which is there first, is the larger one."""
    models = {"teacher": teacher, "student": student}
    steps = [_supervised(config, "warm_start", which, models[which], mesh) for which in config.policies]
    return Stage(
        "warm_start", tuple(program for program, _ in steps), (steps[0][1], *(helper.resident for helper in embedder))
    )


def _grpo(config: Config, teacher: _Model, mesh: Mesh, helpers: list[_Helper]) -> Stage:
    settings = config.grpo
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    state = _state(teacher, settings.optimizer, mesh)
    B, G = settings.prompts_per_step, settings.group_size
    update = make_grpo_step(teacher.decoder, optimizer, state, mesh, teacher.tokens, settings)
    step = Program(
        "grpo_step",
        _sizes(config, B, G, settings.microbatches),
        update,
        (state, _scored_batch(config, B, G, mesh)),
        (0,),
    )
    sampling = _sampling(config, "teacher", teacher, B // settings.microbatches, G, mesh)
    residents = [Resident("teacher's state", state)]
    if settings.uniform_steps:
        residents.append(Resident("teacher's state before the first step", state))
    residents += [helper.resident for helper in helpers]
    scoring = [program for helper in helpers for program in helper.programs]
    if settings.kl_weight:
        # A model with adapters is its own reference, with those it began with or none.
        if not config.teacher.lora_rank:
            residents.append(Resident("reference's parameters", teacher.params))
        logprobs = make_logprobs(teacher.decoder, mesh, teacher.tokens, settings)
        arguments = (teacher.params, _batch(config, B, G, mesh))
        scoring.append(Program("reference", _sizes(config, B, G, settings.microbatches), logprobs, arguments, (0,)))
    return Stage("grpo", (*sampling, *scoring, step), tuple(residents))


def _distill(config: Config, teacher: _Model, student: _Model, mesh: Mesh, embedder: list[_Helper]) -> Stage:
    settings = config.distill
    supervised, state = _supervised(config, "supervised", "student", student, mesh)
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    B, G = settings.prompts_per_step, settings.group_size
    update = make_distill_step(student.decoder, teacher.decoder, optimizer, state.tree, mesh, student.tokens, settings)
    step = Program(
        "distill_step",
        _sizes(config, B, G, settings.microbatches),
        update,
        (state.tree, teacher.params, _batch(config, B, G, mesh)),
        (0, 1),
    )
    lists = _sampler(config, "teacher_lists", teacher, config.evaluation.prompts_per_step, config.teacher_lists, mesh)
    sampling = _sampling(config, "student", student, B, G, mesh)
    residents = (
        Resident("teacher's parameters", teacher.params),
        Resident("student's state", state.tree),
        Resident("supervised student's state", state.tree),
        *(helper.resident for helper in embedder),
    )
    return Stage("distill", (lists, supervised, *sampling, step), residents)


def _evaluate(config: Config, teacher: _Model, mesh: Mesh, helpers: list[_Helper]) -> Stage:
    B, G = config.evaluation.prompts_per_step, config.evaluation.best_of_n[-1]
    return Stage(
        "evaluate",
        (
            _sampler(config, "best_of_n", teacher, B, G, mesh),
            *(program for helper in helpers for program in helper.programs),
        ),
        (Resident("teacher's parameters", teacher.params), *(helper.resident for helper in helpers)),
    )


def _model(section: ModelConfig, config: Config, mesh: Mesh) -> _Model:
    if section.path:
        shape, tokens = decoder_shape(section.path)
    else:
        tokens = config.prompt.vocabulary_size
        shape = fresh_shape(section, tokens)
    decoder = decoder_of(section, shape)
    return _Model(decoder, _params(decoder, mesh), tokens)


def _params(model: Decoder | Encoder, mesh: Mesh, dtype: Any = None) -> dict:
    init = init_params if isinstance(model, Decoder) else encoder.init_params
    return abstract_on(jax.eval_shape(lambda: init(cast(Any, model), jax.random.key(0))), mesh, dtype)


def _state(model: _Model, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Parameters and optimizer state, as ``create_state`` lays them out."""
    optimizer = make_optimizer(config, 1)
    state = jax.eval_shape(
        lambda params: TrainState(jnp.int32(0), params, optimizer.init(trainable(params))), model.params
    )
    return abstract_on(state, mesh)


def _spread(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _same(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))


def _prompts(config: Config, B: int, mesh: Mesh) -> tuple[Any, Any]:
    S = config.prompt.prompt_buckets[-1]
    return _spread((B, S), jnp.int32, mesh), _spread((B, S), bool, mesh)


def _batch(config: Config, B: int, G: int, mesh: Mesh) -> Batch:
    T = config.prompt.max_new_tokens
    return Batch(*_prompts(config, B, mesh), _spread((B, G, T), jnp.int32, mesh), _spread((B, G, T), bool, mesh))


def _scored_batch(config: Config, B: int, G: int, mesh: Mesh) -> ScoredBatch:
    batch = _batch(config, B, G, mesh)
    logprobs = _spread(batch.mask_BGT.shape, jnp.float32, mesh)
    reference = logprobs if config.grpo.kl_weight else None
    rewards = _spread((B, G), jnp.float32, mesh)
    return ScoredBatch(**vars(batch), old_logprobs_BGT=logprobs, reward_BG=rewards, reference_logprobs_BGT=reference)


def _sizes(config: Config, B: int, G: int, microbatches: int = 1) -> str:
    parts = f", {microbatches} microbatches" if microbatches > 1 else ""
    return f"{B} × {G} lists of {config.prompt.max_new_tokens} on prompts of {config.prompt.prompt_buckets[-1]}{parts}"


def _supervised(config: Config, section: str, which: str, model: _Model, mesh: Mesh) -> tuple[Program, Resident]:
    settings = getattr(config, section)
    state = _state(model, settings.optimizer, mesh)
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    B, G = settings.prompts_per_step, settings.group_size
    update = make_sft_step(model.decoder, optimizer, state, mesh, model.tokens, settings.microbatches)
    name = f"{section}_{which}" if section == "warm_start" else f"{section}_step"
    sizes = _sizes(config, B, G, settings.microbatches)
    return Program(name, sizes, update, (state, _batch(config, B, G, mesh)), (0,)), Resident(f"{which}'s state", state)


def _sampling(config: Config, which: str, model: _Model, B: int, G: int, mesh: Mesh) -> tuple[Program, ...]:
    """The sampler, and its two halves: the prompts, and the choice of one token each."""
    whole = _sampler(config, f"{which}_sampler", model, B, G, mesh)
    decoder, T = model.decoder, config.prompt.max_new_tokens
    prompts = _prompts(config, B, mesh)

    def prefill(params: dict, prompt_BS: jax.Array, mask_BS: jax.Array) -> Any:
        return decoder.apply({"params": params}, prompt_BS, mask_BS, method="prefill")

    def decode(params: dict, own: tuple, prompt: tuple, token_BG: jax.Array, mask_BS: jax.Array) -> Any:
        cache, t = Cache(*prompt, *own), jnp.int32(T - 1)
        decoded = decoder.apply({"params": params}, token_BG, t, cache, mask_BS, method="decode")
        hidden_BGD, key, value = cast(Any, decoded)
        own_key = jax.lax.dynamic_update_slice_in_dim(cache.own_key_LBKGHT, key, t, axis=5)
        own_value = jax.lax.dynamic_update_slice_in_dim(cache.own_value_LBKGTH, value, t, axis=4)
        logits = next_logits(hidden_BGD.reshape(B * G, -1), head_VD(params), model.tokens)
        uniforms = jnp.full((B * G,), 0.5, jnp.float32)
        return (own_key, own_value), choose(logits, uniforms, SamplingSettings())

    shape = decoder.config
    L, K, H, S = shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, prompts[0].shape[1]
    caches = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *batch_sharding(mesh).spec))

    def cache(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((L, B, K, *sizes), decoder.dtype, sharding=caches)

    prompt, own = (cache(H, S), cache(S, H)), (cache(G, H, T), cache(G, T, H))
    arguments = (model.params, own, prompt, _spread((B, G), jnp.int32, mesh), prompts[1])
    return (
        whole,
        Program(
            f"{which}_prefill",
            f"{B} prompts of {S}",
            jax.jit(traced_on(mesh, prefill)),
            (model.params, *prompts),
            (0,),
            part_of=whole.name,
        ),
        Program(
            f"{which}_decode",
            f"one token of {B} × {G} lists",
            jax.jit(traced_on(mesh, decode), donate_argnums=1),
            arguments,
            (0,),
            part_of=whole.name,
        ),
    )


def _sampler(config: Config, name: str, model: _Model, B: int, G: int, mesh: Mesh) -> Program:
    T = config.prompt.max_new_tokens
    sampler = make_sampler(
        model.decoder,  # pyright: ignore[reportArgumentType]
        max_new_tokens=T,
        vocabulary_size=model.tokens,
        pad_id=0,
        mesh=mesh,
    )
    number = _same((), jnp.int32, mesh)
    share = _same((), jnp.float32, mesh)
    arguments = (
        model.params,
        *_prompts(config, B, mesh),
        _spread((B,), jnp.int32, mesh),
        _same((G,), jnp.int32, mesh),
        number,
        number,
        SamplingSettings(temperature=share, top_p=share, top_k=number),
        _same((2,), jnp.int32, mesh),
    )
    return Program(name, _sizes(config, B, G), sampler, arguments, (0,))


def _embedder(config: Config, mesh: Mesh) -> list[_Helper]:
    """Of the queries that are rewarded; none where no model embeds."""
    settings = config.retrieval
    if settings.embedder != "sentence_encoder":
        return []
    shape = as_embedder(find_shape(settings.embedder_path).shape)
    dtype = jnp.dtype(settings.embedder_compute)
    model = Decoder(shape, dtype=dtype) if isinstance(shape, DecoderConfig) else Encoder(shape)
    task = len(settings.query_task.split()) + 4 if isinstance(model, Decoder) else 0
    words = task + config.prompt.max_query_words
    S = 1 << (int(_TOKENS_A_WORD * words) + 1).bit_length()
    ways = batch_ways(mesh)
    B = batch_size(ways * S, S, ways)
    B += -B % ways
    params = _params(model, mesh, dtype)
    pooling = "last" if isinstance(model, Decoder) else "mean"
    encode = make_encode(model, params, pooling, mesh)
    arguments = (params, _spread((B, S), jnp.int32, mesh), _spread((B, S), bool, mesh))
    program = Program("embed", f"{B} queries of {S} tokens", encode, arguments, (0,))
    return [_Helper((program,), Resident("embedder", params))]


def _judge(config: Config, name: str, mesh: Mesh) -> list[_Helper]:
    """None where no language model judges here."""
    settings = getattr(config, name)
    if settings.kind != "language_model":
        return []
    shape, tokens = decoder_shape(settings.model)
    model = Decoder(shape, dtype=jnp.dtype(settings.compute))
    params = _params(model, mesh, settings.compute)
    ways = batch_ways(mesh)
    B = settings.lists_per_step + -settings.lists_per_step % ways
    S = 1 << (_JUDGE_CHAT + config.prompt.max_new_tokens - 1).bit_length()
    C = config.reward.max_facets + 1 + len(SPECIFICITY)  # and whether all queries are about one of the facets
    C += -C % 4
    T = _JUDGE_QUESTION
    scorer = make_scorer(model, (0,), (1,), mesh)
    arguments = (
        params,
        _spread((B, S), jnp.int32, mesh),
        _spread((B, S), bool, mesh),
        _spread((B, C, T), jnp.int32, mesh),
        _spread((B, C), jnp.int32, mesh),
    )
    sizes = f"{B} lists of {S} tokens, {C} questions each"
    programs = [Program(name, sizes, scorer, arguments, (0,))]
    if settings.rubric == "language_model":
        prompt = dataclasses.replace(config.prompt, prompt_buckets=(_JUDGE_MESSAGE,), max_new_tokens=WRITTEN_TOKENS)
        own = dataclasses.replace(config, prompt=prompt)
        writer = _sampler(own, f"{name}_rubric", _Model(model, params, tokens), B, 1, mesh)
        sizes = f"{B} questions of {WRITTEN_TOKENS} tokens on messages of {_JUDGE_MESSAGE}"
        programs.append(dataclasses.replace(writer, what=sizes))
    return [_Helper(tuple(programs), Resident(name.replace("_", " "), params))]


def replaced(config: Config, section: str, **values: Any) -> Config:
    """The config with other settings in a section."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def bytes_a_device(tree: Any) -> float:
    """What a tree of abstract arrays with shardings takes on the device that has most of it, without padding."""

    def leaf(x: jax.ShapeDtypeStruct) -> float:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        return float(jnp.dtype(x.dtype).itemsize) * float(functools.reduce(lambda a, b: a * b, shape, 1))

    return sum(map(leaf, jax.tree.leaves(tree)))
