"""KubeRay's own samples pass the schemas: what an API server takes, the linter takes. They are not shipped: name a folder that has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.kube.documents import Document, parse
from tests.kube_texts import flaws_of

FOLDER = os.environ.get("FTCORE_KUBERAY_SAMPLES", "")


def test_every_sample_of_kuberay_passes_the_schemas() -> None:
    if not FOLDER:
        pytest.skip("FTCORE_KUBERAY_SAMPLES names no folder: KubeRay's ray-operator/config/samples")
    files = sorted(Path(FOLDER).rglob("*.yaml"))
    found = [each for file in files for each in parse(file.read_text(encoding="utf-8"), file.name)]
    assert len([each for each in found if isinstance(each, Document) and each.api_version == "ray.io/v1"]) > 80
    assert [flaw for file in files for flaw in flaws_of(file.read_text(encoding="utf-8"))] == []
