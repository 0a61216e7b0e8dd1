"""Trees: numbers as Kubernetes and Go read them, and places where nothing stands."""

from __future__ import annotations

import pytest

from cluster.kube.documents import Document
from cluster.kube.practice.images import ray_version, tag
from cluster.kube.practice.secrets import is_secret
from cluster.kube.trees import go_duration_s, quantity, root, version


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("500m", 0.5),
        ("2", 2),
        ("1.5", 1.5),
        ("8Gi", 8 * 2**30),
        ("1k", 1000),
        ("1e3", 1000),
        ("1E", 1e18),
        ("2Ei", 2 * 2**60),
        ("8GiB", None),
        ("", None),
        ("9e999", None),
    ],
)
def test_quantities_are_read_as_kubernetes_does(text: str, amount: float | None) -> None:
    assert quantity(text) == amount


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300), ("1h30m", 5400), ("-5m", -300), ("1.5s", 1.5), ("0", 0), ("300", None), ("5 m", None), ("", None)]
)
def test_durations_are_read_as_go_does(text: str, seconds: float | None) -> None:
    assert go_duration_s(text) == seconds


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.52.0", (2, 52, 0)), ("v2.53.0rc1", (2, 53, 0)), ("2.9", (2, 9)), ("2", None), ("nightly", None), ("", None)]
)
def test_versions_are_read_as_the_operator_does(text: str, numbers: tuple[int, ...] | None) -> None:
    assert version(text) == numbers


@pytest.mark.parametrize(
    ("image", "found", "ray"),
    [
        ("rayproject/ray:2.60.0-py311-gpu", "2.60.0-py311-gpu", (2, 60, 0)),
        ("registry:5000/app:1.4.0-ray2.59.1", "1.4.0-ray2.59.1", (2, 59, 1)),
        ("registry:5000/app", "", None),
        ("app@sha256:0123", "", None),
        ("app:main", "main", None),
    ],
)
def test_an_images_tag_says_which_ray_it_holds(image: str, found: str, ray: tuple[int, ...] | None) -> None:
    assert (tag(image), ray_version(image)) == (found, ray)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "hf_abc", True),
        ("AWS_SECRET_ACCESS_KEY", "abc/def", True),
        ("REDIS_PASSWORD", "1234", True),
        ("apiKey", "abc", True),
        ("SSH_PUBLIC_KEY", "ssh-ed25519 AAAA", False),
        ("API-KEY", "abc", True),
        ("RAY_TLS_SERVER_KEY", "/etc/ray/tls/tls.key", False),
        ("TOKENIZERS_PARALLELISM", "true", False),
        ("MAX_TOKEN", "4096", False),
        ("RAY_AUTH_TOKEN", "$(TOKEN)", False),
        ("RAY_AUTH_MODE", "token", False),
        ("HF_TOKEN", "", False),
    ],
)
def test_a_secret_is_known_by_the_words_of_its_name(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret


def test_a_place_with_nothing_in_it_leads_on_to_nothing() -> None:
    place = root(Document("a.yaml", 1, {"spec": {"a": [1, {"b": None}], "c": "text"}}))
    assert place.down("spec", "a", 1, "b").path == "spec.a[1].b"
    assert not place.down("spec", "a", 1, "b").given
    assert not place.down("spec", "c", "deeper", 7, "still").given
    assert [item.value for item in place.down("spec", "c")] == []
    assert (place.down("spec", "a", 0).number, place.down("spec", "c").number) == (1, None)
