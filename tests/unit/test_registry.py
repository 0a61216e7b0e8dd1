"""The registry: filled from sibling files, the same in every process; two things under one kind are refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftcore.errors import ConfigError
from ftcore.registry import Registry


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[type]]:
    """An axis in a package of its own: base.py holds the registry, one file a kind."""
    package = tmp_path / "shapes_for_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text("from ftcore.registry import Registry\nSHAPES = Registry('shape', 'shapes_for_a_test')\n")
    for kind in ("circle", "square"):
        (package / f"{kind}.py").write_text(f"from shapes_for_a_test.base import SHAPES\n@SHAPES.register({kind!r})\nclass It: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import shapes_for_a_test.base as base

    yield base.SHAPES
    for name in [name for name in sys.modules if name.startswith("shapes_for_a_test")]:
        del sys.modules[name]


def test_a_new_file_is_a_new_kind(shapes: Registry[type]) -> None:
    assert list(shapes) == ["circle", "square"]


def test_an_unknown_kind_is_told_with_the_near_one(shapes: Registry[type]) -> None:
    with pytest.raises(ConfigError) as caught:
        shapes["cirkle"]
    assert (caught.value.wanted, caught.value.remedy) == ("circle | square", "did you mean `circle`?")


def test_two_things_under_one_kind_are_refused(shapes: Registry[type]) -> None:
    class Impostor: ...

    shapes.fill()
    with pytest.raises(ConfigError, match="two implementations call themselves shape `circle`"):
        shapes.register("circle")(Impostor)


def test_registering_the_same_thing_again_is_fine(shapes: Registry[type]) -> None:
    circle = shapes["circle"]
    assert shapes.register("circle")(circle) is circle


def test_a_kind_from_outside_stands_beside_ours(shapes: Registry[type]) -> None:
    @shapes.register("triangle")
    class Triangle: ...

    assert "triangle" in shapes and shapes["triangle"] is Triangle
