import itertools
import json

import pytest

from bench.gate.outcome import EXIT
from tests.bench.gate.reports import VERDICTS, one_of_each, outcome, report

# Of one case: verdict, wrong, advisory, strict, and the exit code.
TABLE = [
    ("IDENTICAL", False, False, False, 0),
    ("PASS", False, False, True, 0),
    ("FASTER", False, False, True, 0),
    ("REGRESSED", False, False, False, 1),
    ("REGRESSED", False, True, False, 0),
    ("REGRESSED", False, True, True, 0),
    ("REGRESSED", True, False, False, 3),
    ("INCONCLUSIVE", False, False, False, 0),
    ("INCONCLUSIVE", False, False, True, 4),
    ("INCONCLUSIVE", False, True, True, 0),
    ("INVALID", False, False, False, 4),
    ("INVALID", False, False, True, 4),
    ("INVALID", False, True, False, 0),
    ("INVALID", True, False, False, 3),
    ("INVALID", True, True, False, 3),
    ("PASS", True, True, False, 3),
]


@pytest.mark.parametrize(("verdict", "wrong", "advisory", "strict", "code"), TABLE)
def test_the_exit_code_of_one_case(verdict, wrong, advisory, strict, code):
    one = outcome(verdict, wrong=wrong)
    assert report(one, advisory=advisory, strict=strict).exit_code == code
    # what is fine beside it changes nothing
    beside = report(outcome("PASS"), one, outcome("FASTER"), advisory=advisory, strict=strict)
    assert beside.exit_code == code


def test_wrong_results_win_then_a_regression_then_what_has_no_verdict():
    slower, invalid = outcome("REGRESSED"), outcome("INVALID")
    wrong = outcome("INVALID", wrong=True)
    for order in itertools.permutations([slower, invalid, wrong]):
        assert report(*order).exit_code == EXIT["wrong"]
    for order in itertools.permutations([slower, invalid, outcome("INCONCLUSIVE")]):
        assert report(*order, strict=True).exit_code == EXIT["regressed"]


def test_no_exit_code_is_that_of_bad_usage_or_an_interrupt():
    assert sorted(EXIT.values()) == [0, 1, 3, 4]


def test_counts_are_of_verdicts_that_occur():
    assert one_of_each().counts == {**dict.fromkeys(VERDICTS, 1), "INVALID": 2}
    assert report(outcome("PASS"), outcome("PASS")).counts == {"PASS": 2}
    assert report().counts == {}


def test_as_a_dictionary_it_is_json_with_what_is_derived():
    read = json.loads(json.dumps(one_of_each(skipped={"a": "new"}).to_dict()))
    assert read["exit_code"] == 3
    assert read["counts"]["INVALID"] == 2
    assert read["skipped"] == {"a": "new"}
    assert [one["verdict"] for one in read["outcomes"]] == [*VERDICTS, "INVALID"]
