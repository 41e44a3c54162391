"""Every setting of a run, as frozen dataclasses. TOML in, TOML out; an unknown key is an error."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import textwrap
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from jaxnr.errors import InputError
from jaxnr.files import write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the events come from and how they are split."""

    format: Literal["synthetic", "events", "mind", "ebnerd", "deskdrop"] = "synthetic"
    """`synthetic` is the generated world; the others are read from `path` (docs/data.md)."""
    path: str = ""
    """Folder with the data; unused by `synthetic`."""
    max_refused_share: float = 0.01
    """A reader stops with its report when more than this share of the rows is refused."""
    valid_days: float = 3.0
    """Length of the validation window, which ends where the test window begins."""
    test_days: float = 4.0
    """Length of the test window, at the end of the log."""
    train_prompts_per_user: int = 4
    """Prompts a user gives for training, each at another time before the validation window."""
    max_signals: int = 16
    """The latest clean signals that a prompt shows."""
    min_signals: int = 3
    """Users with fewer clean signals before the request are skipped and counted."""
    max_test_users: int = 0
    """At most so many test users (validation: half as many), drawn by seed; 0 for all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningConfig:
    """Which events are dropped before anything reads them (the paper's first stage)."""

    rules: bool = True
    """Drop empty, navigational, broken and repeated texts by rule; without, only blank ones."""
    classifier: str = "none"
    """What judges the events that are left: `none`; `roberta`, a small one that is trained here on `labels`; or the
    folder or hub name of a RoBERTa classifier."""
    labels: str = "truth"
    """Where labels come from: `truth`, the generated world's; `judge`, the language model of [judge]; or a file."""
    keep_labels: tuple[str, ...] = ("keep", "clean", "true", "1")
    """Labels, in small letters, by which an event or a classifier's answer means to keep; all others mean to drop."""
    judged_events: int = 2000
    """Events that `labels = "judge"` asks about, drawn at random."""
    context_texts: int = 16
    """Texts of the user before an event that the classifier which is trained here compares it with."""
    max_tokens: int = 64
    """Longer texts are cut."""
    vocabulary_size: int = 4096
    """Of its byte-level BPE, at most."""
    hidden_size: int = 64
    """Width of what is passed from layer to layer."""
    layers: int = 2
    """Attention with a feed-forward part, each."""
    heads: int = 4
    """Of an attention."""
    epochs: int = 2
    """Times that every labelled event of the training users is seen."""
    batch: int = 64
    """Events a step."""
    learning_rate: float = 2e-3
    """Of AdamW, where its warm-up ends."""


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a decoder's layer, which can have adapters."""

Remat = Literal["none", "dots", "layers"]
"""How much a decoder computes again in the backward pass (rematerialisation)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: pretrained, from `path`, or of the Qwen2 architecture in the shape given here, from scratch."""

    path: str = ""
    """Local folder or hub name of a pretrained decoder, Qwen2 or Qwen3, whose config.json says its shape; the settings
    from `hidden_size` to `rms_norm_eps` are then unused."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations, and of matrices beside adapters. Trained parameters, softmax and losses are
    float32."""
    lora_rank: int = 0
    """Width of low-rank adapters, which alone are then trained; 0: none, all weights are trained."""
    lora_alpha: float = 16.0
    """Adapters are multiplied by this over the rank."""
    lora_targets: tuple[str, ...] = PROJECTIONS
    """Projections that have adapters."""
    hidden_size: int = 128
    """Width of what is passed from layer to layer."""
    num_layers: int = 3
    """Attention with a feed-forward part, each."""
    intermediate_size: int = 288
    """Width within the feed-forward part."""
    num_heads: int = 4
    """Query heads of an attention."""
    num_kv_heads: int = 2
    """Key and value heads; each serves equally many query heads."""
    head_dim: int = 32
    """Width of a head."""
    tie_word_embeddings: bool = True
    """Whether the output layer has the weights of the token embeddings."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary position embeddings."""
    rms_norm_eps: float = 1e-6
    """What norms add to the mean square."""
    remat: Remat = "none"
    """What is computed again for the gradients, to save memory. `none`: nothing, all activations of every layer are
    kept. `dots`: all but the outputs of the projections, that is attention's products, norms and activations, for
    little more arithmetic. `layers`: each layer from its input, which alone is kept, for a third more arithmetic."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What the policy reads and what it may write."""

    instructions: str = "Write news search queries for this reader."
    """How every prompt begins."""
    signal_words: int = 3
    """Telling words of each signal that a prompt shows, at most; 0: the whole text, which pretrained models read."""
    reasoning: bool = False
    """Ask for a reasoning block before the list (models that can reason)."""
    max_prompt_tokens: int = 120
    """Longer prompts lose their oldest signals; data/report.json counts them (`prompts_shortened`)."""
    prompt_buckets: tuple[int, ...] = (120,)
    """Padded prompt lengths; each program compiles once a bucket."""
    max_new_tokens: int = 80
    """Generation budget, the L of Dr.GRPO."""
    min_queries: int = 3
    """Lists with fewer are malformed."""
    max_queries: int = 18
    """Lists with more are malformed."""
    max_query_words: int = 6
    """Lists with a longer query are malformed."""
    vocabulary_size: int = 4096
    """Of the byte-level BPE that is trained for models from scratch, at most; pretrained ones bring their tokenizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How text becomes vectors, and vectors articles."""

    embedder: Literal["tfidf_svd", "sentence_encoder"] = "tfidf_svd"
    """TF-IDF + SVD, fitted to texts of the run, or a pretrained sentence encoder."""
    embedder_path: str = ""
    """Local folder or hub name of the sentence encoder: BERT, RoBERTa or Qwen3-Embedding."""
    embedder_compute: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and activations of a sentence encoder."""
    query_task: str = "Given a news search query, retrieve news articles that match it"
    """What encoders that follow instructions (Qwen3-Embedding) are told of each query; others do not read it."""
    embedding_size: int = 320
    """Of the TF-IDF + SVD embedder; a sentence encoder has its own."""
    articles_per_query: int = 10
    """What each query retrieves."""
    merge: Literal["reciprocal_rank", "round_robin", "max_score", "score_sum"] = "score_sum"
    """How the lists of one user's queries become one ranking; results.json has the validation recall under each way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the five rewards (the paper: all one), and what the alignment and the coverage are measured on."""

    align: float = 1.0
    """Weight: do the queries lie close to articles?"""
    coverage: float = 8.0
    """Weight: does the list cover what the user is interested in?"""
    specificity: float = 0.5
    """Weight: are the queries rich in content?"""
    diversity: float = 0.3
    """Weight: do the queries differ from each other?"""
    structure: float = 1.0
    """Weight: does the list keep to the format?"""
    align_articles: int = 3
    """K of alignment: the paper takes 10 of millions, a catalogue of hundreds has three or four a subject."""
    max_facets: int = 6
    """Facets of a user's signals that the coverage rubric asks for."""
    max_failed_share: float = 0.5
    """A run stops when the judge or the embedder fails on more than this share of a batch's lists, ten at least; what
    fails is left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who judges coverage and specificity in training."""

    kind: Literal["similarity", "language_model", "http"] = "similarity"
    """Similarity and term statistics, or a language model that answers a rubric's questions, here or by HTTP."""
    model: str = ""
    """Local folder or hub name of the language model; for `http` its name at the endpoint."""
    rubric: Literal["template", "language_model"] = "template"
    """Who words the question on an interest of the user: a template, or that language model, from the signals."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and activations of `language_model`."""
    lists_per_step: int = 32
    """Lists, of all hosts, that `language_model` scores at once, each with all of its questions."""
    url: str = ""
    """Of the endpoint, up to and including /v1."""
    token_variable: str = ""
    """Environment variable that holds the endpoint's token; empty for none. The token itself is never stored."""
    concurrency: int = 16
    """Requests under way at once."""
    timeout: float = 60.0
    """Seconds that one request may take."""
    retries: int = 4
    """After timeouts, lost connections and the statuses 408, 429 and 5xx."""
    max_failed_share: float = 0.05
    """A run stops when more than this share of a batch's questions fail, and ten at least; fewer are left out. Likewise
    of the questions that it was to write so far; where there is none, the template's is asked."""
    cache: str = "judge.sqlite"
    """File of the answers that the endpoint gave, within the run's folder unless absolute; empty for none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondJudgeConfig(JudgeConfig):
    """A judge that training never sees, for validation and evaluation. Its settings are those of [judge]."""

    kind: Literal["word_overlap", "language_model", "http"] = "word_overlap"
    """`word_overlap` asks whether queries have the words of the user's interests in them; it judges coverage alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW after clipping by the global norm; a linear warm-up, then a schedule to the last step."""

    learning_rate: float = 1e-3
    """Where the warm-up ends."""
    warmup_steps: int = 20
    """Steps in which the learning rate rises from 0, in a line."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; `constant` does not."""
    final_share: float = 0.1
    """Share of the learning rate that is left at the last step."""
    beta1: float = 0.9
    """Of AdamW: decay of the mean of the gradients."""
    beta2: float = 0.95
    """Of AdamW: decay of the mean of their squares."""
    weight_decay: float = 0.01
    """Of AdamW, of all parameters alike."""
    max_grad_norm: float = 1.0
    """Longer gradients are cut to this length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Warm start, or supervised distillation."""

    steps: int = 340
    """0 for no warm start, where both models are pretrained."""
    prompts_per_step: int = 24
    """Different training prompts in a step."""
    group_size: int = 1
    """Lists to imitate a prompt; they share it, as completions do."""
    microbatches: int = 1
    """Parts that the prompts of a step are split into; their gradients add up to the step's, in less memory."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=4e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Policy optimisation of the teacher: Dr.GRPO (arXiv 2503.20783), or one of its relatives."""

    steps: int = 50
    """Each samples, rewards, and updates the teacher once."""
    prompts_per_step: int = 16
    """Different training prompts in a step."""
    group_size: int = 8
    """Lists sampled a prompt; the advantage of each is over their mean."""
    microbatches: int = 1
    """Parts that the prompts of a step are split into. Their gradients add up to the step's, in less memory; and while
    the lists of one are judged, the next is sampled."""
    loss: Literal["dr_grpo", "grpo", "dapo", "gspo", "cispo"] = "dr_grpo"
    """What the policy minimises (docs/training.md). `dapo` leaves out groups whose lists all have the same reward."""
    advantages: Literal["dr_grpo", "grpo", "gdpo"] = "dr_grpo"
    """The reward less its group's mean; `grpo` divides by the group's standard deviation, and `gdpo` standardises each
    of the rewards in its group before they are summed, then the sums over the batch."""
    clip_low: float = 0.0
    """A token of a poor list has no gradient once its probability has fallen by this share. `gspo`: a whole list, by
    the mean over its tokens; `cispo`: 1 less this is a token's least weight. 0: as the loss's paper has it."""
    clip_high: float = 0.0
    """A token of a good list has no gradient once its probability has risen by this share. `gspo`: a whole list, by
    the mean over its tokens; `cispo`: 1 and this is a token's largest weight. 0: as the loss's paper has it."""
    importance_cap: float = 0.0
    """Largest weight of truncated importance sampling, which corrects for other probabilities in sampling than in
    training; the clip is then measured from those in training. 0: no weights."""
    overlong_tokens: int = 0
    """The last tokens of the budget in which DAPO's length penalty falls from 0 to -1; added to the reward. 0: none."""
    kl: Literal["k2", "k3"] = "k2"
    """Term that holds the policy to the one it starts from: `k2` has the gradient of KL(policy ‖ start), `k3`, of the
    GRPO paper, that of KL(start ‖ policy)."""
    kl_weight: float = 0.0
    """Of that term; 0: none, and no reference policy is run."""
    temperature: float = 1.0
    """Of sampling, and so of the policy that is updated."""
    uniform_steps: int = 15
    """Steps of a second teacher under the paper's uniform reward weights, for the results table; 0 for none. As many
    of the chosen weights' schedule, so no more than `steps`."""
    validate_every: int = 25
    """Steps between measurements of recall on the validation users; 0 for none."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=5, weight_decay=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """On-policy distillation of the supervised student: its own samples, and at each token a divergence between its
    distribution and the teacher's."""

    steps: int = 100
    """Each samples from the student and updates it once. 0: there is no student, and no stage trains one."""
    prompts_per_step: int = 16
    """Different training prompts in a step."""
    group_size: int = 4
    """Lists sampled a prompt."""
    microbatches: int = 1
    """Parts that the prompts of a step are split into; their gradients add up to the step's, in less memory."""
    temperature: float = 1.0
    """Of sampling, and of both distributions that the divergence compares."""
    divergence: Literal["reverse_kl", "jsd", "sampled_token", "sampled_token_control_variate"] = "reverse_kl"
    """KL(student ‖ teacher) over the whole vocabulary, the generalised Jensen-Shannon divergence, or an estimate of the
    former's gradient from the sampled token alone, with or without a baseline."""
    jsd_beta: float = 0.5
    """Share of the teacher in the mixture that `jsd` compares both with: near 0 it acts like KL(teacher ‖ student),
    near 1 like KL(student ‖ teacher), and its size shrinks at both ends."""
    prefix_tokens: int = 0
    """Only the first so many tokens of each list count; 0 for all."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4, warmup_steps=5, weight_decay=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The frozen protocol of docs/evaluation.md."""

    samples: int = 2
    """Lists sampled a user for each model; a user's value is the mean over them."""
    best_of_n: tuple[int, ...] = (1, 2, 4, 8)
    """How many of the teacher's lists the best by reward is chosen from; the last is how many are sampled."""
    temperature: float = 0.6
    """Of all models alike. Below 1, where they are trained, a small model's slips become rare."""
    prompts_per_step: int = 32
    """Users whose lists are sampled at once."""
    bootstrap_resamples: int = 2000
    """Resamples of the users, for the 95 % intervals."""
    showcase_users: int = 10
    """Test users whose signals, lists and articles the report shows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemsConfig:
    """What a model of clicked articles knows an article by."""

    kind: Literal["id", "text", "id_and_text"] = "text"
    """A vector trained for each article that training clicked, the text's vector, or the sum of both. `id`, as in the
    papers, can score no article that training has not clicked."""
    id_dropout: float = 0.0
    """Share of the articles whose id is left out in a training step, so that texts learn to stand alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GruConfig:
    """GRU4Rec (arXiv 1511.06939, 1706.03847)."""

    items: ItemsConfig = ItemsConfig()
    length: int = 200
    """Latest clicks that are read."""
    size: int = 100
    """Of the article vectors and of the state."""
    dropout: float = 0.3
    """Share of what is read of an article that a training step leaves out."""
    negatives: int = 2048
    """Drawn by popularity^0.5 for all of a step, beside the batch's other targets."""
    learning_rate: float = 0.05
    """Of Adagrad."""
    batch: int = 64
    """Users a step."""
    epochs: int = 10
    """Times that every user is trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SasrecConfig:
    """SASRec (arXiv 1808.09781) with a sampled softmax."""

    items: ItemsConfig = ItemsConfig()
    length: int = 200
    """Latest clicks that are read."""
    size: int = 200
    """Of the article vectors and of what is passed from block to block."""
    blocks: int = 2
    """Attention with a feed-forward part, each."""
    heads: int = 1
    """Of an attention."""
    dropout: float = 0.5
    """Of the embeddings, the attention and the feed-forward parts."""
    negatives: int = 128
    """Drawn at random for every click that is predicted."""
    temperature: float = 0.05
    """Cosines are divided by this."""
    learning_rate: float = 3e-3
    """Of Adam."""
    batch: int = 128
    """Users a step."""
    epochs: int = 25
    """Times that every user is trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HstuConfig:
    """HSTU (arXiv 2402.17152)."""

    items: ItemsConfig = ItemsConfig()
    length: int = 200
    """Latest clicks that are read."""
    size: int = 200
    """Of the article vectors and of what is passed from block to block."""
    blocks: int = 2
    """Layers."""
    heads: int = 1
    """Of a layer; each is `size` / `heads` wide."""
    dropout: float = 0.5
    """Of the embeddings and of what a layer adds."""
    time_bias: Literal["target", "last", "none"] = "target"
    """How long ago each click was: at the time of what is predicted, which is the request when serving, or at the click
    that is read last; or not told."""
    negatives: int = 128
    """Drawn at random for every click that is predicted."""
    temperature: float = 0.05
    """Cosines are divided by this."""
    learning_rate: float = 3e-3
    """Of AdamW without weight decay."""
    batch: int = 128
    """Users a step."""
    epochs: int = 25
    """Times that every user is trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NrhubConfig:
    """NRHUB (Wu et al., EMNLP 2019): news titles, search queries and page titles."""

    records: int = 20
    """Latest records of each of the three streams that are read."""
    record_words: int = 12
    """First words of a record that are read."""
    word_size: int = 100
    """Of the word vectors, which begin at random."""
    filters: int = 400
    """Of the convolution over three words; a record's vector is as wide, and so a user's and an article's."""
    attention_size: int = 200
    """Of the tanh layer of each attention: over words, over records and over streams."""
    dropout: float = 0.2
    """Of the word vectors."""
    negatives: int = 4
    """Articles that a click is set against, drawn at random."""
    learning_rate: float = 1e-3
    """Of Adam."""
    batch: int = 32
    """Users a step, each with all of their clicks."""
    epochs: int = 10
    """Times that every user is trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinsageConfig:
    """PinSage (arXiv 1806.01973) on the graph of users and the articles that they clicked."""

    size: int = 128
    """Of the vectors of articles, and of what a neighbour passes on."""
    neighbours: int = 10
    """Articles that random walks from an article visit most."""
    walks: int = 200
    """Random walks from each article."""
    restart: float = 0.5
    """Probability that a walk goes back to where it began, after each step to a user and on to an article."""
    margin: float = 0.1
    """By which an article clicked next is to score above one drawn at random."""
    negatives: int = 128
    """Drawn at random for all of a step."""
    clicks: int = 10
    """A user's latest clicks, whose mean vector the user is ranked by."""
    learning_rate: float = 3e-3
    """Of Adam."""
    batch: int = 128
    """Pairs of clicks a step."""
    epochs: int = 10
    """Times that every pair is trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """The five trained baselines of docs/baselines.md. Their settings are those of the first trial, and were chosen on
    validation users of the generated world."""

    trials: int = 4
    """Settings that are tried for each baseline; Recall@10 of the validation users chooses."""
    checkpoint_every: int = 500
    """Steps between a trial's checkpoints."""
    gru: GruConfig = GruConfig()
    sasrec: SasrecConfig = SasrecConfig()
    hstu: HstuConfig = HstuConfig()
    nrhub: NrhubConfig = NrhubConfig()
    pinsage: PinsageConfig = PinsageConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    """Devices among which a batch is divided; they hold the same parameters."""
    fsdp: int = 1
    """Devices among which a batch and the parameters are divided."""
    tensor: int = 1
    """Devices among which every layer is divided."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run of the whole road."""

    seed: int = 0
    """Of the world, the models and every draw."""
    checkpoint_every: int = 25
    """Steps between checkpoints; a killed run loses at most so many."""
    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite changes nothing; after more than so many of a stage, it stops."""
    data: DataConfig = DataConfig()
    cleaning: CleaningConfig = CleaningConfig()
    prompt: PromptConfig = PromptConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    second_judge: SecondJudgeConfig = SecondJudgeConfig()
    teacher: ModelConfig = ModelConfig()
    student: ModelConfig = ModelConfig(
        hidden_size=48, num_layers=3, intermediate_size=16, num_heads=4, num_kv_heads=2, head_dim=32
    )
    warm_start: SftConfig = SftConfig()
    grpo: GrpoConfig = GrpoConfig()
    teacher_lists: int = 2
    """Lists that the teacher samples a training prompt for supervised distillation."""
    supervised: SftConfig = SftConfig(
        steps=100, prompts_per_step=16, group_size=2, optimizer=OptimizerConfig(learning_rate=2e-3)
    )
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def policies(self) -> tuple[Literal["teacher", "student"], ...]:
        """The sections of the models that the run trains: with ``distill.steps`` 0 there is no student."""
        return ("teacher", "student") if self.distill.steps else ("teacher",)


def load_config(path: Path) -> Config:
    """The config in a TOML file; a key it leaves out keeps its default.

    Raises InputError for a file that cannot be read, an unknown key (naming the nearest known one) or a value of the
    wrong type. Whether the values make sense is for ``config_rules.validate``: the command line may still change them.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        return _replace(Config(), table)
    except OSError as error:
        raise InputError(f"{path}: cannot read this config: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a UTF-8 text file; expected a config in TOML.") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}.") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save_config(config: Config, path: Path) -> None:
    """Writes every setting, so that ``load_config`` gives ``config`` back whatever the defaults have become."""
    write_text(path, to_toml(config))


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value, for every setting of a config or of one section."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            values |= flatten(value, f"{prefix}{field.name}.")
        else:
            values[prefix + field.name] = value
    return values


def _replace(section: Any, table: dict[str, Any], prefix: str = "") -> Any:
    """``section`` with the values of a TOML table; the defaults are the section's own, not its class's."""
    types = get_type_hints(type(section))
    values = {}
    for name, value in table.items():
        key = prefix + name
        if name not in types:
            raise InputError(f"unknown key `{key}`; the nearest known key is `{_nearest(name, prefix, list(types))}`.")
        current = getattr(section, name)
        if not dataclasses.is_dataclass(current):
            values[name] = _convert(key, value, types[name])
        elif isinstance(value, dict):
            values[name] = _replace(current, value, f"{key}.")
        else:
            raise InputError(f"`{key}` is {_show(value)}; expected a table, [{key}], with its own keys.")
    return dataclasses.replace(section, **values)


def _nearest(name: str, prefix: str, siblings: list[str]) -> str:
    """The known key closest to ``prefix + name``: a sibling spelt alike or with these initials, else the same name in
    another table."""
    initials = [sibling for sibling in siblings if "".join(word[0] for word in sibling.split("_")) == name]
    alike = initials or difflib.get_close_matches(name, siblings, n=1)
    elsewhere = [key for key in flatten(Config()) if key.rpartition(".")[2] == name]
    if not alike and elsewhere:
        return elsewhere[0]
    return prefix + (alike or difflib.get_close_matches(name, siblings, n=1, cutoff=0.0))[0]


def _convert(key: str, value: Any, kind: Any) -> Any:
    """A TOML value as the type of its field: a whole number will do for a float, a list for a tuple."""
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_convert(f"{key}[{i}]", item, get_args(kind)[0]) for i, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:  # exactly: true is not the number 1
        return value
    raise InputError(f"`{key}` is {_show(value)}; expected {_expected(kind)}.")


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(_show(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each item {_expected(get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes"}[kind]


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def to_toml(config: Config) -> str:
    """Every setting as TOML, under the docstring it has in this file."""
    lines: list[str] = []

    def comment(text: str) -> None:
        lines.extend(f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 100))

    def write(section: Any, prefix: str) -> None:
        comment(type(section).__doc__ or "")
        if prefix:
            lines.append(f"[{prefix}]")
        notes = _field_docstrings(type(section))
        values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
        tables = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
        for name in [name for name in values if name not in tables]:
            comment(notes.get(name, ""))
            lines.append(tomli_w.dumps({name: values[name]}).strip())
        for name, table in tables.items():
            lines.append("")
            write(table, f"{prefix}.{name}" if prefix else name)

    write(config, "")
    return "\n".join(lines) + "\n"


@functools.cache
def _field_docstrings(section: type) -> dict[str, str]:
    """Field to the string that stands under it in the source."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(section)).body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: note.value.value
        for field, note in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    }


if __name__ == "__main__":
    print(to_toml(Config()), end="")
