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
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from ftcore.batching import Batcher, Row, Step
from ftcore.decoder import Decoder, cores
from ftcore.engines.base import EngineEnded, FinishReason, Request, Stats, Token
from ftcore.errors import ConfigError, FtcoreError, ModelError
from ftcore.fairness import Fairness
from ftcore.lora_updates import LoadedAdapter
from ftcore.orders import Order, Probe
from ftcore.prefixes import Prefixes
from ftcore.sampling import Asked, Drawn, sample

if TYPE_CHECKING:
    from ftcore.engines.torch import Torch

log = logging.getLogger(__name__)
PROOF_EVERY = 8
"""Steps, while rows decode, between two chunks of the prompts that prove a new adapter: who streams does not feel it come."""
PATIENCE = 32
"""Rows that may be let in before one that waits for a slot; then nobody is, until it has one."""
Made = list[tuple[int, Token]]


@dataclass
class Counts:
    steps: int = 0
    tokens: int = 0
    prompt: int = 0
    reused: int = 0
    preempted: int = 0


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
        self._probes: deque[Probe] = deque()
        self._counts = Counts()
        self._fair = Fairness()
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

    def enter(self, key: int, request: Request) -> None:
        if request.adapter and (request.adapter not in self.adapters or request.adapter in self._leaving):
            raise ConfigError("this adapter is not loaded", where="adapter", got=request.adapter[:80], remedy="load it first")
        total = min(self.decoder.max_context, len(request.prompt) + request.max_tokens)
        seed = request.sampling.seed
        row = Row(request, total, list(request.prompt), seed=secrets.randbits(63) if seed is None else seed, key=key)
        self._fair.joins(request.salt, {each.request.salt for each in self._rows.values()})
        self._rows[key] = row
        self._batcher.waiting.append(row)

    def end(self, key: int) -> None:
        """Takes a row out, whatever it is doing; its stream, if anybody still reads it, hears `abort`."""
        if key in self._rows:
            self._remove(key)
            self._deliver([(key, Token(-1, "", finish="abort"))])

    def keep(self, digest: str, adapter: LoadedAdapter) -> None:
        self.adapters[digest] = adapter

    def leave(self, digest: str) -> Future[None]:
        """Done when the last row that uses the digest has ended and it is forgotten."""
        gone: Future[None] = Future()
        gone.set_running_or_notify_cancel()
        if digest not in self.adapters:
            gone.set_result(None)
        else:
            self._leaving.setdefault(digest, []).append(gone)
            self._forget_unused(digest)
        return gone

    def probe(self, prompt: Sequence[int], digest: str, is_embedding: bool) -> Future[Any]:
        """Done with the [V] logits after a prompt, or its [H] embedding."""
        if digest and (digest not in self.adapters or digest in self._leaving):
            raise ConfigError("this adapter is not loaded", where="adapter", got=digest[:80], remedy="load it first")
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()
        self._probes.append(Probe(prompt, digest, is_embedding, done))
        return done

    def publish(self) -> None:
        counts, batcher = self._counts, self._batcher
        self.stats = Stats(
            len(batcher.rows), len(batcher.waiting), counts.steps, counts.tokens, counts.prompt, counts.reused, tuple(self.adapters),
            sum(adapter.num_bytes for adapter in self.adapters.values()), sum(row.num_cached for row in batcher.rows),
            self._section.max_batch * self.decoder.max_context, batcher.num_admitted, batcher.waited_s,
            counts.preempted,
        )  # fmt: skip

    # ---- the loop

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._section.num_threads or cores())
            self.decoder = Decoder(self._section, self._base)
            self._batcher = Batcher(self._section.max_batch, self._section.chunk_tokens)
            self._prefixes = Prefixes(self._section.prefix_mib << 20)
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
                self._admit()
                self._read_probe()
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
        for gone in [gone for each in self._leaving.values() for gone in each] + [probe.done for probe in self._probes]:
            gone.set_exception(self.end_error())
        self._deliver([(key, Token(-1, "", finish="abort")) for key in self._rows])

    def _obey(self) -> bool:
        """Does what was ordered; waits for an order when there is nothing to compute. False when it is to end."""
        while True:
            idle = not self._batcher.rows and not self._batcher.waiting and not self._probes
            if idle:
                self.publish()
            try:
                order = self._orders.get(block=idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            order.run()

    def _needed(self, but: Row | None = None) -> set[str]:
        """Digests whose slots somebody is using."""
        probing = {self._probes[0].digest} if self._probes and self._probes[0].num_read else set()
        return ({row.request.adapter for row in self._batcher.rows if row is not but} | probing) - {""}

    def _has_slot(self, digest: str, needed: set[str]) -> bool:
        """Makes an adapter active beside `needed`, if there is room; joins `needed` then."""
        if not digest or digest in needed:
            return True
        adapter = self.adapters[digest]
        if not self.decoder.lora.activate(digest, adapter.rank, adapter.updates, needed):
            return False
        needed.add(digest)
        return True

    def _admit(self) -> None:
        """Lets waiting rows in while there are places and slots for them, in the order of fairness between their owners."""
        batcher = self._batcher
        if not batcher.waiting or not (batcher.has_room or self._made_room()):
            return
        needed, blocked, oldest = self._needed(), set[str](), None
        for row in self._fair.order(list(batcher.waiting)):
            if not batcher.has_room or (oldest is not None and oldest.num_passed >= PATIENCE):
                return
            digest = row.request.adapter
            if digest in blocked or not self._has_slot(digest, needed):
                blocked.add(digest)
                oldest = oldest or row
                continue
            if oldest is not None:
                oldest.num_passed += 1
            batcher.waiting.remove(row)
            batcher.admit(row)
            if row.kept is not None:
                self.decoder.cache.restore(row.place, row.kept)
                row.kept = None
                continue
            self._fair.read(row.request.salt, row.num_prompt)
            saved = self._prefixes.longest((digest, row.request.salt), row.tokens[:-1])
            if saved is not None:
                self.decoder.cache.restore(row.place, saved)
                row.num_cached = saved.shape[-2]
                self._counts.reused += row.num_cached

    def _made_room(self) -> bool:
        """Has a row of an owner with too many places step back for one with too few. Its keys and values are kept meanwhile: of fewer rows
        than there are places, for it comes in again before its owner's others."""
        batcher = self._batcher
        first = next(self._fair.order(batcher.waiting))
        owner = self._fair.gives_way(first.request.salt, Counter(row.request.salt for row in batcher.rows))
        back = min((row for row in batcher.decoding if row.request.salt == owner), key=lambda row: len(row.tokens), default=None)
        if back is None or self._withdraw({back.request.adapter} - {""}):  # asked now: its slot may be another's when it ends
            return back is not None
        if not self._has_slot(first.request.adapter, self._needed(but=back)):
            return False
        back.kept = self.decoder.cache.saved(back.place, back.num_cached)
        lengths = {row.place: row.num_cached for row in batcher.rows}
        self._move(batcher.remove(back), lengths)
        batcher.waiting.appendleft(back)
        self._counts.preempted += 1
        return True

    def _read_probe(self) -> None:
        """One chunk of the first probe, if there is a slot for it now."""
        probe = self._probes[0] if self._probes else None
        if probe is None or (self._batcher.decoding and not probe.is_embedding and self._counts.steps % PROOF_EVERY):
            return
        if not self._has_slot(probe.digest, self._needed()):
            return
        part = probe.prompt[probe.num_read : probe.num_read + self._section.chunk_tokens]
        hidden = self.decoder.read(part, probe.num_read, probe.digest, self._batcher.spare + 1)
        probe.num_read += len(part)
        if probe.num_read < len(probe.prompt):
            return
        self._probes.popleft()
        if self._withdraw({probe.digest} - {""}):
            probe.done.set_exception(EngineEnded("the slot of this adapter held other weights than were loaded", got=probe.digest[:12]))
            return
        if probe.is_embedding and not bool(torch.isfinite(hidden).all()):
            probe.done.set_exception(
                ModelError("it gives numbers that are not finite", where="adapter", got=probe.digest[:12] or "the base")
            )
            return
        self._counts.prompt += probe.num_read * probe.is_embedding
        value = normalize(hidden.float())[0] if probe.is_embedding else self.decoder.logits(hidden)
        probe.done.set_result(value.float().cpu().numpy())

    def _step(self) -> None:
        step = self._batcher.step()
        if step.is_empty:
            return
        logits = self.decoder.step(step)
        due = [*step.decoding, *(chunk.row for chunk in step.chunks if chunk.is_last)]
        for row in step.decoding:
            row.num_cached += 1
        for chunk in step.chunks:
            chunk.row.num_cached += chunk.count
            self._counts.prompt += chunk.count
        sound = torch.isfinite(logits.sum(-1)).tolist() if due else []
        asked = [Asked(row.request.sampling, row.request.prompt, row.tokens[row.num_prompt :], row.seed, row.walk) for row in due]
        drawn = sample(logits, asked) if due else []
        made = [self._taken(row, token) if fine else self._spoiled(row) for row, token, fine in zip(due, drawn, sound, strict=True)]
        made = self._withdrawn(made)
        self._keep_prefixes(step)
        self._counts.steps += 1
        self._counts.tokens += len(made)
        lengths = {row.place: row.num_cached for row in self._batcher.rows}
        self._move(self._batcher.settle(), lengths)
        for key, token in made:
            if token.finish is not None:
                self._remove(key)
        self.publish()
        self._deliver(made)

    def _taken(self, row: Row, token: Drawn) -> tuple[int, Token]:
        """A row's next token."""
        row.tokens.append(token.id)
        if row.walk is not None and not row.walk.accept(token.id):
            return row.key, Token(-1, row.request.adapter, finish="abort", problem=row.walk.problem)
        self._fair.made(row.request.salt)
        finish: FinishReason | None = None
        if token.id in row.request.stop_ids:
            finish = "stop"
        elif len(row.tokens) >= row.max_total:
            finish = "length"
        return row.key, Token(token.id, row.request.adapter, token.logprob, token.top, finish)

    def _withdrawn(self, made: Made) -> Made:
        """`made`, unless an answer that ends here came from a slot that holds other weights than were loaded: then all its rows end."""
        bad = self._withdraw({token.adapter for _, token in made if token.finish in ("stop", "length")} - {""})
        return [(key, token) for key, token in made if token.adapter not in bad]

    def _withdraw(self, digests: set[str]) -> set[str]:
        """Those of the digests whose slots hold other weights than were loaded. Every row that they computed for ends."""
        lora = self.decoder.lora
        bad = {digest for digest in digests if lora.held(digest) != self.adapters[digest].fingerprint}
        under_way = [*self._batcher.rows, *(row for row in self._batcher.waiting if row.kept is not None)]
        doomed = [row for row in under_way if row.request.adapter in bad]
        for digest in bad:
            log.error("the slot of adapter %s holds other weights than were loaded: its answers are withdrawn", digest[:12])
            self._prefixes.forget(digest)
            lora.deactivate(digest)
        for row in doomed:
            self._remove(row.key)
        self._deliver([(row.key, Token(-1, row.request.adapter, finish="abort")) for row in doomed])
        return bad

    def _spoiled(self, row: Row) -> tuple[int, Token]:
        """A row whose numbers are not finite ends; nothing of it stays in the cache."""
        log.error(
            "adapter %s gives numbers that are not finite: request %s ends", row.request.adapter[:12] or "(base)", row.request.id[:64]
        )
        self.decoder.cache.clear(row.place)
        row.tokens.append(0)
        return row.key, Token(-1, row.request.adapter, finish="abort")

    def _keep_prefixes(self, step: Step) -> None:
        for chunk in step.chunks:
            row = chunk.row
            if row.num_cached == row.num_prompt and self._prefixes.limit and row.key in self._rows:
                owner = (row.request.adapter, row.request.salt)
                self._prefixes.keep(owner, row.request.prompt, partial(self.decoder.cache.saved, row.place))

    def _move(self, moves: list[tuple[int, int]], lengths: dict[int, int]) -> None:
        for source, target in moves:
            self.decoder.cache.move([(source, target)], [lengths[source]])
            lengths[target] = lengths[source]

    def _remove(self, key: int) -> None:
        row = self._rows.pop(key)
        lengths = {each.place: each.num_cached for each in self._batcher.rows}
        self._move(self._batcher.remove(row), lengths)
        self._forget_unused(row.request.adapter)

    def _forget_unused(self, digest: str) -> None:
        if digest not in self._leaving or any(row.request.adapter == digest for row in self._rows.values()):
            return
        if any(probe.digest == digest for probe in self._probes):
            for probe in [probe for probe in self._probes if probe.digest == digest]:
                self._probes.remove(probe)
                probe.done.set_exception(ConfigError("this adapter was unloaded", where="adapter", got=digest[:12]))
        self.decoder.lora.deactivate(digest)
        self.adapters.pop(digest, None)
        self._prefixes.forget(digest)
        for gone in self._leaving.pop(digest):
            gone.set_result(None)
