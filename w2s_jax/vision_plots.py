"""The plots of a vision experiment's report, in the style of `plots`: {"png": bytes, "svg": bytes} each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from w2s_jax.plots import (
    CEILING,
    COLOURS,
    LINE,
    MARKERS,
    WEAK,
    draw_dot,
    draw_pgr,
    legend_guide,
    legend_line,
    pgr_range,
    plain_axis,
    render,
    styles_of,
)
from w2s_jax.tables import with_interval


def quality(rows: Sequence[dict], measure: str) -> dict[str, bytes]:
    """Weak, student and ceiling of every method, and its PGR beside them.

    `rows`: of `metrics.pgr`, with `method`; `measure`: what was measured ("Accuracy", "Top-5 accuracy").
    """
    from matplotlib.figure import Figure

    styles = styles_of([r["method"] for r in rows])
    figure = Figure(figsize=(10.4, len(rows) * 4 * LINE + 1.3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for i, row in enumerate(rows):
        for line, key, style in ((4 * i, "weak", WEAK), (4 * i + 1, "student", styles[row["method"]]), (4 * i + 2, "ceiling", CEILING)):
            draw_dot(left, row[key], row[f"{key}_ci"], line, style)
    low, high = pgr_range(rows)
    for i, row in enumerate(rows):
        draw_pgr(right, row, 4 * i + 1, styles[row["method"]], low, high)
    right.axvline(0, color="0.55", linewidth=1.2, zorder=1)
    right.axvline(1, color="0.55", linewidth=1.2, linestyle="--", zorder=1)
    right.set_xlim(low, high)
    for axis, title in ((left, f"{measure} on the test set"), (right, f"PGR by {measure.lower()}")):
        plain_axis(axis, title, "", "")
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=6)
        for i in range(1, len(rows)):
            axis.axhline(4 * i - 1, color="0.9", linewidth=0.8, zorder=0)
    left.set_yticks([4 * i + 1 for i in range(len(rows))], [f"{r['method']}\ngap {with_interval(r['gap'], r['gap_ci'])}" for r in rows])
    left.set_ylim(4 * len(rows) - 1, -1)
    handles = [legend_line(WEAK, "weak"), *(legend_line(styles[r["method"]], f"student, {r['method']}") for r in rows),
               legend_line(CEILING, "ceiling"), legend_guide("-", "PGR 0: weak"), legend_guide("--", "PGR 1: ceiling")]
    if any(r["pgr_ci"] and not r["gap_clear"] for r in rows):
        handles.insert(-2, legend_line(("black", "o"), "hollow: gap's interval includes 0", hollow=True))
    return render(figure, handles)


def epochs(methods: Sequence[dict], weak: float) -> dict[str, bytes]:
    """Accuracy and agreement with the supervisor by epoch: thick = mean over the seeds, thin = each seed.

    `methods`: with `method` and `epochs`; a ceiling that several of them share is drawn once. `weak`: the supervisor's accuracy.
    """
    from matplotlib.figure import Figure

    styles = styles_of([m["method"] for m in methods])
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    handles = [_line(styles[m["method"]], f"student, {m['method']}") for m in methods]
    drawn: list = []
    for m in methods:
        style = styles[m["method"]]
        _by_epoch(left, m["epochs"]["accuracy"], style, "-")
        _by_epoch(right, m["epochs"]["agreement"], style, "-")
        ceiling = m["epochs"]["ceiling"]
        if ceiling and ceiling not in drawn:
            drawn.append(ceiling)
            shared = all(other["epochs"]["ceiling"] in (None, [], ceiling) for other in methods)
            colour = CEILING[0] if shared else style[0]
            _by_epoch(left, ceiling, (colour, "none"), "--")
            handles.append(_line((colour, "none"), "ceiling" if shared else f"ceiling, {m['method']}", "--"))
    left.axhline(weak, color=WEAK[0], linestyle=":", linewidth=1.6, zorder=1)
    handles.append(legend_guide(":", "weak"))
    plain_axis(left, "Accuracy on the test set", "epoch", "accuracy")
    plain_axis(right, "Agreement with the supervisor on the test set", "epoch", "share of equal predictions")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return render(figure, handles)


def noise(levels: Sequence[dict]) -> dict[str, bytes]:
    """Accuracy of probes on labels of which a share was replaced: their mean with its interval, each seed, and the labels' own accuracy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis = figure.subplots()
    style = (COLOURS[0], MARKERS[0])
    levels = sorted(levels, key=lambda r: r["level"])
    x = [r["level"] for r in levels]
    means = [math.fsum(r["accuracy"]) / len(r["accuracy"]) for r in levels]
    axis.plot(x, [r["label_accuracy"] for r in levels], color="0.55", linestyle="--", linewidth=1.2, zorder=1)
    axis.plot(x, means, color=style[0], marker=style[1], markersize=5.5, linewidth=1.6, markeredgecolor="white", markeredgewidth=0.4,
              zorder=4)
    for r in levels:
        if r["accuracy_ci"]:
            axis.plot([r["level"]] * 2, r["accuracy_ci"], color=style[0], linewidth=1.6, marker="_", markersize=7, zorder=3)
        if len(r["accuracy"]) > 1:  # beside their mean, which would cover them
            axis.plot([r["level"] + (x[-1] - x[0] or 1) / 50] * len(r["accuracy"]), r["accuracy"], color=style[0], alpha=0.6, marker="x",
                      markersize=4, linestyle="none", zorder=3)
    axis.set_ylim(bottom=max(0.0, min(*means, *(r["label_accuracy"] for r in levels)) - 0.05), top=1.02)
    plain_axis(axis, "Accuracy against label noise", "share of the labels that were replaced by another class", "accuracy on the test set")
    seeds = max(len(r["accuracy"]) for r in levels)
    handles = [_line(style, "mean over the seeds, 95% interval" if seeds > 1 else "probe, 95% interval"),
               *([legend_line((style[0], "x"), "one seed", line=False)] if seeds > 1 else []),
               legend_guide("--", "accuracy of the labels themselves")]
    return render(figure, handles)


def l2(paths: dict[str, Sequence[dict]]) -> dict[str, bytes]:
    """Held-out loss, accuracy and agreement along the path of L2 penalties, for each set of labels; the chosen one is ringed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    panels = (("heldout_loss", "Loss on held-out labels", "cross-entropy, nats"), ("accuracy", "Accuracy on the test set", "accuracy"),
              ("agreement", "Agreement with the supervisor", "share of equal predictions"))  # fmt: skip
    smallest = min((r["l2"] for path in paths.values() for r in path if r["l2"] > 0), default=1.0)
    zero = smallest / 10  # where a penalty of 0 stands on a scale that has no 0
    handles, colours = [], itertools.cycle(zip(COLOURS, MARKERS))
    for axis, (_, title, ylabel) in zip(axes := figure.subplots(1, 3), panels):
        axis.set_xscale("log")
        plain_axis(axis, title, "L2 penalty", ylabel)
    for name, path in paths.items():
        style = next(colours)
        path = sorted(path, key=lambda r: r["l2"])
        handles.append(_line(style, name))
        for axis, (key, *_) in zip(axes, panels):
            points = [(r["l2"] or zero, r[key], r["chosen"]) for r in path if r.get(key) is not None]
            axis.plot([x for x, *_ in points], [y for _, y, _ in points], color=style[0], marker=style[1], markersize=4.5, linewidth=1.6,
                      zorder=3)
            for x, y, chosen in points:
                if chosen:
                    axis.plot([x], [y], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=style[0], markeredgewidth=1.4,
                              zorder=4)
    if any(r["l2"] == 0 for path in paths.values() for r in path):
        for axis in axes:
            ticks = [t for t in axis.get_xticks() if t >= smallest * 0.99 and t <= max(r["l2"] for p in paths.values() for r in p) * 1.01]
            axis.set_xticks([zero, *ticks], ["0", *(f"$10^{{{round(math.log10(t))}}}$" for t in ticks)])
            axis.minorticks_off()
    handles.append(legend_line(("0.3", "o"), "chosen by the held-out loss", hollow=True))
    return render(figure, handles)


def _by_epoch(axis, values: Sequence[Sequence[float]], style: tuple[str, str], line: str) -> None:
    """`values`: one list of epochs a seed."""
    colour, marker = style
    shortest = min(len(v) for v in values)
    mean = [math.fsum(v[i] for v in values) / len(values) for i in range(shortest)]
    for one in values if len(values) > 1 else []:
        axis.plot(range(1, len(one) + 1), one, color=colour, linestyle=line, linewidth=0.7, alpha=0.45, zorder=2)
    axis.plot(range(1, shortest + 1), mean, color=colour, linestyle=line, linewidth=1.8, marker=marker, markersize=4.5,
              markeredgecolor="white", markeredgewidth=0.4, markevery=max(1, shortest // 10), zorder=3)


def _line(style: tuple[str, str], label: str, line: str = "-"):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=style[0], marker=style[1], markersize=5.5, linewidth=1.6, linestyle=line, label=label)
