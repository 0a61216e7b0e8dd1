"""Follow: a submitted job's log on the terminal, through lost connections, until the job has ended; Ctrl-C stops the job.

In: a JobSubmissionClient, the job. Out: the job's exit code. Runs in: a person's terminal.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ftcore.errors import ClusterError

DETACHED = 130
POLL_S, RETRY_S = 0.5, 2.0
PATIENCE_S = 600.0
"""A cluster that does not answer for so long is given up; the job runs on without us."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Detached(Exception):
    """The second Ctrl-C."""


class Follower:
    """Follows one job. `shown` counts characters: after a lost connection the log comes again from its beginning."""

    STOPPED = 75

    def __init__(self, client: Any, job: str, *, write: Callable[[str], object] = sys.stdout.write) -> None:
        self.client, self.job, self.write = client, job, write
        self.shown = 0
        self.asked_to_stop = False
        self._silent_since: float | None = None
        self._said_so = False

    def to_the_end(self) -> int:
        """Returns the exit code: the job's own; 75 when it was stopped; 130 when we left it to itself."""
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            while True:
                try:
                    info = self._info()
                    self._tail()
                    if info is not None and str(info.status) in ENDED:
                        return self._code(info)
                    time.sleep(POLL_S)
                except KeyboardInterrupt:
                    self._stop()
        except Detached:
            return DETACHED
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.asked_to_stop:
            raise Detached
        self.asked_to_stop = True
        print("\nstopping the job: it seals a checkpoint first (Ctrl-C again: leave it to itself)", file=sys.stderr, flush=True)
        raise KeyboardInterrupt  # out of the log, wherever it is read

    def _tail(self) -> None:
        """Shows what is new until the log ends or breaks off."""
        try:
            asyncio.run(self._show())
        except Detached:
            raise
        except Exception as error:  # aiohttp's, the websocket's, the server's: all mean that the log broke off
            self._lost(error)

    async def _show(self) -> None:
        seen = 0
        async for text in self.client.tail_job_logs(self.job):
            new = text[max(0, self.shown - seen) :]
            seen += len(text)
            if new:
                self.write(new)
                sys.stdout.flush()
            self.shown = max(self.shown, seen)
            self._silent_since, self._said_so = None, False

    def _stop(self) -> None:
        try:
            self.client.stop_job(self.job)
        except (RuntimeError, OSError) as error:
            self._lost(error)
            self.asked_to_stop = False  # Ctrl-C tries again

    def _info(self) -> Any:
        try:
            info = self.client.get_job_info(self.job)
        except (RuntimeError, OSError) as error:
            if "does not exist" in str(error):
                raise ClusterError(
                    "this job is not known here",
                    where=self.client.get_address(),
                    got=self.job,
                    remedy="`ray job list` shows the cluster's jobs",
                ) from error
            self._lost(error)
            return None
        self._silent_since = None
        return info

    def _lost(self, error: BaseException) -> None:
        """Says it once, waits, and gives up after a while."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        if not self._said_so:
            self._said_so = True
            print(
                f"the cluster does not answer ({type(error).__name__}); trying again, the job is not affected", file=sys.stderr, flush=True
            )
        if now - self._silent_since > PATIENCE_S:
            raise ClusterError(
                f"the cluster has not answered for {PATIENCE_S:g} s", where=self.client.get_address(), got=str(error)[:200],
                remedy=f"when it does again: ftcore submit --follow {self.job}",
            ) from error  # fmt: skip
        time.sleep(RETRY_S)

    def _code(self, info: Any) -> int:
        if str(info.status) == "STOPPED":
            return self.STOPPED
        if str(info.status) == "SUCCEEDED":
            return 0
        if info.driver_exit_code is None:  # it never ran, or its supervisor died with its node
            first = next((line.strip() for line in str(info.message or "").splitlines() if line.strip()), "no reason given")
            print(f"job {self.job} failed: {first}", file=sys.stderr)
            return 1
        return int(info.driver_exit_code)
