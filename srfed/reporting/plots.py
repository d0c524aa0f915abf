"""Plots for studies: lines and heat maps, as PNG files. The only module that imports matplotlib."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from numpy.typing import ArrayLike

from srfed.files import write_bytes

RESOLUTION = 110
"""Dots per inch."""
Curve = tuple[Sequence[float], Sequence[float]]
"""x and y of one line."""


def line_plot(
    path: Path,
    series: Mapping[str, Curve],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
    spread: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw labelled lines with a mark at each point, and write them atomically.

    Args:
        path: the PNG file.
        series: x and y by label, drawn in this order; a single point is a mark.
        x_label, y_label, title: texts.
        log_x, log_y: logarithmic axes.
        spread: half the length of the error bars by label, one for each point.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(figsize=(7.0, 4.4), dpi=RESOLUTION, layout="constrained")
    axes = figure.add_subplot()
    for label, (x, y) in series.items():
        bars = (spread or {}).get(label)
        axes.errorbar(
            x, y, yerr=bars, marker="o", markersize=4, capsize=2, linewidth=1.4, label=label
        )
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    for axis, set_scale, logarithmic in (
        (axes.xaxis, axes.set_xscale, log_x),
        (axes.yaxis, axes.set_yscale, log_y),
    ):
        if logarithmic:
            set_scale("log")
            # matplotlib would write 20 as 2 × 10¹.
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(StrMethodFormatter("{x:g}"))
            axis.set_tick_params(which="minor", labelsize=7)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    _write(path, figure)


def heat_map(
    path: Path,
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    """Draw a matrix with its numbers, and write it atomically.

    Args:
        path: the PNG file.
        values: float, len(rows) x len(columns); NaN is left blank.
        rows, columns: their labels.
        title, x_label, y_label: texts.

    Raises:
        ValueError: the matrix does not fit the labels.
        UserError: the file cannot be written.
    """
    matrix = np.asarray(values, dtype=float)
    if matrix.shape != (len(rows), len(columns)):
        raise ValueError(
            f"a matrix {matrix.shape} does not fit {len(rows)} rows and {len(columns)} columns"
        )
    figure = Figure(
        figsize=(2.4 + 0.55 * len(columns), 1.8 + 0.45 * len(rows)),
        dpi=RESOLUTION,
        layout="constrained",
    )
    axes = figure.add_subplot()
    axes.imshow(matrix, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    middle = (np.nanmin(matrix) + np.nanmax(matrix)) / 2
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            colour = "white" if value <= middle else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour
            )
    _write(path, figure)


def _write(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
