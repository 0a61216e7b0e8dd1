"""Tokens of an issuer, over real sockets: whom they name, every way to be refused, keys that change, an issuer that is away."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ftcore.errors import ConfigError
from serving import jwts
from serving.settings import load_settings
from tests.live_http import loop_thread, on_a_port
from tests.served import Store, served
from tests.served import store as store

FAKE = {"kind": "fake", "vocabulary": 250, "max_context": 256, "max_batch": 8, "token_s": 0.001}
KINDS = {"RS256": jwt.algorithms.RSAAlgorithm, "ES256": jwt.algorithms.ECAlgorithm, "EdDSA": jwt.algorithms.OKPAlgorithm}
ISSUER, AUDIENCE = "https://login.example", "ftcore"
SHARED = b"a secret that both sides would have to know"


@dataclass
class Login:
    """An issuer: its keys by id, and how often they were asked for."""

    keys: dict[str, tuple[str, Any]]
    num_asked: int = 0
    is_away: bool = False
    port: int = 0

    @property
    def jwks(self) -> bytes:
        rows = [
            json.loads(KINDS[kind].to_jwk(key.public_key())) | {"kid": kid, "alg": kind, "use": "sig"}
            for kid, (kind, key) in self.keys.items()
        ]
        shared = base64.urlsafe_b64encode(SHARED).decode().rstrip("=")
        rows += [{"kty": "oct", "kid": "shared", "k": shared}, {"kty": "new", "kid": "new"}, rows[0] | {"kid": "enc", "use": "enc"}]
        return json.dumps({"keys": rows}).encode()

    def token(self, kid: str = "rsa", headers: dict[str, Any] | None = None, key: Any = None, kind: str = "", **claims: Any) -> str:
        now = time.time()
        whole = {"iss": ISSUER, "aud": AUDIENCE, "exp": now + 60, "nbf": now - 1, "tenant": "acme", **claims}
        known = self.keys.get(kid, self.keys["rsa"])
        body = {name: value for name, value in whole.items() if value is not None}
        named = {name: value for name, value in {"kid": kid, **(headers or {})}.items() if value is not None}
        return jwt.encode(body, key or known[1], kind or known[0], headers=named)


@dataclass
class World:
    login: Login
    http: httpx.Client

    def models(self, token: str) -> httpx.Response:
        return self.http.get("/v1/models", headers={"authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def login() -> Iterator[Login]:
    found = Login(
        {
            "rsa": ("RS256", generate_rsa(65537, 2048)),
            "ec": ("ES256", generate_private_key(SECP256R1())),
            "ed": ("EdDSA", Ed25519PrivateKey.generate()),
        }
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.num_asked += 1
            self.send_response(503 if found.is_away else 200)
            self.end_headers()
            if not found.is_away:
                self.wfile.write(found.jwks)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.port = server.server_port
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def world(store: Store, login: Login, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    told = {"jwks": f"http://127.0.0.1:{login.port}/keys", "issuer": ISSUER, "audience": AUDIENCE}
    opened = served(store, tmp_path_factory.mktemp("jwt"), engine=FAKE, jwt=told)
    with loop_thread() as do:
        server = do(opened.__aenter__())
        with on_a_port(server, do) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
            yield World(login, http)
        do(opened.__aexit__(None, None, None))


def soon(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kid", ["rsa", "ec", "ed"])
def test_a_token_opens_what_is_its_tenants(world: World, kid: str) -> None:
    for tenant, names in (("acme", ["base", "sales", "support"]), ("bolt", ["base", "legal", "support"])):
        reply = world.models(world.login.token(kid, tenant=tenant, aud=["another", AUDIENCE]))
        assert [row["id"] for row in reply.json()["data"]] == names, reply.text
    assert world.models(world.login.token(kid, nbf=None)).status_code == 200


def bad_tokens(login: Login) -> dict[str, str]:
    now, good = time.time(), login.token()
    head, body, signature = good.split(".")
    rsa = login.keys["rsa"][1]
    public = rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def packed(tree: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(tree).encode()).decode().rstrip("=")

    def by_hand(secret: bytes, kid: str) -> str:  # the library refuses to make one
        start = f"{packed({'alg': 'HS256', 'typ': 'JWT', 'kid': kid})}.{body}"
        made = hmac.new(secret, start.encode(), hashlib.sha256).digest()
        return f"{start}.{base64.urlsafe_b64encode(made).decode().rstrip('=')}"

    other = json.loads(base64.urlsafe_b64decode(body + "=="))
    return {
        "none": f"{packed({'alg': 'none', 'kid': 'rsa'})}.{body}.",
        "none, signed": f"{packed({'alg': 'none', 'kid': 'rsa'})}.{body}.{signature}",
        "public key as secret": by_hand(public, "rsa"), "a shared secret": by_hand(SHARED, "shared"), "no signature": f"{head}.{body}.",
        "another tenant put in": f"{head}.{packed({**other, 'tenant': 'bolt'})}.{signature}",
        "stranger's key": login.token(key=generate_rsa(65537, 2048)), "another of the keys": login.token("ec", key=rsa, kind="RS256"),
        "algorithm not taken": login.token(kind="PS256"), "an encryption key": login.token("enc"),
        "no kid": login.token(headers={"kid": None}),
        "kid of another type": f"{packed({'alg': 'RS256', 'kid': ['rsa']})}.{body}.{signature}", "unknown kid": login.token("nobody"),
        "jku": login.token("nobody", {"jku": "http://127.0.0.1:1/keys"}), "crit": login.token(headers={"crit": ["x"], "x": 1}),
        "expired": login.token(exp=now - 60), "not yet": login.token(nbf=now + 60), "no end": login.token(exp=None),
        "another audience": login.token(aud="another"), "no audience": login.token(aud=None),
        "another issuer": login.token(iss="https://evil.example"), "no issuer": login.token(iss=None),
        "no tenant": login.token(tenant=None), "unknown tenant": login.token(tenant="nobody"), "no name": login.token(tenant=["acme"]),
        "a path": login.token(tenant="../acme"), "huge": login.token(padding="x" * 9000), "garbage": "a.b.c", "dots": ".." ,
        "deep": f"{packed({'kid': 'rsa'})[:-2]}.{'W' * 3000}.x", "a key": "ft_" + "a" * 43,
    }  # fmt: skip


def test_whatever_is_wrong_with_a_token_it_is_told_in_the_same_words(world: World) -> None:
    bad = bad_tokens(world.login)
    told = {name: world.models(token) for name, token in bad.items()}
    assert {name: reply.status_code for name, reply in told.items()} == dict.fromkeys(bad, 401)
    assert len({reply.text for reply in told.values()}) == 1
    assert world.models(world.login.token()).status_code == 200


def test_unknown_keys_make_nobody_ask_the_issuer_often_and_a_new_key_comes_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwts, "REFETCH_S", 3600.0)
    before = -1
    while before != world.login.num_asked:  # a fetch that was under way
        before = world.login.num_asked
        time.sleep(1)
    assert {world.models(world.login.token(f"kid-{number}")).status_code for number in range(100)} == {401}
    time.sleep(0.5)
    assert world.login.num_asked == before, "no token makes this server ask more often than REFETCH_S"
    world.login.keys["next"] = ("EdDSA", Ed25519PrivateKey.generate())
    monkeypatch.setattr(jwts, "REFETCH_S", 0.1)
    soon(lambda: world.models(world.login.token("next")).status_code == 200)
    del world.login.keys["next"]
    monkeypatch.setattr(jwts, "REFRESH_S", 0.1)
    soon(lambda: world.models(world.login.token("next")).status_code == 401)


def test_while_the_issuer_is_away_known_keys_go_on_and_then_no_more(world: World, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwts, "REFRESH_S", 0.05)
    monkeypatch.setattr(jwts, "REFETCH_S", 0.05)
    try:
        world.login.is_away, before = True, world.login.num_asked
        soon(lambda: world.login.num_asked > before + 3)
        assert world.models(world.login.token()).status_code == 200
        monkeypatch.setattr(jwts, "STALE_S", 0.1)
        soon(lambda: world.models(world.login.token()).status_code == 503)
        assert world.models("ft_" + "a" * 43).status_code == 401, "keys are judged as before"
        assert world.http.get("/v1/models").status_code == 401
    finally:
        world.login.is_away = False
    monkeypatch.setattr(jwts, "STALE_S", 60)
    soon(lambda: world.models(world.login.token()).status_code == 200)


def test_keys_from_a_file(login: Login, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_bytes(login.jwks)
    base = ["base=b", "store=s", "tenants=t", f"jwt.issuer={ISSUER}", f"jwt.audience={AUDIENCE}"]
    settings = load_settings(None, [*base, f"jwt.jwks={tmp_path / 'keys.json'}", "jwt.algorithms=[ES256]"])
    assert settings.jwt is not None
    issuer = jwts.Issuer(settings.jwt)
    issuer.refresh()
    caller = issuer.caller(login.token("ec"), {"acme": settings.limits})
    assert caller is not None and (caller.tenant, caller.key) == ("acme", "jwt:ec")
    assert issuer.caller(login.token("rsa"), {"acme": settings.limits}) is None, "of an algorithm that is not taken here"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["jwt.jwks=k", "jwt.algorithms=[HS256]"], "RS256"), (["jwt.jwks=k", "jwt.algorithms=[none]"], "RS256"),
        (["jwt.jwks=k", "tenants=''"], "tenants=FOLDER"),
        (["jwt.jwks=http://login.example/keys"], "jwks"), (["jwt.jwks=ftp://login.example/keys"], "jwks"),
        (["jwt.jwks=https://a:b@c/keys"], "jwks"),
    ],
)  # fmt: skip
def test_settings_that_would_be_unsafe_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_settings(None, ["base=b", "store=s", "tenants=t", "jwt.issuer=i", "jwt.audience=a", *words])
