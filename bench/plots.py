"""A job's search as plots: how it converged, and what each parameter of the winner's kernel does.

Drawn with matplotlib's objects onto its Agg canvas: no display, no state that others share.
"""

from __future__ import annotations

import importlib
import io
import math
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autotune.export import searched
from autotune.store import Attempt, Store
from autotune.tune import Choice
from bench.tuning import Tuned
from vqkernels.atomic import write_atomically
from vqkernels.device import Device
from vqkernels.errors import BackendError, ContainerError
from vqkernels.space import Value
from vqkernels.tuned_table import TableDevice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["convergence", "eta_squared", "parameters", "prepare", "save"]

# Okabe and Ito's colours, told apart by the colour-blind too; without yellow, too pale on white,
# and black, which lines have. A shape goes with each, for more kernels than colours.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_SHAPES = ("o", "s", "^", "D", "v", "P", "*")
_BLUE, _RED, _GREY = _COLOURS[0], _COLOURS[5], "#666666"

_Styles = dict[str, tuple[str, str]]

_COLUMNS = 3  # panels side by side
_MOST_LABELS = 36  # characters below a panel that stand side by side
_FAILED_AT = 0.95  # of a panel's height
# A floor further below the best than this stays outside: a tiny layer takes what a call takes, and
# its attempts would be squeezed into a line.
_FAR = 30
_ROOM = 1.15  # between the outermost times and the edges of a log axis, as a factor
_INCHES = 7.5  # least width: two lines of title


def prepare(folder: Path) -> None:
    """Make `folder`, before hours go into what could not be drawn or written.

    Raises BackendError without matplotlib, ContainerError where nothing can be written there.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise BackendError(
            f"--plot needs matplotlib ({error}); pip install 'vqbench[plot]'"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ContainerError(f"{folder}: {error.strerror}; choose another folder") from error


def save(store: Store, done: Tuned, device: Device, folder: Path) -> list[Path]:
    """Write a job's plots into `folder`, over older ones; returns their paths.

    Raises ContainerError where one can't be written.
    """
    attempts = searched(store, store.subject(done.job.recipe.facts(device)))
    title = f"{done.job}\n{TableDevice.of(device)}, {done.job.recipe.dtype}"
    slug = _file_name(str(done.job))
    winner = done.result.winner
    figures = {
        f"{slug}-convergence.png": convergence(title, attempts, done.result.baseline),
        f"{slug}-{_file_name(winner.kernel)}-parameters.png": parameters(title, attempts, winner),
    }
    paths = []
    for name, figure in figures.items():
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=150)
            write_atomically(folder / name, [file.getvalue()])
        paths.append(folder / name)
    return paths


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text.replace("=", "")).strip("-.")


# ------------------------------------------------------------------------------------------------
# how a search converged


def convergence(title: str, attempts: Sequence[Attempt], baseline: Choice) -> Figure:
    """Every attempt's median in the order of attempts, the best so far, default and floor.

    attempts: of the search, of all kernels. What failed is above, in a row for each way to fail.
    """
    numbered = list(enumerate(attempts, 1))
    timed = [(at, one) for at, one in numbered if one.measurement.status == "ok"]
    failed = [(at, one) for at, one in numbered if one.measurement.status != "ok"]
    ways, styles = sorted({one.measurement.status for _, one in failed}), _styles(attempts)
    height = max(4.6, 0.25 * (len(styles) + 5)) + 0.25 * len(ways)
    figure = _figure(title, 9.5, height)
    if ways:
        above, main = figure.subplots(2, 1, sharex=True, height_ratios=[0.25 * len(ways), 4])
        _failures(above, failed, ways, styles)
    else:
        main = figure.subplots()
    main.set_xlim(0.5, len(attempts) + 0.5)
    main.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    main.set_xlabel("attempt of the search")
    main.set_ylabel("median time (us)")
    for kernel, (colour, shape) in styles.items():
        mine = [(at, _us(one)) for at, one in timed if one.key.kernel == kernel]
        count = sum(one.key.kernel == kernel for one in attempts)
        label = f"{kernel} ({count})" if mine else f"{kernel} ({count}, all failed)"
        x, y = zip(*mine, strict=True) if mine else ((), ())
        main.scatter(x, y, s=24, c=colour, marker=shape, alpha=0.8, linewidths=0, label=label)
    if timed:
        _lines(main, timed, len(attempts), baseline)
    else:
        _note(main, f"no attempt succeeded: {_ways(attempts)}")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def _failures(
    axes: Axes, failed: Sequence[tuple[int, Attempt]], ways: Sequence[str], styles: _Styles
) -> None:
    """A mark for each failure in the row of its status."""
    axes.scatter(
        [at for at, _ in failed],
        [ways.index(one.measurement.status) for _, one in failed],
        s=24,
        c=[styles[one.key.kernel][0] for _, one in failed],
        marker="x",
    )
    axes.set_yticks(range(len(ways)), ways)
    axes.set_ylim(-0.7, len(ways) - 0.3)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _lines(axes: Axes, timed: Sequence[tuple[int, Attempt]], count: int, baseline: Choice) -> None:
    """The best so far, the default's time and the least time that the best could take."""
    best = min((one for _, one in timed), key=_us)
    so_far = np.minimum.accumulate([_us(one) for _, one in timed])
    axes.step(
        [*(at for at, _ in timed), count + 0.5],
        [*so_far, so_far[-1]],
        where="post",
        color="black",
        linewidth=1.2,
        label=f"best so far: {_digits(_us(best))} us",
    )
    shown = [_us(one) for _, one in timed]
    for _, one in timed:
        if one.key == baseline.key():
            label = f"default: {_digits(_us(one))} us, {baseline.kernel}"
            axes.axhline(_us(one), color=_GREY, linestyle="--", linewidth=1.2, label=label)
    if floor_s := best.measurement.floor_s:
        floor_us = floor_s * 1e6
        near = _us(best) <= _FAR * floor_us
        where = "" if near else " (far below)"
        label = f"floor: {_digits(floor_us)} us, {floor_us / _us(best):.0%} of the best{where}"
        axes.axhline(floor_us, color=_RED, linestyle=":", linewidth=1.6, label=label)
        shown += [floor_us] if near else []
    _log_scale(axes, shown)


def _styles(attempts: Sequence[Attempt]) -> _Styles:
    """Colour and shape of each kernel: the same in every plot with the same kernels."""
    kernels = sorted({one.key.kernel for one in attempts})
    return {
        kernel: (_COLOURS[at % len(_COLOURS)], _SHAPES[at % len(_SHAPES)])
        for at, kernel in enumerate(kernels)
    }


# ------------------------------------------------------------------------------------------------
# what parameters do


def parameters(title: str, attempts: Sequence[Attempt], winner: Choice) -> Figure:
    """A panel for each parameter of the winner's kernel that varied: its medians by value.

    attempts: of the search, of any kernels. The panel of the parameter that explains most is first.
    """
    mine = [one for one in attempts if one.key.kernel == winner.kernel]
    timed = [one for one in mine if one.measurement.status == "ok"]
    names = [name for name in winner.config if len(_values(mine, name)) > 1] if timed else []
    names.sort(key=lambda name: -eta_squared([*_by_value(timed, name).values()]))
    rows, columns = math.ceil(len(names) / _COLUMNS), min(len(names), _COLUMNS)
    figure = _figure(f"{winner.kernel}, {title}", max(_INCHES, 3.4 * columns), 1.8 + 2.6 * rows)
    if not names:
        axes = figure.subplots()
        axes.set_axis_off()
        why = "no parameter varied" if timed else f"no attempt succeeded: {_ways(mine)}"
        _note(axes, f"{why} (attempts: {len(mine)})")
        return figure
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        _panel(axes, name, mine, winner)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("median time (us)")
    _log_scale(grid[0, 0], [_us(one) for one in timed], room_above=len(timed) < len(mine))
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
        title="%: of the variance of log time, what the parameter explains alone, "
        "and what one without effect would",
        title_fontsize=9,
    )
    return figure


def _panel(axes: Axes, name: str, attempts: Sequence[Attempt], winner: Choice) -> None:
    """The medians at each value of a parameter, their median, the winner, and what failed."""
    timed = [one for one in attempts if one.measurement.status == "ok"]
    failed = [one for one in attempts if one.measurement.status != "ok"]
    values, groups = _values(attempts, name), _by_value(timed, name)
    chance = (len(groups) - 1) / max(len(timed) - 1, 1)
    share = eta_squared([*groups.values()])
    axes.set_title(f"{name}: {share:.0%} (chance: {chance:.0%})", fontsize=10)
    x, y = _spread(timed, name, values), [_us(one) for one in timed]
    axes.scatter(x, y, s=16, c=_BLUE, alpha=0.6, linewidths=0, label="a config's median")
    middles = [math.exp(np.median(logs)) * 1e6 for logs in groups.values()]
    places = [values.index(value) for value in groups]
    axes.scatter(places, middles, s=500, c="black", marker="_", label="median of medians")
    for place, us, one in zip(x, y, timed, strict=True):
        if one.key == winner.key():
            axes.scatter(place, us, s=90, c="none", edgecolors=_RED, label="winner")
    if failed:
        x, top = _spread(failed, name, values), axes.get_xaxis_transform()
        y = [_FAILED_AT] * len(failed)
        axes.scatter(x, y, s=16, c=_GREY, marker="x", transform=top, label="failed")
    labels = [str(value) for value in values]
    slanted = sum(len(label) + 1 for label in labels) > _MOST_LABELS
    axes.set_xticks(range(len(values)), labels, rotation=30 if slanted else 0, fontsize=9)
    axes.set_xlim(-0.6, len(values) - 0.4)


def eta_squared(groups: Sequence[Sequence[float]]) -> float:
    """The share of the variance of all values that lies between the groups' means; 0 without any.

    Fisher's correlation ratio: 1 where the group tells the value, 0 where it tells nothing. Groups
    that differ by chance alone have (groups - 1) / (values - 1) on average.
    """
    values = np.concatenate([np.asarray(group, np.float64) for group in groups])
    if np.ptp(values) == 0:
        return 0.0
    mean = values.mean()
    between = sum(len(group) * (np.mean(group) - mean) ** 2 for group in groups)
    return float(between / ((values - mean) ** 2).sum())


def _values(attempts: Sequence[Attempt], name: str) -> list[Value]:
    """The values that a parameter had, in order; texts behind numbers."""
    found = {one.key.config[name] for one in attempts}
    return sorted(found, key=lambda value: (isinstance(value, str), value))


def _by_value(timed: Sequence[Attempt], name: str) -> dict[Value, list[float]]:
    """Logarithms of the medians at each value of a parameter."""
    groups: dict[Value, list[float]] = {}
    for one in timed:
        groups.setdefault(one.key.config[name], []).append(math.log(one.measurement.median_s))
    return groups


def _spread(attempts: Sequence[Attempt], name: str, values: Sequence[Value]) -> list[float]:
    """Where each attempt stands: at its value, beside others of it by the golden ratio's steps."""
    seen, x = Counter[int](), []
    for one in attempts:
        place = values.index(one.key.config[name])
        x.append(place + 0.5 * ((0.5 + 0.618 * seen[place]) % 1 - 0.5))
        seen[place] += 1
    return x


# ------------------------------------------------------------------------------------------------
# what both share


def _figure(title: str, width: float, height: float) -> Figure:
    """An empty figure on the canvas that writes PNGs. width, height: in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure


def _log_scale(axes: Axes, times_us: Sequence[float], *, room_above: bool = False) -> None:
    """A log axis with plain numbers on it, also where it spans less than a power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = min(times_us) / _ROOM, max(times_us) * _ROOM
    if room_above:
        high *= (high / low) ** 0.12
    locator = LogLocator(subs=(1, 2, 5)) if high / low > 8 else MaxNLocator(6, steps=[1, 2, 5, 10])
    ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks])


def _note(axes: Axes, text: str) -> None:
    """A line in place of data."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")


def _ways(attempts: Sequence[Attempt]) -> str:
    """How often attempts ended in each way."""
    counts = Counter(one.measurement.status for one in attempts)
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def _us(attempt: Attempt) -> float:
    return attempt.measurement.median_s * 1e6


def _digits(us: float) -> str:
    return f"{us:,.0f}" if us >= 1000 else f"{us:.4g}"
