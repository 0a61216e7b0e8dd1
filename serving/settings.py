"""Settings: everything `ftcore serve` and `serving.app:build` can be told, as one strict section.

In: a YAML file, PATH=VALUE. Out: ServeSettings. Runs in: the command, the Serve controller's build task, every replica; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, StringConstraints, ValidationError, ValidationInfo, field_validator, model_validator

from ftcore.card import Digest, Name
from ftcore.engines.base import EngineChoice
from ftcore.errors import ConfigError
from ftcore.recipe_errors import explain
from ftcore.recipe_file import Tree, by_line, override, read_tree
from ftcore.section import Section, leaf_paths

S = TypeVar("S", bound=Section)
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
METERS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month")


class Limits(Section):
    """What one tenant may ask: at once, and in a minute, a day or a month (UTC)."""

    max_concurrent: int = Field(64, ge=1)
    """Answers under way and waiting, in each copy of the ingress; further ones get 429."""
    max_tokens: int = Field(4096, ge=1)
    """Longest answer."""
    max_choices: int = Field(8, ge=1)
    """`n`."""
    requests_per_minute: int | None = Field(None, ge=1)
    """None, here and below: no such limit. Further ones get 429 until the next minute begins."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Of prompts and answers. An answer's longest possible length is reserved before it begins; what it did not use comes back."""
    tokens_per_day: int | None = Field(None, ge=1)
    tokens_per_month: int | None = Field(None, ge=1)

    @property
    def meters(self) -> dict[str, int]:
        """Key -> limit, of what is counted over time."""
        return {key: limit for key in METERS if (limit := getattr(self, key)) is not None}

    @property
    def named(self) -> dict[str, int | None]:
        """What was said of them; the rest is a default."""
        return self.model_dump(exclude_unset=True)


class Metrics(Section):
    """Who may read `/metrics` and `/status`, which name every tenant, and how many of them."""

    key_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """SHA-256 of the key that may (`ftcore serve --new-metrics-key` makes one); empty: this machine, or nobody where there are tenants."""
    labels: int = Field(100, ge=2, le=10_000)
    """Pairs of tenant and adapter that get figures of their own; the rest is counted together as `_other`."""


class Admin(Section):
    """The API by which operators look after tenants, keys and adapters: on a port of its own, with keys of its own."""

    port: int | None = Field(None, ge=0, le=65535)
    """None: there is none."""
    host: str = "127.0.0.1"
    keys: dict[Name, Digest] = Field(default_factory=dict)
    """Who may -> SHA-256 of their key (`ftcore serve --new-admin-key` makes one). The name stands in the audit log beside each change.
    Empty: only this machine may ask, so that no proxy may be before it."""


class Jwt(Section):
    """Tokens of an issuer elsewhere, taken beside keys: each names a tenant that `tenants` holds, whose limits are its own."""

    jwks: str = Field(pattern=r"^(https://[^\s@]+|http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?/[^\s@]*|[^:]+)$")
    """Where the issuer's public keys are: an https address (http on this machine alone), or a file."""
    issuer: str = Field(min_length=1)
    """What `iss` has to be."""
    audience: str = Field(min_length=1)
    """What `aud` has to be, or hold."""
    tenant_claim: str = Field("tenant", min_length=1)
    """The claim that names the tenant."""
    algorithms: tuple[Algorithm, ...] = Field(("RS256", "ES256", "EdDSA"), min_length=1)
    """All with a public key: nothing that this server holds could sign a token."""

    @property
    def is_file(self) -> bool:
        return "://" not in self.jwks


class Tls(Section):
    """PEM files, on every machine where this server listens."""

    cert: str = Field(min_length=1)
    """The certificate, and after it those between it and the root."""
    key: str = Field(min_length=1)
    """Its private key, without a password."""


ALL = "all"
Desired = Annotated[str, StringConstraints(pattern=rf"^({ALL}|[a-z0-9][a-z0-9._-]{{0,62}}/[a-z0-9][a-z0-9._-]{{0,62}})$")]


class Replicas(Section):
    """Copies of the base: a number of them, or as many between two as the load asks for."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    target: int = Field(16, ge=1)
    """Answers under way and waiting that one replica is meant to have; `engine.max_batch` of them are computed at once."""
    up_after_s: float = Field(10, ge=0)
    """How long the load is above that before there is one more."""
    down_after_s: float = Field(300, ge=0)
    """How long it is below before there is one less; what that one is answering is finished first (`drain_s`)."""

    @model_validator(mode="before")
    @classmethod
    def _a_number(cls, value: object) -> object:
        return {"min": value, "max": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class Ingress(Section):
    """What takes requests in: reads keys and names, hands jobs on. Further copies share limits over time and the audit log exactly;
    `limits.max_concurrent` holds in each copy by itself."""

    replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0, ge=0)
    """Logical CPUs of a copy. Above 0 none sits on a head that has none, so that a head may go while clients ask."""


class Base(Section):
    """One model, and what serves it."""

    base: str = Field(min_length=1)
    """Folder or hub name of the base."""
    base_revision: str = "main"
    chat_template: str = "auto"
    """As in a recipe's `model.chat_template`: adapters are served under the template they were trained with, and no other."""
    tool_format: Literal["auto", "hermes", "llama3", "mistral"] = "auto"
    """How the base writes tool calls; `auto`: as its chat template shows."""
    engine: EngineChoice = Field(default="torch")
    """What computes."""
    replicas: Replicas = Replicas()
    """Copies of the base: a number, or `{min, max}` to follow the load."""
    num_cpus: float = Field(1, ge=0)
    """Logical CPUs of a replica."""
    num_gpus: float = Field(0, ge=0)
    """GPUs of a replica."""
    queue: int = Field(256, ge=1)
    """Requests a replica takes at most, under way and waiting; further ones get 503 with Retry-After."""
    adapter_mib: int = Field(4096, ge=1)
    """Memory for loaded adapters; those not in use leave first."""
    preload: tuple[Desired, ...] = ()
    """Adapters (`tenant/name`) that a replica holds before it takes requests, and goes on holding; `all`: every name, while they fit."""
    only: tuple[Name, ...] = ()
    """Tenants that see this base and may ask it, and whose adapters on it are answered; empty: every one."""

    @field_validator("preload", "only", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    def is_for(self, tenant: str) -> bool:
        return not self.only or tenant in self.only

    @property
    def preloads_all(self) -> bool:
        return ALL in self.preload


class ServeSettings(Base):
    """One base or several, many tenants' adapters. What stands in `Base` is the first one's."""

    base_name: Name = "base"
    """What clients call the bare base."""
    bases: dict[Name, Base] = Field(default_factory=dict)
    """Further bases, by what clients call them: a full fine-tune, for one. What is left out has its default, not what the first one has.
    Each adapter is answered on the base that it was trained on."""
    store: str = Field(min_length=1)
    """The adapter store: a folder, s3:// or another fsspec path."""
    tenants: str = ""
    """Folder of tenants and their keys (`ftcore tenants`); empty: no keys, and only this machine may ask, as tenant `local_tenant`."""
    local_tenant: Name = "demo"
    """Whose adapters are served when there are no keys."""
    host: str = "127.0.0.1"
    """Any other than this machine's own is refused without keys, and in the clear: it takes `tls` or `behind_proxy`."""
    port: int = Field(8000, ge=0, le=65535)
    haproxy: bool = False
    """HAProxy in front, in place of Ray Serve's own proxy: several times its requests/s. Its statistics, which name no
    tenant, are shown to whoever reaches this machine, so it is for servers with keys."""
    tls: Tls | None = None
    """HTTPS, here and on the admin API's port. None: plain HTTP."""
    behind_proxy: bool = False
    """TLS ends in a proxy before this server, so it may listen in the clear. It takes keys, since every client comes from the proxy's
    address then; nothing here believes what a header like X-Forwarded-For says of another."""
    poll_s: float = Field(1.0, gt=0, le=5)
    """How often the store is asked what names point at now, and what was revoked."""
    max_body_kib: int = Field(1024, ge=1)
    """Largest request."""
    body_s: float = Field(30.0, gt=0)
    """How long a request may take to come in."""
    begin_s: float = Field(60.0, gt=0)
    """How long it may wait for a replica that begins to answer it; then it gets 503 with Retry-After."""
    drain_s: float = Field(300.0, gt=0)
    """How long a replica or an ingress that ends goes on with the answers under way: for 4,096 tokens, 14 a second."""
    limits: Limits = Limits()
    """Of every tenant, but where it has its own (`ftcore tenants limits`)."""
    audit_spool: str = ""
    """Local folder where audit lines wait to be sealed into the store; empty: in a local store itself, else below ~/.local/state/ftcore."""
    ingress: Ingress = Ingress()
    metrics: Metrics = Metrics()
    admin: Admin = Admin()
    jwt: Jwt | None = None
    """None: keys alone."""
    otel_endpoint: str = Field("", pattern=r"^(https?://[^\s@]+)?$")
    """Where traces go (OTLP over HTTP, like `http://localhost:4318/v1/traces`); empty: nowhere."""

    @field_validator("bases")
    @classmethod
    def _one_name_each(cls, bases: dict[str, Base], info: ValidationInfo) -> dict[str, Base]:
        first = info.data.get("base_name")
        if first in bases:
            raise ValueError(f"{first} is what clients call the first base (base_name): give this one another name")
        return bases

    @model_validator(mode="after")
    def _tokens_name_tenants(self) -> ServeSettings:
        if self.jwt is not None and not self.tenants:
            raise ValueError("jwt needs tenants=FOLDER: a token names one of them")
        return self

    @model_validator(mode="after")
    def _a_proxy_hides_who_asks(self) -> ServeSettings:
        if self.behind_proxy and not self.tenants:
            raise ValueError("behind_proxy needs tenants=FOLDER: behind a proxy everybody seems to be on this machine")
        return self

    @property
    def is_local_only(self) -> bool:
        return not self.tenants

    @property
    def all_bases(self) -> dict[str, Base]:
        """What clients call it -> a base; the first one first."""
        return {self.base_name: self, **self.bases}

    def bases_of(self, tenant: str) -> list[str]:
        """Names of the bases that a tenant sees."""
        return [name for name, base in self.all_bases.items() if base.is_for(tenant)]

    def of(self, name: str) -> ServeSettings:
        """The same settings with that base as the first one: what its replicas are given."""
        own, others = self.all_bases[name], {other: base for other, base in self.all_bases.items() if other != name}
        return self.model_copy(update={**{key: getattr(own, key) for key in Base.model_fields}, "base_name": name, "bases": others})


def settings_of(words: Sequence[str]) -> ServeSettings:
    """From a command line: a YAML file or none, then `path=value`. Raises as `load_settings` does."""
    named = words and "=" not in words[0]
    return load_settings(Path(words[0]) if named else None, words[1:] if named else words)


def load_settings(path: Path | None, overrides: Sequence[str] = ()) -> ServeSettings:
    """From a YAML file (or nothing) and `path=value`. Raises ConfigError that lists every problem with its line."""
    tree = read_tree(path) if path is not None else Tree({}, name="settings")
    return _checked(tree, ServeSettings, overrides, "`ftcore serve --help` names the keys")


def changed_limits(limits: Limits, overrides: Sequence[str]) -> Limits:
    """`limits` with `key=value` put in (`key=null` takes one away). Raises ConfigError as `load_settings` does."""
    return _checked(Tree(limits.named, name="settings"), Limits, overrides, f"the keys: {', '.join(leaf_paths(Limits))}")


def _checked(tree: Tree, kind: type[S], overrides: Sequence[str], remedy: str) -> S:
    for text in overrides:
        override(tree, text)
    problems = list(tree.problems)
    try:
        checked = kind.model_validate(tree.values)
        if not problems:
            return checked
    except ValidationError as error:
        problems += explain(error, tree, kind)
    lines = "".join(f"\n  {problem}" for problem in sorted(problems, key=by_line))
    raise ConfigError(f"{len(problems)} problem{'s' * (len(problems) != 1)} in the settings{lines}", remedy=remedy)
