"""The plots of a report: dots with error bars, a panel a task, a block of lines a pair of models.

Okabe and Ito's colours, then Tol's, which colour-blind readers tell apart, and a marker of its own for every series, so that
the plots also work in print. Drawn on `matplotlib.figure.Figure` directly: no display, no global state, the same bytes every time.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from w2s_jax.config import LOSS_ARGS
from w2s_jax.tables import TITLES, number

LINE = 0.19  # inches between two lines of a block
WEAK, CEILING = ("0.5", "s"), ("black", "D")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#661100", "#117733")
MARKERS = ("o", "^", "v", "P", "X", "<", ">", "p", "h", "*", "d")
EDGES = (-1.0, 2.0)  # PGR beyond them is drawn at the edge, with its value


def quality(rows: Sequence[dict]) -> dict[str, bytes]:
    """Weak, students and ceiling of every pair, with intervals: {"png": bytes, "svg": bytes}.

    `rows`: of a Comparison, all of one metric. The dotted line is what needs no model: the majority class, or chance for AUROC.
    """
    metric, losses = rows[0]["metric"], _losses(rows)
    blocks, height = _blocks(rows), len(losses) + 3  # weak, students, ceiling, a free line
    figure, axes = _canvas(blocks, height, columns=1)
    for (task, pairs), (axis,) in zip(blocks.items(), axes, strict=True):
        for top, found in zip(range(0, height * len(pairs), height), pairs.values(), strict=True):
            ends = max(found.values(), key=lambda r: len(r["seeds"]))  # losses may lack seeds; the ends then show the most complete
            _dot(axis, ends["weak"], ends["weak_ci"], top, WEAK)
            for line, loss in enumerate(losses, top + 1):
                if loss in found:
                    _dot(axis, found[loss]["student"], found[loss]["student_ci"], line, _style(loss))
            _dot(axis, ends["ceiling"], ends["ceiling_ci"], top + height - 2, CEILING)
        baseline = ends["majority_baseline"] if metric == "accuracy" else 0.5
        axis.axvline(baseline, color="0.5", linestyle=":", linewidth=1.2, zorder=1)
        _finish(axis, task, list(pairs), height, f"{TITLES[metric]} on the test set")
    handles = [_handle(WEAK, "weak"), *(_handle(_style(x), f"student, {x}") for x in losses), _handle(CEILING, "ceiling"),
               _guide(":", "majority class" if metric == "accuracy" else "chance")]
    return _render(figure, handles)


def pgr(rows: Sequence[dict]) -> dict[str, bytes]:
    """PGR of every pair and loss with its interval, the gap beside it, a column a metric: {"png": bytes, "svg": bytes}.

    Hollow: the gap's interval includes 0. Where PGR is undefined or withheld (`metrics.pgr`), the line says so instead.
    """
    metrics, losses = [m for m in TITLES if any(r["metric"] == m for r in rows)], _losses(rows)
    blocks, height = _blocks(rows), max(len(losses), 2) + 1
    figure, axes = _canvas(blocks, height, columns=len(metrics))
    for (task, pairs), row_of_axes in zip(blocks.items(), axes, strict=True):
        for metric, axis in zip(metrics, row_of_axes, strict=False):
            here = [r for r in rows if r["task"] == task and r["metric"] == metric]
            if not here:  # a task without AUROC
                axis.set_axis_off()
                continue
            low, high = _range(here)
            labels = []
            for index, name in enumerate(pairs):
                found = {r["loss"]: r for r in here if _name(r) == name}
                ends = max(found.values(), key=lambda r: len(r["seeds"]))
                ci = ends["gap_ci"]
                labels.append(f"{name}\ngap {number(ends['gap'])}" + (f" [{number(ci[0])}, {number(ci[1])}]" if ci else ""))
                for line, loss in enumerate(losses, index * height):
                    if loss in found:
                        _pgr_dot(axis, found[loss], line, _style(loss), low, high)
            axis.axvline(0, color="0.55", linewidth=1.2, zorder=1)
            axis.axvline(1, color="0.55", linewidth=1.2, linestyle="--", zorder=1)
            axis.set_xlim(low, high)
            _finish(axis, task, labels, height, f"PGR by {'AUROC' if metric == 'auroc' else metric}")
    handles = [*(_handle(_style(x), x) for x in losses), _guide("-", "weak"), _guide("--", "ceiling")]
    if any(r["pgr_ci"] and not r["gap_clear"] for r in rows):
        handles.insert(len(losses), _handle(("black", "o"), "hollow: gap's interval includes 0", hollow=True))
    return _render(figure, handles)


def _pgr_dot(axis, row: dict, line: int, style: tuple[str, str], low: float, high: float) -> None:
    if row["pgr_ci"] is None:
        text = "undefined, no gap" if row["pgr"] is None else f"withheld, no gap in {100 * row['undefined']:.0f}% of draws"
        axis.text(0.03, line, f"{row['loss']}: {text}", color="0.25", fontsize=7.5, va="center")
        return
    inside = min(max(row["pgr"], low), high)
    _dot(axis, inside, row["pgr_ci"], line, style, hollow=not row["gap_clear"], centre=row["pgr"])
    if inside != row["pgr"]:
        right = inside == high
        axis.annotate(number(row["pgr"], 1), (inside, line), (-7 if right else 7, 0), textcoords="offset points", fontsize=7.5,
                      va="center", ha="right" if right else "left")


def _dot(axis, value: float, ci, line: float, style: tuple[str, str], hollow: bool = False, centre: float | None = None) -> None:
    colour, marker = style
    if ci:
        axis.plot(ci, (line, line), color=colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
        axis.plot(ci, (line, line), color=colour, marker="|", markersize=6, linestyle="none", zorder=2)
    edge = centre is not None and centre != value  # at the edge of the panel: show the marker whole
    axis.plot([value], [line], color=colour, marker=marker, markersize=5.5, markerfacecolor="white" if hollow else colour,
              linestyle="none", zorder=3, clip_on=not edge)


def _blocks(rows: Sequence[dict]) -> dict[str, dict[str, dict[str, dict]]]:
    """task -> pair -> loss -> row, in the order of the rows; of several metrics the first one's rows."""
    blocks: dict = {}
    for row in rows:
        blocks.setdefault(row["task"], {}).setdefault(_name(row), {}).setdefault(row["loss"], row)
    return blocks


def _name(row: dict) -> str:
    name = f"{row['weak_model']} \u2192 {row['strong_model']}"
    return name if len(name) <= 32 else f"{row['weak_model']}\n\u2192 {row['strong_model']}"


def _losses(rows: Sequence[dict]) -> list[str]:
    """In the order of the registry, so that a loss looks the same in every report."""
    found = {r["loss"] for r in rows}
    return [x for x in LOSS_ARGS if x in found] + sorted(found - set(LOSS_ARGS))


def _style(loss: str) -> tuple[str, str]:
    index = list(LOSS_ARGS).index(loss) if loss in LOSS_ARGS else len(LOSS_ARGS)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _canvas(blocks: dict, height: int, columns: int):
    """A figure, and for each task its axes (a list of `columns`); many tasks stand in several columns."""
    from matplotlib.figure import Figure

    across = 1 if len(blocks) <= 4 else 2 if len(blocks) <= 12 else 3
    down = math.ceil(len(blocks) / across)
    tallest = max(len(pairs) for pairs in blocks.values()) * height * LINE + 0.75
    wide = 7.2 if across * columns == 1 else 5.2 * across * columns
    figure = Figure(figsize=(wide, down * tallest + 0.7), layout="constrained")
    grid = figure.subplots(down, across * columns, squeeze=False)
    cells = [grid[i // across][(i % across) * columns:(i % across + 1) * columns] for i in range(down * across)]
    for unused in cells[len(blocks):]:
        for axis in unused:
            axis.set_axis_off()
    return figure, cells[:len(blocks)]


def _finish(axis, title: str, labels: list[str], height: int, xlabel: str) -> None:
    """Titles, one tick a block, the first block on top, light lines between blocks."""
    centres = [index * height + (height - 2) / 2 for index in range(len(labels))]
    axis.set_yticks(centres, labels, fontsize=8.5)
    axis.set_ylim(height * len(labels) - 1, -1)
    for index in range(1, len(labels)):
        axis.axhline(index * height - 1, color="0.9", linewidth=0.8, zorder=0)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8.5)
    axis.grid(axis="x", color="0.93", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel(xlabel, fontsize=9)


def _range(rows: Sequence[dict]) -> tuple[float, float]:
    """Limits of a PGR axis: 0, 1 and every interval, as far as EDGES go."""
    values = [x for r in rows if r["pgr_ci"] for x in (r["pgr"], *r["pgr_ci"])]
    return max(EDGES[0], min([0.0, *values]) - 0.1), min(EDGES[1], max([1.0, *values]) + 0.1)


def _handle(style: tuple[str, str], label: str, hollow: bool = False):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=style[0], marker=style[1], markersize=5.5, linewidth=0 if hollow else 1.6, label=label,
                  markerfacecolor="white" if hollow else style[0])


def _guide(line: str, label: str):
    from matplotlib.lines import Line2D

    return Line2D([], [], color="0.55", linestyle=line, linewidth=1.2, label=label)


def _render(figure, handles: list) -> dict[str, bytes]:
    import matplotlib

    per_row = max(2, int(figure.get_figwidth() / (0.45 + 0.06 * max(len(h.get_label()) for h in handles))))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(per_row, len(handles)), fontsize=8.5, frameon=False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not once a format
    out = {}
    with matplotlib.rc_context({"svg.hashsalt": "w2s", "svg.fonttype": "path"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, dpi=150, metadata=metadata)
            out[kind] = stream.getvalue()
    return out
