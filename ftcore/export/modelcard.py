"""The model card for people: Markdown with Hugging Face front matter, everything that came from rows or users escaped.

In: a Card. Out: README.md text. Runs in: publish, fetch, merge; no torch.
"""

from __future__ import annotations

import re

import yaml

from ftcore.card import Card, printable

SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~&$-])")


def escaped(text: object) -> str:
    """Text that Markdown and HTML show as it is: no markup, no links, no control characters, one line."""
    shown = SPECIAL.sub(r"\\\1", printable(text))
    shown = shown.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")
    return shown.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;")


def front_matter(card: Card, *, library: str = "peft", base_model: str = "", extra_tags: tuple[str, ...] = ()) -> str:
    """The YAML head that a hub reads: base_model, library_name, tags."""
    tags = [printable(tag) for tag in (card.method.kind, card.stage, "ftcore", *extra_tags) if tag]
    facts: dict[str, object] = {"base_model": printable(base_model or card.base.id), "library_name": library, "tags": tags}
    facts["base_model_relation"] = "adapter" if library == "peft" else "finetune"
    return f"---\n{yaml.safe_dump(facts, sort_keys=True, allow_unicode=False)}---\n"


def render_card(card: Card, base_model: str = "") -> str:
    """README.md of an adapter version; `base_model`: the base's name on a hub, where the card knows only a folder."""
    effect = {name: fact.effect for name, fact in card.probes.items()}
    rows = {
        "version": card.digest, "base": f"{card.base.id} (revision {card.base.revision}, weights {card.base.weights[:16]})",
        "base held in": f"{card.base.dtype}, quantisation {card.base.quantisation}",
        "method": f"{card.method.kind}, rank {card.method.rank}, alpha {card.method.alpha}, {card.method.num_trainable:,} trained numbers",
        "targets": ", ".join(card.method.targets), "stage": card.stage or "unknown", "seed": card.seed, "workers": card.world_size,
        "data": _data(card),
        "tokenizer / template": f"{card.tokenizer[:16]} / {card.template[:16] or 'none'}",
        "recipe": card.recipe.digest[:16] if card.recipe else "imported",
        "continues from": card.parent or "the base", "made": f"{card.created} by {card.tool}",
        "signed by": f"key {card.signature.key_id}" if card.signature else "nobody",
    }  # fmt: skip
    lines = [front_matter(card, base_model=base_model), f"# {escaped(f'{card.tenant}/{card.name}')}", ""]
    lines += ["| fact | value |", "|---|---|", *(f"| {name} | {escaped(value)} |" for name, value in rows.items()), ""]
    if card.quantisation:
        fact = card.quantisation
        lines += [
            f"Trained on a quantised base ({escaped(fact.how)}). Against the full-precision base, logits at the probes differ by at most "
            f"{_number(fact.difference_bare)} bare and {_number(fact.difference_tuned)} with the adapter on: {fact.share:.0%} of the "
            "adapter's own effect.",
            "",
        ]
    if card.metrics:
        lines += ["| metric | value |", "|---|---|"]
        lines += [f"| {escaped(name)} | {escaped(_number(value))} |" for name, value in sorted(card.metrics.items())] + [""]
    lines += [
        "Probes: on 8 fixed prompts the adapter moves a recorded logit by at most "
        + ", ".join(f"{_number(value)} ({escaped(name)})" for name, value in effect.items())
        + ". `ftcore adapters verify` compares them.",
        "",
        "Plain PEFT loads this folder: `PeftModel.from_pretrained(base, folder)`.",
        "",
        "Versions: " + ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in sorted(card.packages.items())) + ".",
    ]
    return "\n".join(lines) + "\n"


def render_merged(card: Card, dtype: str, difference: float, limit: float) -> str:
    """README.md of a merged model."""
    name = f"{card.tenant}/{card.name}@{card.digest}"
    head = front_matter(card, library="transformers", extra_tags=("merged",))
    title = escaped(f"{card.tenant}/{card.name}")
    base = f"{escaped(card.base.id)} (weights {card.base.weights[:16]})"
    proof = f"its logits differ from the adapter on the base by at most {difference:.3g} (allowed: {limit:.3g})"
    return (
        f"{head}# {title}, merged\n\nThe adapter {escaped(name)} folded into its base {base}, saved in {dtype}.\n\n"
        f"Loaded again in plain transformers, {proof}.\n"
    )


def render_trained(base: str, dtype: str, num_parameters: int) -> str:
    """README.md of a fully trained model that has no card of its own (the run's folder says how it was trained)."""
    facts: dict[str, object] = {"base_model": printable(base), "base_model_relation": "finetune", "library_name": "transformers"}
    head = f"---\n{yaml.safe_dump(facts | {'tags': ['ftcore', 'full']}, sort_keys=True, allow_unicode=False)}---\n"
    return (
        f"{head}# {escaped(base)}, fine-tuned\n\n"
        f"Every one of the {num_parameters:,} numbers of {escaped(base)} was trained; saved in {dtype}.\n"
        "The recipe, the data's audit and the losses are in the folder of the run.\n\n"
        "Plain transformers loads this folder: `AutoModelForCausalLM.from_pretrained(folder)`.\n"
    )


def _data(card: Card) -> str:
    if card.data is None:
        return "unknown"
    return ", ".join([card.data.digest[:16], *(f"{key} {value:,}" for key, value in sorted(card.data.counts.items()))])


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
