"""Where a server may listen: with keys, and unread on the way; what else is refused before it listens. TLS is met as it was asked for."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ftcore.cli import main
from ftcore.errors import ClusterError, ConfigError
from serving.admin import admin_running
from serving.app import application, build
from serving.exposure import require_served
from serving.settings import ServeSettings, Tls, load_settings
from serving.tenants import key_hash, new_clear_key
from tests.certificates import make_pair

FAR = ("0.0.0.0", "::", "10.0.0.7", "serve.example", "127.0.0.1.example")
KEYS = {"tenants": "t"}


def of(**keys: Any) -> ServeSettings:
    return ServeSettings.model_validate({"base": "b", "store": "s", **keys})


@pytest.mark.parametrize("host", FAR)
def test_beyond_this_machine_it_takes_keys_and_tls_or_a_proxy(tmp_path: Path, host: str) -> None:
    pair = make_pair(tmp_path)
    tls = {"cert": str(pair.cert), "key": str(pair.key)}
    for settings, told in (
        (of(host=host), "without keys"), (of(host=host, tls=tls), "without keys"), (of(host=host, **KEYS), "in the clear"),
        (of(host=host, **KEYS, tls=tls), ""), (of(host=host, **KEYS, behind_proxy=True), ""),
    ):  # fmt: skip
        if told:
            with pytest.raises(ConfigError, match=told) as refused:
                application(settings)
            assert refused.value.remedy and refused.value.where == "host"
        else:
            application(settings)
    admin = {"host": host, "port": 0}
    for more in ({"admin": admin}, {"admin": admin, "tls": tls}, {"admin": {**admin, "keys": {"ada": "0" * 64}}}):
        with pytest.raises(ConfigError) as refused, admin_running(of(**KEYS, **more)):
            pass
        assert refused.value.where == "admin.host"


def test_on_this_machine_the_clear_will_do(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        application(of(host=host))
        application(of(host=host, **KEYS))
    with pytest.raises(ConfigError, match="behind_proxy needs tenants"):
        load_settings(None, ["base=b", "store=s", "behind_proxy=true"])
    with pytest.raises(ConfigError, match="without keys"), admin_running(of(**KEYS, behind_proxy=True, admin={"port": 0})):
        pass


def test_a_certificate_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair, other = make_pair(tmp_path), make_pair(tmp_path, "other")
    (tmp_path / "empty").write_text("")
    for cert, key in ((pair.cert, other.key), (pair.cert, pair.locked), (pair.cert, tmp_path / "gone"), (tmp_path / "empty", pair.key)):
        with pytest.raises(ConfigError, match="cannot be used"):
            application(of(tls={"cert": str(cert), "key": str(key)}))
    assert main(["serve", "base=b", "store=s", "tenants=t", "haproxy=true", f"tls.cert={pair.cert}", f"tls.key={pair.key}"]) == 2
    assert "ends no TLS" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="http_options"):
        build({"base": "b", "store": "s", "tls": {"cert": str(pair.cert), "key": str(pair.key)}})


def test_the_admin_api_speaks_tls_with_that_certificate_alone(tmp_path: Path) -> None:
    pair, other, key = make_pair(tmp_path), make_pair(tmp_path, "other"), new_clear_key()
    (tmp_path / "store").mkdir()
    settings = of(tls={"cert": str(pair.cert), "key": str(pair.key)}, admin={"port": 0, "keys": {"ada": key_hash(key)}})
    settings = settings.model_copy(update={"store": str(tmp_path / "store"), "audit_spool": str(tmp_path / "spool")})
    with admin_running(settings) as url:
        assert url.startswith("https://127.0.0.1:")
        headers = {"authorization": f"Bearer {key}"}
        ours = ssl.create_default_context(cafile=pair.cert)
        assert httpx.get(f"{url}/admin/adapters", headers=headers, verify=ours, trust_env=False, timeout=60).json() == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/admin/adapters", verify=ssl.create_default_context(cafile=other.cert), trust_env=False, timeout=60)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{url}/admin/adapters".replace("https", "http"), trust_env=False, timeout=60)
        port = int(url.rpartition(":")[2])
        require_served(Tls(cert=str(pair.cert), key=str(pair.key)), "127.0.0.1", port)
        with pytest.raises(ClusterError, match="this certificate"):
            require_served(Tls(cert=str(other.cert), key=str(other.key)), "127.0.0.1", port)


def test_a_port_that_speaks_plain_http_is_found_out(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    settings = of(admin={"port": 0}).model_copy(update={"store": str(tmp_path / "store"), "audit_spool": str(tmp_path / "spool")})
    with admin_running(settings) as url, pytest.raises(ClusterError, match="serve shutdown"):
        require_served(Tls(cert=str(pair.cert), key=str(pair.key)), "127.0.0.1", int(url.rpartition(":")[2]))
