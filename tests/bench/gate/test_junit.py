"""JUnit XML: held to the schema, and read by a reader that others wrote."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import junitparser
import pytest
import xmlschema
from hypothesis import given, settings

from bench.gate import junit, wording
from tests.bench.gate.reports import ODD, VERDICTS, one_of_each, outcome, report

SCHEMA = xmlschema.XMLSchema(str(Path(__file__).parents[1] / "data" / "junit.xsd"))


def read(text):
    """The one suite, as junitparser sees it; the schema holds."""
    SCHEMA.validate(text)
    (suite,) = junitparser.JUnitXml.fromstring(text.encode())
    return suite


def kinds(suite):
    """What junitparser takes each case for, by the layer's name."""
    return {
        case.name.split()[1].removeprefix("layer."): [type(one).__name__ for one in case.result]
        for case in suite
    }


def said_last(text):
    """Of the suite as a whole, which junitparser doesn't read."""
    return ET.fromstring(text)[0].findtext("system-out")


def test_every_verdict_has_its_element():
    text = junit.xml(one_of_each(skipped={"minilm layer.new rq": "not in the baseline"}))
    suite = read(text)
    assert kinds(suite) == {
        "wrong": ["Failure"],
        "regressed": ["Failure"],
        "invalid": ["Error"],
        "inconclusive": [],
        "faster": [],
        "pass": [],
        "identical": [],
        "new": ["Skipped"],
    }
    # of the file itself: junitparser counts anew
    counted = {"tests": "8", "failures": "2", "errors": "1", "skipped": "1"}
    assert counted.items() <= ET.fromstring(text)[0].attrib.items()


def test_types_tell_a_wrong_case_from_a_slower_one():
    suite = read(junit.xml(one_of_each(strict=True)))
    types = {case.name.split()[1]: one.type for case in suite for one in case.result}
    assert types == {
        "layer.wrong": "wrong",
        "layer.regressed": "slower",
        "layer.invalid": "no verdict",
        "layer.inconclusive": "no verdict",
    }


def test_advice_fails_only_what_is_wrong():
    text = junit.xml(one_of_each(advisory=True, strict=True))
    suite = read(text)
    assert {name for name, found in kinds(suite).items() if found} == {"wrong"}
    assert (suite.failures, suite.errors) == (1, 0)
    assert wording.ADVICE in said_last(text)


@pytest.mark.parametrize("advisory", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("verdict", VERDICTS)
def test_something_failed_exactly_where_the_exit_code_says_so(verdict, wrong, strict, advisory):
    made = report(outcome(verdict, wrong=wrong), strict=strict, advisory=advisory)
    suite = read(junit.xml(made))
    assert (suite.failures + suite.errors > 0) == (made.exit_code > 0)
    assert suite.failures + suite.errors == sum(len(case.result) for case in suite)


def test_a_case_tells_its_numbers_reason_and_doubts():
    for verdict in VERDICTS:
        one = outcome(verdict, doubts=("the clock fell",))
        (case,) = read(junit.xml(report(one)))
        said = case.result[0].text if case.result else case.system_out
        assert said.startswith(f"{verdict}: why q_proj is {verdict}")
        assert "doubt: the clock fell" in said
        assert wording.times(one) in said
        assert case.classname == "vqbench.gate"
    (case,) = read(junit.xml(report(outcome("PASS"))))
    assert case.time == pytest.approx(28.9e-6)


def test_the_suite_tells_what_was_compared_where_and_when():
    made = one_of_each(
        host="box",
        started="2026-11-22T06:00:00+00:00",
        seconds=93.21,
        records="r.jsonl",
        strict=True,
    )
    text = junit.xml(made)
    suite = read(text)
    assert (suite.hostname, suite.timestamp) == ("box", "2026-11-22T06:00:00+00:00")
    assert suite.time == pytest.approx(93.21)
    facts = {one.name: one.value for one in suite.properties()}
    assert facts == {
        "baseline": "abc1234",
        "candidate": "working tree",
        "device": "Test CPU",
        "records": "r.jsonl",
        "exit code": "3",
        "strict": "yes",
    }
    assert said_last(text) == wording.closing(made)


def test_without_a_host_or_a_time_there_is_no_empty_attribute():
    suite = ET.fromstring(junit.xml(report()))[0]
    assert "hostname" not in suite.attrib
    assert "timestamp" not in suite.attrib
    assert suite.get("tests") == "0"


@settings(max_examples=60)
@given(ODD, ODD)
def test_any_name_and_reason_is_valid_xml_and_comes_back(name, words):
    made = report(
        *(outcome(verdict, name, reason=words, doubts=(words,)) for verdict in VERDICTS),
        skipped={name: words},
        notes=(words,),
        host=words,
        baseline=name,
    )
    suite = read(junit.xml(made))
    cases = list(suite)
    assert {case.name for case in cases[:-1]} == {wording.plain(outcome("PASS", name).name)}
    assert cases[-1].name == wording.plain(name)
    assert cases[-1].result[0].message == wording.plain(words)
