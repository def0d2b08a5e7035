"""A gate's report as text, Markdown (as markdown-it renders it) and JSON, and its files."""

from __future__ import annotations

import errno
import json
import math
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from markdown_it import MarkdownIt

from bench.gate import render, wording
from tests.bench.gate.reports import ODD, VERDICTS, one_of_each, outcome, report
from vqkernels.errors import ContainerError


class Page(HTMLParser):
    """Rendered Markdown: tables as rows of cells, list items, headings of folds, all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.items: list[str] = []
        self.folds: list[str] = []
        self.tags: set[str] = set()
        self._depth = 0
        self._target: list[str] | None = None  # its last entry takes the text
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
        assert self._depth == 0  # each fold is closed

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self._depth += tag == "details"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "li", "summary"):
            cells = self.tables[-1][-1] if tag in ("td", "th") else None
            self._target = {"li": self.items, "summary": self.folds}.get(tag, cells)
            self._target.append("")

    def handle_endtag(self, tag):
        self._depth -= tag == "details"
        if tag in ("td", "th", "li", "summary"):
            self._target = None

    def handle_data(self, data):
        if self._target is not None:
            self._target[-1] += data.strip("\n")


HEADINGS = [
    "case",
    "baseline us",
    "candidate us",
    "ratio",
    "at least",
    "at most",
    "detectable %",
    "verdict",
]
# What a page is made of. A name that is data adds nothing to it.
TAGS = {"h2", "p", "strong", "br", "table", "thead", "tbody", "tr", "th", "td", "code", "ul", "li"}
TAGS |= {"details", "summary", "blockquote"}


def lines_with(text, word):
    return [line for line in text.splitlines() if word in line]


def test_a_table_shows_each_case_the_gravest_first():
    lines = render.text(one_of_each()).splitlines()
    head = next(i for i, line in enumerate(lines) if "baseline us" in line)
    rows = [line.split() for line in lines[head + 2 : head + 9]]
    assert [row[-1] for row in rows] == list(wording.ORDER)
    assert rows[1][6:] == ["26.7", "28.9", "1.082", "1.051", "1.113", "7.3", "REGRESSED"]
    assert rows[2][6:] == ["-"] * 6 + ["INVALID"]


def test_below_the_table_stand_reasons_counts_and_last_what_it_comes_to():
    made = one_of_each(
        skipped={"a": "new", "b": "new"},
        notes=("no selfcheck is stored",),
        records="results/x.jsonl",
        seconds=93.2,
        host="box",
    )
    text = render.text(made)
    lines = text.splitlines()
    assert lines[:2] == ["candidate working tree, baseline abc1234", "Test CPU on box, 93 s"]
    for verdict in ("REGRESSED", "INVALID", "INCONCLUSIVE", "FASTER"):
        (line,) = lines_with(text, f"why layer.{verdict.lower()} is {verdict}")
        assert line.startswith(f"{verdict} minilm layer.{verdict.lower()} rq-2x256x8 m=1 ")
    assert not lines_with(text, "why layer.pass is")
    assert not lines_with(text, "why layer.identical is")
    assert lines_with(text, "INCONCLUSIVE minilm")[0].endswith(
        "; slowdowns of 7.3 % and more would have been called"
    )
    assert lines[-5:-1] == [
        "7 cases: 1 WRONG, 1 REGRESSED, 1 INVALID, 1 INCONCLUSIVE, 1 FASTER, 1 PASS, 1 IDENTICAL, "
        "2 skipped",
        "  skipped 2 x new: a, b",
        "note: no selfcheck is stored",
        "records: results/x.jsonl",
    ]
    assert lines[-1] == wording.closing(made)
    assert text.endswith("\n")


@pytest.mark.parametrize("form", [render.text, render.markdown])
def test_advice_is_said_before_and_not_otherwise(form):
    assert "ADVISORY" in form(one_of_each(advisory=True)).split("baseline us")[0]
    assert "ADVISORY" not in form(one_of_each())


def test_nothing_to_compare_is_no_error():
    made = report(skipped={"a": "new"})
    assert render.text(made).splitlines()[-1].startswith("no case was compared, 1 skipped")
    assert "0 cases: 1 skipped" in render.text(made)
    assert Page(render.markdown(made)).tables == []
    assert json.loads(render.json_text(made))["outcomes"] == []


def test_markdown_renders_as_a_table_with_reasons_below():
    made = one_of_each(skipped={"a": "new"}, notes=("no selfcheck",))
    page = Page(render.markdown(made))
    (table,) = page.tables
    assert table[0] == HEADINGS
    assert [row[-1] for row in table[1:]] == list(wording.ORDER)
    assert table[2][1:-1] == ["26.7", "28.9", "1.082", "1.051", "1.113", "7.3"]
    assert [item.split(" ", 1)[0] for item in page.items[:5]] == list(wording.ORDER[:5])
    assert page.folds == ["skipped 1 x new"]
    assert page.items[5:] == ["a", "note: no selfcheck"]
    assert page.tags <= TAGS


def test_markdown_says_first_what_it_comes_to():
    made = report(outcome("REGRESSED"))
    first, second = render.markdown(made).split("\n\n")[:2]
    assert first == "## vqbench gate: slower"
    assert second.replace("\\", "") == f"**{wording.closing(made)}**"


def test_markdown_folds_what_is_long():
    quiet = [outcome("PASS", f"p{i}") for i in range(11)]
    loud = [outcome("INCONCLUSIVE", f"i{i}") for i in range(11)]
    skipped = {f"s{i}": "a <new> | kernel" for i in range(20)}
    doubtful = [outcome("PASS", doubts=(f"doubt {'i' * i}",)) for i in range(11)]
    page = Page(
        render.markdown(report(*quiet, *loud, *doubtful, skipped=skipped, notes=["n"] * 11))
    )
    assert page.folds == [
        "22 cases PASS or IDENTICAL",
        "reasons",
        "skipped 20 x a <new> | kernel",
        "doubts",
        "notes",
    ]
    assert [len(table) - 1 for table in page.tables] == [11, 22]
    assert {row[-1] for row in page.tables[0][1:]} == {"INCONCLUSIVE"}
    only_quiet = Page(render.markdown(report(*quiet)))
    assert [len(table) - 1 for table in only_quiet.tables] == [11]
    assert Page(render.markdown(report(*quiet[1:], *loud))).tables[0][-1][-1] == "PASS"


@settings(max_examples=100)
@given(ODD, ODD)
@example(r"<b>|\|`x`*y* _z_ &amp;", "[a](b) <b>c</b> &lt; | ~~s~~ `d`\n---")
def test_any_name_and_reason_is_shown_as_it_is(name, words):
    cases = [outcome(verdict, name, reason=words, doubts=(words,)) for verdict in VERDICTS]
    made = report(*cases, skipped={name: words}, notes=(words,), host=words, candidate=name)
    page = Page(render.markdown(made))
    (table,) = page.tables
    assert [len(row) for row in table] == [len(HEADINGS)] * (len(VERDICTS) + 1)
    shown = wording.plain(cases[0].name)
    assert {row[0] for row in table[1:]} == {shown}
    reasons = [item for item in page.items if item.startswith("REGRESSED")]
    assert reasons == [f"REGRESSED {shown}: {wording.plain(words)}".rstrip()]
    assert page.folds[0].rstrip() == f"skipped 1 x {wording.plain(words)}".rstrip()
    assert page.tags <= TAGS
    text = render.text(made)
    assert all(line.isprintable() for line in text.split("\n"))
    text.encode()


def test_json_is_the_report_with_null_for_what_is_infinite():
    made = report(outcome("INCONCLUSIVE", high=math.inf, smallest=math.nan, doubts=("d",)))
    read = json.loads(render.json_text(made), parse_constant=pytest.fail)
    assert read["outcomes"][0]["high"] is None
    assert read["outcomes"][0]["smallest"] is None
    assert read["outcomes"][0]["baseline_s"] == 26.7e-6
    assert read["outcomes"][0]["doubts"] == ["d"]
    assert read["exit_code"] == 0


def test_each_form_goes_to_its_file(tmp_path):
    made = one_of_each()
    targets = {form: tmp_path / f"report.{form}" for form in render.FORMS}
    render.check_targets(targets)
    for path in targets.values():
        path.write_text("an older report")
    render.write_reports(made, targets)
    for form, path in targets.items():
        assert path.read_text(encoding="utf-8") == render.FORMS[form](made)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.json",
        "report.junit",
        "report.md",
        "report.text",
    ]


def test_a_step_summary_is_appended_to(tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    made = one_of_each()
    render.write_reports(made, {"md": summary})  # GitHub makes the file; others need not
    summary.write_text("what an earlier step said\n")
    render.check_targets({"md": summary})
    render.write_reports(made, {"md": summary})
    assert summary.read_text() == "what an earlier step said\n" + render.markdown(made)


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        render.write_reports(report(), {"json": pipe})
        assert json.loads(os.read(reader, 65536))["exit_code"] == 4
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_full_disk_leaves_a_step_summary_as_it_was(tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    real, calls = Path.open, []

    def open_full(path, *arguments, **options):
        file = real(path, *arguments, **options)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                calls.append(len(data))
                if len(calls) > 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data[:10])

        return Full()

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(ContainerError, match="can't be appended to: No space left") as error:
        render.write_reports(one_of_each(), {"md": summary})
    assert "\n" not in str(error.value)
    assert len(calls) == 2
    assert summary.read_bytes() == b"before\n"


def test_one_file_that_can_not_be_written_loses_no_other(tmp_path):
    gone = tmp_path / "gone" / "report.xml"
    targets = {"junit": gone, "json": tmp_path / "report.json"}
    with pytest.raises(ContainerError, match=r"gone/report\.xml: can't be written"):
        render.write_reports(report(), targets)
    assert json.loads((tmp_path / "report.json").read_text())["exit_code"] == 4


def test_what_can_not_be_written_is_told_before(tmp_path, monkeypatch):
    with pytest.raises(ContainerError, match="is a folder: give the name of a file"):
        render.check_targets({"md": tmp_path})
    with pytest.raises(ContainerError, match=r"there is no folder .*/gone: make it first"):
        render.check_targets({"md": tmp_path / "gone" / "x.md"})
    with pytest.raises(ContainerError, match=r"x: named for two reports"):
        render.check_targets({"md": tmp_path / "x", "json": tmp_path / "x"})
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ContainerError, match=r"x.md: can't be written"):
        render.check_targets({"md": tmp_path / "x.md"})
