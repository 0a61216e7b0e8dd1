"""Sharing: which recipes can be trained together over one frozen base. See ftcore.shared, which does it.

In: recipes, the base's config.json. Out: the reason why not, or what those of one base have in common. Runs in: the driver; no torch.
"""

from __future__ import annotations

from ftcore.data.identity import model_config
from ftcore.methods.lora import Lora
from ftcore.recipe import Model, Recipe
from ftcore.shapes import head_extra
from ftcore.stages.base import Stage


def refusal(recipe: Recipe) -> str:
    """Why this recipe cannot share its base with others; "" when it can. Its base is not looked at."""
    method = recipe.method
    reasons = {
        "only LoRA over a frozen base is shared": not isinstance(method, Lora),
        "dropout draws from one stream, which others would share": getattr(method, "dropout", 0) > 0,
        "DoRA needs the norm of base and update together": getattr(method, "dora", False),
        "whole modules would be trained beside the base": bool(getattr(method, "modules_to_save", ())),
        "another backend executes its steps": recipe.backend.kind != "plain",
        "it continues from an adapter": recipe.model.adapter is not None,
        "examples are not packed": not (recipe.data.pack and recipe.stage.packs),
        "the stage asks the base too": recipe.stage.needs_reference,
        "the stage makes its own batches": type(recipe.stage).experience is not Stage.experience,
        "fp16 has one loss scale for all": recipe.model.dtype == "fp16",
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), "")


def refusal_of_base(model: Model) -> str:
    """Why this base cannot be shared, as its config.json has it; "" when it can. Raises ModelError where there is no such base."""
    key = head_extra(model_config(model))
    return f"its head is more than a linear layer ({key} in config.json), so its loss is made of whole logits" if key else ""


def base_key(recipe: Recipe) -> tuple[str, ...]:
    """What candidates of one base have in common."""
    held = recipe.method.held(recipe.model.dtype) if isinstance(recipe.method, Lora) else ""
    loading = [str(getattr(recipe.method, name, "")) for name in ("bits", "quant_type", "double_quant", "compute_dtype")]
    data = recipe.data.model_dump_json(exclude={"engine"})  # who prepared the rows changes nothing in them
    sections = [data, *(each.model_dump_json() for each in (recipe.model, recipe.stage, recipe.backend))]
    return (*sections, held, *loading)
