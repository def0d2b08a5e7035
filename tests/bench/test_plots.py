"""Plots of a search: what the figures hold, on attempts that are made up."""

from __future__ import annotations

import dataclasses
import math
import struct
import sys
import zlib
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autotune.measurement import Correctness, Measurement
from autotune.store import Attempt, Key, Store
from autotune.trial import Recipe
from autotune.tune import Choice, Result
from bench import plots
from bench.tuning import Job, Tuned
from vqkernels.device import Device
from vqkernels.errors import BackendError, ContainerError
from vqkernels.kernel import registry
from vqkernels.presets import PRESETS
from vqkernels.space import Config

RIGHT = Correctness(worst=0.1, max_abs=0.0, relative_rms=0.0, controls={})
DEVICE = Device(kind="cpu", name="Test", arch="any", units=8, llc_bytes=1, memory_bytes=1)
LAYERS = ("q_proj", "o_proj")
JOB = Job(LAYERS, "rq-2x256x8", Recipe(spec=PRESETS["rq-2x256x8"], n=4096, k=2048, m=8))


def timed(us: float, floor_s: float | None = 4e-6) -> Measurement:
    samples = (us / 2e6, us / 1e6, us / 1e6)
    return Measurement(status="ok", samples_s=samples, correctness=RIGHT, floor_s=floor_s)


def attempt(kernel: str, us: float | None, status: str = "compile", **config) -> Attempt:
    """One that took so long, or failed."""
    measured = Measurement(status=status, reason="told") if us is None else timed(us)
    return Attempt(Key(kernel, "s", Config(**config)), measured, "", "")


def choice(one: Attempt) -> Choice:
    return Choice(one.key.kernel, one.key.source, one.key.config)


SEARCH = [
    attempt("b/slow", 40.0),
    attempt("a/fast", None, tile=4, split=True),
    attempt("a/fast", 20.0, tile=1, split=True),
    attempt("a/fast", 30.0, tile=1, split=False),
    attempt("a/fast", None, "timeout", tile=4, split=False),
    attempt("a/fast", 10.0, tile=2, split=True),
    attempt("a/fast", 10.0, tile=2, split=False),
]


def lines(axes: Axes) -> dict[str, list[float]]:
    """The heights of each line, by its label."""
    return {str(line.get_label()): [*map(float, line.get_ydata())] for line in axes.lines}


def marks(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The places of each kind of mark, by its label."""
    return {
        str(group.get_label()): [(round(float(x), 3), float(y)) for x, y in group.get_offsets()]
        for group in axes.collections
    }


def drawn(figure: Figure) -> Figure:
    """The figure, laid out: where texts end up is known only then."""
    figure.canvas.draw()
    return figure


def test_convergence_shows_attempts_failures_best_default_and_floor() -> None:
    figure = plots.convergence("product\ndevice", SEARCH, choice(SEARCH[0]))
    above, main = figure.axes
    assert figure.get_suptitle() == "product\ndevice"
    assert marks(main) == {
        "a/fast (6)": [(3, 20), (4, 30), (6, 10), (7, 10)],
        "b/slow (1)": [(1, 40)],
    }
    assert [*marks(above).values()] == [[(2, 0), (5, 1)]]
    assert [text.get_text() for text in above.get_yticklabels()] == ["compile", "timeout"]
    assert main.get_yscale() == "log"
    assert lines(main) == {
        "best so far: 10 us": [40, 20, 20, 10, 10, 10],
        "default: 40 us, b/slow": [40, 40],
        "floor: 4 us, 40% of the best": [pytest.approx(4), pytest.approx(4)],
    }
    assert main.lines[0].get_drawstyle() == "steps-post", "a best holds from its own attempt on"
    (legend,) = figure.legends
    told = {text.get_text() for text in legend.get_texts()}
    assert told == {*marks(main), *lines(main)}
    low, high = main.get_ylim()
    assert low < 4 < 40 < high


def test_a_floor_far_below_does_not_squeeze_the_attempts() -> None:
    tiny = [attempt("a/b", us) for us in (200.0, 250.0)]
    (axes,) = plots.convergence("t", tiny, choice(tiny[1])).axes
    assert "floor: 4 us, 2% of the best (far below)" in lines(axes)
    assert axes.get_ylim()[0] > 150


def test_without_a_floor_or_with_a_default_that_failed() -> None:
    unknown = dataclasses.replace(SEARCH[0], measurement=timed(40.0, floor_s=None))
    axes = plots.convergence("t", [unknown, SEARCH[1]], choice(SEARCH[1])).axes[-1]
    assert [*lines(axes)] == ["best so far: 40 us"]


def test_a_kernel_has_a_colour_and_a_shape_of_its_own() -> None:
    many = [attempt(f"kernel/{at:02}", 10.0 + at) for at in range(40)]
    (axes,) = plots.convergence("t", many, choice(many[0])).axes
    looks = {
        (tuple(group.get_facecolor()[0]), group.get_paths()[0].vertices.tobytes())
        for group in axes.collections
    }
    assert len(looks) == 40


def test_the_legend_is_beside_the_axes_and_below_the_title() -> None:
    long = "gate_proj/up_proj 28672x8192 aqlm-2x8 m=8\n" + 9 * "a GPU's name "
    for kernels in (1, 14):
        tried = [attempt(f"cuda/kernel_{at:02}", 10.0 + at) for at in range(kernels)]
        figure = drawn(plots.convergence(long, [*tried, SEARCH[1]], choice(tried[0])))
        boxes = [*figure.axes, *figure.legends, figure._suptitle]
        boxes = [one.get_window_extent() for one in boxes]
        assert not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_parameters_are_ordered_by_what_they_explain() -> None:
    fastest = choice(SEARCH[5])
    figure = plots.parameters("product\ndevice", SEARCH, fastest)
    assert figure.get_suptitle() == "a/fast, product\ndevice"
    tile, split = figure.axes
    # of log 20, log 30 | log 10, log 10 by tile; log 20, log 10 | log 30, log 10 by split
    within, mean = math.log(1.5) ** 2 / 2, math.log(6) / 4
    logs = [math.log(2), math.log(3), 0, 0]
    share = 1 - within / sum((one - mean) ** 2 for one in logs)
    assert tile.get_title() == f"tile: {share:.0%} (chance: 33%)"
    assert split.get_title() == "split: 5% (chance: 33%)"
    assert [text.get_text() for text in tile.get_xticklabels()] == ["1", "2", "4"]
    assert [text.get_text() for text in split.get_xticklabels()] == ["False", "True"]
    shown = marks(tile)
    assert sorted(y for _, y in shown["a config's median"]) == [10, 10, 20, 30]
    assert [round(x) for x, _ in shown["a config's median"]] == [0, 0, 1, 1]
    assert shown["median of medians"] == [(0, pytest.approx(600**0.5)), (1, pytest.approx(10))]
    assert shown["winner"] == [shown["a config's median"][2]]
    assert [round(x) for x, _ in shown["failed"]] == [2, 2]
    assert tile.get_yscale() == "log"
    assert tile.get_ylim() == split.get_ylim()


def test_failures_are_above_the_times_and_long_values_apart() -> None:
    names = ["bytes of one row together", "columns", "words of sixteen bytes"]
    tried = [attempt("a/b", us, layout=name) for name in names for us in (10.0, 1e3, 1e4, None)]
    figure = drawn(plots.parameters("t", tried, choice(tried[0])))
    (axes,) = figure.axes
    slowest = axes.transLimits.transform(axes.transScale.transform((0, 1e4)))[1]
    assert slowest < marks(axes)["failed"][0][1] - 0.02
    labels = axes.get_xticklabels()
    assert [text.get_text() for text in labels] == names
    assert {text.get_rotation() for text in labels} == {30.0}
    (legend,) = figure.legends
    below = min(text.get_window_extent().y0 for text in labels)
    assert legend.get_window_extent().y1 <= below


def test_marks_of_one_value_do_not_cover_each_other() -> None:
    same = [attempt("a/b", 10.0, tile=at % 2, other=at) for at in range(40)]
    figure = plots.parameters("t", same, choice(same[0]))
    by_name = {axes.get_title().partition(":")[0]: axes for axes in figure.axes}
    places = marks(by_name["tile"])["a config's median"]
    assert len(set(places)) == 40
    assert all(abs(x - round(x)) <= 0.25 for x, _ in places)


@pytest.mark.parametrize(
    ("attempts", "note"),
    [
        ([attempt("a/b", 10.0)], "no parameter varied (attempts: 1)"),
        (
            [attempt("a/b", None, tile=1), attempt("a/b", None, "timeout", tile=2)],
            "no attempt succeeded: 1 compile, 1 timeout (attempts: 2)",
        ),
    ],
    ids=["one attempt, one config", "all failed"],
)
def test_where_there_is_nothing_to_compare_a_line_says_so(
    attempts: list[Attempt], note: str
) -> None:
    only = choice(attempts[0])
    (axes,) = drawn(plots.parameters("t", attempts, only)).axes
    assert [text.get_text() for text in axes.texts] == [note]
    main = drawn(plots.convergence("t", attempts, only)).axes[-1]
    ticks = [tick for tick in main.get_xticks() if 0.5 <= tick <= len(attempts) + 0.5]
    assert ticks == [*range(1, len(attempts) + 1)]
    if attempts[0].measurement.status == "ok":
        assert lines(main)["best so far: 10 us"] == [10, 10]
    else:
        assert [text.get_text() for text in main.texts] == [note.partition(" (")[0]]


@pytest.mark.parametrize(
    ("low", "high"), [(612.0, 700.0), (300.0, 900.0), (100.0, 650.0), (3.0, 2e5)]
)
def test_a_log_axis_has_plain_numbers_on_it(low: float, high: float) -> None:
    two = [attempt("a/b", us) for us in (low, high)]
    (axes,) = plots.convergence("t", two, choice(two[0])).axes
    texts = [text.get_text() for text in axes.get_yticklabels()]
    assert 3 <= len(texts) <= 16
    bottom, top = axes.get_ylim()
    assert all(bottom <= float(text.replace(",", "")) <= top for text in texts)


@pytest.mark.parametrize(
    ("groups", "share"),
    [
        ([[1, 1], [3, 3]], 1.0),
        ([[1, 3], [1, 3]], 0.0),
        # means 2 and 5 around 3.5: between 4 * 1.5^2 = 9, within 4 * 1^2 = 4
        ([[1, 3], [4, 6]], 9 / 13),
        # groups of unlike sizes, means 0 and 3 around 1: between 4 * 1 + 2 * 4 = 12, within 2
        ([[0, 0, 0, 0], [2, 4]], 12 / 14),
        ([[2.5]], 0.0),
        ([[0.1, 0.1, 0.1], [0.1]], 0.0),
    ],
)
def test_eta_squared(groups: list[list[float]], share: float) -> None:
    assert plots.eta_squared(groups) == pytest.approx(share, abs=1e-12)


def test_files_are_pictures_of_the_search_alone(tmp_path: Path, monkeypatch) -> None:
    shown = []

    def noted(title: str, attempts: list[Attempt], baseline: Choice) -> Figure:
        shown.extend(one.key for one in attempts)
        return convergence(title, attempts, baseline)

    convergence = plots.convergence
    monkeypatch.setattr(plots, "convergence", noted)
    store = Store(f"sqlite:///{tmp_path / 'tuning.sqlite'}")
    subject = store.subject(JOB.recipe.facts(DEVICE))
    kernel = registry()["torch/dequant"]
    now, before = kernel.source_hash, "an older source"
    for key in (
        Key(kernel.id, before, Config()),
        Key(kernel.id, now, Config()),
        Key(kernel.id, now, Config(), round=1),
        Key("no/such", now, Config()),
    ):
        claim = store.claim(subject, key)
        assert claim is not None
        store.finish(claim, timed(10.0))
    best = Choice(kernel.id, now, Config())
    done = Tuned(JOB, Result(best, best, None, {best: 1e-5}, {"ok": 1}, {}), 1.0, {})
    paths = plots.save(store, done, DEVICE, tmp_path)
    assert shown == [best.key()], "no other source, round or kernel"
    stem = "q_proj-o_proj-4096x2048-rq-2x256x8-m8"
    assert [path.name for path in paths] == [
        f"{stem}-convergence.png",
        f"{stem}-torch-dequant-parameters.png",
    ]
    for path in paths:
        width, height, pixels = png(path.read_bytes())
        assert width >= 7 * 150
        assert height >= 150
        assert len(set(pixels)) > 10, "something is drawn"
    assert not [*tmp_path.glob(".vqbench*")]


def png(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and filtered pixels; every chunk's checksum is right."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, packed, size = 8, [], b"", (0, 0)
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
        kinds.append(kind)
        if kind == b"IHDR":
            size = struct.unpack_from(">II", body)
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    assert kinds[-1] == b"IEND"
    return *size, zlib.decompress(packed)


def test_the_title_names_product_device_and_m(tmp_path: Path, monkeypatch) -> None:
    titles = []

    def noted(title: str, *_: object) -> Figure:
        titles.append(title)
        return Figure()

    monkeypatch.setattr(plots, "convergence", noted)
    monkeypatch.setattr(plots, "parameters", noted)
    best = Choice("a/b", "s", Config())
    store = Store(f"sqlite:///{tmp_path / 'tuning.sqlite'}")
    plots.save(store, Tuned(JOB, Result(best, best, None, {}, {}, {}), 1.0, {}), DEVICE, tmp_path)
    product = "q_proj/o_proj 4096x2048 rq-2x256x8 m=8"
    assert set(titles) == {f"{product}\nTest any, 8 threads, float32"}
    many = dataclasses.replace(JOB, layers=tuple(f"encoder.layer.{at}.query" for at in range(24)))
    assert str(many) == "24 layers 4096x2048 rq-2x256x8 m=8"


def test_without_matplotlib_a_line_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match=r"matplotlib .*; pip install 'vqbench\[plot\]'$"):
        plots.prepare(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch) -> None:
    plots.prepare(tmp_path / "a" / "b")
    assert [*(tmp_path / "a" / "b").iterdir()] == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ContainerError, match=r"file.*: .*; choose another folder$"):
            plots.prepare(folder)

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(plots.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ContainerError, match="Read-only file system; choose another folder"):
        plots.prepare(tmp_path)
