"""Judge: a language model that is asked for verdicts, many at once, within a limit, never twice for the same one.

In: cases (a row and what is to be judged about it), a rubric, a system that judges. Out: a Reply a case. Runs in: the driver.

It is tried once before any row is spent: whether it answers, takes a JSON schema, and gives a verdict that can be read. What passes by
itself (429, 5xx, no connection) the endpoint waits for; what does not ends the work, and what was said until then is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ftcore.card import printable
from ftcore.data.types import Conversation, Message, Origin
from ftcore.engines.torch import Torch
from ftcore.errors import DataError
from ftcore.evals.given import Said
from ftcore.evals.panel import Panel, open_panel
from ftcore.evals.replies import REPLIES_A_PART, Replies, Reply
from ftcore.evals.rubric import Form, Part, Rubric
from ftcore.evals.spending import Purse, Spent
from ftcore.evals.systems import System

Log = Callable[[str], None]
EACH = 100
"""Replies between two lines of progress."""
LOOK_AGAIN_S = 0.02
TRIAL_TIMEOUT_S = 30.0
"""Of each try: silence is told within some minutes; the rows' own questions are waited for longer."""


class NoMoney(Exception):
    """The next question could pass the limit."""


@dataclass(frozen=True)
class Case:
    """One question to a judge about row `id`."""

    id: str
    turn: str
    parts: tuple[Part, ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.id, self.turn


@dataclass(frozen=True)
class Terms:
    """On what terms it is asked. `most_unread`: rows without a verdict from which on asking is of no use."""

    max_tokens: int = 512
    at_once: int = 8
    most_unread: float = float("inf")


@dataclass
class Asking:
    """One command's work."""

    system: System
    engine: Torch
    rubric: Rubric
    replies: Replies
    purse: Purse
    terms: Terms
    log: Log
    _panel: Panel = field(init=False)
    _new: list[Reply] = field(default_factory=list)
    _unread: set[str] = field(default_factory=set)
    _done: int = 0
    _over: bool = False

    async def ask(self, cases: Sequence[Case], kept: dict[tuple[str, str], Reply]) -> str:
        """Asks what is missing; returns why it stopped early, or "". Raises FtcoreError where the judge fails altogether."""
        missing = [case for case in cases if case.key not in kept]
        self._unread = {case.id for case in cases if case.key in kept and not kept[case.key].verdict}
        if not missing:
            return ""
        self._panel = open_panel([self.system], self.engine, self.terms.at_once)
        try:
            form = await self._tried()
            self.log(f"{self.system.name}: {len(missing):,} of {len(cases):,} questions to ask")
            queue = iter(missing)
            workers = (self._work(queue, form) for _ in range(min(self.terms.at_once, len(missing))))
            ends = await asyncio.gather(*workers, return_exceptions=True)  # what is in the air is paid for: nobody is cut off
        except NoMoney as stop:
            ends = [stop]
        finally:
            self._keep()
            await self._panel.close()
        failed = [end for end in ends if isinstance(end, BaseException) and not isinstance(end, NoMoney)]
        if failed:
            raise failed[0]
        if any(isinstance(end, NoMoney) for end in ends):
            return f"the next question could pass the limit ({self.purse.limit})"
        return "too many verdicts cannot be read" if self._hopeless() else ""

    async def try_out(self) -> None:
        """Whether it can be asked at all; nothing where that is known."""
        if self.replies.form()[0] is not None:
            return
        self._panel = open_panel([self.system], self.engine, self.terms.at_once)
        try:
            await self._tried()
        except NoMoney:
            self.log("the limit does not even allow a trial")
        finally:
            await self._panel.close()

    async def _work(self, queue: Iterator[Case], form: Form) -> None:
        for case in queue:
            if self._over or self._hopeless():
                return
            try:
                await self._judge(case, form)
            except BaseException:
                self._over = True
                raise

    async def _judge(self, case: Case, form: Form) -> None:
        messages, told = self.rubric.messages(case.parts, form), ""
        said, spent = await self._say(messages, form)
        if not said.error and not (told := self.rubric.read(said.text, form)):
            try:
                said, more = await self._say(self.rubric.again(messages, said.text, form), form)
            except NoMoney:  # it was paid for once; the row is asked again when there is money
                self._add(Reply(case.id, f"{case.turn}, asked once", "", said.text, "", spent))
                raise
            told, spent = "" if said.error else self.rubric.read(said.text, form), spent + more
        self._add(Reply(case.id, case.turn, told, said.text, said.error, spent))
        if not told:
            self._unread.add(case.id)

    def _add(self, reply: Reply) -> None:
        self._new.append(reply)
        self._done += 1
        if len(self._new) >= REPLIES_A_PART:
            self._keep()
        if self._done % EACH == 0:
            self.log(f"  {self._done:,} answered, {self.purse.spent.tokens:,} tokens")

    async def _say(self, messages: Sequence[Message], form: Form, system: System | None = None) -> tuple[Said, Spent]:
        said = None
        while (held := self.purse.take(messages, self.terms.max_tokens)) is None:
            if not self.purse.is_waiting:
                raise NoMoney
            await asyncio.sleep(LOOK_AGAIN_S)  # what is in the air may turn out smaller than it could have been
        schema = self.rubric.schema if form == "schema" else None
        asked = Conversation(tuple(messages), Origin("judge", 0))
        try:
            said = await self._panel.say(system or self.system, asked, self.terms.max_tokens, schema=schema)
        finally:
            spent = self.purse.settle(held, said)
        return said, spent

    async def _tried(self) -> Form:
        """The form it answers in, found out once. Raises DataError where it answers and no verdict can be read in either form."""
        form, _ = self.replies.form()
        if form is not None:
            return form
        total, heard, system = Spent(), "", self.system
        if system.endpoint is not None:
            system = replace(system, endpoint=replace(system.endpoint, timeout_s=TRIAL_TIMEOUT_S))
        forms: tuple[Form, ...] = ("schema", "line") if self._panel.holds else ("line",)
        for form in forms:
            messages = self.rubric.messages(self.rubric.trial, form)
            for again in (False, True):
                said, spent = await self._say(self.rubric.again(messages, heard, form) if again else messages, form, system)
                total, heard = total + spent, said.error or said.text
                if not said.error and self.rubric.read(said.text, form):
                    self.replies.write_form(form, total)
                    return form
                if said.error:
                    break
        got = repr(printable(heard))[:300]
        if said.error:
            raise DataError(
                "this judge refuses a trial question", where=self.system.name, got=got, remedy="see what it wants; a local one: --context"
            )
        raise DataError(
            "this judge gives no verdict that can be read, not even on a trial question", where=self.system.name, got=got,
            wanted=f"a last line `Verdict: {' | '.join(self.rubric.choices)}`, or the same as JSON",
            remedy="take a model that follows instructions, or more --judge-tokens where it thinks first",
        )  # fmt: skip

    def _hopeless(self) -> bool:
        return len(self._unread) > self.terms.most_unread

    def _keep(self) -> None:
        if self._new:
            self.replies.write(self._new)
            self._new = []
