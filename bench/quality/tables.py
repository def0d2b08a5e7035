"""The report as people read it, and its layers as rows for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.format_text import told
from bench.quality.layers import LayerQuality
from bench.quality.measures import MEASURES, Values
from bench.quality.report import Judged, Report
from bench.tables import render

__all__ = ["layer_rows", "notes", "text"]

Row = dict[str, Any]

# What a table shows of the measures; the machine forms have all of them.
_SHOWN = (
    "bits",
    "mse",
    "relative_error",
    "cosine",
    "max_error",
    "weighted_error",
    "run_error",
    "output_error",
    "output_cosine",
    "output_cosine_low",
    "output_cosine_worst",
    "int8_cost",
)
_INPUTS = {
    "held-out": "held-out tokens of the calibration",
    "run": "the calibration's whole run (no held-out tokens, so no token's own cosine)",
    "gaussian": "made-up Gaussian inputs, which no calibration knows: a hint, not a measurement",
}
_MOST_NAMES = 3


def layer_rows(report: Report) -> list[Row]:
    """A row a layer, with every measure, and a row `total` for each candidate."""
    rows = []
    for one in report.candidates:
        rows += [
            {
                "candidate": one.label,
                "layer": layer.layer,
                "tensor": layer.tensor,
                "n": layer.n,
                "k": layer.k,
                "format": told(layer.format),
                "inputs": layer.inputs,
                "tokens": layer.tokens,
                **layer.measures,
            }
            for layer in one.layers
        ]
        head = dict.fromkeys(("tensor", "n", "k", "format", "inputs", "tokens"))
        rows.append({"candidate": one.label, "layer": "total", **head, **one.totals})
    return rows


def text(report: Report, output: str, *, worst: int, totals: bool) -> str:
    """Layers, totals, the `worst` layers and the sections of each candidate; `totals`: no layers.

    output: `table` or `md`.
    """
    parts = [] if totals else [_layers(report, output)]
    parts.append(_titled("All layers, by their weights", _totals(report, output), output))
    if worst and not totals:
        title = f"Worst {worst} by output error"
        parts.append(_titled(title, _worst(report, output, worst), output))
    for one in report.candidates:
        parts += [
            _titled(f"{one.label}: {name}{of}", _section(section[rows], output), output)
            for name, section in one.sections.items()
            for rows, of in (("rows", ""), ("canaries", ", canaries"))
            if section.get(rows)
        ]
    return "\n\n".join(part.strip("\n") for part in parts)


def notes(report: Report) -> Iterator[str]:
    """Lines on what the numbers were measured on, and on what has none."""
    for inputs in dict.fromkeys(layer.inputs for one in report.candidates for layer in one.layers):
        count = sum(layer.inputs == inputs for one in report.candidates for layer in one.layers)
        yield f"outputs of {count} layers: on {_INPUTS[inputs]}"
    for one in report.candidates:
        if one.unmatched:
            yield f"{one.label}: not in the dense model: {_some(one.unmatched)}"
        if one.dense:
            yield f"{one.label}: {len(one.dense)} matrices are left dense: {_some(one.dense)}"
        for name, reason in one.refused.items():
            yield f"{one.label}: refused {name}: {reason}"


# ------------------------------------------------------------------------------------------------
# tables


def _layers(report: Report, output: str) -> str:
    rows = [
        {**_head(report, one), **_layer(layer)} for one in report.candidates for layer in one.layers
    ]
    columns = {
        "layer": "layer",
        "shape": "n x k",
        **_measured(rows),
        **_codes(),
        "inputs": "inputs",
    }
    return render(rows, _named(report) | columns, output)


def _layer(layer: LayerQuality) -> Row:
    return {
        "layer": layer.layer,
        "shape": f"{layer.n}x{layer.k}",
        **_digits(layer.measures),
        "entropy": " + ".join(
            f"{stage['entropy_bits']:.2f}/{stage['even_bits']:.4g}" for stage in layer.usage
        ),
        "dead": " + ".join(str(stage["dead"]) for stage in layer.usage),
        "inputs": layer.inputs,
    }


def _codes() -> dict[str, str]:
    return {"entropy": "code entropy, bits", "dead": "dead"}


def _totals(report: Report, output: str) -> str:
    rows = [
        {
            "candidate": one.label,
            "layers": len(one.layers),
            "weights": sum(layer.weights for layer in one.layers),
            **_digits(one.totals),
        }
        for one in report.candidates
    ]
    columns = {"candidate": "candidate", "layers": "layers", "weights": "weights"}
    both = ("entropy_share", "dead_entries")
    columns |= _measured(rows) | {name: MEASURES[name].heading for name in both}
    return render(rows, columns, output)


def _worst(report: Report, output: str, count: int) -> str:
    rows = []
    for one in report.candidates:
        # an error that is no number is the worst of all
        ordered = sorted(one.layers, key=lambda layer: _badness(layer.measures), reverse=True)
        rows += [{**_head(report, one), **_layer(layer)} for layer in ordered[:count]]
    names = ("bits", "relative_error", "output_error", "output_cosine", "output_cosine_worst")
    columns = {name: MEASURES[name].heading for name in names}
    return render(rows, _named(report) | {"layer": "layer"} | columns, output)


def _section(rows: Sequence[Row], output: str) -> str:
    """Rows of a section, floats to four digits after the point where they are small."""
    shown = [
        {
            name: f"{value:.4f}" if isinstance(value, float) and abs(value) < 100 else value
            for name, value in row.items()
        }
        for row in rows
    ]
    return render(shown, None, output)


def _badness(measures: Values) -> float:
    error = measures["output_error"]
    return float("inf") if error is None or error != error else error


def _head(report: Report, one: Judged) -> Row:
    return {"candidate": one.label} if _named(report) else {}


def _named(report: Report) -> dict[str, str]:
    """The column that tells candidates apart, where there are several."""
    return {"candidate": "candidate"} if len(report.candidates) > 1 else {}


def _measured(rows: Sequence[Row]) -> dict[str, str]:
    """Columns of the measures that some row has."""
    return {
        name: MEASURES[name].heading
        for name in _SHOWN
        if any(row.get(name) is not None for row in rows)
    }


def _digits(measures: Mapping[str, float | None]) -> Row:
    """Measures as a table shows them: cosines, which crowd below 1, to five digits after it."""
    return {
        name: None if value is None else (f"{value:.5f}" if "cosine" in name else _short(value))
        for name, value in measures.items()
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.4g}"


def _titled(title: str, table: str, output: str) -> str:
    return f"{'## ' if output == 'md' else ''}{title}\n\n{table.strip(chr(10))}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
