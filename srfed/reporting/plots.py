"""Plots: lines and heat maps as PNG files for studies, lines and intervals as SVG for pages.

The only module that imports matplotlib.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import ArrayLike

from srfed.files import write_bytes

RESOLUTION = 110
"""Dots per inch."""
Curve = tuple[Sequence[float], Sequence[float]]
"""x and y of one line."""
COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
    "#4c9f70",
)
"""Of lines, readable on light and on dark ground."""
GREY = "#8a8a8a"
NARROW = 5.0
"""Between values that are less than so many times apart a logarithmic axis has too few numbers."""
_INK = "#010203"
"""What becomes the page's own colour of text."""


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


@dataclass(frozen=True)
class Drawing:
    """A plot for a page: SVG in the page's own colour of text, and each line's label and colour.

    The labels are for the page to write: in SVG a name that anybody may have chosen is markup, and
    matplotlib's fonts do not have every letter.
    """

    svg: str
    key: Sequence[tuple[str, str]] = ()


def draw_lines(
    series: Sequence[tuple[str, Curve]],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    level: float | None = None,
) -> Drawing:
    """Draw lines for a page; it is as wide as a telephone and larger by the page's choice.

    Args:
        series: label, x and y; of more than there are colours all but the first are grey.
        x_label, y_label: texts of ours.
        log_y: a logarithmic axis, where all values are above 0 and far enough apart.
        level: a dashed line across.
    """
    figure, axes = _page_figure()
    many = len(series) > len(COLOURS)
    key = []
    # The first is the headline, and lies on top.
    for number, (label, (x, y)) in enumerate(series):
        colour = GREY if many and number else COLOURS[number]
        if number < 1 or not many:
            key.append((label, colour))
        axes.plot(
            x,
            y,
            color=colour,
            linewidth=1.0 if number else 1.8,
            marker="o" if len(x) < 30 else None,
            markersize=3,
            zorder=2 if number else 3,
        )
    if many:
        key.append((f"the other {len(series) - 1}", GREY))
    if level is not None:
        axes.axhline(level, color=_INK, linewidth=1, linestyle="--")
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    values = [value for _, (_, y) in series for value in y]
    if log_y and min(values) > 0 and max(values) > NARROW * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return Drawing(_svg(figure, axes), key)


def draw_intervals(
    values: Sequence[tuple[float, float, float]], *, x_label: str, level: float
) -> Drawing:
    """Draw (low, value, high) as marks with bars, numbered from the top, for a page.

    Args:
        values: in order.
        x_label: a text of ours.
        level: where a dashed line stands.
    """
    figure, axes = _page_figure(height=1.2 + 0.22 * len(values))
    rows = range(1, len(values) + 1)
    middle = [value for _, value, _ in values]
    axes.errorbar(
        middle,
        rows,
        xerr=[
            [max(0.0, value - low) for low, value, _ in values],
            [max(0.0, high - value) for _, value, high in values],
        ],
        fmt="o",
        markersize=4,
        capsize=2,
        color=COLOURS[0],
    )
    axes.axvline(level, color=_INK, linewidth=1, linestyle="--")
    axes.set_yticks(rows)
    axes.set_ylim(len(values) + 0.5, 0.5)
    axes.set_xlabel(x_label, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return Drawing(_svg(figure, axes))


@dataclass(frozen=True)
class Panel:
    """One measure of :func:`interval_panels`: its text, and (low, value, high) or None by row."""

    text: str
    values: Sequence[tuple[float, float, float] | None]


def interval_panels(
    path: Path, panels: Sequence[Panel], rows: Sequence[str], *, level: float
) -> None:
    """Draw marks with bars, a panel for each measure and a row for each label, and write them.

    Args:
        path: the PNG file, which the umask decides about.
        panels: from the top, each with an axis of its own.
        rows: their labels, of ours, from the top.
        level: where a dashed line stands.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(
        figsize=(7.0, len(panels) * (0.9 + 0.25 * len(rows))), dpi=RESOLUTION, layout="constrained"
    )
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        for row, found in enumerate(panel.values):
            if found is not None:
                low, value, high = found
                axes.errorbar(
                    value,
                    row,
                    xerr=[[value - low], [high - value]],
                    marker="o",
                    capsize=3,
                    color=COLOURS[row % len(COLOURS)],
                )
        axes.axvline(level, color="black", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(panel.text, fontsize=9)
        axes.grid(alpha=0.3, axis="x")
    _write(path, figure, private=False)


def _page_figure(height: float = 2.9) -> tuple[Figure, Axes]:
    """Margins in inches: constrained layout, which finds them, doubles the time of a page."""
    width = 4.4
    figure = Figure(figsize=(width, height))
    left, bottom, rest = 0.75, 0.45, 0.12
    axes = figure.add_axes(
        (
            left / width,
            bottom / height,
            (width - left - rest) / width,
            (height - bottom - rest) / height,
        )
    )
    return figure, axes


def _svg(figure: Figure, axes: Axes) -> str:
    """The figure without ground and in the page's ink, as an element of a page."""
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=_INK, alpha=0.15, which="both")
    axes.tick_params(which="both", colors=_INK)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _write(path: Path, figure: Figure, *, private: bool = True) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue(), private=private)
