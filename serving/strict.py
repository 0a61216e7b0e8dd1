"""Strict: what every model of a client's JSON has in common.

In: JSON. Out: models that refuse unknown and too many keys, and text that is no Unicode. Runs in: the ingress.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

MAX_KEYS = 64


def encodable(text: str) -> str:
    """JSON can hold half a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("this is not valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(encodable)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: Any) -> Any:
        """An error for each of a million unknown keys would take longer than any answer."""
        if isinstance(value, dict) and len(value) > MAX_KEYS:
            raise ValueError(f"more than {MAX_KEYS} fields")
        return value

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_set(cls, value: Any) -> Any:
        """OpenAI's clients send null for what was not set."""
        if not isinstance(value, dict):
            return value
        settable = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {key: each for key, each in value.items() if each is not None or key not in settable}
