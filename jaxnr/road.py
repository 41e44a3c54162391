"""The road, stage by stage: data, warm start, Dr.GRPO, distillation, evaluation. ``run_stages`` walks it.

Each stage reads what the stages before it wrote under the run's folder and writes its own; a stage that was killed goes
on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxnr.checkpoint import Checkpoints, DamagedCheckpoint
from jaxnr.config import Config, GrpoConfig, RewardConfig, SftConfig
from jaxnr.data.dataset import load as load_examples
from jaxnr.data.examples import Example, split_times
from jaxnr.data.pipeline import training_batches
from jaxnr.data.prepare import known_texts, known_words, open_rewards, prepare_data
from jaxnr.data.schema import Tables
from jaxnr.errors import InputError
from jaxnr.evaluation.run import evaluate, recall_at_10
from jaxnr.files import read_json, write_json_lines, write_text
from jaxnr.hosts import first_says, gather_rows, is_first, on_first, own, own_rows, place_rows, read_rows
from jaxnr.mesh import abstract_on, check_batch_sizes, make_mesh
from jaxnr.models.decoder import init_params
from jaxnr.models.lora import NO_LORA, trainable, with_trainable, without_adapters
from jaxnr.progress import progress
from jaxnr.prompting.output import ParsedList
from jaxnr.prompting.tokenizer import load_tokenizer
from jaxnr.rewards.composite import REWARDS, RewardModel, Scored, summarise
from jaxnr.rewards.failures import PatientJudge
from jaxnr.rewards.judge import Judge, OpenedWhenAsked, open_judge
from jaxnr.rewards.specificity import TermStatistics
from jaxnr.sampling.sampler import SamplingSettings
from jaxnr.training.fresh import fresh_params
from jaxnr.training.last_batch import LastBatch
from jaxnr.training.loop import train
from jaxnr.training.metrics import MetricsLog
from jaxnr.training.policy_losses import decoupled_reward, overlong_penalty
from jaxnr.training.rollout import Policy, Rollout, all_lists, make_policy, padded_chunks, roll_out, roll_out_and_score
from jaxnr.training.start import make_decoder, pretrained_params
from jaxnr.training.steps import (
    Batch,
    ScoredBatch,
    TrainState,
    create_state,
    make_distill_step,
    make_grpo_step,
    make_logprobs,
    make_optimizer,
    make_sft_step,
)
from jaxnr.training.targets import Target, place_targets, warm_start_batches

logger = logging.getLogger(__name__)

UNIFORM = RewardConfig(align=1.0, coverage=1.0, specificity=1.0, diversity=1.0, structure=1.0)
"""The paper's weights."""

STAGES = ("data", "sft", "grpo", "distill", "evaluate")

_STAGE_OF = {
    "warm_start_teacher": "sft",
    "warm_start_student": "sft",
    "grpo": "grpo",
    "grpo_uniform": "grpo",
    "supervised": "distill",
    "distill": "distill",
}
"""Training stage, by whose name its checkpoints go, to the stage of the road that it belongs to."""


@dataclasses.dataclass(frozen=True)
class Road:
    """A run's folder with everything that the stages after ``data`` share."""

    config: Config
    out: Path
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    tables: Tables
    examples: dict[str, Sequence[Example]]
    rewards: RewardModel
    second_judge: Judge
    """Asked in validation and evaluation alone."""
    signal_terms: TermStatistics
    log: MetricsLog
    last_batch: LastBatch
    """Told by each step what it trains on."""
    earlier: list[float] = dataclasses.field(default_factory=list)
    """Seconds that earlier processes took for what this one goes on from, one entry a training stage."""

    @classmethod
    def open(cls, config: Config, out: Path) -> Road:
        """Loads what the data stage wrote."""
        tables = Tables.load(out / "data")
        mesh = make_mesh(config.mesh)
        check_batch_sizes(config, mesh)
        tokenizer = load_tokenizer(str(out / "tokenizer"))
        return cls(
            config=config,
            out=out,
            mesh=mesh,
            tokenizer=tokenizer,
            tables=tables,
            examples={split: load_examples(out / "data" / "examples", split) for split in ("train", "valid", "test")},
            rewards=open_rewards(config, out, tables, mesh),
            second_judge=PatientJudge(
                OpenedWhenAsked(lambda: open_judge(config.second_judge, out, mesh)),
                shared=config.second_judge.kind == "language_model",
            ),
            signal_terms=TermStatistics.load(out / "retrieval" / "signal_terms.json"),
            log=MetricsLog(out / "metrics.jsonl"),
            last_batch=LastBatch(out / "skipped", tokenizer, mesh),
        )

    def policy(self, shape: str) -> Policy:
        """The decoder of ``shape`` ("teacher" or "student") with its sampler."""
        model = make_decoder(getattr(self.config, shape), self.tokenizer)
        return make_policy(model, self.tokenizer, self.config.prompt, self.mesh, self.signal_terms)

    def has_trained(self, stage: str) -> bool:
        """Whether a training stage has left a checkpoint."""
        with Checkpoints(self.out / "checkpoints" / stage) as checkpoints:
            return checkpoints.latest_step() is not None

    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took, over all processes.

        Of a process that was killed, training up to its last checkpoint counts: the rest was done again.
        """
        markers = {stage: self.out / "done" / f"{stage}.json" for stage in STAGES}
        return {stage: read_seconds(path, stage) for stage, path in markers.items() if path.exists()}

    def trained_params(self, policy: Policy, stage: str) -> dict:
        """The parameters that a training stage ended with; of one that was stopped, with a warning, its latest.

        Raises InputError, naming the stage's command, where it has none or their checkpoint is damaged.
        """
        command = f"jaxnr {_STAGE_OF[stage]} CONFIG --out {self.out}"
        if not self.has_trained(stage):
            raise InputError(
                f"{self.out}: there is no model of the training stage {stage} yet; `{command}` has to run first."
            )
        params = jax.eval_shape(lambda: init_params(policy.model, jax.random.key(0)))
        with Checkpoints(self.out / "checkpoints" / stage) as checkpoints:
            if is_first() and not (self.out / "done" / f"{_STAGE_OF[stage]}.json").exists():
                stopped = "%s: %s was stopped, and its model is the one after step %d; `%s --resume` goes on with it."
                logger.warning(stopped, self.out, stage, checkpoints.latest_step(), command)
            try:
                return checkpoints.restore_params(abstract_on(params, self.mesh))
            except DamagedCheckpoint as error:
                raise InputError(f"{error} `{command}` trains again from the checkpoint before.") from None

    def roll_out(
        self, policy: Policy, params: dict, examples: Sequence[Example], samples: int, temperature: float, step: int
    ) -> Rollout:
        """Sampled lists under this run's seed, unfiltered, as training needs them; ``examples`` as ``roll_out`` has
        them."""
        settings = SamplingSettings(temperature=temperature)
        return roll_out(policy, params, examples, samples=samples, seed=self.config.seed, step=step, settings=settings)

    def train(
        self,
        stage: str,
        state: TrainState,
        step: Callable,
        *,
        section: str,
        steps: int,
        source: Sequence[Example] | None = None,
        **options,
    ) -> TrainState:
        """The host loop over this run's training prompts, or over ``source``, in batches as ``section`` has them.

        ``step(state, examples, index)`` is given this process's rows of each batch.
        """
        batch_size = getattr(self.config, section).prompts_per_step
        seed = self.config.seed + sum(map(ord, stage))  # every stage sees its own order
        batches = training_batches(
            self.examples["train"] if source is None else source,
            batch_size=batch_size,
            batch_size_key=f"{section}.prompts_per_step",
            seed=seed,
            rows=own_rows(self.mesh, batch_size),
        )
        return train(
            stage=stage,
            state=state,
            batches=batches,
            step=step,
            steps=steps,
            folder=self.out / "checkpoints" / stage,
            checkpoint_every=self.config.checkpoint_every,
            log=self.log,
            resumed=self.earlier.append,
            max_skipped_steps=self.config.max_skipped_steps,
            keep_batch=self.last_batch.write,
            **options,
        )


def run_stages(config: Config, out: Path, stages: Sequence[str], resume: bool = False) -> None:
    """Runs the named stages in the road's order; with ``resume``, those that have ended already are passed over."""
    for stage in STAGES:
        if stage not in stages:
            continue
        marker = out / "done" / f"{stage}.json"
        if first_says(resume and marker.exists()):
            continue
        started, earlier = time.monotonic(), []
        if stage == "data":
            on_first(lambda: prepare_data(config, out))
        else:
            road = Road.open(config, out)
            _RUN[stage](road)
            earlier = road.earlier
        if is_first():
            (out / "done" / "evaluate.json").unlink(missing_ok=True)  # what was measured is no longer all that there is
            write_text(marker, json.dumps({"seconds": round(time.monotonic() - started + sum(earlier), 3)}))


def read_seconds(path: Path, stage: str) -> float:
    """What the mark of a stage that has ended says it took. Raises InputError where it does not."""
    expected = f"the seconds that a stage took; delete the file, and `jaxnr {stage} CONFIG --resume` writes it again"
    seconds = read_json(path, expected).get("seconds")
    if not isinstance(seconds, int | float):
        raise InputError(f"{path}: expected {expected} (`seconds` is {seconds!r}).")
    return seconds


def warm_start(road: Road) -> None:
    """Supervised steps that give the teacher and the student, where there is one, the format and the language (see
    training/targets.py).

    Pretrained models know both; with ``warm_start.steps`` 0 they stay as they are.
    """
    config = road.config.warm_start
    train = list(road.examples["train"])
    t1, _ = split_times(road.tables, road.config.data)
    # Single texts say which words go together in one stream; a user's signals side by side, which go together across.
    texts = known_texts(road.tables, train, t1)
    words = known_words(texts, road.signal_terms)
    texts += [" ".join(signal.text for signal in example.signals) for example in train]
    reading = config.steps * 2 // 3
    # The teacher leaves long lists for RL to find. The student gets them from the teacher, and reads to the end.
    random_reading = {"teacher": reading, "student": config.steps}
    for offset, shape in enumerate(road.config.policies):
        policy = road.policy(shape)
        path, seed = getattr(road.config, shape).path, 2 * road.config.seed + offset
        if path:
            params = pretrained_params(policy.model, path, road.mesh, seed)
        else:
            params = fresh_params(policy.model, road.tokenizer, texts, seed)
        supervise(
            road,
            f"warm_start_{shape}",
            policy,
            params,
            "warm_start",
            warm_start_batches(policy, config.group_size, road.config.seed, words, reading, random_reading[shape]),
            source=train,
        )


def train_teacher(road: Road) -> None:
    """Policy optimisation with the configured reward weights and, for the comparison, with the paper's uniform ones.

    Both follow the schedule of ``grpo.steps``, the second for its first ``uniform_steps``.
    """
    config = road.config.grpo
    policy = road.policy("teacher")
    optimizer = make_optimizer(config.optimizer, config.steps)
    start = create_state(road.trained_params(policy, "warm_start_teacher"), optimizer, road.mesh)
    update = make_grpo_step(policy.model, optimizer, start, road.mesh, policy.vocabulary_size, config)
    runs = [("grpo", road.rewards, config.steps)]
    if config.uniform_steps:
        runs.append(("grpo_uniform", road.rewards.with_weights(UNIFORM), min(config.uniform_steps, config.steps)))
    reference = reference_policy(road, policy, start.params) if config.kl_weight else None
    for stage, rewards, steps in runs:
        last = stage == runs[-1][0]  # may have the start itself; a step donates its state
        reinforce(road, stage, policy, start if last else copied(start), update, rewards, steps, reference)


def copied(tree):
    """The same arrays in memory of their own."""
    return jax.tree.map(jnp.copy, tree)


def reference_policy(road: Road, policy: Policy, start: dict) -> Callable[[dict, Batch], jax.Array]:
    """``logprobs(params, batch)`` under the policy that the stage starts from, given the present parameters.

    Of a model with adapters only these differ between the two, so the rest is not held twice; and where no warm start
    has trained them they do nothing at the start, so the reference is the model without.
    """
    config = road.config
    bare = bool(config.teacher.lora_rank) and not config.warm_start.steps
    model = policy.model.clone(lora=NO_LORA) if bare else policy.model
    logprobs = make_logprobs(model, road.mesh, policy.vocabulary_size, config.grpo)
    if bare:
        return lambda params, batch: logprobs(without_adapters(params), batch)
    kept = copied(trainable(start))
    return lambda params, batch: logprobs(with_trainable(params, kept), batch)


def training_reward(
    config: GrpoConfig, weights: RewardConfig, scores: Mapping[str, np.ndarray], mask_BGT: jax.Array
) -> np.ndarray:
    """What advantages come from [B, G], of ``Scored.by_name``: the total, or for GDPO the sum of the rewards as
    standardised in their groups; and DAPO's length penalty, to GDPO a reward like the others."""
    penalty_BG = np.asarray(overlong_penalty(mask_BGT, config.overlong_tokens)) if config.overlong_tokens else None
    if config.advantages != "gdpo":
        return scores["total"] if penalty_BG is None else scores["total"] + penalty_BG
    weighted = [(scores[name], getattr(weights, name)) for name in REWARDS]
    if penalty_BG is not None:
        weighted.append((penalty_BG, 1.0))
    rewards_K, weights_K = zip(*weighted, strict=True)
    return np.asarray(decoupled_reward(jnp.stack(rewards_K), jnp.array(weights_K)))


def reinforce(
    road: Road,
    stage: str,
    policy: Policy,
    state: TrainState,
    update: Callable,
    rewards: RewardModel,
    steps: int,
    reference: Callable[[dict, Batch], jax.Array] | None,
) -> None:
    """Policy optimisation from ``state``."""
    road.train(
        stage,
        state,
        reinforcement(road, policy, update, rewards, rewards.config.reward, reference),
        section="grpo",
        steps=steps,
        validate=lambda params: recall_at_10(road, policy, params),
        validate_every=road.config.grpo.validate_every,
    )


def reinforcement(
    road: Road,
    policy: Policy,
    update: Callable,
    rewards: Callable[[Sequence[Example], list[list[ParsedList]]], Scored],
    weights: RewardConfig,
    reference: Callable[[dict, Batch], jax.Array] | None = None,
) -> Callable[[TrainState, list[Example], int], tuple[TrainState, dict]]:
    """The step of the host loop: sample, reward, ``update``; with a ``reference``, under a KL term."""
    config = road.config.grpo

    def step(state: TrainState, examples: list[Example], index: int) -> tuple[TrainState, dict]:
        rollout, scores = roll_out_and_score(
            policy,
            state.params,
            examples,
            lambda examples, lists: rewards(examples, lists).by_name,
            config.microbatches,
            samples=config.group_size,
            seed=road.config.seed,
            step=index,
            settings=SamplingSettings(temperature=config.temperature),
        )
        reward_BG = training_reward(config, weights, scores, read_rows(rollout.batch.mask_BGT))
        batch = ScoredBatch(
            rollout.batch.prompt_BS,
            rollout.batch.prompt_mask_BS,
            rollout.batch.completion_BGT,
            rollout.batch.mask_BGT,
            old_logprobs_BGT=rollout.completions.logprobs_BGT,
            reward_BG=place_rows(reward_BG, road.mesh),
            reference_logprobs_BGT=reference(state.params, rollout.batch) if reference else None,
        )
        road.last_batch.remember(examples, batch)
        state, metrics = update(state, batch)
        return state, metrics | summarise(gather_rows(scores, road.mesh))

    return step


def distill_student(road: Road) -> None:
    """Both students: one supervised on the teacher's lists, and one that goes on from it with its own samples.

    On-policy steps need samples that the teacher has something to say about, so they begin after supervised ones. With
    ``distill.steps`` 0 there is neither.
    """
    config = road.config
    if not config.distill.steps:
        logger.info("distill.steps is 0: there is no student to train.")
        return
    teacher, student = road.policy("teacher"), road.policy("student")
    teacher_params = road.trained_params(teacher, "grpo")
    lists = teacher_lists(road, teacher, teacher_params)
    imitable = [example for example in road.examples["train"] if lists[example.example_id]]
    needed = max(config.supervised.prompts_per_step, 1)
    if len(imitable) < needed:
        raise InputError(
            f"The teacher wrote a well-formed list for {len(imitable)} of {len(lists)} training prompts; distillation "
            f"needs {needed} (supervised.prompts_per_step). Train it longer: warm_start.steps, then grpo.steps."
        )

    def imitate(examples: Sequence[Example], step: int) -> Batch:
        del step
        wanted = range(config.supervised.group_size)
        choices = [lists[example.example_id] for example in examples]
        return place_targets(
            student,
            [
                Target(example, tuple(known[place % len(known)] for place in wanted))
                for example, known in zip(examples, choices, strict=True)
            ],
        )

    untrained = road.trained_params(student, "warm_start_student")
    state = supervise(road, "supervised", student, untrained, "supervised", imitate, source=imitable)
    distill_on_policy(road, student, state.params, teacher, teacher_params)


def distill_on_policy(road: Road, student: Policy, params: dict, teacher: Policy, teacher_params: dict) -> None:
    """The student samples, and moves towards the teacher on its own samples (paper, stage 3)."""
    config = road.config.distill
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = create_state(params, optimizer, road.mesh)
    update = make_distill_step(
        student.model, teacher.model, optimizer, state, road.mesh, student.vocabulary_size, config
    )

    def step(state: TrainState, examples: list[Example], index: int) -> tuple[TrainState, dict]:
        rollout = road.roll_out(student, state.params, examples, config.group_size, config.temperature, index)
        road.last_batch.remember(examples, rollout.batch)
        return update(state, teacher_params, rollout.batch)

    road.train("distill", state, step, section="distill", steps=config.steps)


def teacher_lists(road: Road, teacher: Policy, params: dict) -> dict[int, list[tuple[str, ...]]]:
    """Example id to the well-formed lists that the teacher samples for it; kept in ``teacher_lists.jsonl``."""
    path = road.out / "teacher_lists.jsonl"
    if not first_says(path.exists()):
        config = road.config
        examples = list(road.examples["train"])
        rows = []
        with progress("teacher_lists", len(examples)) as bar:
            for chunk in padded_chunks(examples, config.evaluation.prompts_per_step):
                rollout = road.roll_out(
                    teacher, params, own(road.mesh, chunk.padded), config.teacher_lists, config.grpo.temperature, step=0
                )
                for example, lists in zip(chunk.examples, all_lists(teacher, rollout), strict=False):
                    queries = [list(parsed.queries) for parsed in lists if parsed.problem is None]
                    rows.append({"example_id": example.example_id, "lists": queries})
                bar.advance({}, len(chunk.examples))
        on_first(lambda: write_json_lines(path, rows))
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        return {row["example_id"]: [tuple(queries) for queries in row["lists"]] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: expected the teacher's lists; delete the file, and `jaxnr distill CONFIG --resume` samples them "
            f"again ({error!r})."
        ) from error


def supervise(
    road: Road,
    stage: str,
    policy: Policy,
    params: dict,
    section: str,
    make_batch: Callable[[Sequence[Example], int], Batch],
    source: Sequence[Example],
) -> TrainState:
    """One supervised stage from ``params``, with the settings of ``section`` ("warm_start" or "supervised").

    ``make_batch(examples, step)`` says what is imitated.
    """
    config: SftConfig = getattr(road.config, section)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = create_state(params, optimizer, road.mesh)
    update = make_sft_step(policy.model, optimizer, state, road.mesh, policy.vocabulary_size, config.microbatches)

    def step(state: TrainState, examples: list[Example], index: int) -> tuple[TrainState, dict]:
        batch = make_batch(examples, index)
        road.last_batch.remember(examples, batch)
        return update(state, batch)

    return road.train(stage, state, step, section=section, steps=config.steps, source=source)


_RUN = {"sft": warm_start, "grpo": train_teacher, "distill": distill_student, "evaluate": evaluate}
