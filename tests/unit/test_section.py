"""Sections are strict and frozen; a choice is picked by its kind and keeps its own keys."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from ftcore.registry import Registry
from ftcore.section import Choice, Section, chosen, leaf_paths

ANIMALS: Registry[type[Animal]] = Registry("animal", "")
ANIMALS._filled = True  # no package stands behind it; its only kind is registered below


class Animal(Choice):
    @abstractmethod
    def says(self) -> str: ...


@ANIMALS.register("dog")
class Dog(Animal):
    """Barks."""

    kind: str = "dog"
    times: int = Field(1, ge=1)
    """How often."""

    def says(self) -> str:
        return "woof" * self.times


class Farm(Section):
    """A place."""

    animal: chosen(Animal, ANIMALS)
    """Who lives there."""
    acres: float = 1
    """How large."""
    name: str | None = None
    """What it is called."""


def farm(**values: Any) -> Farm:
    return Farm.model_validate(values)


def test_a_choice_acts() -> None:
    assert farm(animal={"kind": "dog", "times": 2}).animal.says() == "woofwoof"


def test_a_kind_alone_takes_its_defaults() -> None:
    assert farm(animal="dog").animal == Dog()


def test_unknown_keys_are_refused_inside_a_choice() -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        farm(animal={"kind": "dog", "tiems": 2})


def test_the_place_of_an_error_inside_a_choice_is_whole() -> None:
    with pytest.raises(ValidationError) as caught:
        farm(animal={"kind": "dog", "times": 0})
    assert caught.value.errors()[0]["loc"] == ("animal", "times")


def test_a_choice_needs_a_kind() -> None:
    with pytest.raises(ValidationError, match="needs a `kind`: one of dog"):
        farm(animal={"times": 2})


def test_a_choice_with_a_default_kind_needs_none() -> None:
    picked = TypeAdapter(chosen(Animal, ANIMALS, "dog")).validate_python({"times": 3})
    assert picked == Dog(times=3)


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        farm(animal="dog").acres = 2


@pytest.mark.parametrize("values", [{"acres": True}, {"animal": {"kind": "dog", "times": False}}])
def test_a_truth_value_is_no_number(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="wanted a number"):
        farm(**{"animal": "dog", **values})


def test_what_is_dumped_keeps_the_keys_of_the_choice() -> None:
    assert farm(animal={"kind": "dog", "times": 2}).model_dump()["animal"] == {"kind": "dog", "times": 2}


def test_leaf_paths_count_a_choice_as_one() -> None:
    assert leaf_paths(Farm) == ["animal", "acres", "name"]


def test_the_schema_draws_each_kind_and_its_short_form() -> None:
    branches = Farm.model_json_schema()["properties"]["animal"]["oneOf"]
    assert {"enum": ["dog"], "description": "A kind with its defaults."} in branches and len(branches) == 2
