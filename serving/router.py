"""Router: sends a request to the replica that has its adapter, unless that one is full.

In: the replicas, a request that names an adapter. Out: the replicas in order of preference. Runs in: the ingress, inside Serve's handle.

Which replica has an adapter needs no messages: each name ranks the replicas by a hash of the two (rendezvous hashing), so every ingress
sends it to the same one, and when a replica comes or goes only the adapters that rank it first move.
"""

from __future__ import annotations

import hashlib
import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class AdapterRouter(RequestRouter):
    """Rendezvous hashing over the adapter's name; the bare base goes to the less busy of two."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        name = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        if not candidate_replicas:
            return []
        if not name:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        ranked = sorted(candidate_replicas, key=lambda replica: _score(name, replica.replica_id.unique_id), reverse=True)
        return [[replica] for replica in ranked]


def _score(name: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{name}:{replica}".encode(), digest_size=8).digest()
