"""Kustomizations are built offline by what is on PATH, and a flaw of the result is told where it was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.kube.building import build
from cluster.kube.documents import Document
from cluster.kube.reading import read
from ftcore.errors import ClusterError, ConfigError
from tests.kube_texts import DEPLOYMENT, RAY_JOB, changed, program

BASE = "resources: [job.yaml, admin.yaml]\n"
OVERLAY = "resources: [../base]\npatches:\n  - path: more.yaml\n"
PATCH = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: admin}\nspec:\n  replicas: 3\n"
BUILT = DEPLOYMENT.replace("  replicas: 1", "  minReadySeconds: 5\n  replicas: 3") + "---\n" + RAY_JOB


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "kustomization.yaml").write_text(BASE)
    (tmp_path / "base" / "job.yaml").write_text(RAY_JOB)
    (tmp_path / "base" / "admin.yaml").write_text(DEPLOYMENT)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "kustomization.yaml").write_text(OVERLAY)
    (tmp_path / "dev" / "more.yaml").write_text(PATCH)
    return tmp_path / "dev"


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `kubectl` that says what the overlay above becomes."""
    (tmp_path / "built.yaml").write_text(BUILT)
    folder = program(tmp_path / "bin", "kubectl", f'echo "$@" > {tmp_path}/asked', f"cat {tmp_path}/built.yaml")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(shutil, "which", lambda name: str(folder / name) if (folder / name).exists() else None)
    return folder


def place(folder: Path, kind: str, path: str) -> str:
    """FILE:LINE of a flaw at a path of what was built."""
    built = build(folder)
    document = next(found for found in built.documents if isinstance(found, Document) and found.kind == kind)
    flaw = built.place(document.flaw("a-rule", path, got="a", wanted="b"))
    return f"{Path(flaw.file).name}:{flaw.line}"


def test_a_flaw_is_told_where_it_was_written(overlay: Path, builder: Path) -> None:
    line = RAY_JOB[: RAY_JOB.index("  backoffLimit")].count("\n") + 1
    assert place(overlay, "RayJob", "spec.backoffLimit") == f"job.yaml:{line}"
    assert (overlay.parent / "asked").read_text().split() == ["kustomize", str(overlay)]


def test_of_a_base_and_its_patch_it_is_the_one_that_wrote_the_value(overlay: Path, builder: Path) -> None:
    assert place(overlay, "Deployment", "spec.replicas") == "more.yaml:5"
    assert place(overlay, "Deployment", "spec.template.spec.containers[0].image") == "admin.yaml:17"


def test_what_nobody_wrote_is_told_at_its_line_of_the_built_text(overlay: Path, builder: Path) -> None:
    assert place(overlay, "Deployment", "spec.minReadySeconds") == "dev (built):6"


def test_what_is_missing_is_told_in_the_one_file_that_has_the_object(overlay: Path, builder: Path) -> None:
    line = RAY_JOB[: RAY_JOB.index("spec:\n")].count("\n") + 1
    assert place(overlay, "RayJob", "spec.activeDeadlineSeconds") == f"job.yaml:{line}"


def test_kustomize_is_asked_before_kubectl(overlay: Path, builder: Path) -> None:
    program(builder, "kustomize", f'echo "$@" > {overlay.parent}/asked', f"cat {overlay.parent}/built.yaml", "echo old key >&2")
    assert build(overlay).said == ("old key",)
    assert (overlay.parent / "asked").read_text().split() == ["build", str(overlay)]


def test_without_either_the_remedy_says_what_to_do(overlay: Path, builder: Path) -> None:
    (builder / "kubectl").unlink()
    with pytest.raises(ClusterError) as refused:
        build(overlay)
    assert "neither kustomize nor kubectl" in refused.value.got and "kustomize build" in refused.value.remedy


def test_what_cannot_be_built_is_told_in_the_builders_words(overlay: Path, builder: Path) -> None:
    program(builder, "kubectl", "echo no such key >&2", "exit 1")
    with pytest.raises(ConfigError, match="cannot be built") as refused:
        build(overlay)
    assert refused.value.got == "no such key" and refused.value.where == str(overlay)


@pytest.mark.parametrize(
    "name",
    [
        "https://example.org/a.yaml",
        "github.com/org/repository//deploy?ref=v1",
        "git@example.org:org/repository.git",
        "example.org/repository?ref=main",
    ],
)
def test_something_remote_is_refused_before_anything_is_built(overlay: Path, builder: Path, name: str) -> None:
    kustomization = overlay.parent / "base" / "kustomization.yaml"
    kustomization.write_text(f"resources:\n  - job.yaml\n  - {name}\n")
    with pytest.raises(ConfigError, match="something remote") as refused:
        build(overlay)
    assert refused.value.where == f"{kustomization}:3 resources[1]" and refused.value.got == name
    assert "download it" in refused.value.remedy and not (overlay.parent / "asked").exists()


def test_a_component_is_left_to_those_who_use_it(overlay: Path, builder: Path) -> None:
    (overlay.parent / "part").mkdir()
    (overlay.parent / "part" / "kustomization.yaml").write_text("kind: Component\n")
    (builder / "kubectl").rename(builder / "kustomize")
    sets = read(overlay.parent)
    assert [Path(each.name).name for each in sets if each.documents][-2:] == ["base", "dev"]
    assert any("a Component is built by those who use it" in note for each in sets for note in each.notes)


@pytest.mark.skipif(not (shutil.which("kustomize") or shutil.which("kubectl")), reason="neither kustomize nor kubectl is installed")
def test_a_real_builder_gives_the_same_places(overlay: Path) -> None:
    assert place(overlay, "Deployment", "spec.replicas") == "more.yaml:5"
    assert place(overlay, "Deployment", "spec.template.spec.containers[0].image") == "admin.yaml:17"
    (overlay / "more.yaml").write_text(changed(PATCH, "name: admin", "name: nobody")[0])
    with pytest.raises(ConfigError, match="cannot be built"):
        build(overlay)
