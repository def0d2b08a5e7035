import math

import pytest
from hypothesis import given

from bench.gate import wording
from tests.bench.gate.reports import ODD, VERDICTS, one_of_each, outcome, report


@given(ODD)
def test_plain_text_is_one_printable_line(text):
    line = wording.plain(text)
    assert line.isprintable()
    assert line == line.strip()
    assert "  " not in line
    assert wording.plain(line) == line


def test_plain_text_shows_what_it_can_not_print():
    assert wording.plain("a\n\tb") == "a b"
    assert wording.plain("\x1b[31m red") == r"\x1b[31m red"
    assert wording.plain("half \ud800, mirrored \u202e") == r"half \ud800, mirrored \u202e"
    assert wording.plain("q — größer") == "q — größer"


def test_the_order_is_by_gravity_then_by_ratio():
    shuffled = one_of_each().outcomes[::-1]
    labels = [wording.label(one) for one in wording.ordered(report(*shuffled))]
    assert labels == list(wording.ORDER)
    assert set(VERDICTS) < set(wording.ORDER)
    ratios = {"a": 1.0, "b": 1.2, "c": 1.1}
    slower = [outcome("PASS", name, ratio=ratio) for name, ratio in ratios.items()]
    bare = outcome("PASS", "d", measured=False)
    assert [one.layer for one in wording.ordered(report(bare, *slower))] == ["b", "c", "a", "d"]


def test_a_wrong_case_is_called_wrong_whatever_its_verdict():
    assert {wording.label(outcome(verdict, wrong=True)) for verdict in VERDICTS} == {"WRONG"}


def test_reasons_are_printed_of_all_that_is_no_plain_pass():
    labels = [wording.label(one) for one in wording.explained(one_of_each())]
    assert labels == ["WRONG", "REGRESSED", "INVALID", "INCONCLUSIVE", "FASTER"]
    again = outcome("PASS", first_ratio=1.09)
    assert wording.explained(report(outcome("PASS"), again)) == [again]


@pytest.mark.parametrize(
    ("smallest", "words"),
    [
        (1.073, "slowdowns of 7.3 % and more would have been called"),
        (21.5, "slowdowns of 2,050.0 % and more would have been called"),
        (math.inf, "no slowdown would have been called"),
    ],
)
def test_an_inconclusive_case_names_the_effect_that_could_have_been_seen(smallest, words):
    one = outcome("INCONCLUSIVE", "a", smallest=smallest)
    assert wording.reason(one) == f"why a is INCONCLUSIVE; {words}"
    assert words not in wording.reason(outcome("REGRESSED", "a", smallest=smallest))


def test_numbers_in_one_line():
    assert wording.times(outcome("PASS")) == (
        "baseline 26.7 us, candidate 28.9 us, ratio 1.082 (1.051 to 1.113), "
        "smallest detectable 7.3 %, 7 pairs"
    )
    assert wording.times(outcome("INVALID", baseline_s=1e-3)) == "baseline 1000 us"
    assert wording.times(outcome("INVALID", smallest=1.03, pairs=7)) == ""


def test_noise_of_a_selfcheck_is_told():
    assert wording.reason(outcome("REGRESSED", "a", noise=1.012)).endswith(
        "; differs from itself by 1.2 %"
    )


def test_doubts_and_skipped_cases_are_grouped_the_most_frequent_first():
    cases = [
        outcome(doubts=("hot",)),
        outcome(doubts=("clock fell", "hot", "hot")),
        outcome(doubts=("clock fell",)),
        outcome(doubts=("clock\nfell",)),
    ]
    assert wording.doubts(report(*cases)) == {"clock fell": 3, "hot": 2}
    skipped = {"a": "new", "b": "gone", "c": "gone"}
    assert list(wording.doubts(report(*cases[:2], *cases[:1])).items()) == [
        ("hot", 3),
        ("clock fell", 1),
    ]
    assert list(wording.skipped(report(skipped=skipped)).items()) == [
        ("gone", ["b", "c"]),
        ("new", ["a"]),
    ]


def test_a_long_list_says_how_many_more():
    assert wording.listed("abc") == "a, b, c"
    assert wording.listed("abcde") == "a, b, c and 2 more"


NAME = "minilm {} rq-2x256x8 m=1 float32 numba/table"


@pytest.mark.parametrize(
    ("cases", "fields", "line"),
    [
        (["PASS", "FASTER"], {}, "no case is slower, 2 compared; exit code 0 (passed)"),
        (
            ["PASS", "REGRESSED"],
            {},
            f"1 of 2 cases REGRESSED: {NAME.format('b')}; exit code 1 (slower)",
        ),
        (
            ["REGRESSED", "INVALID", "INCONCLUSIVE"],
            {},
            f"1 of 3 cases REGRESSED: {NAME.format('a')}; 1 of 3 cases INVALID: "
            f"{NAME.format('b')}; exit code 1 (slower)",
        ),
        (
            ["INCONCLUSIVE", "PASS"],
            {},
            f"1 of 2 cases INCONCLUSIVE: {NAME.format('a')}; exit code 0 (passed)",
        ),
        (
            ["INCONCLUSIVE", "INVALID"],
            {"strict": True},
            f"1 of 2 cases INVALID: {NAME.format('b')}; 1 of 2 cases INCONCLUSIVE: "
            f"{NAME.format('a')}; exit code 4 (no verdict)",
        ),
        (
            ["REGRESSED"],
            {"advisory": True},
            f"1 of 1 cases REGRESSED: {NAME.format('a')}; exit code 0 (advisory)",
        ),
        (
            [],
            {"skipped": {"x": "new"}},
            "no case was compared, 1 skipped; exit code 4 (no verdict)",
        ),
    ],
)
def test_the_closing_line(cases, fields, line):
    found = [outcome(verdict, layer) for verdict, layer in zip(cases, "abc", strict=False)]
    assert wording.closing(report(*found, **fields)) == line


def test_the_closing_line_of_wrong_results():
    wrong = outcome("INVALID", "a", wrong=True)
    for advisory in (False, True):
        assert wording.closing(report(wrong, outcome("PASS"), advisory=advisory)) == (
            f"1 of 2 cases WRONG: {NAME.format('a')}; exit code 3 (wrong results)"
        )
