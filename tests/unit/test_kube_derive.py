"""The schemas that ship are KubeRay's, all of what binds and none of the text; the same sources give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kube.crds import SHIPPED, kuberay, read_folder
from cluster.kube.derive import TEXT, compact, main
from ftcore.errors import ConfigError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "kuberay"


def test_what_ships_is_what_the_sources_give() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here: KubeRay's CRDs, to derive the shipped schemas again")
    assert compact(SHARED) == SHIPPED.read_text(encoding="utf-8")
    wanted = {(crd.api_version, crd.kind): bare(crd.schema) for crd in read_folder(SHARED) if crd.version == "v1"}
    assert {(crd.api_version, crd.kind): crd.schema for crd in kuberay()[1]} == wanted


def bare(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without its text, by another way than the one under test: fields that are called `description` stay."""
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            kept[key] = {name: bare(child) for name, child in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            kept[key] = bare(value)
        elif key not in TEXT:
            kept[key] = value
    return kept


def test_what_ships_says_of_which_release_it_is_and_stays_small() -> None:
    version, crds = kuberay()
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert version == "1.7.0" and sorted(shipped["sources"]) == [f"ray.io_{name}.yaml" for name in sorted(
        ("rayclusters", "raycronjobs", "rayjobs", "rayservices")
    )]  # fmt: skip
    assert sorted((crd.api_version, crd.kind, crd.has_status) for crd in crds) == [
        ("ray.io/v1", kind, True) for kind in ("RayCluster", "RayCronJob", "RayJob", "RayService")
    ]
    assert SHIPPED.stat().st_size < 100_000 and '"description":"' not in SHIPPED.read_text(encoding="utf-8")


def made(folder: Path, schema: dict[str, Any], **more: object) -> Path:
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}, "subresources": {"status": {}}}
    spec = {"group": "a.b", "names": {"kind": "Thing", "plural": "things"}, "scope": "Namespaced", "versions": [{**version, **more}]}
    crd = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "things.a.b"}, "spec": spec}
    folder.mkdir(exist_ok=True)
    (folder / "thing.yaml").write_text(yaml.safe_dump(crd))
    return folder


def test_a_field_called_description_is_kept_and_a_description_is_not(tmp_path: Path) -> None:
    text = {"type": "string", "description": "words"}
    folder = made(tmp_path, {"type": "object", "properties": {"description": text, "other": text}})
    (folder / "SOURCE.txt").write_text("a/b tag v1.2.3\n")
    derived = json.loads(compact(folder))
    assert derived["nodes"] == [{"type": "string"}, {"type": "object", "properties": {"description": 0, "other": 0}}]
    assert derived["kuberay"] == "1.2.3" and len(derived["sources"]["thing.yaml"]) == 64


def test_sources_that_do_not_say_their_release_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of which KubeRay"):
        compact(made(tmp_path, {"type": "object"}))
    with pytest.raises(ConfigError, match="one folder is wanted"):
        main([])


def test_a_folder_without_crds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: Deployment\n")
    with pytest.raises(ConfigError) as refused:
        read_folder(tmp_path)
    assert "1 files, none" in refused.value.got
    with pytest.raises(ConfigError, match="no folder"):
        read_folder(tmp_path / "nowhere")


def test_crds_may_stand_in_a_list_and_only_served_versions_count(tmp_path: Path) -> None:
    crd = yaml.safe_load((made(tmp_path / "one", {"type": "object"}) / "thing.yaml").read_text())
    old = {**crd["spec"]["versions"][0], "name": "v1alpha1", "served": False}
    crd["spec"]["versions"].append(old)
    (tmp_path / "all.json").write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": [crd]}))
    assert {(found.api_version, found.kind) for found in read_folder(tmp_path)} == {("a.b/v1", "Thing")}


def test_a_crd_that_is_not_complete_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nspec: {group: a.b}\n")
    with pytest.raises(ConfigError, match="not complete") as refused:
        read_folder(tmp_path)
    assert refused.value.where.endswith("a.yaml") and "versions" in refused.value.got
