"""The account of a reading: sums, reasons, places, and the stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnr.data.readers.report import ReadReport, Refused
from jaxnr.errors import InputError

FATES = st.lists(st.sampled_from(["keep", "repair", "skip", "refuse"]), max_size=60)


@given(FATES)
def test_every_row_is_kept_refused_or_skipped(fates):
    report = ReadReport(max_refused_share=1.0)
    with report.rows_of("a.tsv") as rows:
        for line, fate in enumerate(fates, start=1):
            if fate == "skip":
                rows.skip(line, "duplicate")
            elif fate == "refuse":
                rows.refuse(line, Refused("bad", "value"))
            else:
                rows.keep(line, ["mended"] if fate == "repair" else [])
    assert report.read == len(fates) == report.kept + report.refused.rows + report.skipped.rows
    assert report.repaired.rows == fates.count("repair") <= report.kept
    for name, tally in (("repair", report.repaired), ("refuse", report.refused), ("skip", report.skipped)):
        assert tally.rows == fates.count(name) == tally.reasons.total()


def test_summary_names_counts_reasons_and_places():
    report = ReadReport(max_refused_share=1.0)
    with report.rows_of("a.tsv") as rows:
        rows.keep(1)
        rows.keep(2, ["time in milliseconds"])
        rows.refuse(3, Refused("unknown domain", "'tv'"))
        rows.skip(4, "duplicate")
    summary = report.summary()
    assert "4 rows read: 2 kept, of them repaired 1 (1 time in milliseconds); refused 1 (1 unknown domain)" in summary
    assert "skipped 1 (1 duplicate)" in summary
    assert "a.tsv:3: unknown domain: 'tv'" in summary
    assert "a.tsv:2: time in milliseconds" in summary
    assert "\n" not in summary


def test_examples_are_the_first_few_and_the_first_of_each_reason():
    report = ReadReport(max_refused_share=1.0)
    with report.rows_of("a") as rows:
        for line in range(1, 101):
            rows.refuse(line, Refused("rare" if line == 90 else "common"))
    assert [example.line for example in report.refused.examples] == [1, 2, 3, 4, 5, 90]


def test_a_few_refused_rows_are_no_reason_to_stop_before_a_thousand():
    report = ReadReport(max_refused_share=0.01)
    with report.rows_of("a") as rows:
        rows.refuse(1, Refused("bad"))
        for line in range(2, 101):
            rows.keep(line)
    assert report.refused.rows == 1  # exactly the share


def refuse_all(report, file, lines):
    with report.rows_of(file) as rows:
        for line in range(1, lines + 1):
            rows.refuse(line, Refused("bad"))


def test_stops_at_a_thousand_rows_and_does_not_read_on():
    report = ReadReport(max_refused_share=0.01)
    with pytest.raises(InputError, match=r"log\.tsv: refused .*more than the share of 0\.01.*log\.tsv:1: bad"):
        refuse_all(report, "log.tsv", lines=5000)
    assert report.read == 1000


def test_a_small_file_is_judged_at_its_end_and_by_itself():
    report = ReadReport(max_refused_share=0.01)
    with report.rows_of("large") as rows:
        for line in range(1, 2000):
            rows.keep(line)
    with pytest.raises(InputError, match="small: refused 2 of the first 2 rows"):
        refuse_all(report, "small", lines=2)
