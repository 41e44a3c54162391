import io
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from jaxnr.evaluation.figures import REWARDS, judge_curves, reward_curves, series
from jaxnr.evaluation.report import METRIC_LABELS, PAPER_ROWS, console_table, markdown_table, write_report

EVIL = "<script>alert('x')</script>"
METHODS = ["recent", "teacher", "prompt_only", "student_on_policy", "my_own_method"]


def interval(mean):
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.03}


def full_results():
    offline = {
        method: {metric: interval(0.1 + 0.05 * i + 0.01 * j) for j, metric in enumerate(METRIC_LABELS)}
        for i, method in enumerate(METHODS)
    }
    return {
        "seed": 3,
        "seconds": {"total": 312.4, "warm_start": 60.2, "grpo": 200.0},
        "users": {"train": 600, "valid": 150, "test": 300, "skipped": {"test_no_relevant": 41, "test_no_request": 4}},
        "offline": offline,
        "comparisons": [
            {"a": "teacher", "b": "prompt_only", "metric": "recall@10", "difference": 0.08, "p_holm": 1e-9,
             "effect_size": 0.31},
            {"a": "teacher", "b": "recent", "metric": "mrr", "difference": 0.0, "p_holm": 1.0, "effect_size": None},
        ],
        "best_of_n": {str(n): {m: interval(0.2 + 0.01 * i) for m in METRIC_LABELS} for i, n in enumerate((8, 1, 2, 4))},
        "slices": {"cold": {"users": 34, "fewer_clicks_than": 5, "offline": {
            "teacher": {"recall@10": interval(0.123), "ndcg@10": interval(0.1)}}}},
        "beyond_accuracy": {"teacher": {"diversity": 0.456, "age_hours": 31.25}},
        "rewards": {model: dict.fromkeys((*REWARDS, "second/coverage"), 0.5) for model in ("teacher", "prompt_only")},
        "judges": {"training": "similarity", "second": "word_overlap"},
        "throughput": {"teacher_users_per_s": 41.25, "student_users_per_s": 1312.5},
        "environment": {"jax": "0.10.2", "device_kind": "cpu", "device_count": 1},
        "data": {"events": 51234, "reader": {"rows": 60000, "refused": 3}, "clicks": {
            "valid": {"relevant": 0, "recallable_share": None}, "test": {"relevant": 3, "recallable_share": 0.6}}},
    }  # fmt: skip


def full_metrics():
    rows = []
    for step in range(30):
        row = {"stage": "grpo", "step": step, "completion_tokens": 30 - step / 5, "logprob_gap": 1e-6 * step}
        for name in ("total", *REWARDS):
            row |= {f"reward/{name}/mean": 0.3 + 0.01 * step, f"reward/{name}/spread": 0.1}
        if step % 10 == 0:
            row["valid/recall@10"] = 0.1 + 0.002 * step
            row |= {"valid/reward/coverage": 0.3 + 0.01 * step, "valid/reward/second/coverage": 0.2}
        rows.append(row)
        for stage in ("warm_start_teacher", "warm_start_student", "supervised"):
            rows.append({"stage": stage, "step": step, "loss": 5 / (1 + step)})
        rows.append({"stage": "distill", "step": step, "reverse_kl": float("nan") if step == 3 else 1 / (1 + step)})
    return rows


def showcase_user():
    return {
        "user_id": "U1<b>",
        "signals": [{"domain": "search", "text": "harbour bridge cost"}, {"domain": "web", "text": f"page {EVIL}"}],
        "lists": {"teacher": ['bridge "toll" & vote', EVIL], "prompt_only": [], "student_on_policy": ["bridge vote"]},
        "articles": {"teacher": [{"title": f"Bridge {EVIL}", "relevant": True}, {"title": "Snow", "relevant": False}]},
    }


class Page(HTMLParser):
    """The tags, attributes and text of a page; knows which tags were left open."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    @property
    def sections(self):
        return [value for name, value in self.attributes if name == "id" and value in ALL_SECTIONS]


ALL_SECTIONS = [
    "offline",
    "best-of-n",
    "comparisons",
    "beyond",
    "rewards",
    "learning",
    "judges",
    "warm-start",
    "counts",
    "showcase",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder / "report.html", full_results(), full_metrics(), [showcase_user()])
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_full_run_has_every_section(page):
    parsed = Page(page)
    assert parsed.sections == ALL_SECTIONS
    assert parsed.tags.count("svg") == 6
    for text in (
        "0.150",
        "0.130–0.180",
        "0.123",
        "0.456",
        "31.2",
        "< 0.001",
        "5 min 12 s",
        "51,234",
        "41.2",
        "reader.refused",
        "harbour bridge cost",
        "coverage, second judge",
        "second judge",
    ):
        assert text in parsed.texts
    for _, *values in PAPER_ROWS:
        assert all(f"{value:.3f}" in parsed.texts for value in values if value)


def test_the_share_of_recallable_clicks_stands_beside_the_numbers_of_users(page):
    texts = [text for text in Page(page).texts if text]
    at = texts.index("share of later clicks that could be recalled")
    assert texts[at + 1] == "– (valid), 0.600 (test)"
    assert "users, test" in texts[:at]


def test_the_page_loads_nothing_and_runs_nothing(page):
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    assert all((value or "").startswith("#") for name, value in parsed.attributes if name.endswith(("href", "src")))
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert all(rest.startswith("#") for rest in page.split("url(")[1:])


def test_text_of_users_is_escaped_and_still_readable(page):
    assert EVIL not in page
    texts = Page(page).texts
    for text in (f"Bridge {EVIL} ✓", f"page {EVIL}", EVIL, 'bridge "toll" & vote', "U1<b>"):
        assert text in texts


def test_methods_come_in_the_order_of_the_road_and_only_the_best_is_bold(page):
    rows = page[page.index('id="offline"') : page.index("<caption>The paper")].split("<tr>")[2:]
    assert ["Most recent" in rows[0], "Prompt only" in rows[1], "Teacher (RL)" in rows[2]] == [True] * 3
    assert "my own method" in rows[-1]
    assert [row.count('class="best"') for row in rows] == [0, 0, 0, 0, 5]


@pytest.mark.parametrize(
    ("results", "rows", "showcase", "sections"),
    [
        ({}, [], [], []),
        ({"seed": 0, "offline": {"recent": {"recall@10": {"mean": 0.5}}}}, [], [], ["offline"]),
        ({"best_of_n": {1: {"mrr": {"mean": None}}}}, [], [], ["best-of-n"]),
        ({}, [{"stage": "distill", "step": 1, "reverse_kl": 0.5}], [], ["warm-start"]),
        ({}, [{"stage": "grpo", "step": 1, "reward/align/mean": 0.5}], [], ["learning"]),
        ({}, [{"stage": "grpo", "step": 1, "seconds": 0.5}], [], []),
        ({}, [], [{"user_id": "U", "signals": [], "lists": {}, "articles": {}}], ["showcase"]),
    ],
)
def test_what_a_run_lacks_is_left_out(tmp_path, results, rows, showcase, sections):
    write_report(tmp_path / "report.html", results, rows, showcase)
    assert Page((tmp_path / "report.html").read_text()).sections == sections


def test_the_same_run_gives_the_same_bytes(tmp_path, page):
    write_report(tmp_path / "again.html", full_results(), full_metrics(), [showcase_user()])
    assert (tmp_path / "again.html").read_text() == page


def test_a_title_that_is_not_valid_unicode_does_not_stop_the_report(tmp_path):
    user = showcase_user() | {"user_id": "broken \ud800 id"}
    write_report(tmp_path / "report.html", {}, [], [user])
    assert "broken ? id" in (tmp_path / "report.html").read_text()


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError):
        write_report(path, {"best_of_n": {"many": {}}}, [], [])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_reinforcement_learning_stage_has_its_curves(tmp_path):
    rows = full_metrics()
    rows += [row | {"stage": "grpo_uniform"} for row in rows if row["stage"] == "grpo"]
    write_report(tmp_path / "report.html", {}, rows, [])
    parsed = Page((tmp_path / "report.html").read_text())
    assert parsed.tags.count("svg") == 7
    assert parsed.texts.count("grpo uniform") == 2  # under both headings


def test_the_judges_stand_side_by_side_only_where_there_are_two():
    rows = [{"step": s, "valid/reward/coverage": 0.1 * s, "valid/reward/specificity": 0.5} for s in range(3)]
    assert judge_curves(rows) is None
    for row in rows:
        row["valid/reward/second/coverage"] = 0.3
    drawn = judge_curves(rows)
    assert all(text in drawn for text in ("coverage by judge", "judge of training", "second judge"))
    assert "specificity" not in drawn


def test_the_spread_is_drawn_as_a_band_of_its_width():
    rows = [{"step": s, "reward/align/mean": 0.5, "reward/align/spread": 0.25} for s in range(5)]
    assert "FillBetweenPolyCollection" in reward_curves(rows)
    for row in rows:
        del row["reward/align/spread"]
    assert "FillBetweenPolyCollection" not in reward_curves(rows)


def test_a_series_skips_rows_that_lack_a_number():
    rows = [{"step": 0, "loss": 1.0}, {"step": 1}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": None}]
    assert series([*rows, {"step": 4, "loss": 2}], "loss") == ([0, 4], [1.0, 2])


def test_markdown_table():
    lines = markdown_table(full_results()).splitlines()
    assert lines[0] == "| method | R@5 | R@10 | NDCG@5 | NDCG@10 | MRR |"
    assert lines[1] == "|---|---|---|---|---|---|"
    assert lines[2].startswith("| Most recent | 0.100 (0.080–0.130) | 0.110 (0.090–0.140) |")
    assert len(lines) == 2 + len(METHODS)
    assert all(line.count("|") == 7 for line in lines)


def test_console_table():
    console = Console(file=io.StringIO(), width=120)
    console.print(console_table(full_results()))
    text = console.file.getvalue()
    row = next(line for line in text.splitlines() if "Teacher (RL)" in line)
    assert row.split()[2:] == ["0.150", "0.160", "0.170", "0.180", "0.190", "0.140", "–", "0.190"]
    Console(file=io.StringIO()).print(console_table({}))


def test_numpy_numbers_are_numbers(tmp_path):
    results = {"offline": {"recent": {"recall@10": {"mean": np.float32(0.25), "low": np.float64(0.2), "high": 0.3}}}}
    assert "| 0.250 (0.200–0.300) |" in markdown_table(results)
