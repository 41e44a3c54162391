"""The vectorised rewards: bounds, monotonicity, invariance, and equality with plain per-list loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr.config import RewardConfig
from jaxnr.rewards.align import align
from jaxnr.rewards.composite import REWARDS, combine, score
from jaxnr.rewards.coverage import coverage
from jaxnr.rewards.diversity import diversity
from jaxnr.rewards.rubric import Calibration
from jaxnr.rewards.specificity import specificity

B, G, Q, K, J, E, C = 2, 3, 4, 5, 3, 8, 3
UNIFORM = RewardConfig(align=1.0, coverage=1.0, specificity=1.0, diversity=1.0, structure=1.0)
CALIBRATION = Calibration(0.1)


def unit(vectors):
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def random_inputs(seed: int) -> dict:
    """Random arrays for ``score``; some queries are missing, some zero vectors, some articles missing."""
    rng = np.random.default_rng(seed)
    mask_BGQ = np.arange(Q) < rng.integers(0, Q + 1, (B, G, 1))
    queries_BGQE = unit(rng.normal(size=(B, G, Q, E)) + rng.normal(size=(B, 1, 1, E)))
    queries_BGQE *= (rng.random((B, G, Q, 1)) < 0.8) & mask_BGQ[..., None]
    scores_BGQK = -np.sort(-rng.uniform(-1, 1, (B, G, Q, K)).astype(np.float32))
    scores_BGQK[rng.random((B, G, Q, K)) < 0.2] = -np.inf
    real_BJ = np.arange(J) < rng.integers(1, J + 1, (B, 1))
    return {
        "queries_BGQE": queries_BGQE.astype(np.float32),
        "query_mask_BGQ": mask_BGQ,
        "article_scores_BGQK": np.where(mask_BGQ[..., None], scores_BGQK, -np.inf),
        "criteria_BGQC": rng.random((B, G, Q, C)).astype(np.float32),
        "facets_BJE": unit(rng.normal(size=(B, J, E))) * real_BJ[..., None],
        "weights_BJ": (rng.uniform(0.5, 3, (B, J)) * real_BJ).astype(np.float32),
        "valid_BG": (rng.random((B, G)) < 0.8).astype(np.float32),
    }


def scored(inputs: dict, weights: RewardConfig = UNIFORM) -> dict[str, np.ndarray]:
    rewards, total_BG = score(**inputs, judged={}, calibration=CALIBRATION, weights=weights)
    return {name: np.asarray(reward_BG) for name, reward_BG in {**rewards, "total": total_BG}.items()}


def reference_list(queries, articles, criteria, facets, weights, valid) -> dict[str, float]:
    """The rewards of one list, straight from their definitions; only what is there is passed."""
    if not valid:
        return dict.fromkeys([*REWARDS, "total"], 0.0)
    n = len(queries)
    rewards = {"structure": 1.0, "align": 0.0, "coverage": 0.0, "specificity": 0.0, "diversity": 0.0}
    if n:
        means = [sum(a if np.isfinite(a) else 0.0 for a in row) / len(row) for row in articles]
        rewards["align"] = min(max(sum(means) / n, 0.0), 1.0)
        rewards["specificity"] = float(np.mean([np.mean(row) for row in criteria]))
        covered, grounded = [0.0] * len(facets), 0.0
        for query in queries:
            cosines = [float(query @ facet) for facet in facets]
            best = int(np.argmax(cosines))
            near = min(max((cosines[best] - CALIBRATION.background) / (1 - CALIBRATION.background), 0), 1)
            covered[best] = max(covered[best], near)
            grounded += near / n
        facet_score = sum(w * c for w, c in zip(weights, covered, strict=True)) / sum(weights)
        rewards["coverage"] = (facet_score + 0.5 * grounded) / 1.5
    if n > 1:
        distances = [1 - float(a @ b) if a.any() and b.any() else 0.0 for a, b in itertools.combinations(queries, 2)]
        rewards["diversity"] = min(max(float(np.mean(distances)), 0.0), 1.0)
    return {**rewards, "total": sum(rewards.values())}


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_a_loop_over_lists(seed):
    inputs = random_inputs(seed)
    actual = scored(inputs)
    for b, g in itertools.product(range(B), range(G)):
        there, real = inputs["query_mask_BGQ"][b, g], inputs["weights_BJ"][b] > 0
        expected = reference_list(
            inputs["queries_BGQE"][b, g][there],
            inputs["article_scores_BGQK"][b, g][there],
            inputs["criteria_BGQC"][b, g][there],
            inputs["facets_BJE"][b][real],
            inputs["weights_BJ"][b][real],
            inputs["valid_BG"][b, g],
        )
        for name, value in expected.items():
            assert actual[name][b, g] == pytest.approx(value, abs=2e-6), name


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_every_reward_is_in_0_1(seed):
    actual = scored(random_inputs(seed))
    assert set(actual) == {*REWARDS, "total"}
    for name in REWARDS:
        assert np.all((actual[name] >= 0) & (actual[name] <= 1)), name


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.permutations(range(Q)), st.permutations(range(G)))
def test_order_of_queries_and_completions_does_not_matter(seed, queries, completions):
    inputs = random_inputs(seed)
    per_query = ("queries_BGQE", "query_mask_BGQ", "article_scores_BGQK", "criteria_BGQC")
    shuffled = {
        name: value[:, completions][:, :, queries] if name in per_query else value for name, value in inputs.items()
    }
    shuffled["valid_BG"] = inputs["valid_BG"][:, completions]
    before, after = scored(inputs), scored(shuffled)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value[:, completions], atol=1e-6)


def test_invalid_structure_zeroes_every_reward_and_judge_failure_stays_nan():
    inputs = random_inputs(0)
    inputs["weights_BJ"] = np.zeros((B, J), np.float32)  # no facets: the judge fails
    inputs["valid_BG"] = np.array([[1, 0, 1], [0, 1, 1]], np.float32)
    actual = scored(inputs)
    invalid = inputs["valid_BG"] == 0
    for value in actual.values():
        assert np.all(value[invalid] == 0)
    for name in ("coverage", "total"):
        assert np.all(np.isnan(actual[name][~invalid]))
    for name in ("align", "specificity", "diversity", "structure"):
        assert not np.isnan(actual[name]).any()


def test_a_reward_of_weight_0_cannot_fail_the_total():
    rewards = {"align": np.full((1, 2), 0.5, np.float32), "coverage": np.full((1, 2), np.nan, np.float32)}
    valid_BG = np.ones((1, 2), np.float32)
    assert np.isnan(combine(rewards, RewardConfig(), valid_BG)).all()
    np.testing.assert_allclose(combine(rewards, RewardConfig(align=2.0, coverage=0.0), valid_BG), 1.0)


def test_total_is_the_weighted_sum():
    inputs = random_inputs(1)
    weights = RewardConfig(align=0.5, coverage=3.0, specificity=0.3, diversity=0.0, structure=2.0)
    actual = scored(inputs, weights)
    expected = sum(getattr(weights, name) * actual[name] for name in REWARDS)
    np.testing.assert_allclose(actual["total"], expected, atol=1e-6)


def lists_of(*queries, total: int = Q):
    """One list as [1, 1, Q, E] with its mask."""
    padded = np.zeros((1, 1, total, E), np.float32)
    padded[0, 0, : len(queries)] = np.reshape(queries, (-1, E))
    return padded, (np.arange(total) < len(queries))[None, None]


AXES = np.eye(E, dtype=np.float32)


def covered(*queries, facets=AXES[:3], weights=(1.0, 1.0, 1.0)) -> float:
    return float(coverage(*lists_of(*queries), np.stack([facets]), np.array([weights], np.float32), CALIBRATION)[0, 0])


def test_a_query_for_an_uncovered_facet_raises_coverage():
    one, two, three = covered(AXES[0]), covered(*AXES[:2]), covered(*AXES[:3])
    assert one < two < three
    assert three == pytest.approx(1.0)


@settings(deadline=None, max_examples=20)
@given(st.tuples(*[st.floats(0.5, 50)] * 3), st.permutations(range(6)), st.integers(1, 3))
def test_a_query_for_an_uncovered_facet_pays_whatever_else_is_in_the_list(weights, axes, count):
    queries = [unit(AXES[axis] + 0.3 * AXES[7]) for axis in axes[:count]]  # some on facets, some on none, none exact
    for facet in set(range(3)) - set(axes[:count]):
        assert covered(*queries, AXES[facet], weights=weights) > covered(*queries, weights=weights)


def test_a_second_query_for_a_covered_facet_does_not_raise_coverage():
    assert covered(AXES[0], AXES[0]) == pytest.approx(covered(AXES[0]))


def test_a_query_without_evidence_lowers_coverage():
    assert covered(AXES[0], AXES[5]) < covered(AXES[0])


def test_better_supported_facets_are_worth_more():
    assert covered(AXES[0], weights=(3.0, 1.0, 1.0)) > covered(AXES[1], weights=(3.0, 1.0, 1.0))


@pytest.mark.parametrize("parts", [2, 3])
def test_a_compound_query_does_not_beat_focused_ones(parts):
    compound = unit(AXES[:parts].sum(axis=0))
    assert covered(compound) < covered(*AXES[:parts])
    assert covered(compound) <= covered(AXES[0])
    # Nor does repeating it in other words, each leaning to another facet: each buys one facet, and half-heartedly.
    leaning = [unit(AXES[:parts].sum(axis=0) + 0.1 * AXES[part]) for part in range(parts)]
    assert covered(*leaning) < covered(*AXES[:parts])


def test_padded_facets_are_not_asked_for():
    facets = np.concatenate([AXES[:1], np.zeros((2, E), np.float32)])
    assert covered(AXES[0], facets=facets, weights=(1.0, 0.0, 0.0)) == pytest.approx(1.0)


def test_duplicates_lower_diversity():
    def diverse(*queries) -> float:
        return float(diversity(*lists_of(*queries))[0, 0])

    assert diverse(*AXES[:3]) == pytest.approx(1.0)
    assert diverse(*AXES[:3], AXES[0]) < 1.0
    assert diverse(AXES[0], AXES[0]) == pytest.approx(0.0, abs=1e-6)
    assert diverse(AXES[0], -AXES[0]) == pytest.approx(1.0)
    assert diverse(AXES[0]) == diverse() == 0.0


def test_nonsense_is_not_diverse():
    nothing = np.zeros(E, np.float32)
    assert float(diversity(*lists_of(nothing, nothing))[0, 0]) == 0.0
    assert float(diversity(*lists_of(AXES[0], AXES[1], nothing))[0, 0]) == pytest.approx(1 / 3)


def test_missing_articles_count_0():
    mask_BGQ = np.ones((1, 1, 1), bool)
    full, half = np.full((1, 1, 1, 4), 0.8, np.float32), np.array([[[[0.8, 0.8, -np.inf, -np.inf]]]], np.float32)
    assert float(align(full, mask_BGQ)[0, 0]) == pytest.approx(0.8)
    assert float(align(half, mask_BGQ)[0, 0]) == pytest.approx(0.4)
    assert float(align(np.full_like(full, -0.5), mask_BGQ)[0, 0]) == 0.0


def test_padding_does_not_change_a_list():
    short, long = lists_of(AXES[0], AXES[1], total=2), lists_of(AXES[0], AXES[1], total=Q)
    assert float(diversity(*short)[0, 0]) == float(diversity(*long)[0, 0])
    criteria = np.random.default_rng(0).random((1, 1, Q, C)).astype(np.float32)
    assert float(specificity(criteria[:, :, :2], short[1])[0, 0]) == pytest.approx(
        float(specificity(criteria, long[1])[0, 0])
    )
