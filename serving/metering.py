"""Metering: one answer's account. Its tokens are reserved before it begins and settled when it ends, however it ends; then it is audited.

In: a job, the events of its answer. Out: tokens taken from the tenant's quota, one audit entry. Runs in: the ingress.

Before a replica has read the prompt its length is a guess; once it is known, and before a token is computed, the reservation is made
large enough for the longest answer. An answer that was begun costs its prompt and the tokens that were handed on.
"""

from __future__ import annotations

import time

from ftcore.card import utc_now
from ftcore.data.types import Message
from serving.audit import AuditLog, Entry
from serving.gate import Refusal
from serving.jobs import Closing, Event, Job, Opening, Piece
from serving.quotas import Quotas, Reservation
from serving.tenants import Caller

CHARACTERS_A_TOKEN = 4


class Account:
    """One answer's."""

    def __init__(self, quotas: Quotas, audit: AuditLog, caller: Caller, job: Job, max_context: int) -> None:
        self._quotas, self._audit, self._caller, self._job, self._max_context = quotas, audit, caller, job, max_context
        self._began, self._time = time.monotonic(), utc_now()
        self._reservation: Reservation | None = None
        self._adapter, self._base = job.answerer.ref.full if job.answerer.ref else "", ""
        self._prompt_tokens = self._completion_tokens = 0
        self._outcome, self._code = "aborted", ""  # until something else is seen
        self._cut = False

    async def begin(self) -> None:
        """Raises Refusal."""
        if self._audit.is_full:
            raise Refusal(503, "the audit log cannot be written at the moment", "audit_unavailable", kind="server_error", retry_after_s=5)
        self._reservation = await self._quotas.reserve(self._caller, self._most(self._guess()))

    async def saw(self, event: Event) -> None:
        """Raises Refusal when the prompt turns out longer than the tenant's quota allows."""
        if isinstance(event, Piece):
            self._completion_tokens += event.num_tokens
            self._cut |= event.finish == "length"
        elif isinstance(event, Opening):
            assert self._reservation is not None
            await self._reservation.at_least(self._most(event.prompt_tokens))
            self._adapter, self._base, self._prompt_tokens = event.adapter, event.base, event.prompt_tokens
        elif isinstance(event, Closing):
            self._prompt_tokens, self._completion_tokens = event.prompt_tokens, event.completion_tokens
            self._outcome = "length" if self._cut else "finished"

    def failed(self, refusal: Refusal) -> None:
        self._outcome, self._code = "failed" if refusal.status >= 500 else "refused", refusal.code

    def end(self) -> None:
        """Never waits: it runs when a client is gone, too."""
        if self._reservation is not None:
            self._reservation.settle(self._prompt_tokens + self._completion_tokens)
        duration_s = round(time.monotonic() - self._began, 4)
        told = (self._job.id, self._caller.tenant, self._caller.key, self._adapter, self._base, self._outcome, self._code)
        self._audit.write(Entry(*told, self._prompt_tokens, self._completion_tokens, duration_s, self._time))

    def _guess(self) -> int:
        """Tokens of what is to be read."""
        return sum(min(_guessed(each), self._max_context) for each in self._job.inputs or (self._job.prompt,))

    def _most(self, prompt_tokens: int) -> int:
        """What the answer can come to use, in all its choices."""
        if self._job.inputs:
            return prompt_tokens
        longest = min(self._job.max_tokens or self._max_context, max(1, self._max_context - prompt_tokens))
        return prompt_tokens + longest * self._job.num_choices


def audit_refusal(audit: AuditLog, caller: Caller, request: str, code: str) -> None:
    """Of a request that never became a job. What it asked for is the client's text, and is left out."""
    audit.write(Entry(request, caller.tenant, caller.key, "", "", "refused", code, 0, 0, 0.0, utc_now()))


def _guessed(prompt: tuple[Message, ...] | tuple[int, ...] | str) -> int:
    if isinstance(prompt, str):
        return len(prompt) // CHARACTERS_A_TOKEN + 1
    if not isinstance(prompt[0], Message):
        return len(prompt)
    return sum(len(turn.content) // CHARACTERS_A_TOKEN + 1 for turn in prompt if isinstance(turn, Message))
