"""Every setting of a run, as frozen dataclasses. TOML in, TOML out; an unknown key is an error."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the events come from and how they are split."""

    format: Literal["synthetic", "events", "mind", "deskdrop"] = "synthetic"
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
    max_signals: int = 20
    """The latest clean signals that a prompt shows."""
    min_signals: int = 3
    """Users with fewer clean signals before the request are skipped and counted."""
    max_test_users: int = 400
    """At most so many test users (validation: half as many), drawn by seed; 0 for all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Qwen2 architecture, trained from scratch."""

    hidden_size: int = 160
    num_layers: int = 4
    intermediate_size: int = 480
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 40
    tie_word_embeddings: bool = True
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What the policy reads and what it may write."""

    instructions: str = "Write news search queries for this reader."
    reasoning: bool = False
    """Ask for a reasoning block before the list (models that can reason)."""
    max_prompt_tokens: int = 192
    """Longer prompts lose their oldest signals; how many did is counted."""
    prompt_buckets: tuple[int, ...] = (96, 192)
    """Padded prompt lengths; each program compiles once a bucket."""
    max_new_tokens: int = 48
    """Generation budget, the L of Dr.GRPO."""
    min_queries: int = 2
    max_queries: int = 6
    max_query_words: int = 10
    vocabulary_size: int = 2048
    """Of the byte-level BPE that is trained for models from scratch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How text becomes vectors, and vectors articles."""

    embedder: Literal["tfidf_svd", "sentence_encoder"] = "tfidf_svd"
    embedder_path: str = ""
    """Local folder or hub name of the sentence encoder."""
    embedding_size: int = 192
    """Of the TF-IDF + SVD embedder; a sentence encoder has its own."""
    articles_per_query: int = 10
    """K of the alignment reward, and what each query retrieves when serving."""
    merge: Literal["reciprocal_rank", "round_robin", "max_score"] = "reciprocal_rank"
    """How the lists of one user's queries become one ranking; chosen on validation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the five rewards (the paper: all one) and the built-in judge's thresholds."""

    align: float = 1.0
    coverage: float = 1.0
    specificity: float = 1.0
    diversity: float = 1.0
    structure: float = 1.0
    max_facets: int = 6
    """Facets of a user's signals that the coverage rubric asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to a tenth."""

    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Warm start, or supervised distillation."""

    steps: int = 400
    batch_size: int = 32
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Dr.GRPO (arXiv 2503.20783)."""

    steps: int = 200
    prompts_per_step: int = 16
    group_size: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.2
    temperature: float = 1.0
    validate_every: int = 50
    """Steps between measurements of recall on the validation users; 0 for none."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, warmup_steps=5, weight_decay=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """On-policy distillation: the student's own samples, reverse KL to the teacher."""

    steps: int = 150
    prompts_per_step: int = 16
    group_size: int = 2
    temperature: float = 1.0
    cold_start_steps: int = 100
    """Supervised steps on the teacher's lists before the student's own samples are good enough to learn on."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_steps=5, weight_decay=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The frozen protocol of docs/evaluation.md."""

    samples: int = 2
    """Lists sampled a user for each model; a user's value is the mean over them."""
    best_of_n: tuple[int, ...] = (1, 2, 4, 8)
    temperature: float = 1.0
    prompts_per_step: int = 32
    bootstrap_resamples: int = 2000
    showcase_users: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run of the whole road."""

    seed: int = 0
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    reward: RewardConfig = RewardConfig()
    teacher: ModelConfig = ModelConfig()
    student: ModelConfig = ModelConfig(
        hidden_size=80, num_layers=2, intermediate_size=240, num_heads=4, num_kv_heads=2, head_dim=20
    )
    warm_start: SftConfig = SftConfig()
    grpo: GrpoConfig = GrpoConfig()
    teacher_lists: int = 1
    """Lists that the teacher samples a training prompt for supervised distillation and the student's cold start."""
    supervised: SftConfig = SftConfig(steps=150, optimizer=OptimizerConfig(learning_rate=1e-3))
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
