"""Recorded spaces: read as they are, written so that others read them, broken ones named."""

import gzip
import json
import math

import numpy as np
import pytest

from autotune.measurement import Correctness, Measurement
from autotune.replay import (
    Tried,
    load_cache,
    load_results,
    replay,
    save_cache,
    save_metadata,
    save_results,
)
from autotune.strategies import Strategy, strategies
from tests.autotune.recorded import FOLDER, made_up, names, recorded
from vqkernels.errors import ConfigError, ContainerError
from vqkernels.space import Config, Param, Space

SPACE = Space(
    (
        Param("tile", (8, 16, 32), ""),
        Param("layout", ("plain", "packed"), ""),
        Param("split", (False, True), ""),
    )
)
RIGHT = Correctness(worst=0.1, max_abs=0.0, relative_rms=0.0, controls={})


def ok(*samples):
    return Measurement(status="ok", samples_s=samples, correctness=RIGHT, compile_s=0.25)


TRIED = [
    Tried(Config(tile=8, layout="plain", split=False), ok(3e-3, 1e-3, 2e-3), "2026-01-01T00:00:00"),
    Tried(Config(tile=8, layout="packed", split=True), ok(1.25e-6)),
    *(
        Tried(Config(tile=16, layout=layout, split=split), Measurement(status=status, reason="why"))
        for layout, split, status in [
            ("plain", False, "constraint"),
            ("plain", True, "compile"),
            ("packed", False, "runtime"),
            ("packed", True, "incorrect"),
        ]
    ),
    Tried(
        Config(tile=32, layout="plain", split=True), Measurement(status="timeout", reason="10 s")
    ),
    Tried(
        Config(tile=32, layout="plain", split=False),
        Measurement(status="checked", correctness=RIGHT),
    ),
]


def save(path):
    save_cache(path, SPACE, TRIED, kernel="gemv", device="Test GPU", problem=[64, 64])
    return path


def check_round_trip(back):
    assert len(back.candidates) == len(TRIED) - 1  # all but the one that was only checked
    for one in TRIED[:-1]:
        outcome = back.outcome(one.config)
        assert outcome.status == one.measurement.status
        if one.measurement.status == "ok":
            assert outcome.seconds == pytest.approx(one.measurement.median_s, rel=1e-12)
        else:
            assert outcome.seconds is None
    with pytest.raises(ConfigError):
        back.outcome(TRIED[-1].config)


@pytest.mark.parametrize("name", ["cache.json", "cache.json.gz"])
def test_cache_round_trip(tmp_path, name):
    back = load_cache(save(tmp_path / name))
    check_round_trip(back)
    assert (back.name, back.device) == ("gemv", "Test GPU")
    assert back.candidates.params[0].values == (8, 16, 32)


def test_results_round_trip(tmp_path):
    save_results(tmp_path / "results.json", TRIED)
    check_round_trip(load_results(tmp_path / "results.json"))


def test_the_same_attempts_make_the_same_file(tmp_path):
    first, again = (save(tmp_path / name).read_bytes() for name in ("a.json.gz", "b.json.gz"))
    assert first == again


def test_a_config_of_another_space_is_not_written(tmp_path):
    other = Tried(Config(tile=7, layout="plain", split=False), ok(1e-3))
    with pytest.raises(ConfigError, match="tile=7"):
        save_cache(tmp_path / "cache.json", SPACE, [other], kernel="", device="", problem=1)
    assert not list(tmp_path.iterdir())


def test_kernel_tuner_reads_and_simulates_our_cache(tmp_path):
    pytest.importorskip("kernel_tuner")
    from kernel_tuner.interface import tune_cache
    from kernel_tuner.util import read_cache

    path = save(tmp_path / "cache.json")
    read = read_cache(str(path), open_cache=False)["cache"]
    assert [("__error__" in one) for one in read.values()] == [False] * 2 + [True] * 5
    results, _ = tune_cache(str(path), strategy="brute_force", quiet=True)
    assert min(one["time"] for one in results) == pytest.approx(1.25e-3)


@pytest.mark.parametrize("kind", ["results", "metadata"])
def test_t4_is_valid(tmp_path, kind):
    pytest.importorskip("kernel_tuner")
    import jsonschema
    from kernel_tuner.file_utils import output_file_schema

    path = tmp_path / f"{kind}.json"
    if kind == "results":
        save_results(path, TRIED)
    else:
        save_metadata(path, [{"gpu": "Test GPU"}], "Linux", ["numpy==2.4"])
    version, schema = output_file_schema(kind)
    whole = json.loads(path.read_text())
    jsonschema.validate(whole, schema)
    assert whole["schema_version"] == version


def test_kernel_tuners_own_t4_is_read(tmp_path):
    """As its `store_output_file` writes it: a failure has its class's name as a measurement."""
    times = {"compilation": 1.0, "benchmark": 2.0, "runtimes": [1.0, 3.0]}
    results = [
        {"configuration": {"a": 1}, "times": times, "invalidity": "correct", "correctness": 1,
         "measurements": [{"name": "time", "value": 2.0, "unit": "ms"}], "objectives": ["time"]},
        {"configuration": {"a": 2}, "times": times, "invalidity": "compile", "correctness": 1,
         "measurements": [{"name": "time", "value": "CompilationFailedConfig", "unit": "ms"}],
         "objectives": ["time"]},
    ]  # fmt: skip
    path = tmp_path / "t4.json"
    path.write_text(json.dumps({"results": results, "schema_version": "1.0.0"}))
    back = load_results(path)
    assert back.outcome(Config(a=1)).seconds == 2e-3
    assert back.outcome(Config(a=2)).status == "compile"


def cache_of(entries, params=None):
    params = params or {"a": [1, 2]}
    keyed = {",".join(str(e[k]) for k in params): e for e in entries}
    return {"tune_params_keys": [*params], "tune_params": params, "cache": keyed}


def test_what_other_versions_wrote(tmp_path):
    """Failures as huge numbers; no objective, no device; a fraction among the values."""
    path = tmp_path / "old.json"
    entries = [{"a": 0.5, "time": 1e20}, {"a": 2, "time": 4.0}]
    path.write_text(json.dumps(cache_of(entries, {"a": [0.5, 2]})))
    back = load_cache(path)
    assert back.seconds.tolist() == [math.inf, 4e-3]
    assert back.statuses == ("runtime", "ok")


def test_a_cache_that_is_still_open(tmp_path):
    """Kernel Tuner appends a line a config and closes the braces at the end."""
    path = tmp_path / "open.json"
    text = json.dumps(cache_of([{"a": 1, "time": 1.0}, {"a": 2, "time": 2.0}]))
    path.write_text(text[:-2] + ",\n")
    assert len(load_cache(path).candidates) == 2


WHOLE = cache_of([{"a": 1, "time": 1.0}])
BROKEN = {
    "empty": "",
    "nested": "[" * 100_000,
    "no JSON": "{'a'",
    "a list": "[]",
    "another thing": '{"a": 1}',
    "no configs": json.dumps({**WHOLE, "cache": {}}),
    "an entry that is a number": json.dumps({**WHOLE, "cache": {"1": 3}}),
    "a config without a value": json.dumps({**WHOLE, "cache": {"1": {"time": 1.0}}}),
    "a config without a time": json.dumps({**WHOLE, "cache": {"1": {"a": 1}}}),
    "a time that is none": json.dumps({**WHOLE, "cache": {"1": {"a": 1, "time": None}}}),
    "a value that isn't declared": json.dumps({**WHOLE, "cache": {"3": {"a": 3, "time": 1.0}}}),
    "a parameter without values": json.dumps({**WHOLE, "tune_params": {}}),
    "values that are no list": json.dumps({**WHOLE, "tune_params": {"a": 1}}),
    "results that are a number": '{"results": 3}',
    "results of nothing": '{"results": []}',
    "an unknown validity": json.dumps(
        {"results": [{"configuration": {"a": 1}, "invalidity": "maybe"}]}
    ),
    "no measurement": json.dumps(
        {"results": [{"configuration": {"a": 1}, "invalidity": "correct", "measurements": []}]}
    ),
}


@pytest.mark.parametrize("load", [load_cache, load_results])
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(tmp_path, load, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ContainerError, match=r"broken\.json") as raised:
        load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"\x1f\x8b", b"\x1f\x8b" + bytes(30), b"\xff\xfe\x00", None])
def test_unreadable_files_are_named(tmp_path, data):
    path = tmp_path / "broken.json.gz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ContainerError, match=r"broken.json.gz"):
        load_cache(path)


def test_a_cut_archive(tmp_path):
    whole = (FOLDER / f"{names()[0]}.json.gz").read_bytes()
    (tmp_path / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ContainerError, match=r"cut.json.gz"):
        load_cache(tmp_path / "cut.json.gz")


@pytest.mark.parametrize("name", names())
def test_recorded_spaces_are_as_their_files_say(name):
    raw = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    space = recorded(name)
    assert len(space.candidates) == len(raw["cache"])
    for entry in list(raw["cache"].values())[::97]:
        outcome = space.outcome(Config(**{key: entry[key] for key in raw["tune_params_keys"]}))
        if isinstance(entry["time"], str):
            assert outcome.seconds is None and outcome.status in ("compile", "runtime")
        else:
            assert outcome.seconds == pytest.approx(entry["time"] * 1e-3)


def test_replay_counts_failures_and_ends():
    space = made_up()
    trace = replay(strategies()["exhaustive"], space, seed=0, budget=10_000)
    assert len(trace) == len(space.candidates)
    assert trace[-1] == 1.0
    short = replay(strategies()["exhaustive"], space, seed=0, budget=10, batch=4)
    assert (short == trace[:10]).all()
    expected = [space.seconds[: n + 1].min() for n in range(10)]
    assert np.allclose(short, space.seconds.min() / np.array(expected))


def test_replay_refuses_a_strategy_that_repeats():
    def search(candidates, rng, *, batch=1):
        while True:
            yield [candidates[0]]

    with pytest.raises(ConfigError, match="asked for twice"):
        replay(Strategy("stuck", search, ""), made_up(), seed=0, budget=5)
