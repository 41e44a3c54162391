"""Which values of a config make sense, and which make sense together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from jaxnr.config import PROJECTIONS, Config, JudgeConfig, flatten
from jaxnr.errors import InputError

# Bounds of the numeric settings, by the last part of the key, or by all of it where it differs from its namesakes; a
# test sees that every number has one.
# fmt: off
POSITIVE = {
    "valid_days", "test_days", "train_prompts_per_user", "max_signals", "min_signals", "hidden_size", "num_layers",
    "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "rms_norm_eps", "max_prompt_tokens",
    "prompt_buckets", "max_new_tokens", "min_queries", "max_queries", "max_query_words", "embedding_size",
    "articles_per_query", "max_facets", "learning_rate", "max_grad_norm", "steps", "prompts_per_step",
    "group_size", "temperature", "samples", "best_of_n", "bootstrap_resamples", "checkpoint_every",
    "teacher_lists", "align_articles", "microbatches", "lora_alpha", "lists_per_step", "concurrency", "timeout",
    "trials", "length", "size", "blocks", "heads", "negatives", "batch", "epochs", "records", "record_words",
    "word_size", "filters", "judged_events", "context_texts", "max_tokens", "layers", "attention_size",
    "neighbours", "walks", "margin", "clicks",
}
NOT_NEGATIVE = {
    "seed", "max_test_users", "align", "coverage", "specificity", "diversity", "structure", "warmup_steps",
    "weight_decay", "showcase_users", "validate_every", "uniform_steps", "signal_words", "retries",
    "lora_rank", "warm_start.steps", "clip_high", "importance_cap", "overlong_tokens", "kl_weight", "prefix_tokens",
    "max_skipped_steps", "distill.steps",
}
SHARE = {
    "max_refused_share", "clip_low", "max_failed_share", "final_share", "beta1", "beta2", "dropout", "id_dropout",
    "restart",
}
# fmt: on
OWN_RULE = {"vocabulary_size", "data", "fsdp", "tensor", "lora_targets", "jsd_beta", "keep_labels"}
"""Settings whose bounds stand in ``_problems``."""


def validate(config: Config) -> None:
    """Raises InputError, naming every setting that is out of its bounds or at odds with another one."""
    if problems := [*_out_of_bounds(config), *_problems(config)]:
        raise InputError("The config does not make sense: " + "; ".join(problems) + ".")


def _out_of_bounds(config: Config) -> Iterator[str]:
    for key, value in flatten(config).items():
        name = key.rpartition(".")[2]
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, int | float)]
        if not all(map(math.isfinite, numbers)):
            yield f"`{key}` is {json.dumps(value)}, expected a finite number"
        elif name in POSITIVE and key not in NOT_NEGATIVE and not all(number > 0 for number in numbers):
            yield f"`{key}` is {json.dumps(value)}, expected more than 0"
        elif (name in NOT_NEGATIVE or key in NOT_NEGATIVE) and not all(number >= 0 for number in numbers):
            yield f"`{key}` is {json.dumps(value)}, expected 0 or more"
        elif name in SHARE and not all(0 <= number <= 1 for number in numbers):
            yield f"`{key}` is {json.dumps(value)}, expected a share between 0 and 1"


def _problems(config: Config) -> Iterator[str]:
    data, prompt, retrieval, mesh = config.data, config.prompt, config.retrieval, config.mesh
    if data.format != "synthetic" and not data.path:
        yield f'`data.path` is empty, expected the folder with the data in the format "{data.format}"'
    cleaning = config.cleaning
    if cleaning.classifier == "roberta" and cleaning.labels == "truth" and data.format != "synthetic":
        yield '`cleaning.labels` is "truth", which the generated world alone has; expected "judge" or a file of labels'
    if not cleaning.classifier or not cleaning.labels:
        yield '`cleaning.classifier` or `cleaning.labels` is empty, expected "none" or a classifier, and a source'
    if cleaning.heads > 0 and cleaning.hidden_size % cleaning.heads:
        yield f"`cleaning.hidden_size` is {cleaning.hidden_size}, expected a multiple of its {cleaning.heads} heads"
    if cleaning.vocabulary_size < 300:
        yield f"`cleaning.vocabulary_size` is {cleaning.vocabulary_size}, expected at least 300: 256 bytes and markers"
    if data.min_signals > data.max_signals:
        yield f"`data.min_signals` is {data.min_signals}, expected at most `max_signals`, {data.max_signals}"
    if prompt.min_queries > prompt.max_queries:
        yield f"`prompt.min_queries` is {prompt.min_queries}, expected at most `max_queries`, {prompt.max_queries}"
    buckets = prompt.prompt_buckets
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[-1] != prompt.max_prompt_tokens:
        yield (
            f"`prompt.prompt_buckets` is {json.dumps(buckets)}, expected rising lengths that end with "
            f"`prompt.max_prompt_tokens`, {prompt.max_prompt_tokens}"
        )
    if prompt.vocabulary_size < 300:
        yield f"`prompt.vocabulary_size` is {prompt.vocabulary_size}, expected at least 300: 256 bytes and the markers"
    if retrieval.embedder == "sentence_encoder" and not retrieval.embedder_path:
        yield "`retrieval.embedder_path` is empty, expected the folder or hub name of the sentence encoder"
    if not any(flatten(config.reward)[name] for name in ("align", "coverage", "specificity", "diversity", "structure")):
        yield "every weight in `reward` is 0, expected at least one above 0"
    yield from _judge_problems("judge", config.judge)
    yield from _judge_problems("second_judge", config.second_judge)
    first, second = config.judge, config.second_judge
    if (first.kind, first.model, first.url) == (second.kind, second.model, second.url):
        yield "`second_judge` is the same as `judge`, expected one that training does not see"
    for name, model in (("teacher", config.teacher), ("student", config.student)):
        if config.warm_start.steps == 0 and not model.path and name in config.policies:
            yield f"`warm_start.steps` is 0, but `{name}.path` is empty: a model from scratch needs a warm start"
        if unknown := [target for target in model.lora_targets if target not in PROJECTIONS]:
            yield f"`{name}.lora_targets` has {json.dumps(unknown[0])}, expected some of {', '.join(PROJECTIONS)}"
        if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
            yield f"`{name}.num_heads` is {model.num_heads}, expected a multiple of its {model.num_kv_heads} key heads"
        if model.head_dim % 2:
            yield f"`{name}.head_dim` is {model.head_dim}, expected an even number: rotary embeddings turn pairs"
    if config.grpo.group_size < 2:
        yield f"`grpo.group_size` is {config.grpo.group_size}, expected at least 2: an advantage compares completions"
    if not 0 < config.distill.jsd_beta < 1:
        yield f"`distill.jsd_beta` is {config.distill.jsd_beta}, expected a number between 0 and 1, without these two"
    if config.grpo.overlong_tokens > prompt.max_new_tokens:
        yield (
            f"`grpo.overlong_tokens` is {config.grpo.overlong_tokens}, expected at most the budget that they are the "
            f"last of, `prompt.max_new_tokens`, {prompt.max_new_tokens}"
        )
    for name, model in (("sasrec", config.baselines.sasrec), ("hstu", config.baselines.hstu)):
        if model.heads > 0 and model.size % model.heads:
            yield f"`baselines.{name}.size` is {model.size}, expected a multiple of its {model.heads} heads"
    best_of_n = config.evaluation.best_of_n
    if not best_of_n or list(best_of_n) != sorted(set(best_of_n)):
        yield f"`evaluation.best_of_n` is {json.dumps(best_of_n)}, expected rising numbers, at least one"
    axes = (mesh.data, mesh.fsdp, mesh.tensor)
    if any(axis < 1 and axis != -1 for axis in axes) or axes.count(-1) > 1:
        yield f"`mesh` is data {axes[0]}, fsdp {axes[1]}, tensor {axes[2]}, expected sizes from 1 on and at most one -1"


def _judge_problems(name: str, judge: JudgeConfig) -> Iterator[str]:
    if judge.kind in ("language_model", "http") and not judge.model:
        yield f'`{name}.model` is empty, expected a language model for a judge of the kind "{judge.kind}"'
    if judge.kind not in ("language_model", "http") and judge.rubric == "language_model":
        yield (
            f'`{name}.rubric` is "language_model", but a judge of the kind "{judge.kind}" does not write; expected '
            '"template", or a judge of the kind "language_model" or "http"'
        )
    if judge.kind == "http" and not judge.url.startswith(("http://", "https://")):
        yield f"`{name}.url` is {json.dumps(judge.url)}, expected the endpoint's address, from http:// or https:// on"
    if judge.token_variable and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", judge.token_variable):
        # Not shown: it may be the token itself.
        yield f"`{name}.token_variable` is not a variable's name, expected the name of the one that holds the token"
