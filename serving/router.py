"""Router: sends a request to the replica that has its adapter, unless that one has as much to do as it is meant to.

In: the replicas, a request that names an adapter. Out: the replicas in order of preference. Runs in: the ingress, inside Serve's handle.

Which replica has an adapter needs no messages: each name ranks the replicas by a hash of the two (rendezvous hashing), so every ingress
sends it to the same one, and when a replica comes or goes only the adapters that rank it first move.
"""

from __future__ import annotations

import hashlib
import random
import sys
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class AdapterRouter(RequestRouter):
    """Rendezvous hashing over the adapter's name, with bounded loads: the next in rank takes what is over `full_at`. The bare base goes to
    the less busy of two."""

    _full_at = sys.maxsize

    def initialize_state(self, *, full_at: int = sys.maxsize, **_: Any) -> None:
        """Called by Ray Serve with the deployment's `request_router_kwargs`. `full_at`: requests under way and waiting at one replica."""
        self._full_at = full_at

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        name = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        if not candidate_replicas:
            return []
        if not name:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        ranked = sorted(candidate_replicas, key=lambda replica: _score(name, replica.replica_id.unique_id), reverse=True)
        num_first = 1 + next((at for at, replica in enumerate(ranked) if not self._is_full(replica)), len(ranked) - 1)
        return [ranked[:num_first], *([replica] for replica in ranked[num_first:])]  # of a rank, Serve takes the least busy

    def _is_full(self, replica: RunningReplica) -> bool:
        """As far as is known here: Serve remembers for 10 s what a replica said with its last answer, and counts what was sent since."""
        length = self.replica_queue_len_cache.get(replica.replica_id)
        return length is not None and length >= self._full_at


def _score(name: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{name}:{replica}".encode(), digest_size=8).digest()
