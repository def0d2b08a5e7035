import csv
import io
import json

import pytest

from bench.tables import OUTPUTS, render

ROWS = [
    {"name": "one|two", "count": 1234567, "share": 0.123456, "note": None, "extra": "x, y"},
    {"name": "[red]", "count": 2, "share": 98765.4321, "note": True, "extra": 'say "z"'},
]
COLUMNS = {"name": "the name", "count": "how many", "share": "share %", "note": "note"}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def test_json_carries_every_key_in_full():
    assert json.loads(render(ROWS, COLUMNS, "json")) == ROWS


def test_jsonl_is_a_row_a_line():
    text = render(ROWS, COLUMNS, "jsonl")
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == ROWS


def test_csv_parses_back_with_whole_numbers_whole():
    gap = [*ROWS, {"name": "third"}]
    read = list(csv.DictReader(io.StringIO(render(gap, COLUMNS, "csv"))))
    assert [row["count"] for row in read] == ["1234567", "2", ""]
    assert [row["extra"] for row in read] == ["x, y", 'say "z"', ""]
    assert float(read[1]["share"]) == ROWS[1]["share"]


def test_markdown_has_the_columns_and_escapes_bars():
    head, rule, first, second = render(ROWS, COLUMNS, "md").splitlines()
    assert cells(head) == list(COLUMNS.values())
    assert cells(rule) == ["---"] * 4
    assert cells(first) == ["one\\|two", "1,234,567", "0.123", "-"]
    assert cells(second) == ["[red]", "2", "98,765.4", "yes"]


def test_a_table_shows_text_as_it_is_and_numbers_to_the_right():
    lines = render(ROWS, COLUMNS, "table").splitlines()
    head = next(line for line in lines if "the name" in line)
    one = next(line for line in lines if "one|two" in line)
    two = next(line for line in lines if "[red]" in line)
    assert one.index("one|two") == two.index("[red]") == head.index("the name")
    assert one.index("1,234,567") + len("1,234,567") == two.index(" 2 ") + 2
    assert all(line == line.rstrip() for line in lines)


def test_no_column_is_cut_in_a_wide_table():
    row = {f"column{number}": "x" * 25 for number in range(12)}
    assert render([row], None, "table").count("x" * 25) == 12


@pytest.mark.parametrize("output", OUTPUTS)
def test_no_rows_are_no_error(output):
    text = render([], COLUMNS, output)
    if output == "json":
        assert json.loads(text) == []
    elif output in ("md", "table"):
        assert "how many" in text
    else:
        assert text == ""


def test_without_columns_a_table_shows_every_key():
    assert cells(render(ROWS, None, "md").splitlines()[0]) == list(ROWS[0])
