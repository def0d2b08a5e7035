import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqkernels.errors import ConfigError
from vqkernels.space import Config, Constraint, Param, Space

SPACE = Space(
    params=(
        Param("tile", (8, 16, 32), "rows at a time"),
        Param("layout", ("row", "column"), "order of codes"),
        Param("split", (False, True), "over k"),
    ),
    constraints=(
        Constraint("small tiles are not split", lambda c: c.number("tile") > 8 or not c["split"]),
        Constraint("columns are split", lambda c: c.text("layout") == "row" or bool(c["split"])),
    ),
)
GOOD = Config(tile=16, layout="row", split=True)

names = st.text("abcxyz_", min_size=1, max_size=6)
values = st.integers() | st.text(max_size=6) | st.booleans()
choices = st.dictionaries(names, values, max_size=5)


@given(choices, st.randoms())
def test_a_config_does_not_depend_on_the_order_of_its_names(chosen, random):
    shuffled = list(chosen.items())
    random.shuffle(shuffled)
    one, other = Config(**chosen), Config(**dict(shuffled))
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)
    assert list(one) == sorted(chosen)


@given(choices, choices)
def test_configs_are_equal_exactly_when_their_values_are(one, other):
    assert (Config(**one) == Config(**other)) == (one == other)
    assert Config(**one) == one
    assert len({Config(**one), Config(**other)}) == (1 if one == other else 2)


@given(choices)
def test_a_config_reads_back_and_is_copied(chosen):
    config = Config(**chosen)
    assert dict(config) == chosen
    assert len(config) == len(chosen)
    assert eval(repr(config), {"Config": Config}) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_a_config_is_not_changed():
    with pytest.raises(TypeError):
        GOOD["tile"] = 8
    with pytest.raises(TypeError):
        del GOOD["tile"]
    other = GOOD.replace(tile=32)
    assert (GOOD["tile"], other["tile"], other["layout"]) == (16, 32, "row")


def test_a_config_does_not_share_what_it_was_made_of():
    chosen = {"tile": 8}
    config = Config(**chosen)
    chosen["tile"] = 16
    assert config["tile"] == 8


def test_a_missing_name_is_a_key_error():
    with pytest.raises(KeyError, match="depth"):
        GOOD["depth"]


def test_numbers_and_texts_are_told_apart():
    assert GOOD.number("tile") == 16
    assert GOOD.text("layout") == "row"
    with pytest.raises(AssertionError):
        GOOD.number("layout")
    with pytest.raises(AssertionError):
        GOOD.text("tile")


def test_a_valid_config_passes():
    SPACE.check(GOOD)
    SPACE.check(Config(split=False, layout="row", tile=8))
    Space().check(Config())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GOOD.replace(depth=1), "no parameter 'depth'; there are ['layout', 'split', 'tile']"),
        (Config(tile=8, split=True), "layout is missing; use one of ('row', 'column')"),
        (GOOD.replace(tile=12), "tile=12 is not one of (8, 16, 32)"),
        (GOOD.replace(tile="16"), "tile='16' is not one of"),
        (GOOD.replace(tile=8), "breaks the rule 'small tiles are not split'"),
        (GOOD.replace(layout="column", split=False), "breaks the rule 'columns are split'"),
    ],
)
def test_an_invalid_config_is_named_in_one_line(config, words):
    with pytest.raises(ConfigError) as error:
        SPACE.check(config)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_first_broken_rule_is_named():
    assert SPACE.broken(GOOD) is None
    assert SPACE.broken(GOOD.replace(tile=8)) == "small tiles are not split"
    assert SPACE.broken(GOOD.replace(layout="column", split=False)) == "columns are split"
