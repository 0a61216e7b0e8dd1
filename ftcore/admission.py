"""Admission: who is let into the batch, who steps back, and what each one needs there: a place in the cache, a slot for its adapter.

In: rows that come and go. Out: rows with places. Runs in: the engine's thread, between two steps.

An order of fairness between owners; memory for keys and values is a place each, so whoever is in can always go on. A row whose adapter
finds no slot lets others pass, up to `PATIENCE` of them; so does a proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from ftcore.batching import Batcher, Row, Step
from ftcore.decoder import Decoder
from ftcore.fairness import Fairness
from ftcore.lora_updates import LoadedAdapter
from ftcore.prefixes import Prefixes

PATIENCE = 32
"""Rows that may be let in before one that waits for a slot; then nobody is, until it has one."""


class Admission:
    """One for each engine."""

    def __init__(
        self,
        batcher: Batcher,
        decoder: Decoder,
        prefixes: Prefixes,
        adapters: Mapping[str, LoadedAdapter],
        withdraw: Callable[[set[str]], set[str]],
    ) -> None:
        """`withdraw`: ends the rows of those digests whose slots hold other weights than were loaded, and tells which these are."""
        self.batcher, self.prefixes = batcher, prefixes
        self.fair = Fairness()
        self.num_reused = self.num_preempted = 0
        self._num_rows: Counter[str] = Counter()
        """By owner: those with places and those that wait, proofs apart."""
        self._decoder, self._adapters, self._withdraw = decoder, adapters, withdraw

    def enter(self, row: Row) -> None:
        if row.wants == "logits":
            self.batcher.proofs.append(row)
        else:
            owner = row.request.salt
            self.fair.joins(owner, self._num_rows)
            self._num_rows[owner] += 1
            self.batcher.waiting.append(row)

    def admit(self) -> None:
        """Lets waiting rows in while there are places and slots for them, and the first proof, which has a place of its own."""
        batcher = self.batcher
        proof = batcher.next_proof
        if proof is not None and self._has_slot(proof.request.adapter, self._needed()):
            batcher.admit_proof()
            proof = None
        if not batcher.waiting or not (batcher.has_room or self._made_room()):
            return
        needed, blocked, oldest = self._needed(), set[str](), proof
        for row in self.fair.order(list(batcher.waiting)):
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
            self._restore(row)

    def hold(self, beside: Callable[[int], int]) -> None:
        """Has only as many rows of who asks much take part in the next step as `beside` allows."""
        lengths = {row.place: row.num_cached for row in self.batcher.rows}
        self._move(self.batcher.hold(beside), lengths)

    def settle(self) -> None:
        """Rows that have read their prompts join those that decode."""
        lengths = {row.place: row.num_cached for row in self.batcher.rows}
        self._move(self.batcher.settle(), lengths)

    def remove(self, row: Row) -> None:
        """Takes a row out for good, whatever it is doing."""
        owner = row.request.salt
        if row.wants != "logits":
            self._num_rows[owner] -= 1
            if not self._num_rows[owner]:
                del self._num_rows[owner]
        self._take_out(row)

    def _take_out(self, row: Row) -> None:
        lengths = {each.place: each.num_cached for each in self.batcher.rows}
        self._move(self.batcher.remove(row), lengths)

    def keep_prefixes(self, step: Step) -> None:
        """Of prompts that this step has read to their ends."""
        for chunk in step.chunks:
            row = chunk.row
            if row.num_cached == row.num_prompt and self.prefixes.limit and row in self.batcher.reading:
                owner = (row.request.adapter, row.request.salt)
                self.prefixes.keep(owner, row.request.prompt, partial(self._decoder.cache.saved, row.place))

    def _restore(self, row: Row) -> None:
        """What is known of a row's keys and values: its own, if it stepped back, or those of a prompt that began alike."""
        if row.kept is not None:
            self._decoder.cache.restore(row.place, row.kept)
            row.kept = None
            return
        self.fair.read(row.request.salt, row.num_prompt)
        saved = self.prefixes.longest((row.request.adapter, row.request.salt), row.tokens[:-1])
        if saved is not None:
            self._decoder.cache.restore(row.place, saved)
            row.num_cached = saved.shape[-2]
            self.num_reused += row.num_cached

    def _needed(self, but: Row | None = None) -> set[str]:
        """Digests whose slots somebody is using."""
        return {row.request.adapter for row in self.batcher.under_way if row is not but} - {""}

    def _has_slot(self, digest: str, needed: set[str]) -> bool:
        """Makes an adapter active beside `needed`, if there is room; joins `needed` then."""
        if not digest or digest in needed:
            return True
        adapter = self._adapters[digest]
        if not self._decoder.lora.activate(digest, adapter.rank, adapter.updates, needed):
            return False
        needed.add(digest)
        return True

    def _made_room(self) -> bool:
        """Has a row of an owner with too many places step back for one with too few. Its keys and values are kept meanwhile: of fewer rows
        than there are places, for it comes in again before its owner's others."""
        batcher = self.batcher
        first = next(self.fair.order(batcher.waiting))
        owner = self.fair.gives_way(first.request.salt, Counter(row.request.salt for row in batcher.rows))
        back = min((row for row in batcher.decoding if row.request.salt == owner), key=lambda row: len(row.tokens), default=None)
        if back is None or self._withdraw({back.request.adapter} - {""}):  # asked now: its slot may be another's when it ends
            return back is not None
        if not self._has_slot(first.request.adapter, self._needed(but=back)):
            return False
        back.kept = self._decoder.cache.saved(back.place, back.num_cached)
        self._take_out(back)
        batcher.waiting.appendleft(back)
        self.num_preempted += 1
        return True

    def _move(self, moves: list[tuple[int, int]], lengths: dict[int, int]) -> None:
        for source, target in moves:
            self._decoder.cache.move([(source, target)], [lengths[source]])
            lengths[target] = lengths[source]
