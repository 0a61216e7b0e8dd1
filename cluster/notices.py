"""Notices: how a cloud says that a machine will be taken away: a file that appears, or an address on the machine that begins to answer.

In: FTCORE_PREEMPTION_FILE, FTCORE_PREEMPTION_URL. Out: why, once. Runs in: the supervisor of each worker.

`ray drain-node` and autoscalers are seen by the driver (cluster.placement), SIGTERM by the worker itself (ftcore.nursery).
"""

from __future__ import annotations

import logging
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

FILE_VARIABLE, URL_VARIABLE = "FTCORE_PREEMPTION_FILE", "FTCORE_PREEMPTION_URL"
EVERY_S = 2.0
TIMEOUT_S = 1.0
MAX_BYTES = 4096
AWS_TOKEN = "X-aws-ec2-metadata-token"
log = logging.getLogger(__name__)


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
        headers = {"Metadata-Flavor": "Google"}  # Google answers nothing without it; others do not look
        told = False
        while True:
            text = ""
            try:
                text = _get(self._url, headers)
            except urllib.error.HTTPError as error:
                if error.code == 401:
                    headers |= _aws_token(self._url)
                elif error.code != 404 and not told:
                    told = True
                    log.warning("preemption notices cannot be read: %s answers %d", self._url, error.code)
            except OSError as error:  # nothing listens there
                if not told:
                    told = True
                    log.warning("preemption notices cannot be read from %s: %s", self._url, error)
            if text and text.upper() != "FALSE":
                self._why = f"{self._url} says {text[:80]}"
                return
            time.sleep(EVERY_S)


def _get(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    asked = urllib.request.Request(url, headers=dict(headers), method=method)
    with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
        return str(answer.read(MAX_BYTES).decode(errors="replace").strip())


def _aws_token(url: str) -> dict[str, str]:
    """The session token that AWS's metadata service (version 2) wants; nothing where it gives none."""
    parts = urllib.parse.urlsplit(url)
    try:
        token = _get(f"{parts.scheme}://{parts.netloc}/latest/api/token", {f"{AWS_TOKEN}-ttl-seconds": "21600"}, "PUT")
    except OSError:
        return {}
    return {AWS_TOKEN: token}
