"""Thresholds from TOML."""

from __future__ import annotations

import pytest

from autotune.verdict import Rule
from bench.gate.thresholds import Limits, load_thresholds
from tests.bench.gate.fakes import target
from vqkernels.errors import ConfigError

GOOD = """
[rule]
ratio = 1.05
dissenters = 0
[[case]]
kernel = "cuda/*"
m = 1
ratio = 1.1
[[case]]
kernel = "cuda/*"
format = "rq-*"
seconds = 1e-6
ratio = 1.2
"""


def test_the_first_that_fits_decides(tmp_path):
    path = tmp_path / "gate.toml"
    path.write_text(GOOD, encoding="utf-8")
    found = load_thresholds(path)
    assert found.rule == Rule(ratio=1.05, dissenters=0)
    assert found.limits(target("cuda/mma")).ratio == 1.1
    several = found.limits(target("cuda/mma", m=8))
    assert (several.ratio, several.seconds) == (1.2, 1e-6)
    assert found.limits(target("cuda/mma", m=8, format="aqlm-2x8")) == Limits()
    assert found.limits(target("numba/table")) == Limits()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ratio = 1.1", "'ratio' is unknown; there are case, rule"),
        ("[rule]\nratios = 1.1", "'ratios' is unknown"),
        ("[rule]\nratio = 0.9", "1 or more"),
        ("[rule]\nratio = '3 %'", "is no number"),
        ("[rule]\nratio = true", "is no number"),
        ("[rule]\nratio = inf", "is no number"),
        ("[rule]\ndissenters = 1.5", "is no whole number"),
        ("[rule]\nalpha = 1.0", "between 0 and 1"),
        ("[[case]]\nkernel = 'a'", "give ratio"),
        ("[[case]]\nratio = 0.5", "1 or more"),
        ("[[case]]\nkernel = 3\nratio = 1.1", "matches nothing"),
        ("[[case]]\nm = '1'\nratio = 1.1", "matches nothing"),
        ("[[case]]\nkernels = 'a'\nratio = 1.1", "'kernels' is unknown"),
        ("case = 3", "not iterable"),
        ("[rule", "give a TOML file"),
    ],
)
def test_what_is_no_threshold_is_named(tmp_path, text, words):
    path = tmp_path / "gate.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as error:
        load_thresholds(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="give a TOML file"):
        load_thresholds(tmp_path / "none.toml")
