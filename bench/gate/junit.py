"""A gate's report as JUnit XML.

In the schema of Jenkins' xunit plugin (junit-10), a subset of what GitLab and others read. What
fails the build is a failure (slower, wrong) or an error (no verdict); all else passes, with its
numbers in system-out. A case's time is its median, so that a CI's trend shows the kernel's.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from bench.gate import wording
from bench.gate.outcome import EXIT, Outcome, Report

__all__ = ["xml"]

_NAME = "vqbench.gate"

# The element and its type for each exit code that a case can give.
_BAD = {
    EXIT["regressed"]: ("failure", "slower"),
    EXIT["wrong"]: ("failure", "wrong"),
    EXIT["invalid"]: ("error", "no verdict"),
}


def xml(report: Report) -> str:
    """The whole file, for UTF-8."""
    found = [_BAD[code][0] for one in report.outcomes if (code := report.code_of(one)) in _BAD]
    counts = {
        "name": _NAME,
        "tests": str(len(report.outcomes) + len(report.skipped)),
        "failures": str(found.count("failure")),
        "errors": str(found.count("error")),
        "time": f"{report.seconds:.3f}",
    }
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", counts)
    suite.set("skipped", str(len(report.skipped)))
    for name, value in (("timestamp", report.started), ("hostname", report.host)):
        if value:
            suite.set(name, wording.plain(value))
    _properties(suite, report)
    for one in wording.ordered(report):
        _case(suite, report, one)
    for name, reason in report.skipped.items():
        case = ET.SubElement(suite, "testcase", name=wording.plain(name), classname=_NAME)
        ET.SubElement(case, "skipped", message=wording.plain(reason))
    last = [wording.ADVICE] if report.advisory else []
    ET.SubElement(suite, "system-out").text = "\n".join([*last, wording.closing(report)])
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _properties(suite: ET.Element, report: Report) -> None:
    facts = [(name, getattr(report, name)) for name in ("baseline", "candidate", "device")]
    facts += [("records", report.records), ("exit code", str(report.exit_code))]
    facts += [("advisory", wording.ADVICE)] if report.advisory else []
    facts += [("strict", "yes")] if report.strict else []
    facts += [("note", note) for note in report.notes]
    facts += [("doubt", f"{count} x {text}") for text, count in wording.doubts(report).items()]
    properties = ET.SubElement(suite, "properties")
    for name, value in facts:
        ET.SubElement(properties, "property", name=name, value=wording.plain(value))


def _case(suite: ET.Element, report: Report, one: Outcome) -> None:
    case = ET.SubElement(suite, "testcase", name=wording.plain(one.name), classname=_NAME)
    if one.candidate_s is not None:
        case.set("time", f"{one.candidate_s:.9f}")
    said = [f"{wording.label(one)}: {wording.reason(one)}", wording.times(one)]
    said += [f"doubt: {wording.plain(doubt)}" for doubt in one.doubts]
    text = "\n".join(line for line in said if line)
    code = report.code_of(one)
    if code in _BAD:
        tag, kind = _BAD[code]
        ET.SubElement(case, tag, type=kind, message=said[0]).text = text
    else:
        ET.SubElement(case, "system-out").text = text
