"""The engine's thread: orders between steps, who is let in, one step after another, and what each step made.

In: orders from an event loop. Out: tokens through `deliver`. Runs in: one thread of a serving process; everything here but `order` and
`stop` is that thread's own.

An order either runs or is refused with the reason why the engine ended: nobody waits for a thread that is gone.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ftcore.admission import Admission
from ftcore.batching import Batcher, Row, Wants
from ftcore.decoder import Decoder, cores
from ftcore.engines.base import EngineEnded, FinishReason, Request, Stats, Token
from ftcore.errors import ConfigError, FtcoreError, ModelError
from ftcore.lora_updates import LoadedAdapter
from ftcore.orders import Order
from ftcore.pace import Pace
from ftcore.prefixes import Prefixes
from ftcore.sampling import Asked, Drawn, sample

if TYPE_CHECKING:
    from ftcore.engines.torch import Torch

log = logging.getLogger(__name__)
Made = list[tuple[int, Token]]


@dataclass
class Counts:
    steps: int = 0
    tokens: int = 0
    prompt: int = 0


class EngineThread:
    """One for each engine."""

    def __init__(self, section: Torch, base: str, deliver: Callable[[Made], None]) -> None:
        self._section, self._base, self._deliver = section, base, deliver
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ended: BaseException | None = None
        self.ready: Future[None] = Future()
        self.ready.set_running_or_notify_cancel()
        self.adapters: dict[str, LoadedAdapter] = {}
        self.stats = Stats()
        self._leaving: dict[str, list[Future[None]]] = {}
        self._rows: dict[int, Row] = {}
        self._counts = Counts()
        self._pace = Pace(section.stretch, section.max_batch)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- any thread

    def start(self) -> None:
        self._thread.start()

    def order(self, do: Callable[[], Any]) -> Future[Any]:
        """Has `do` run between two steps; its result, what it raised, or why the engine ended."""
        order = Order(do)
        with self._lock:
            if self._ended is None:
                self._orders.put(order)
            else:
                order.refuse(self.end_error())
        return order.done

    def stop(self) -> None:
        self._orders.put(None)

    def join(self) -> None:
        self._thread.join()

    def end_error(self) -> EngineEnded:
        got = f"{type(self._ended).__name__}: {self._ended}"[:300]
        return EngineEnded("this engine has ended", got=got, remedy="open it again")

    @property
    def has_ended(self) -> bool:
        return self._ended is not None

    # ---- orders

    def enter(self, key: int, request: Request, wants: Wants = "answer") -> Future[Any]:
        """A row; the future of what is found where it is only read."""
        if request.adapter and (request.adapter not in self.adapters or request.adapter in self._leaving):
            raise ConfigError("this adapter is not loaded", where="adapter", got=request.adapter[:80], remedy="load it first")
        total = min(self.decoder.max_context, len(request.prompt) + request.max_tokens)
        seed = request.sampling.seed
        row = Row(request, total, list(request.prompt), seed=secrets.randbits(63) if seed is None else seed, key=key, wants=wants)
        row.found.set_running_or_notify_cancel()
        self._rows[key] = row
        self._admission.enter(row)
        return row.found

    def end(self, key: int) -> None:
        """Takes a row out, whatever it is doing; its stream, if anybody still reads it, hears `abort`."""
        if key in self._rows:
            self._give_up([self._rows[key]], EngineEnded("it was aborted"))

    def keep(self, digest: str, adapter: LoadedAdapter) -> None:
        self.adapters[digest] = adapter

    def leave(self, digest: str) -> Future[None]:
        """Done when the last row that uses the digest has ended and it is forgotten; its proofs end at once."""
        gone: Future[None] = Future()
        gone.set_running_or_notify_cancel()
        if digest not in self.adapters:
            gone.set_result(None)
        else:
            self._leaving.setdefault(digest, []).append(gone)
            proofs = [row for row in self._batcher.proofs if row.request.adapter == digest]
            self._give_up(proofs, ConfigError("this adapter was unloaded", where="adapter", got=digest[:12]))
            self._forget_unused(digest)
        return gone

    def publish(self) -> None:
        counts, batcher, admission = self._counts, self._batcher, self._admission
        self.stats = Stats(
            len(batcher.rows), len(batcher.waiting), counts.steps, counts.tokens, counts.prompt, admission.num_reused, tuple(self.adapters),
            sum(adapter.num_bytes for adapter in self.adapters.values()), sum(row.num_cached for row in batcher.rows),
            self._section.max_batch * self.decoder.max_context, batcher.num_admitted, batcher.waited_s, admission.num_preempted,
        )  # fmt: skip

    # ---- the loop

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._section.num_threads or cores())
            self.decoder = Decoder(self._section, self._base)
            self._batcher = Batcher(self._section.max_batch, self._section.chunk_tokens)
            prefixes = Prefixes(self._section.prefix_mib << 20)
            self._admission = Admission(self._batcher, self.decoder, prefixes, self.adapters, self._withdraw)
        except FtcoreError as error:
            self._ended = error
            self.ready.set_exception(error)
            return
        except BaseException as error:
            self._ended = error
            wrapped = ModelError("the engine cannot begin", got=f"{type(error).__name__}: {error}"[:300])
            wrapped.__cause__ = error
            self.ready.set_exception(wrapped)
            return
        self.ready.set_result(None)
        ended: BaseException = RuntimeError("closed")
        try:
            while self._obey():
                self._admission.admit()
                self._admission.hold(self._pace.beside)
                self._step()
        except BaseException as error:
            log.exception("the engine ended in the middle of a step")
            ended = error
        self._finish(ended)

    def _finish(self, error: BaseException) -> None:
        """Refuses everything that waits, and everything that comes."""
        with self._lock:
            self._ended = error
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                break
            if order is not None:
                order.refuse(self.end_error())
        for gone in [gone for each in self._leaving.values() for gone in each]:
            gone.set_exception(self.end_error())
        for row in [row for row in self._rows.values() if row.wants != "answer"]:
            row.found.set_exception(self.end_error())
        self._deliver([(key, Token(-1, "", finish="abort")) for key, row in self._rows.items() if row.wants == "answer"])

    def _obey(self) -> bool:
        """Does what was ordered; waits for an order when there is nothing to compute. False when it is to end."""
        while True:
            idle = self._batcher.is_idle
            if idle:
                self.publish()
            try:
                order = self._orders.get(block=idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            order.run()

    def _step(self) -> None:
        step = self._batcher.step()
        if step.is_empty:
            return
        started = time.perf_counter()
        hidden, finite = self.decoder.step(step)
        due = step.due
        for row in step.decoding:
            row.num_cached += 1
        for chunk in step.chunks:
            chunk.row.num_cached += chunk.count
            self._counts.prompt += chunk.count * (chunk.row.wants != "logits")
        self._counts.steps += 1
        for chunk, fine in zip(step.chunks, finite, strict=True):
            if not fine and chunk.row.wants != "logits":  # who proves an adapter judges its logits, as they are
                self._spoil(chunk.row)
        made = self._said(due, hidden)
        read = [(row, hidden[at]) for at, row in enumerate(due) if row.wants != "answer" and row.key in self._rows]
        ending = {token.adapter for _, token in made if token.finish in ("stop", "length")} | {row.request.adapter for row, _ in read}
        bad = self._withdraw(ending - {""})  # what a slot with other weights has computed is nobody's
        for row, last in read:
            if row.key in self._rows:
                self._find(row, last)
        made = [(key, token) for key, token in made if token.adapter not in bad]
        self._counts.tokens += len(made)
        self._admission.keep_prefixes(step)
        self._admission.settle()
        for key, token in made:
            if token.finish is not None:
                self._remove(key)
        if not step.chunks:
            self._pace.took(len(step.decoding) - step.num_heavy, step.num_heavy, time.perf_counter() - started)
        self.publish()
        self._deliver(made)

    def _said(self, due: Sequence[Row], hidden: Tensor) -> Made:
        """The next token of each row of `due`, whose last states are `hidden` [n, H], that answers."""
        at = [number for number, row in enumerate(due) if row.wants == "answer" and row.key in self._rows]
        if not at:
            return []
        rows = [due[number] for number in at]
        logits = self.decoder.logits(hidden if len(at) == len(due) else hidden[torch.tensor(at, device=hidden.device)])
        sound = torch.isfinite(logits.sum(-1)).tolist()
        asked = [Asked(row.request.sampling, row.request.prompt, row.tokens[row.num_prompt :], row.seed, row.walk) for row in rows]
        made = []
        for row, token, fine in zip(rows, sample(logits, asked), sound, strict=True):
            if fine:
                made.append(self._taken(row, token))
            else:
                self._spoil(row)
        return made

    def _find(self, row: Row, hidden: Tensor) -> None:
        """What was asked of a prompt whose last state is `hidden` [H]."""
        found = normalize(hidden.float(), dim=0) if row.wants == "embedding" else self.decoder.logits(hidden[None])[0]
        value = found.float().cpu().numpy()
        self._remove(row.key)
        row.found.set_result(value)

    def _taken(self, row: Row, token: Drawn) -> tuple[int, Token]:
        """A row's next token."""
        row.tokens.append(token.id)
        if row.walk is not None and not row.walk.accept(token.id):
            return row.key, Token(-1, row.request.adapter, finish="abort", problem=row.walk.problem)
        self._admission.fair.made(row.request.salt)
        finish: FinishReason | None = None
        if token.id in row.request.stop_ids:
            finish = "stop"
        elif len(row.tokens) >= row.max_total:
            finish = "length"
        return row.key, Token(token.id, row.request.adapter, token.logprob, token.top, finish)

    def _withdraw(self, digests: set[str]) -> set[str]:
        """Those of the digests whose slots hold other weights than were loaded. Every row that they computed for ends."""
        lora = self.decoder.lora
        bad = {digest for digest in digests if lora.held(digest) != self.adapters[digest].fingerprint}
        for digest in bad:
            log.error("the slot of adapter %s holds other weights than were loaded: its answers are withdrawn", digest[:12])
            self._admission.prefixes.forget(digest)
            lora.deactivate(digest)
            begun = [row for row in self._rows.values() if row.request.adapter == digest and (row.place >= 0 or row.kept is not None)]
            self._give_up(begun, EngineEnded("the slot of this adapter held other weights than were loaded", got=digest[:12]))
        return bad

    def _give_up(self, rows: Sequence[Row], error: FtcoreError) -> None:
        """Ends rows: a stream hears `abort`, who waits for something read hears why."""
        for row in rows:
            self._remove(row.key)
            if row.wants != "answer":
                row.found.set_exception(error)
        self._deliver([(row.key, Token(-1, row.request.adapter, finish="abort")) for row in rows if row.wants == "answer"])

    def _spoil(self, row: Row) -> None:
        """A row whose numbers are not finite ends, and nothing of it stays in the cache, where another row's mask would not hold it off."""
        adapter = row.request.adapter[:12] or "the base"
        log.error("%s gives numbers that are not finite: request %s ends", adapter, row.request.id[:64])
        self.decoder.cache.clear(row.place)
        self._give_up([row], ModelError("it gives numbers that are not finite", where="adapter", got=adapter))

    def _remove(self, key: int) -> None:
        row = self._rows[key]
        self._admission.remove(row)
        del self._rows[key]
        self._forget_unused(row.request.adapter)

    def _forget_unused(self, digest: str) -> None:
        if digest not in self._leaving or any(row.request.adapter == digest for row in self._rows.values()):
            return
        self.decoder.lora.deactivate(digest)
        self.adapters.pop(digest, None)
        self._admission.prefixes.forget(digest)
        for gone in self._leaving.pop(digest):
            gone.set_result(None)
