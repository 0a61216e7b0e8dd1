"""Progress: the line a person watches while a run trains: step, loss, tokens/s, time left.

In: journal lines. Out: one line that rewrites itself on a terminal, or a line now and then in a log. Runs in: the driver; no torch.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

LOG_EVERY_S = 15.0
WINDOW = 20
"""Steps that the speed is averaged over."""


class ProgressLine:
    """`show` each journal line. With a terminal the line is rewritten in place; otherwise `log` gets one every `log_every_s` seconds."""

    def __init__(self, log: Callable[[str], None] = print, *, stream: TextIO | None = None, log_every_s: float = LOG_EVERY_S) -> None:
        out = stream or sys.stderr
        self._terminal = out if out.isatty() else None
        self._log, self._log_every_s = log, log_every_s
        self._logged_at, self._width = float("-inf"), 0
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)
        self._validation: float | None = None

    def show(self, line: Mapping[str, Any]) -> None:
        if "validation_loss" in line:
            self._validation = line["validation_loss"]
            self.say(f"step {line['step']:,}: validation loss {self._validation:.4f}, perplexity {line['perplexity']:.4g}")
            return
        self._recent.append((line["step"], line["seconds"], line.get("tokens_per_s", 0.0)))
        text, last = self.text(line), line["step"] >= line.get("num_steps", 0)
        if self._terminal:
            self._terminal.write(f"\r{text:<{self._width}}")
            self._terminal.flush()
            self._width = len(text)
        elif last or time.monotonic() - self._logged_at >= self._log_every_s:
            self._logged_at = time.monotonic()
            self._log(text)

    def text(self, line: Mapping[str, Any]) -> str:
        """`step 40/200  loss 1.2345  1,630 tokens/s  left 0:42`"""
        total = line.get("num_steps")
        parts = [f"step {line['step']:,}" + (f"/{total:,}" if total else ""), f"loss {line['loss']:.4f}"]
        if self._validation is not None:
            parts.append(f"validation {self._validation:.4f}")
        speeds = [speed for _, _, speed in self._recent if speed]
        if speeds:
            parts.append(f"{len(speeds) / sum(1 / speed for speed in speeds):,.0f} tokens/s")
        if total and self._seconds_per_step():
            parts.append(f"left {clock(self._seconds_per_step() * (total - line['step']))}")
        return "  ".join(parts)

    def _seconds_per_step(self) -> float:
        (first_step, first_s, _), (last_step, last_s, _) = self._recent[0], self._recent[-1]
        if last_step > first_step:
            return (last_s - first_s) / (last_step - first_step)
        return last_s / max(1, last_step)

    def say(self, text: str) -> None:
        """A sentence between progress lines."""
        self.close()
        self._log(text)

    def restart(self) -> None:
        """Workers began again from a checkpoint: the speed so far says nothing about them."""
        self._recent.clear()

    def close(self) -> None:
        """Leaves the terminal on a fresh line."""
        if self._terminal and self._width:
            self._terminal.write("\n")
            self._terminal.flush()
            self._width = 0


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `3:20:00`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
