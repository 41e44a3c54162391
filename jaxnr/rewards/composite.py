"""The five rewards of sampled lists, and their weighted sum: from parsed lists to arrays [B, G]."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxnr.config import Config, RewardConfig
from jaxnr.data.examples import Example
from jaxnr.errors import InputError
from jaxnr.hosts import together, total
from jaxnr.prompting.output import ParsedList
from jaxnr.retrieval.embedder import Embedder
from jaxnr.retrieval.index import ArticleIndex, Rows
from jaxnr.rewards.align import align
from jaxnr.rewards.coverage import coverage
from jaxnr.rewards.criteria import TextRubric, subject_of, text_rubric
from jaxnr.rewards.diversity import diversity
from jaxnr.rewards.failures import PatientEmbedder, PatientJudge
from jaxnr.rewards.judge import Judge, judged_rewards
from jaxnr.rewards.rubric import FACET_WORDS, Calibration, Rubric, build_rubric, in_article_words
from jaxnr.rewards.specificity import CRITERIA, TermStatistics, specificity, telling_words
from jaxnr.rewards.structure import structure

FEEDBACK_ARTICLES = 5
"""Articles that a facet is moved towards: about as many as the catalogue has on one subject."""

FEWEST_LISTS = 10
"""So many are counted before the share of failures can stop a run."""

REWARDS = ("align", "coverage", "specificity", "diversity", "structure")

_EMBEDDED = {"align", "coverage", "diversity"}
"""The rewards that are made of the queries' vectors."""

_NO_QUESTIONS = text_rubric((), ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What the queries of G lists for each of B users find in the catalogue; on the host."""

    texts: list[str]
    """The different queries."""
    text_BGQ: np.ndarray
    """Which of ``texts`` each query is; -1 for none."""
    queries_BGQE: np.ndarray
    query_mask_BGQ: np.ndarray
    article_rows_BGQK: np.ndarray
    """Rows of the index, best first; -1 where there is none."""
    article_scores_BGQK: np.ndarray
    """Cosines; -inf where there is no article or no query."""
    failed_BG: np.ndarray
    """Lists with a query that the embedder failed on: it finds nothing."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """What the rewards say of G lists for each of B users."""

    rewards: dict[str, np.ndarray]
    """Each of ``REWARDS``, [B, G] in [0, 1]; 0 for a list of invalid structure, NaN where the judge failed."""
    total_BG: np.ndarray
    """Their weighted sum."""
    found: Retrieved

    @property
    def by_name(self) -> dict[str, np.ndarray]:
        """The five, and their sum as ``total``."""
        return {**self.rewards, "total": self.total_BG}


class RewardModel:
    """Scores lists: text is embedded once, everything after is arrays.

    Of several processes each scores lists of its own. They call its methods in the same order, as an embedder or a
    judge that they hold together is asked by all at once, and as they stop together.

    Args:
        embedder: of queries, signals and articles.
        index: the catalogue, by the same embedder; ``item_ids_I`` are the articles of its rows. Articles that a user
            has clicked before the request are not retrieved for that user.
        articles_IE: their vectors, as they are in the index.
        statistics: of the terms of the catalogue.
        signal_terms: of the terms of signals and catalogue: which words of a signal tell what it is about.
        calibration: of the embedder's cosines, measured on the training signals.
        config: the limits on lists, the articles a query and the weights.
        judge: of coverage and specificity, by the rubric's questions; None for similarity and term statistics.
    """

    def __init__(
        self,
        *,
        embedder: Embedder,
        index: ArticleIndex,
        item_ids_I: Sequence[str],
        articles_IE: Rows,
        statistics: TermStatistics,
        signal_terms: TermStatistics,
        calibration: Calibration,
        config: Config,
        judge: Judge | None = None,
    ):
        self.embedder, self.index, self.calibration = embedder, index, calibration
        self.statistics, self.signal_terms = statistics, signal_terms
        self.articles_IE = articles_IE
        self.item_ids_I = np.array(item_ids_I)
        self.config = config
        self.judge = PatientJudge(judge, shared=config.judge.kind == "language_model") if judge else None
        self._patient_embedder = PatientEmbedder(embedder, shared=config.retrieval.embedder == "sentence_encoder")
        self._failures, self._lists = 0, 0
        self._row_of = {item_id: row for row, item_id in enumerate(item_ids_I)}
        self._rubrics: dict[int, Rubric] = {}
        self._text_rubrics: dict[int, TextRubric] = {}
        self._criteria: dict[str, tuple[float, ...]] = {}

    def __call__(self, examples: Sequence[Example], lists: Sequence[Sequence[ParsedList]]) -> Scored:
        """Scores ``lists[b][g]``, sampled for ``examples[b]``. Compiles once for each (B, G).

        What judge or embedder raise costs the lists that they raise for: no rewards (NaN), and no total. Raises
        InputError past the share ``reward.max_failed_share`` of those that could have one.
        """
        # First: an endpoint is asked while the device is still busy with other lists.
        judged = self.judged_by(self.judge, examples, lists) if self.judge else {}
        found = self.retrieve(examples, lists)
        criteria_NC = np.array([*map(self._criteria_of, found.texts), (0.0,) * len(CRITERIA)], np.float32)
        rubrics, valid_BG = self._rubrics_of(examples), structure(lists)
        rewards, total_BG = _jitted_score(
            queries_BGQE=found.queries_BGQE,
            query_mask_BGQ=found.query_mask_BGQ,
            article_scores_BGQK=found.article_scores_BGQK[..., : self.config.reward.align_articles],
            criteria_BGQC=criteria_NC[found.text_BGQ],
            facets_BJE=np.stack([rubric.facets_JE for rubric in rubrics]),
            weights_BJ=np.stack([rubric.weights_J for rubric in rubrics]),
            valid_BG=valid_BG,
            judged=judged,
            calibration=self.calibration,
            weights=self.config.reward,
        )
        assert total_BG.shape == found.text_BGQ.shape[:2]
        lost_BG = found.failed_BG & (valid_BG > 0)
        rewards = {
            name: np.where(lost_BG & (name in _EMBEDDED), np.nan, reward_BG) for name, reward_BG in rewards.items()
        }
        total_BG = np.where(lost_BG, np.nan, total_BG)
        # A user without a known signal has no rubric, and no total: that is no failure.
        unknown_B = [
            e.example_id in self._rubrics and not self._rubrics[e.example_id].weights_J.any() for e in examples
        ]
        possible_BG = ~np.array(unknown_B)[:, None] & (valid_BG > 0)
        self._check_share(int((possible_BG & np.isnan(total_BG)).sum()), int(possible_BG.sum()))
        return Scored(rewards, total_BG, found)

    def _check_share(self, failures: int, lists: int) -> None:
        """Of this batch, together with the last ones where they have few lists: by chance all of two may fail.

        All processes' lists count, so that all of them stop or none.
        """
        failures, lists = total((failures, lists))
        self._failures, self._lists = self._failures + failures, self._lists + lists
        if self._lists < FEWEST_LISTS:
            return
        failures, lists = self._failures, self._lists
        self._failures = self._lists = 0
        share = self.config.reward.max_failed_share
        if failures > share * lists:
            error = (self.judge.last_error if self.judge else None) or self._patient_embedder.last_error
            elsewhere = ", or another process has the error" if jax.process_count() > 1 else ""
            raise InputError(
                f"The judge or the embedder failed on {failures} of the last {lists} lists, more than the share of "
                f"{share} that `reward.max_failed_share` allows; "
                + (f"the last error: {error!r}." if error else f"the judge's answers are NaN{elsewhere}.")
            ) from error

    def with_weights(self, weights: RewardConfig) -> RewardModel:
        """The same rewards under the weights of ``weights``; its other settings are ignored."""
        changed = {name: getattr(weights, name) for name in REWARDS}
        model = copy.copy(self)
        reward = dataclasses.replace(self.config.reward, **changed)
        model.config = dataclasses.replace(self.config, reward=reward)
        return model

    def over(self, index: ArticleIndex, item_ids_I: Sequence[str], articles_IE: Rows) -> RewardModel:
        """The same rewards over another catalogue, whose vectors are by the same embedder."""
        model = copy.copy(self)
        model.index, model.item_ids_I, model.articles_IE = index, np.array(item_ids_I), articles_IE
        model._row_of = {item_id: row for row, item_id in enumerate(item_ids_I)}
        model._rubrics, model._text_rubrics = {}, {}  # the old ones are in the words of the old articles
        return model

    def judged_by(
        self, judge: Judge, examples: Sequence[Example], lists: Sequence[Sequence[ParsedList]]
    ) -> dict[str, np.ndarray]:
        """coverage and specificity [B, G] of ``lists[b][g]`` by any judge; see ``judged_rewards``."""
        self.precompute(examples)
        rubrics = [self._text_rubrics.get(example.example_id, _NO_QUESTIONS) for example in examples]
        return together(lambda: judged_rewards(judge, rubrics, lists))

    def retrieve(self, examples: Sequence[Example], lists: Sequence[Sequence[ParsedList]]) -> Retrieved:
        """What each query of ``lists[b][g]`` finds for ``examples[b]``: all that serving needs."""
        texts, text_BGQ = _unique_queries(lists, self.config.prompt.max_queries)
        embeddings_NE, failed_N = self._embed(texts)
        # Row -1, the last, is what a missing query gets: zeros.
        queries_BGQE = np.vstack([embeddings_NE, np.zeros((1, self.embedder.size), np.float32)])[text_BGQ]
        failed_BGQ = np.append(failed_N, False)[text_BGQ]
        mask_BGQ = (text_BGQ >= 0) & ~failed_BGQ
        scores_BGQK, rows_BGQK = self._search(examples, queries_BGQE, self.config.retrieval.articles_per_query)
        return Retrieved(
            texts=texts,
            text_BGQ=text_BGQ,
            queries_BGQE=queries_BGQE,
            query_mask_BGQ=mask_BGQ,
            article_rows_BGQK=np.where(mask_BGQ[..., None], rows_BGQK, -1),
            article_scores_BGQK=np.where(mask_BGQ[..., None], scores_BGQK, -np.inf),
            failed_BG=np.any(failed_BGQ, axis=-1),
        )

    def precompute(self, examples: Sequence[Example]) -> None:
        """Builds the rubrics of many examples at once, each text embedded once.

        An example with a signal that the embedder fails on has none until the next time.
        """
        new = [example for example in examples if example.example_id not in self._rubrics]
        texts = dict.fromkeys(signal.text for example in new for signal in example.signals)
        row_of = {text: row for row, text in enumerate(texts)}
        telling = {text: telling_words(text, self.signal_terms, FACET_WORDS) for text in texts}
        embeddings_NE, failed_N = self._embed(list(telling.values()))
        new = [e for e in new if not any(failed_N[row_of[signal.text]] for signal in e.signals)]
        rubrics = [
            build_rubric(
                embeddings_NE[[row_of[signal.text] for signal in example.signals]],
                self.calibration,
                self.config.reward.max_facets,
            )
            for example in new
        ]
        for example, rubric in zip(new, self._in_article_words(new, rubrics), strict=True):
            signals = [[example.signals[row].text for row in rows] for rows in rubric.members]
            subjects = [subject_of([telling[text] for text in texts]) for texts in signals]
            weights = rubric.weights_J[: len(subjects)].tolist()
            self._rubrics[example.example_id] = rubric
            self._text_rubrics[example.example_id] = text_rubric(subjects, weights, signals)

    def _in_article_words(self, examples: Sequence[Example], rubrics: Sequence[Rubric]) -> list[Rubric]:
        """The rubrics with facets moved towards the articles nearest to them that are live at the request."""
        if not rubrics:
            return []
        facets_BJE = np.stack([rubric.facets_JE for rubric in rubrics])
        B, J, E = facets_BJE.shape
        times_N = np.repeat([example.timestamp for example in examples], J)
        _, rows_NK = self.index.search(facets_BJE.reshape(-1, E), times_N, FEEDBACK_ARTICLES)
        articles_NKE = np.where(rows_NK[..., None] >= 0, self.articles_IE[rows_NK], 0)  # zeros for a missing article
        articles_BJKE = articles_NKE.reshape(B, J, -1, E)
        return [in_article_words(rubric, found) for rubric, found in zip(rubrics, articles_BJKE, strict=True)]

    def rubric(self, example: Example) -> Rubric:
        """The example's coverage criteria; built once."""
        return self._rubrics_of([example])[0]

    def text_rubric(self, example: Example) -> TextRubric:
        """The rubric as questions; built once."""
        self.precompute([example])
        return self._text_rubrics.get(example.example_id, _NO_QUESTIONS)

    def _rubrics_of(self, examples: Sequence[Example]) -> list[Rubric]:
        self.precompute(examples)
        E, max_facets = self.embedder.size, self.config.reward.max_facets
        empty = Rubric(np.zeros((max_facets, E), np.float32), np.zeros(max_facets, np.float32), ())
        return [self._rubrics.get(example.example_id, empty) for example in examples]

    def _embed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [N, E], and for which texts the embedder failed [N].

        Queries and signals alike go in as queries, so that their cosines are those of the calibration.
        """
        return self._patient_embedder(texts)

    def _criteria_of(self, query: str) -> tuple[float, ...]:
        if query not in self._criteria:
            self._criteria[query] = self.statistics.criteria(query)
        return self._criteria[query]

    def _search(self, examples: Sequence[Example], queries_BGQE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Each query's best articles of those published at its request and not seen by its user."""
        B, G, Q, E = queries_BGQE.shape
        seen = [[self._row_of[item_id] for item_id in example.seen if item_id in self._row_of] for example in examples]
        exclude_BX = np.full((B, max(map(len, seen))), -1, np.int32)
        for row, rows in enumerate(seen):
            exclude_BX[row, : len(rows)] = rows
        times_B = np.array([example.timestamp for example in examples])
        scores_NK, rows_NK = self.index.search(
            queries_BGQE.reshape(-1, E), np.repeat(times_B, G * Q), k, np.repeat(exclude_BX, G * Q, axis=0)
        )
        return scores_NK.reshape(B, G, Q, k), rows_NK.reshape(B, G, Q, k)


def score(
    queries_BGQE: jax.Array,
    query_mask_BGQ: jax.Array,
    article_scores_BGQK: jax.Array,
    criteria_BGQC: jax.Array,
    facets_BJE: jax.Array,
    weights_BJ: jax.Array,
    valid_BG: jax.Array,
    judged: dict[str, jax.Array],
    calibration: Calibration,
    weights: RewardConfig,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The five rewards and their composite, each [B, G]; a pure function of arrays.

    What ``judged`` holds stands in place of the built-in judge's.
    """
    rewards = {
        "align": align(article_scores_BGQK, query_mask_BGQ),
        "coverage": coverage(queries_BGQE, query_mask_BGQ, facets_BJE, weights_BJ, calibration),
        "specificity": specificity(criteria_BGQC, query_mask_BGQ),
        "diversity": diversity(queries_BGQE, query_mask_BGQ),
        "structure": valid_BG,
        **judged,
    }
    rewards = {name: jnp.where(valid_BG > 0, reward_BG, 0.0) for name, reward_BG in rewards.items()}
    return rewards, combine(rewards, weights, valid_BG)


_jitted_score = jax.jit(score, static_argnames=("weights",))


def combine(rewards: dict[str, jax.Array], weights: RewardConfig, valid_BG: jax.Array) -> jax.Array:
    """total_BG = Σ λ_k R_k (paper, the composite), 0 for a list of invalid structure.

    A NaN (judge failure) stays NaN, unless its weight is 0: what is not asked for cannot fail.
    """
    weighted = [getattr(weights, name) * reward_BG for name, reward_BG in rewards.items() if getattr(weights, name)]
    return jnp.where(valid_BG > 0, jnp.stack(weighted).sum(0), 0.0)


def summarise(rewards: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For each of ``Scored.by_name``, judge failures aside: mean, mean spread (standard deviation) within a group, and
    the share of groups in which it is constant and so teaches nothing; as ``reward/<name>/mean`` and so on. And
    ``reward/failed``, the share of lists without a total.
    """
    summary = {"reward/failed": float(np.isnan(rewards["total"]).mean())}
    for name, reward_BG in rewards.items():
        known = np.ma.masked_invalid(reward_BG.astype(np.float64))
        spread_B = known.std(axis=1)
        summary[f"reward/{name}/mean"] = _number(known.mean())
        summary[f"reward/{name}/spread"] = _number(spread_B.mean())
        # Equal values can have a spread of rounding error, so they are compared themselves.
        summary[f"reward/{name}/constant"] = _number((known.max(axis=1) == known.min(axis=1)).mean())
    return summary


def _number(value: float | np.ma.MaskedArray) -> float:
    """NaN where every value was a judge failure."""
    return float("nan") if value is np.ma.masked else float(value)


def _unique_queries(lists: Sequence[Sequence[ParsedList]], max_queries: int) -> tuple[list[str], np.ndarray]:
    """The distinct queries, and text_BGQ: which of them each is, -1 for none."""
    number: dict[str, int] = {}
    text_BGQ = np.full((len(lists), len(lists[0]), max_queries), -1, np.int32)
    for row, group in enumerate(lists):
        for column, parsed in enumerate(group):
            for place, query in enumerate(parsed.queries):
                text_BGQ[row, column, place] = number.setdefault(query, len(number))
    return list(number), text_BGQ
