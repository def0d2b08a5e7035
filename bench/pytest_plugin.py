"""A selection as pytest-benchmark cases: one test for each kernel, layer, format and m.

    pytest -p bench.pytest_plugin --vqbench-workload llama2-7b --vqbench-format aqlm-2x8

makes tests of its own, in the place of those that pytest would find unasked; files that are named
run too. A test that is written gets its cases from a marker (and the plugin goes into the root
conftest: `pytest_plugins = ["bench.pytest_plugin"]`):

    @pytest.mark.vqbench(workload="llama2-7b", formats=["aqlm-2x8"], kernels=["numba/*"])
    def test_product(vqbench_case):
        assert vqbench_case.measure().median_s < 1e-3

A case is checked against the oracle, then timed as `vqbench run` does: on cold weights, on a GPU
by its events, as long as pytest-benchmark's `max_time` and `min_rounds` say. A format that a
kernel refuses is a skip, a kernel that is wrong a failure. pytest-benchmark gets the samples, and
`extra_info` the other fields of a record (`bench.records`). Where it is disabled, as it is by
pytest-xdist, cases are checked but not timed.
"""

# Loaded for every test of whoever names it: torch, and all of ours, with the first case alone.
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from autotune.measurement import Measurement
    from autotune.timers import Budget
    from bench.cases import Chosen, Session

__all__ = ["VqbenchCase"]

_SELECTING = ("workload", "layer", "format", "kernel", "m", "fuse")
# Of the marker: the same, by the names of `bench.selection.Selection`.
_FIELDS = ("workload", "layers", "formats", "kernels", "ms", "fuse")


@dataclasses.dataclass(frozen=True)
class VqbenchCase:
    """One kernel on one product: `measure` checks and times it, once a test."""

    workload: str
    layer: str
    format: str
    m: int
    kernel: str
    measure: Callable[[], Measurement]


class _Clock:
    """A timer that plays samples back: 0 before a round, the round's sample after it.

    The times are taken already, by a GPU's events or over cold copies, and no clock that is read
    around a call could see them. `timer`, and `setup` of `pedantic`, are documented; what would
    put samples into the fixture's statistics directly is not.
    """

    def __init__(self) -> None:
        self._samples: Iterator[float] = itertools.repeat(0.0)
        self._now = 0.0
        self.__name__ = "none"  # what pytest-benchmark's JSON calls the timer

    def __call__(self) -> float:
        return self._now

    def load(self, samples: Sequence[float], timer: str) -> None:
        """Play these, again and again: a profile asks for more rounds."""
        self._samples, self.__name__ = itertools.cycle(samples), timer

    def before_round(self) -> None:
        """Back to 0, from where the difference is the sample, to the last bit."""
        self._now = 0.0

    def round(self) -> None:
        """On to the next sample."""
        self._now = next(self._samples)


_SESSION = pytest.StashKey["Session"]()
_CHOSEN = pytest.StashKey["Chosen"]()
_CLOCK = pytest.StashKey[_Clock]()
_SAVED = pytest.StashKey[list[Mapping[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options, as those of `vqbench run`."""
    group = parser.getgroup("vqbench", "kernels as benchmarks (bench.pytest_plugin)")

    def add(name: str, **kwargs: Any) -> None:
        group.addoption(f"--vqbench-{name}", **kwargs)

    add("workload", action="append", default=[], help="Name, or a .toml file.")
    add("layer", action="append", default=[], help="Layers by glob, e.g. '*.query'.")
    add("fuse", action="store_true", help="Layers of one input as one: qkv_proj, ...")
    add("format", action="append", default=[], help="Format, e.g. rq-2x256x8.")
    add("kernel", action="append", default=[], help="Kernels by glob: 'numba/*'.")
    add("m", action="append", default=[], type=_count, help="Tokens; repeat for several.")
    add("device", default="auto", help="cpu, cuda, cuda:N, or the GPU if there is one.")
    add("threads", type=_count, help="CPU threads; all that may run here.")
    add("dtype", choices=["float32", "float16", "bfloat16"], help="Activations.")
    add("hot", action="store_true", help="Measure with the weight in cache; marked so.")


def _count(text: str) -> int:
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; where options select cases, leave out files that nobody named."""
    if config.getoption("benchmark_disable", None) is None:
        raise pytest.UsageError(
            "bench.pytest_plugin needs pytest-benchmark; run: pip install pytest-benchmark"
        )
    config.addinivalue_line(
        "markers", f"vqbench({', '.join(_FIELDS)}): the cases of a test that takes `vqbench_case`"
    )
    if _selects(config) and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args.clear()


def _selects(config: pytest.Config) -> bool:
    return any(config.getoption(f"vqbench_{name}") for name in _SELECTING)


@pytest.hookimpl(tryfirst=True)  # so that -k, -m and --benchmark-skip meet what is added
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add a test for each case that options select. Raises UsageError where there is none."""
    if not _selects(config):
        return
    from vqkernels.errors import VqError

    given = {
        field: config.getoption(f"vqbench_{name}")
        for field, name in zip(_FIELDS, _SELECTING, strict=True)
    }
    try:
        chosen = _choose(config, **given)
    except VqError as error:
        raise pytest.UsageError(str(error)) from error
    # the path is of no file: it is what the ids begin with, wherever vqbench is installed
    parent = _Cases.from_parent(session, path=config.rootpath / "vqbench")
    parent.chosen = chosen
    items += session.genitems(parent)


class _Cases(pytest.Module):
    """The parent of tests that no file holds; a module, since fixtures may be of that scope."""

    chosen: Sequence[Chosen]

    def collect(self) -> Iterator[pytest.Item]:
        """A test for each case."""
        self.obj = pytest  # any module that is imported already
        for one in self.chosen:
            item: pytest.Item = pytest.Function.from_parent(self, name=str(one), callobj=_test)
            item.stash[_CHOSEN] = one
            yield item


def _test(vqbench_case: VqbenchCase) -> None:
    __tracebackhide__ = True
    vqbench_case.measure()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case that the marker selects."""
    if "vqbench_case" not in metafunc.fixturenames:
        return
    from vqkernels.errors import VqError

    marker = metafunc.definition.get_closest_marker("vqbench")
    try:
        chosen = _choose(metafunc.config, **_fields(marker))
    except VqError as error:
        # shown as one line, where another exception would come with this file's code
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: {error}") from error
    metafunc.parametrize("vqbench_case", chosen, ids=chosen, indirect=True)


def _fields(marker: pytest.Mark | None) -> dict[str, Any]:
    """A marker's arguments by name; one of several may stand for itself."""
    from vqkernels.errors import SpecError

    if marker is None:
        raise SpecError("vqbench_case needs @pytest.mark.vqbench(workload=..., formats=[...])")
    if marker.args or set(marker.kwargs) - set(_FIELDS):
        raise SpecError(f"the vqbench marker takes {', '.join(_FIELDS)}, each by its name")
    fields = {
        name: (value,) if isinstance(value, str | int) else tuple(value)
        for name, value in marker.kwargs.items()
        if name != "fuse"
    }
    if not all(type(m) is int and m >= 1 for m in fields.get("ms", ())):
        raise SpecError("the vqbench marker's ms are whole numbers of at least 1")
    return {**dict.fromkeys(_FIELDS, ()), **fields, "fuse": marker.kwargs.get("fuse", False)}


def _choose(config: pytest.Config, **given: Any) -> list[Chosen]:
    """What `_FIELDS` select on the session's device."""
    from bench.selection import selections

    named = selections(
        given["workload"], given["layers"], given["formats"], given["ms"], given["fuse"]
    )
    return _session(config).choose(named, given["kernels"])


def _session(config: pytest.Config) -> Session:
    from bench.cases import Session
    from bench.options import named_device, usual_dtype
    from bench.run import Plan

    if _SESSION not in config.stash:
        device = named_device(
            config.getoption("vqbench_device"), config.getoption("vqbench_threads")
        )
        plan = Plan(
            selections=(),
            kernels=(),
            device=device,
            dtype=config.getoption("vqbench_dtype") or usual_dtype(device),
            cold=not config.getoption("vqbench_hot"),
        )
        config.stash[_SESSION] = Session(plan)
    return config.stash[_SESSION]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Make a benchmark of a test that has a case: give pytest-benchmark its group and the timer."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None and "vqbench_case" in callspec.params:
        item.stash[_CHOSEN] = callspec.params["vqbench_case"]
    if _CHOSEN not in item.stash:
        return
    item.stash[_CLOCK] = clock = _Clock()
    asked = item.get_closest_marker("benchmark")
    settings = {"group": item.stash[_CHOSEN].group, **(asked.kwargs if asked else {})}
    # ahead of the test's own: pytest-benchmark reads one marker
    item.add_marker(pytest.mark.benchmark(**{**settings, "timer": clock}), append=False)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After the last case for now, leave the memory to the session's other tests."""
    if _CHOSEN in item.stash and (nextitem is None or _CHOSEN not in nextitem.stash):
        _session(item.config).forget()


@pytest.fixture
def vqbench_case(request: pytest.FixtureRequest, benchmark: Any) -> VqbenchCase:
    """A case that `@pytest.mark.vqbench` selects; measured when its `measure` is called."""
    chosen = request.node.stash[_CHOSEN]
    return VqbenchCase(
        workload=chosen.workload.name,
        layer=chosen.layer.name,
        format=chosen.format_name,
        m=chosen.m,
        kernel=chosen.kernel.id,
        measure=functools.partial(_measure, request.node, benchmark),
    )


def _measure(item: pytest.Item, benchmark: Any) -> Measurement:
    """Measure and tell pytest-benchmark; skip or fail where there is nothing to tell."""
    __tracebackhide__ = True
    from vqkernels.errors import VqError

    session, chosen = _session(item.config), item.stash[_CHOSEN]
    budget = _budget(item) if benchmark.enabled else None
    try:
        measured, facts = session.measure(chosen, budget)
    except VqError as error:  # of the weight: a file that is damaged
        _fail(benchmark, f"{chosen}: {error}")
    if measured.status == "constraint":
        pytest.skip(f"{chosen.kernel.id}: {measured.reason}")
    if measured.status not in ("ok", "checked"):
        _fail(benchmark, f"{chosen}: {measured.status}: {measured.reason}")
    samples = facts.pop("samples_s")
    benchmark.extra_info.update(facts)
    if measured.timing:
        item.stash[_CLOCK].load(samples, measured.timing.timer)
        _warn_of_unlike(item, facts)
    _play(item.stash[_CLOCK], benchmark, samples)
    return measured


def _budget(item: pytest.Item) -> Budget:
    """Within pytest-benchmark's limits, of the command line or of the test's marker."""
    from autotune.timers import Budget

    marker = item.get_closest_marker("benchmark")
    assert marker is not None, "each test of a case has one"
    asked: dict[str, Any] = {
        name: marker.kwargs.get(name, item.config.getoption(f"benchmark_{name}"))
        for name in ("max_time", "min_rounds")
    }
    usual, rounds = Budget(), int(asked["min_rounds"])
    return Budget(
        seconds=float(asked["max_time"]),
        min_samples=max(usual.min_samples, rounds),
        max_samples=max(usual.max_samples, rounds),
    )


def _fail(benchmark: Any, reason: str) -> NoReturn:
    """Fail with the reason alone; a fixture that no round used would get a warning besides."""
    __tracebackhide__ = True

    def wrong() -> None:
        raise RuntimeError(reason)

    with contextlib.suppress(RuntimeError):
        benchmark.pedantic(wrong)
    pytest.fail(reason, pytrace=False)


def _play(clock: _Clock, benchmark: Any, samples: Sequence[float]) -> None:
    rounds = max(1, len(samples))  # one where none was timed, for `_fail`'s reason
    benchmark.pedantic(clock.round, setup=clock.before_round, rounds=rounds)
    if samples:
        kept = benchmark.stats.stats.data
        assert kept == list(samples), "pytest-benchmark has other times than were measured"


@pytest.hookimpl(optionalhook=True)  # pytest-benchmark's
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, compared_benchmark: Mapping[str, Any]
) -> None:
    """Keep what is compared with: of the machine, pytest-benchmark itself compares no GPU."""
    config.stash.setdefault(_SAVED, []).extend(compared_benchmark["benchmarks"])


def _warn_of_unlike(item: pytest.Item, facts: Mapping[str, Any]) -> None:
    from bench.cases import differences

    for saved in item.config.stash.get(_SAVED, []):
        if saved["fullname"] != item.nodeid:
            continue
        if found := differences(facts, saved.get("extra_info", {})):
            text = f"{item.nodeid}: compared with a run unlike this one: {'; '.join(found)}"
            item.warn(pytest.PytestWarning(text))
