"""`ftcore k8s lint`: what is read, what is left out, what is said, and the exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.kube.core import versions
from cluster.kube.reading import read
from ftcore.cli import main
from ftcore.errors import ClusterError, ConfigError
from tests.kube_texts import DEPLOYMENT, RAY_JOB, changed, program
from tests.unit.test_kube_derive import made

WRONG = changed(RAY_JOB, "  backoffLimit: 1", "  backofLimit: 1")[0]
MONITOR = "apiVersion: monitoring.coreos.com/v1\nkind: PodMonitor\nmetadata: {name: a}\nspec: {anything: 1}\n"
THING = "apiVersion: a.b/v1\nkind: Thing\nmetadata: {name: a}\nspec: {size: large}\n"
SCHEMA = {"type": "object", "properties": {"spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}


@pytest.fixture(autouse=True)
def _schemas_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules beside them have tests of their own (test_kube_rules.py)."""
    monkeypatch.setattr("cluster.kube.lint.rules.check", lambda documents, gates: iter(()))


def lint(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["k8s", "lint", *map(str, arguments)])
    seen = capsys.readouterr()
    return code, seen.out + seen.err


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_clean_manifests_say_what_they_were_checked_against(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = lint(capsys, write(tmp_path, job=RAY_JOB, admin=DEPLOYMENT))
    newest = versions()[-1]
    assert code == 0
    assert said.splitlines()[-1] == (
        f"documents checked: 2 (1 Deployment, 1 RayJob) against KubeRay 1.7.0, Kubernetes {newest}: 0 errors, 0 warnings"
    )


def test_a_flaw_is_said_with_its_place_and_the_exit_code_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = lint(capsys, write(tmp_path, job=WRONG))
    assert code == 1 and f"{tmp_path}/job.yaml:13  RayJob/train spec.backofLimit  [unknown-field]" in said
    assert "did you mean `backoffLimit`?" in said and said.splitlines()[-1].endswith("1 errors, 0 warnings")


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = lint(capsys, write(tmp_path, job=WRONG, monitor=MONITOR), "--json", "--kubernetes", "1.34")
    whole = json.loads(said)
    assert code == 1 and not whole["clean"] and whole["counts"] == {"error": 1, "warning": 0}
    assert whole["against"] == ["KubeRay 1.7.0", "Kubernetes 1.34"] and whole["kinds"] == {"PodMonitor": 1, "RayJob": 1}
    assert [flaw["path"] for flaw in whole["flaws"]] == ["spec.backofLimit"] and len(whole["notes"]) == 1


def test_a_warning_is_clean_unless_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, a=RAY_JOB, b=RAY_JOB)
    assert lint(capsys, tmp_path)[0] == 0
    code, said = lint(capsys, tmp_path, "--strict")
    assert code == 1 and "[duplicate]" in said


def test_an_object_twice_in_one_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = lint(capsys, write(tmp_path, a=f"{RAY_JOB}---\n{RAY_JOB}"))
    assert code == 1 and "each kind, namespace and name once" in said


def test_what_is_ignored_is_counted_and_what_ignores_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = lint(capsys, write(tmp_path, job=WRONG), "--ignore", "unknown-field,unknown-feld")
    assert code == 0 and "--ignore unknown-field: 1 flaws" in said and "--ignore unknown-feld: no flaws" in said


def test_another_version_of_a_kuberay_kind_is_refused_and_judged_by_the_version_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = lint(capsys, write(tmp_path, job=changed(WRONG, "ray.io/v1", "ray.io/v1alpha1")[0]))
    assert code == 1 and "got ray.io/v1alpha1; wanted ray.io/v1" in said and "`backoffLimit`?" in said


@pytest.mark.parametrize(("name", "code", "level"), [("v1beta1", 0, "warning"), ("v9", 1, "error")])
def test_a_deprecated_version_is_a_warning_and_one_that_is_not_served_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, level: str
) -> None:
    crd = yaml.safe_load((made(tmp_path / "crds", SCHEMA) / "thing.yaml").read_text())
    crd["spec"]["versions"].append({**crd["spec"]["versions"][0], "name": "v1beta1", "deprecated": True})
    (tmp_path / "crds" / "thing.yaml").write_text(yaml.safe_dump(crd))
    (tmp_path / "a.yaml").write_text(THING.replace("a.b/v1", f"a.b/{name}").replace("large", "3"))
    got, said = lint(capsys, tmp_path / "a.yaml", "--crds", tmp_path / "crds")
    assert got == code and f"{level:<7} {tmp_path}/a.yaml:1" in said and f"got a.b/{name}; wanted a.b/v1\n" in said


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("kind: RayJob", "kind: RayJobs", "did you mean `RayJob`?"),
        ("apiVersion: ray.io/v1", "apiVersion: ray/v1", "got ray/v1; wanted ray.io/v1"),
        ("apiVersion: ray.io/v1", "apiVersion: v1", "got v1; wanted ray.io/v1"),
    ],
)
def test_a_kind_or_group_misspelt_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, wanted: str) -> None:
    code, said = lint(capsys, write(tmp_path, job=changed(RAY_JOB, old, new)[0]))
    assert code == 1 and wanted in said and said.count("[kind]") == 1


def test_a_kind_without_schema_is_said_to_be_unchecked_but_for_its_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = lint(capsys, write(tmp_path, a=MONITOR, b=MONITOR.replace("name: a", "name: A_b")))
    assert code == 1 and said.count("error  ") == 1 and "[name]" in said
    assert "not checked: monitoring.coreos.com/v1 PodMonitor x 2 (no schema; --crds DIR)" in said


def test_a_folder_of_crds_checks_more_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "crds", SCHEMA)
    (tmp_path / "a.yaml").write_text(THING)
    assert "not checked: a.b/v1 Thing" in lint(capsys, tmp_path / "a.yaml")[1]
    code, said = lint(capsys, tmp_path / "a.yaml", "--crds", tmp_path / "crds")
    assert code == 1 and "spec.size" in said and "wanted an integer" in said and "not checked" not in said
    assert f"Kubernetes {versions()[-1]}, the CRDs of {tmp_path}/crds:" in said


def test_the_clusters_crds_are_asked_of_kubectl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    crd = yaml.safe_load((made(tmp_path / "crds", SCHEMA) / "thing.yaml").read_text())
    (tmp_path / "all.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [crd]}))
    folder = program(tmp_path / "bin", "kubectl", f'echo "$@" > {tmp_path}/asked', f"cat {tmp_path}/all.json")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    code, said = lint(capsys, write(tmp_path, a=THING) / "a.yaml", "--cluster")
    assert code == 1 and "wanted an integer" in said and "the cluster's CRDs: 1 errors" in said
    assert (tmp_path / "asked").read_text().split() == ["get", "crd", "-o", "json"]
    program(folder, "kubectl", "echo cannot connect >&2", "exit 1")
    code, said = lint(capsys, tmp_path / "a.yaml", "--cluster")
    assert code == ClusterError.exit_code and "cannot connect" in said
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no kubectl on PATH" in lint(capsys, tmp_path / "a.yaml", "--cluster")[1]


def test_what_is_no_manifest_is_left_out_with_a_line(tmp_path: Path) -> None:
    write(tmp_path, job=RAY_JOB, values="image: a\n", template="metadata:\n  name: {{ .Values.name }}\n")
    (tmp_path / "chart" / "templates").mkdir(parents=True)
    (tmp_path / "chart" / "Chart.yaml").write_text("name: a\n")
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git", job=RAY_JOB)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "admin.json").write_text(json.dumps(yaml.safe_load(DEPLOYMENT)))
    sets = read(tmp_path)
    assert [document.title for each in sets for document in each.documents] == ["RayJob/train", "Deployment/admin"]
    notes = [note for each in sets for note in each.notes]
    assert len(notes) == 3 and all(note.startswith(f"left out: {tmp_path}/") for note in notes)


def test_a_dashboards_braces_do_not_make_a_template(tmp_path: Path) -> None:
    (found,) = read(write(tmp_path, a='apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {legend: "{{node}}"}\n'))
    assert [document.kind for document in found.documents] == ["ConfigMap"] and found.notes == ()


def test_a_list_is_read_as_its_items_with_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = "\n".join("    " + line for line in WRONG.splitlines())
    code, said = lint(capsys, write(tmp_path, a=f"apiVersion: v1\nkind: List\nitems:\n  -\n{inner}\n"))
    assert code == 1 and "a.yaml:17  RayJob/train spec.backofLimit" in said


def test_yaml_that_cannot_be_read_is_a_flaw_at_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, a="kind: [\n", b="a: 1\na: 2\nkind: A\n", job=RAY_JOB)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    code, said = lint(capsys, tmp_path)
    assert code == 1 and said.count("[yaml]") == 3 and "this key twice" in said


@pytest.mark.parametrize("name", ["nowhere", "empty", "other"])
def test_nothing_to_lint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "values.yaml").write_text("a: 1\n")
    code, said = lint(capsys, tmp_path / name)
    assert code == ConfigError.exit_code and "nothing to lint" in said


def test_a_wrong_word_after_k8s_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k8s", "lnt"]) == 2
    assert "did you mean `ftcore k8s lint`?" in capsys.readouterr().err


def test_the_commands_help_loads_none_of_the_linter() -> None:
    code = "import sys; from ftcore.cli import main; main(['--help']); print([m for m in ('celpy', 're2', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_its_packages_the_remedy_names_the_extra() -> None:
    code = "import sys; sys.modules['celpy'] = None; from ftcore.cli import main; sys.exit(main(['k8s', 'lint', 'a.yaml']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == ConfigError.exit_code and "no module celpy" in done.stderr and "ftcore[k8s]" in done.stderr
