"""Candidates: exactly the valid configs, once each, and a count of what every rule took away."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.candidates import enumerate_space, from_configs
from vqkernels.errors import ConfigError
from vqkernels.space import Config, Constraint, Param, Space

SPACE = Space(
    (
        Param("rows", (1, 2, 4, 8), ""),
        Param("warps", (1, 2, 4), ""),
        Param("layout", ("plain", "packed"), ""),
        Param("split", (False, True), ""),
    ),
    (
        Constraint("threads", lambda c: c.number("rows") * c.number("warps") <= 8),
        # Reads `split` only where the layout asks for it: not known from one look.
        Constraint("packed splits", lambda c: c["layout"] == "plain" or bool(c["split"])),
    ),
)


def everything(space):
    """All combinations, the slow way."""
    names = [param.name for param in space.params]
    values = [param.values for param in space.params]
    return [Config(**dict(zip(names, one, strict=True))) for one in itertools.product(*values)]


def valid(space):
    return [config for config in everything(space) if space.broken(config) is None]


@st.composite
def spaces(draw):
    """Small spaces, whose rules read some parameters, or one depending on another."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    params = tuple(Param(f"p{at}", tuple(range(size)), "") for at, size in enumerate(sizes))
    rules = []
    for number in range(draw(st.integers(0, 3))):
        first, second, third = (draw(st.sampled_from(params)).name for _ in range(3))
        limit = draw(st.integers(0, 4))

        def holds(config, first=first, second=second, third=third, limit=limit):
            read = second if config[first] else third
            return config[first] + config[read] <= limit

        rules.append(Constraint(f"rule {number}", holds))
    return Space(params, tuple(rules))


@given(spaces())
def test_exactly_the_valid_ones_in_order(space):
    candidates = enumerate_space(space)
    assert list(candidates) == valid(space)
    assert candidates.complete
    lost = sum(candidates.ruled_out.values())
    assert len(candidates) + lost == candidates.combinations == len(everything(space))
    assert set(candidates.ruled_out) == {rule.name for rule in space.constraints}


@given(spaces())
def test_index_and_membership(space):
    candidates = enumerate_space(space)
    for at, config in enumerate(candidates):
        assert candidates.index(config) == at
        assert config in candidates
    for config in everything(space):
        assert (config in candidates) == (space.broken(config) is None)


@given(spaces())
def test_neighbours_differ_in_one_parameter(space):
    candidates = enumerate_space(space)
    for at, config in enumerate(candidates):
        for adjacent in (False, True):
            wanted = [
                other
                for other, one in enumerate(candidates)
                if (moves := [abs(one[n] - config[n]) for n in config if one[n] != config[n]])
                and len(moves) == 1
                and (not adjacent or moves == [1])
            ]
            assert candidates.neighbours(at, adjacent=adjacent).tolist() == wanted


@given(spaces(), st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_samples_never_repeat(space, seed, count):
    candidates = enumerate_space(space)
    drawn = candidates.sample(np.random.default_rng(seed), count)
    assert len(set(drawn.tolist())) == len(drawn) == min(count, len(candidates))
    assert drawn.tolist() == candidates.sample(np.random.default_rng(seed), count).tolist()


@given(spaces(), st.integers(0, 5))
def test_without_counts_what_it_takes(space, limit):
    candidates = enumerate_space(space)
    fewer = candidates.without("too large", lambda c: sum(c.values()) <= limit)
    assert list(fewer) == [c for c in valid(space) if sum(c.values()) <= limit]
    assert fewer.ruled_out["too large"] == len(candidates) - len(fewer)


def test_texts_and_booleans():
    assert list(enumerate_space(SPACE)) == valid(SPACE)


def test_what_is_no_candidate():
    candidates = enumerate_space(SPACE)
    good = candidates[0]
    bad = [Config(), good.replace(rows=3), good.replace(more=1), good.replace(rows=8, warps=4)]
    for config in [*bad, Config(**{**good, "rows": "1"})]:
        assert config not in candidates
        with pytest.raises(ConfigError, match="not a candidate"):
            candidates.index(config)
    assert "rows" not in candidates


def test_a_rule_runs_once_for_what_it_reads():
    asked = []

    def holds(config):
        asked.append((config["p0"], config["p1"]))
        return config["p0"] + config["p1"] < 9

    params = tuple(Param(f"p{at}", tuple(range(10)), "") for at in range(6))
    candidates = enumerate_space(Space(params, (Constraint("small", holds),)))
    assert len(candidates) == 45 * 10**4
    # The grid itself, and looks at it while it grows; not a million.
    assert len(asked) < 1000


@pytest.mark.parametrize(
    "read",
    [
        lambda c: sum(c.values()),
        lambda c: sum(dict(c).values()),
        lambda c: sum(c[name] for name in c),
        lambda c: sum(c.get(f"p{at}", 0) for at in range(3)),
        lambda c: sum({**c}.values()),
        lambda c: sum(c.replace(p0=c.number("p0")).values()),
        lambda c: hash(c) and sum(v for _, v in c.items()),
        lambda c: eval(
            repr(c).replace("Config", "sum_of"), {"sum_of": lambda **v: sum(v.values())}
        ),
    ],
)
def test_every_way_to_read_is_seen(read):
    params = tuple(Param(f"p{at}", (0, 1, 2), "") for at in range(3))
    space = Space(params, (Constraint("sum", lambda c: read(c) % 2 == 0),))
    assert list(enumerate_space(space)) == valid(space)


def test_a_rule_may_lean_on_one_before_it():
    params = (Param("a", (0, 1, 2), ""), Param("b", (1, 2, 4), ""))
    nonzero = Constraint("nonzero", lambda c: c["a"] * c["b"] != 0)
    divides = Constraint("divides", lambda c: c["b"] % c["a"] == 0)
    assert len(enumerate_space(Space(params, (nonzero, divides)))) == 5
    with pytest.raises(ConfigError, match="'divides' fails"):
        enumerate_space(Space(params, (divides, nonzero)))


def test_a_large_space_is_thinned_evenly():
    params = tuple(Param(f"p{at}", tuple(range(10)), "") for at in range(6))
    space = Space(params, (Constraint("even", lambda c: (c["p0"] + c["p5"]) % 2 == 0),))
    candidates = enumerate_space(space, limit=5000)
    assert not candidates.complete
    assert 1500 < len(candidates) < 5500
    assert all(space.broken(config) is None for config in candidates[:200])
    for at in range(6):  # each value about as often as the others
        share = np.bincount(candidates.rows[:, at], minlength=10) / len(candidates)
        assert (abs(share - 0.1) < 0.04).all()
    again = enumerate_space(space, limit=5000)
    assert (again.rows == candidates.rows).all()


def test_too_many_combinations_to_number():
    params = tuple(Param(f"p{at}", tuple(range(100)), "") for at in range(12))
    with pytest.raises(ConfigError, match="declare fewer values"):
        enumerate_space(Space(params))


def test_recorded_configs():
    configs = [Config(a=2, b="y"), Config(a=1, b="x"), Config(a=2, b="y")]
    params = (Param("a", (1, 2), ""), Param("b", ("x", "y"), ""))
    candidates = from_configs(params, configs)
    assert list(candidates) == [Config(a=1, b="x"), Config(a=2, b="y")]
    with pytest.raises(ConfigError, match="no parameter or value"):
        from_configs(params, [Config(a=3, b="x")])


def test_nothing_to_tune():
    candidates = enumerate_space(Space())
    assert list(candidates) == [Config()]
    assert candidates.neighbours(0).tolist() == []
    impossible = Space((Param("a", (1, 2), ""),), (Constraint("never", lambda c: c["a"] > 2),))
    assert list(enumerate_space(impossible)) == []
    assert enumerate_space(impossible).ruled_out == {"never": 2}
