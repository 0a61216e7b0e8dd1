"""JWTs: tokens of an issuer elsewhere, taken beside keys. Its public keys are fetched now and then; no request waits for that.

In: a token, the tenants there are. Out: a Caller, or None. Runs in: the ingress.

A token has to be signed by a key that the issuer publishes, with an algorithm that the settings name (asymmetric ones alone), for this
issuer and audience, and in its time; its claim has to name a tenant of the store. Whatever is wrong with it is told in the same words.
A token whose key is not known is refused, and has the keys fetched again soon: at most once in REFETCH_S, whoever sends how many.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
from jwt.types import Options

from serving.settings import Jwt, Limits
from serving.tenants import Caller

log = logging.getLogger(__name__)
MAX_CHARACTERS = 8192
LEEWAY_S = 10.0
"""By how much clocks may differ."""
FETCH_S, REFRESH_S, REFETCH_S = 10.0, 300.0, 10.0
"""Longest wait for the issuer; how often its keys are fetched, and how often at most after a failure or for an unknown key."""
STALE_S = 3600.0
"""Keys that could not be fetched again for this long are no longer trusted: a withdrawn one could be among them."""


class Issuer:
    """The issuer's keys as they were last seen."""

    def __init__(self, settings: Jwt) -> None:
        self._settings = settings
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched = self._asked = -STALE_S - time.monotonic()
        self._is_due = True
        """The last fetch failed, or a token named a key that was not in it."""

    @property
    def is_stale(self) -> bool:
        return time.monotonic() - self._fetched > STALE_S

    def refresh(self) -> None:
        """Blocks, when there is something to do: call it again and again, in a thread."""
        if time.monotonic() - self._asked < (REFETCH_S if self._is_due else REFRESH_S):
            return
        self._asked, self._is_due = time.monotonic(), False
        try:
            self._keys, self._fetched = self._usable(self._fetch()), time.monotonic()
        except (jwt.PyJWTError, OSError, ValueError) as error:
            self._is_due = True
            log.warning("the keys of %s cannot be fetched: %s", self._settings.issuer, error)

    def caller(self, token: str, tenants: Mapping[str, Limits]) -> Caller | None:
        """Who a good token names; None for any other."""
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            if not isinstance(kid, str) or kid not in self._keys:
                self._is_due = True
                return None
            claims = self._claims(token, self._keys[kid])
        except (jwt.PyJWTError, ValueError):
            return None
        tenant = claims.get(self._settings.tenant_claim)
        return Caller(tenant, f"jwt:{kid[:64]}", tenants[tenant]) if isinstance(tenant, str) and tenant in tenants else None

    def _claims(self, token: str, key: jwt.PyJWK) -> dict[str, Any]:
        wanted = self._settings
        options: Options = {"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True}
        return jwt.decode(token, key, wanted.algorithms, options, audience=wanted.audience, issuer=wanted.issuer, leeway=LEEWAY_S)

    def _fetch(self) -> Any:
        if self._settings.is_file:
            return json.loads(Path(self._settings.jwks).read_bytes())
        return jwt.PyJWKClient(self._settings.jwks, cache_jwk_set=False, timeout=FETCH_S).fetch_data()

    def _usable(self, tree: Any) -> dict[str, jwt.PyJWK]:
        """By id. What is not for signatures, or of another algorithm, is left out. Raises ValueError when nothing is left."""
        rows = tree.get("keys") if isinstance(tree, dict) else None
        found = {}
        for row in rows if isinstance(rows, list) else []:
            try:
                key = jwt.PyJWK(row)
            except (jwt.PyJWTError, AttributeError, TypeError):  # of a kind that this library does not know
                continue
            if isinstance(key.key_id, str) and key.public_key_use in ("sig", None) and key.algorithm_name in self._settings.algorithms:
                found[key.key_id] = key
        if not found:
            raise ValueError("no key with an id, for signatures, of these algorithms: " + ", ".join(self._settings.algorithms))
        return found


def token_of(header: str | None) -> str:
    """What could be a token in an `Authorization` header; empty when nothing could."""
    scheme, _, token = (header or "").partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and len(token) <= MAX_CHARACTERS and token.count(".") == 2 else ""
