"""What a waiting user sees on stderr: one line, or a progress bar. Of several processes, process 0 shows it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from w2s_jax import distributed


def say(text: str) -> None:
    """Prints one line on stderr, above a progress bar if there is one."""
    if not distributed.is_main():
        return
    from tqdm import tqdm

    tqdm.write(str(text), file=sys.stderr)
    sys.stderr.flush()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """A bar with the loss, the accuracy, the tokens (or images) per second and the time left; plain lines where stderr is no terminal.

        with Progress(steps, start=resumed_at, label="gpt2 on sciq") as progress:
            progress.update(1, loss=0.69, accuracy=0.5, tokens=4096)

    `tokens` (what `counted` names) are counted and shown as a rate; every other value is shown as it is. Values may be left out.
    `weights`, one a unit, say how long the units take compared with each other, where that differs; the time left then follows them.
    """

    def __init__(self, total: int, start: int = 0, label: str = "", unit: str = "step", every: float = 10.0,
                 weights: Sequence[float] | None = None, counted: str = "tokens"):
        self.weights, self.counted = weights, counted
        self.total, self.count, self.label, self.unit, self.every = int(total), int(start), label, unit, every
        self._begin = self._said = time.monotonic()
        self._first: tuple[float, int] | None = None  # time and count after the first update: compiling is no measure of speed
        self._counted = 0
        self._values: dict = {}
        self._bar = None
        self._dirty = False
        self._shown = distributed.is_main()
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]" if weights else None  # tqdm knows no weights
            self._bar = tqdm(total=self.total, initial=self.count, desc=label or None, unit=unit, dynamic_ncols=True, file=sys.stderr,
                             bar_format=bar_format)

    def update(self, n: int = 1, **values) -> None:
        """`n` more are done; `values` are the newest."""
        now = time.monotonic()
        self.count += n
        counted = values.pop(self.counted, 0)
        if self._first is None:
            self._first = (now, self.count)
        else:
            self._counted += counted
            if self._counted and now > self._first[0]:
                values[f"{self.counted}/s"] = self._counted / (now - self._first[0])
        self._values.update({k: v for k, v in values.items() if v is not None})
        self._dirty = True
        if self._bar is not None:
            left = self._left(now) if self.weights else ""
            self._bar.set_postfix_str(", ".join(filter(None, (left, self._text()))), refresh=False)
            self._bar.update(n)
        elif now - self._said >= self.every or self.count >= self.total:
            self._line(now)

    def _text(self) -> str:
        names = {"accuracy": "acc"}
        return ", ".join(f"{names.get(k, k)} {_number(v)}" for k, v in self._values.items())

    def _left(self, now: float) -> str:
        """The time left, or nothing as long as it can't be told."""
        if not self._first or self.count >= self.total:
            return ""
        start, at = self._first
        if self.weights:
            done, rest = sum(self.weights[at:self.count]), sum(self.weights[self.count:])
        else:
            done, rest = self.count - at, self.total - self.count
        return f"{clock((now - start) * rest / done)} left" if done else ""

    def _line(self, now: float) -> None:
        if not self._shown:
            return
        parts = [f"{self.label or self.unit} {self.count}/{self.total}"]
        if text := self._text():
            parts.append(text)
        if left := self._left(now):
            parts.append(left)
        parts.append(f"{clock(now - self._begin)} passed")
        print(", ".join(parts), file=sys.stderr, flush=True)
        self._said, self._dirty = now, False

    def close(self) -> None:
        """Ends the bar; the last state is always shown."""
        if self._bar is not None:
            self._bar.close()
        elif self._dirty:
            self._line(time.monotonic())
        self._dirty = False

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _number(value) -> str:
    if isinstance(value, str):
        return value
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
