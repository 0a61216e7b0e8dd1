"""Exposure: where a server may listen, and whether what it says there can be read on the way. Refused before anything listens.

In: settings, a host. Out: nothing, or a ConfigError with the remedy. Runs in: the process of `ftcore serve`, the admin API.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography.x509 import load_pem_x509_certificate, load_pem_x509_certificates

from ftcore.errors import ClusterError, ConfigError
from serving.gate import is_here
from serving.settings import ServeSettings, Tls


def require_guarded(settings: ServeSettings, where: str, host: str, *, has_keys: bool, make_one: str) -> None:
    """Beyond this machine there are keys, and nobody on the way reads them. `make_one` makes a key."""
    if settings.tls is not None:
        _require_pair(settings.tls)
    if is_here(host) and (has_keys or not settings.behind_proxy):
        return
    if not has_keys:
        raise ConfigError(
            "without keys only this machine may ask", where=where, got=host, wanted="127.0.0.1, or keys", remedy=f"make one: {make_one}"
        )
    if settings.tls is None and not settings.behind_proxy:
        raise ConfigError(
            "keys and answers would cross the network in the clear", where=where, got=host, wanted="127.0.0.1, or TLS",
            remedy="tls.cert=FILE tls.key=FILE; or behind_proxy=true, where a proxy before this server ends TLS",
        )  # fmt: skip


def _require_pair(tls: Tls) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.cert, tls.key, password="")  # else a locked key asks the terminal
    except (OSError, ValueError) as error:
        raise ConfigError(
            "this certificate and key cannot be used", where=f"{tls.cert}, {tls.key}", got=str(error)[:200],
            wanted="a certificate and its own private key, in PEM, without a password",
        ) from error  # fmt: skip


def require_served(tls: Tls, host: str, port: int) -> None:
    """Whoever asks that port meets this certificate. A Serve that ran already keeps the options it began with; HAProxy ends no TLS."""
    try:
        seen = ssl.get_server_certificate(({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port), timeout=10)
        is_ours = load_pem_x509_certificate(seen.encode()) == load_pem_x509_certificates(Path(tls.cert).read_bytes())[0]
    except OSError:  # ssl.SSLError too: it speaks plain HTTP
        is_ours = False
    if not is_ours:
        raise ClusterError(
            "Ray Serve does not answer with this certificate", where=f"{host}:{port}", wanted=tls.cert,
            remedy="end the Serve that runs there already (serve shutdown); unset RAY_SERVE_ENABLE_HA_PROXY",
        )  # fmt: skip
