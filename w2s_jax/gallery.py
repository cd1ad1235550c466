"""A sheet of images with what is shown, what the weak model said and what its student said: right in green, wrong in orange."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from w2s_jax.tables import number

MOST = 24
ACROSS = 6
SIDE, LARGEST = 192, 224  # pixels: smaller images are scaled up to about SIDE by whole numbers, larger ones down to LARGEST
GAP, MARGIN, LINE = 26, 22, 19  # pixels between cells, around the sheet, between lines of text
DPI, POINTS = 110, 8.6
LINES = 2  # of a class name
RIGHT, WRONG, PLAIN = "#00704F", "#B84300", "0.1"  # dark enough for text on white, apart for colour-blind readers, and marked beside
TICK, CROSS, CUT = "\u2713", "\u2717", "\u2026"


class Picture(NamedTuple):
    """An image (uint8 `[height, width, 3]`), its class, and the classes that weak model and student chose with their probabilities."""

    image: np.ndarray
    true: str
    weak: str
    weak_p: float
    student: str
    student_p: float


def draw(pictures: Sequence[Picture]) -> bytes:
    """At most MOST pictures as one PNG, ACROSS in a row; the same bytes every time.

    Pixels of small images stay squares of one size. A class name has LINES lines at most; where it is cut, it ends in an ellipsis.
    """
    import matplotlib.font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not 0 < len(pictures) <= MOST:
        raise ValueError(f"{len(pictures)} pictures; expected 1 to {MOST}")
    tiles = [_scaled(p.image) for p in pictures]
    cell = max(SIDE, *(max(t.shape[:2]) for t in tiles))
    across = min(ACROSS, len(pictures))
    font = matplotlib.font_manager.FontProperties(family="DejaVu Sans", size=POINTS)
    renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()

    def width(text: str) -> float:
        return renderer.get_text_width_height_descent(text, font, False)[0]

    role = max(width(w) for w in ("true", "weak", "student")) + 8  # the column of the roles
    mark = width(CROSS) + 5
    texts = [_texts(p, lambda t: width(t) <= cell - role - mark, lambda t: width(t) <= cell - role) for p in pictures]
    rows = [range(i, min(i + across, len(pictures))) for i in range(0, len(pictures), across)]
    heights = [[max(len(texts[i][part]) for i in row) for part in range(3)] for row in rows]  # lines, so that rows stay in line
    tallest = [max(tiles[i].shape[0] for i in row) for row in rows]
    total = (2 * MARGIN + across * cell + (across - 1) * GAP,
             2 * MARGIN + 2 * LINE + sum(t + 8 + LINE * sum(h) for t, h in zip(tallest, heights)) + GAP * (len(rows) - 1))
    figure = Figure(figsize=(total[0] / DPI, total[1] / DPI), dpi=DPI, facecolor="white")

    def write(x: float, y: float, text: str, colour: str) -> None:
        """`y`: pixels from the top to the line's baseline."""
        figure.text(x / total[0], 1 - y / total[1], text, color=colour, fontproperties=font, va="baseline", ha="left")

    legend = f"{TICK} right   {CROSS} wrong   In brackets: the probability that the model gives to its answer."
    top = MARGIN
    for row, tall, lines in zip(rows, tallest, heights):
        for column, i in enumerate(row):
            left = MARGIN + column * (cell + GAP)
            tile = tiles[i]
            figure.figimage(tile, left, total[1] - top - tall)
            y = top + tall + 8
            for part, (name, count) in enumerate(zip(("true", "weak", "student"), lines)):
                colour = PLAIN
                write(left, y + LINE - 6, name, "0.45")
                if part:
                    right = (pictures[i].weak, pictures[i].student)[part - 1] == pictures[i].true
                    colour = RIGHT if right else WRONG
                    write(left + role, y + LINE - 6, TICK if right else CROSS, colour)
                for n, line in enumerate(texts[i][part]):
                    write(left + role + mark * bool(part), y + LINE * (n + 1) - 6, line, colour)
                y += LINE * count
        top += tall + 8 + LINE * sum(lines) + GAP
    write(MARGIN, top - GAP + 2 * LINE, legend, "0.3")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def _scaled(image: np.ndarray) -> np.ndarray:
    """An image at the size of the sheet, uint8 `[height, width, 3]`."""
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: {image.dtype} {image.shape}, expected uint8 [height, width, 3]")
    longest = max(image.shape[:2])
    if longest <= LARGEST:
        times = max(1, int(SIDE / longest + 0.5))
        return image.repeat(times, axis=0).repeat(times, axis=1)
    size = [max(1, round(n * LARGEST / longest)) for n in image.shape[1::-1]]
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _texts(picture: Picture, marked: Callable[[str], bool], free: Callable[[str], bool]) -> list[list[str]]:
    """The lines of the three labels; `marked` and `free` say whether a line is short enough beside a mark, or without one."""
    return [fit(picture.true, "", free), fit(picture.weak, f"({number(picture.weak_p, 2)})", marked),
            fit(picture.student, f"({number(picture.student_p, 2)})", marked)]


def fit(name: str, suffix: str, short: Callable[[str], bool]) -> list[str]:
    """`name` and, behind it, `suffix` in at most LINES lines of which each is `short`; the name is cut, visibly, where it must be."""
    for kept in range(len(name), 0, -1):
        cut = name if kept == len(name) else name[:kept].rstrip(" ,") + CUT
        lines = _wrapped(f"{cut} {suffix}".split(), short)
        if len(lines) <= LINES:
            return lines
    return [suffix]


def _wrapped(words: list[str], short: Callable[[str], bool]) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and short(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
            continue
        while not short(word) and len(word) > 1:  # a word longer than a line is broken
            n = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or short(word[:n]))
            lines.append(word[:n])
            word = word[n:]
        lines.append(word)
    return lines
