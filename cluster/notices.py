"""Notices: how a cloud says that a machine will be taken away: a file that appears, or an address on the machine that begins to answer.

In: FTCORE_PREEMPTION_FILE, FTCORE_PREEMPTION_URL. Out: why, once. Runs in: the supervisor of each worker.

`ray drain-node` and autoscalers are seen by the driver (cluster.placement), SIGTERM by the worker itself (ftcore.nursery).
"""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from pathlib import Path

FILE_VARIABLE, URL_VARIABLE = "FTCORE_PREEMPTION_FILE", "FTCORE_PREEMPTION_URL"
EVERY_S = 2.0
TIMEOUT_S = 1.0
MAX_BYTES = 4096


class Notices:
    """Looks every two seconds; `heard` gives the reason once and then nothing."""

    def __init__(self, file: str = "", url: str = "") -> None:
        self._file, self._url = file, url
        self._why = ""
        self._looked = float("-inf")
        if url:
            threading.Thread(target=self._ask, name="preemption-notice", daemon=True).start()

    @classmethod
    def from_environment(cls) -> Notices:
        return cls(os.environ.get(FILE_VARIABLE, ""), os.environ.get(URL_VARIABLE, ""))

    def heard(self) -> str:
        if self._file and time.monotonic() - self._looked >= EVERY_S:
            self._looked = time.monotonic()
            if Path(self._file).exists():
                self._why, self._file = f"{self._file} appeared", ""
        why, self._why = self._why, ""
        return why

    def _ask(self) -> None:
        """AWS answers 404 until there is a notice, Google FALSE."""
        while True:
            try:
                with urllib.request.urlopen(self._url, timeout=TIMEOUT_S) as answer:
                    text = answer.read(MAX_BYTES).decode(errors="replace").strip()
            except OSError:  # no notice yet: nothing there, or 404
                text = ""
            if text and text.upper() != "FALSE":
                self._why = f"{self._url} says {text[:80]}"
                return
            time.sleep(EVERY_S)
