"""A RayJob and a Deployment as a person writes them, and the one flaw that a change to their text makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cluster.kube import core, metadata, schema
from cluster.kube.crds import Catalogue, kuberay
from cluster.kube.documents import Document, parse
from cluster.kube.flaws import Flaw

RAY_JOB = """\
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: train
  labels:
    team: nlp
  annotations:
    example.org/why: "first run"
spec:
  entrypoint: python train.py
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: 600
  backoffLimit: 1
  rayClusterSpec:
    rayVersion: "2.60.0"
    headGroupSpec:
      rayStartParams:
        num-cpus: "0"
      template:
        metadata:
          labels:
            tier: head
        spec:
          containers:
            - name: head
              image: example.org/ray:2.60.0
              ports:
                - containerPort: 6379
                  name: gcs
              env:
                - name: A
                  value: "1"
              resources:
                limits:
                  cpu: 1
                  memory: 5Gi
    workerGroupSpecs:
      - groupName: workers
        replicas: 1
        minReplicas: 0
        maxReplicas: 2
        template:
          spec:
            containers:
              - name: worker
                image: example.org/ray:2.60.0
"""
DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: admin
spec:
  replicas: 1
  selector:
    matchLabels:
      app: admin
  template:
    metadata:
      labels:
        app: admin
    spec:
      containers:
        - name: admin
          image: example.org/ftcore:1
          ports:
            - containerPort: 8000
          resources:
            limits:
              memory: 1Gi
"""


def documents(text: str, file: str = "m.yaml") -> list[Document]:
    found = list(parse(text, file))
    assert all(isinstance(each, Document) for each in found), found
    return [each for each in found if isinstance(each, Document)]


def flaws_of(text: str) -> list[Flaw]:
    """Of the schema side, of every document."""
    return [flaw for document in documents(text) for flaw in _checked(document)]


def _checked(document: Document) -> Iterator[Flaw]:
    yield from metadata.check(document)
    crd = Catalogue.of(kuberay()[1]).find(document.api_version, document.kind)
    yield from schema.check(document, crd) if crd else core.check(document, core.versions()[-1]) or ()


def changed(text: str, old: str, new: str) -> tuple[str, int]:
    """The text with one place changed, and the line of the change."""
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
    return text.replace(old, new), text[: text.index(old)].count("\n") + 1


def program(folder: Path, name: str, *lines: str) -> Path:
    """A program for PATH that runs these lines of shell."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    file.chmod(0o755)
    return folder
