"""Publish: from a finished run (or a foreign PEFT folder) to a sealed version, proven on a fresh base before it counts.

In: `final/` of a run, its recipe and prepared data. Out: an AdapterRef; or an IntegrityError and nothing in the store. Runs in: the driver.

The written adapter is bound to a fresh base, held as the trained one was, through plain PEFT, every tensor read back, and its probe logits
compared with those that the trained model gave; then probes are recorded on the full-precision base too, the card is made, signed when
asked, and written last.
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftcore.adapter_files import CONTENT, TOKENIZER, WEIGHTS, check_adapter, content_digest, content_files, read_config
from ftcore.adapters import AdapterRef, AdapterStore, split_ref
from ftcore.bind import bind_adapter, widen_whole_modules
from ftcore.card import BaseFacts, Card, DataFacts, MethodFacts, ProbeFacts, QuantisationFacts, package_versions, recipe_facts, utc_now
from ftcore.data.chat import Chat
from ftcore.data.prepared import Prepared
from ftcore.data.tokenizer import load_tokenizer, tokenizer_digest
from ftcore.devices import device_here
from ftcore.errors import ConfigError, IntegrityError
from ftcore.lean_imports import PeftModel
from ftcore.models import load_base, model_type
from ftcore.probes import EXACT, IN_FP32, Probes, check, record
from ftcore.quantisation import Quantisation
from ftcore.recipe import Model, Recipe
from ftcore.rundir import RunDir
from ftcore.safetensors_header import check_safetensors
from ftcore.signing import sign_card
from ftcore.weights import base_folder, check_base, weights_digest

Log = Callable[[str], None]


def publish_run(
    run: RunDir, recipe: Recipe, prepared: Prepared, *, facts: Mapping[str, int | str] = MappingProxyType({}), log: Log = print
) -> AdapterRef:
    """Verifies and publishes a finished run's `final/` as `output.adapter`, and promotes it if the recipe says so and asks for no gate.

    `facts`: what the card says beside the run's own metrics (of the search that it won, for one).
    """
    store = AdapterStore(recipe.output.store)
    parent = run.folder.read_json("parent/manifest.json").get("ref") if run.folder.exists("parent/manifest.json") else None
    with run.opened("final") as final:
        result = run.folder.read_json("final/result.json")
        size, metrics = int(result["world_size"]), {**result["metrics"], **facts}
        ref = publish_final(recipe, final, prepared.manifest, metrics=metrics, world_size=size, store=store, parent=parent, log=log)
    if recipe.output.promote and recipe.output.gate is None:
        store.promote(ref)
        log(f"{ref.tenant}/{ref.name} now means {ref}")
    return ref


def publish_final(
    recipe: Recipe,
    final: Path,
    manifest: Mapping[str, Any],
    *,
    metrics: Mapping[str, Any],
    world_size: int,
    store: AdapterStore,
    parent: AdapterRef | str | None = None,
    log: Log = print,
) -> AdapterRef:
    """Verifies the adapter in `final` against the logits its trained model gave, and seals it in the store.

    `manifest`: the prepared data's. Raises IntegrityError when what was written is not what was trained; then nothing is published.
    """
    if recipe.output.adapter is None or not recipe.method.is_adapter:
        raise ConfigError(
            "this run makes no adapter to publish", got=f"method {recipe.method.kind}, output.adapter {recipe.output.adapter}",
            remedy="unset output.adapter; a whole model stays in the run's final/ folder",
        )  # fmt: skip
    tokenizer = load_tokenizer(recipe.model)
    with tempfile.TemporaryDirectory(prefix="ftcore-publish-") as scratch:
        folder = stage_content(final, Path(scratch) / "adapter")
        proof = prove(recipe, folder, tokenizer, Probes.load(final), log)
        proof.probes.save(folder)
        tenant, name, _ = split_ref(recipe.output.adapter)
        template = _template_digest(recipe, tokenizer, manifest)
        card = make_card(
            folder, tenant, name, base_facts(recipe), tokenizer_digest(tokenizer), template, proof.probes,
            method=recipe.method.kind, data=data_facts(manifest), recipe=recipe_facts(recipe.model_dump(mode="json")),
            stage=recipe.stage.kind, seed=recipe.optim.seed, world_size=world_size, metrics=plain_metrics(metrics),
            quantisation=proof.quantisation, parent=parent.full if isinstance(parent, AdapterRef) else parent,
        )  # fmt: skip
        if recipe.output.sign_key:
            card = sign_card(card, recipe.output.sign_key)
        ref = store.publish(folder, card)
    log(f"published {ref} in {store}")
    return ref


def import_adapter(
    source: Path, name: str, model: Model, store: AdapterStore, *, held: Quantisation | None = None, sign_key: str | None = None,
    log: Log = print,
) -> AdapterRef:  # fmt: skip
    """Publishes an adapter that plain PEFT made elsewhere: bound exactly to `model`, its probes recorded now in fp32.

    `held`: recorded over the base held so too, for engines that hold it so.
    """
    tenant, short, version = split_ref(name)
    if version:
        raise ConfigError("an import makes its own version", got=name, wanted="tenant/name")
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory(prefix="ftcore-import-") as scratch:
        folder = stage_content(source, Path(scratch) / "adapter")
        check_adapter(folder)  # before a base is loaded for it
        probes = _recorded(model, None, folder, tokenizer)
        if held is not None:
            probes = probes.merged(_recorded(model, held, folder, tokenizer))
        probes.save(folder)
        facts = BaseFacts(id=model.path, revision=model.revision, weights=_weights(model), dtype="fp32", model_type=model_type(model))
        kind = str(read_config(folder)["peft_type"]).lower()
        card = make_card(folder, tenant, short, facts, tokenizer_digest(tokenizer), "", probes, method=kind, stage="imported")
        ref = store.publish(folder, sign_card(card, sign_key) if sign_key else card)
    log(f"imported {ref}: its probes were recorded now, so they prove what was imported, not how it was trained")
    return ref


def _recorded(model: Model, held: Quantisation | None, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Probes:
    base = load_base(model, held, dtype="fp32", device=device_here())
    precision = "fp32" if held is None else held.serve(base, "fp32")
    tuned = bind_adapter(base, folder)
    return record(tuned, tokenizer, tuned.disable_adapter, precision)


@dataclass(frozen=True)
class Proof:
    """What a proof leaves for the card: the probes, with full precision's, and what quantising the base did."""

    probes: Probes
    quantisation: QuantisationFacts | None


def prove(recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase, trained: Probes, log: Log) -> Proof:
    """Binds the written adapter to fresh bases and compares with what the trained model gave. Raises IntegrityError where it differs.

    First on a base held as it trained (bf16, nf4, ...), by both readings. Then on the full-precision base: checked there where the readings
    above could not tell, recorded there always. How far a quantised base is from it is a fact for the card, not a fault of the adapter.
    """
    held, dtype = recipe.method.held(recipe.model.dtype), recipe.model.dtype
    proven = held not in EXACT and _prove_as_held(recipe, folder, tokenizer, trained, held, log)
    exact = "fp64" if dtype == "fp64" else "fp32"
    gc.collect()
    tuned = bind_adapter(load_base(recipe.model, dtype=exact, device=device_here()), folder)
    if not proven:
        report = check(tuned, tokenizer, trained, exact, tuned.disable_adapter)
        report.require(folder)
        log(f"proof in {exact}: {report.reason}")
    probes = trained if exact in trained.by_precision else trained.merged(record(tuned, tokenizer, tuned.disable_adapter, exact))
    return Proof(probes, _quantisation(recipe, trained, held, tuned, log))


def _prove_as_held(recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase, trained: Probes, held: str, log: Log) -> bool:
    """Proves the adapter on a base held as it was trained. Returns False when only full precision can tell.

    The reading computed in fp32 decides where there is one. The other is what the device's own arithmetic gave: it binds on the same kind
    of device, or where it is all there is.
    """
    tuned, method = bind_adapter(load_base(recipe.model, recipe.method, device=device_here()), folder), recipe.method
    as_trained = check(tuned, tokenizer, trained, held, tuned.disable_adapter)
    log(f"proof in {held}: {as_trained.reason}")
    twice = held + IN_FP32 in trained.by_precision
    if not as_trained.inconclusive and (not twice or trained.nearest(held).device == device_here()):
        as_trained.require(folder)
    if not twice:
        if as_trained.inconclusive and method.quantises:  # the full-precision base is another model: it cannot tell
            as_trained.require(folder)
        return not as_trained.inconclusive
    widen_whole_modules(tuned, folder)
    with method.in_fp32(tuned):
        exact = check(tuned, tokenizer, trained, held + IN_FP32, tuned.disable_adapter)
    log(f"proof in {held}{IN_FP32}: {exact.reason}")
    exact.require(folder)
    return True


def _quantisation(recipe: Recipe, trained: Probes, held: str, full: PeftModel, log: Log) -> QuantisationFacts | None:
    """How far the full-precision model is from the logits recorded on the quantised one; None where nothing was quantised."""
    if not recipe.method.quantises:
        return None
    only = Probes(trained.prompts, {held: trained.by_precision[held]})
    report = check(full, None, only, "fp32", full.disable_adapter)
    assert report.noise is not None and report.effect is not None, "an adapter can be switched off"
    share = report.max_abs_error / report.effect
    log(
        f"quantised base against full precision: logits differ by {report.noise:.3g} bare, {report.max_abs_error:.3g} with the adapter on, "
        f"{share:.0%} of the adapter's own effect ({report.effect:.3g})"
    )
    return QuantisationFacts(
        how=recipe.method.quantisation(recipe.model.dtype), difference_bare=report.noise, difference_tuned=report.max_abs_error,
        effect=report.effect, share=share,
    )  # fmt: skip


def make_card(
    folder: Path, tenant: str, name: str, base: BaseFacts, tokenizer: str, template: str, probes: Probes, *, method: str, **facts: Any
) -> Card:  # fmt: skip
    """The card of a staged folder; `facts` are the Card's further fields."""
    files = content_files(folder)
    return Card(
        tenant=tenant, name=name, digest=content_digest(files), files=files, base=base, tokenizer=tokenizer, template=template,
        method=method_facts(folder, method), packages=package_versions(), created=utc_now(),
        probes={key: ProbeFacts.model_validate(fact) for key, fact in probes.facts().items()}, **facts,
    )  # fmt: skip


def stage_content(source: Path, target: Path) -> Path:
    """Copies adapter and probes alone (final/ holds notes of the run too). Raises IntegrityError unless the weights are safetensors."""
    if not (source / WEIGHTS).is_file():
        if (source / "adapter_model.bin").is_file():
            what, remedy = (
                "this adapter's weights are a pickle, which can run code when it is loaded",
                "convert it to safetensors in a sandbox",
            )
        else:
            what, remedy = "this folder holds no adapter weights", "give a PEFT folder"
        raise IntegrityError(what, where=source, wanted=WEIGHTS, remedy=remedy)
    target.mkdir(parents=True)
    for name in CONTENT:
        if (source / name).is_symlink():
            raise IntegrityError("a symbolic link in an adapter folder", where=source / name, remedy="copy the file itself")
        if (source / name).is_file() and name not in TOKENIZER:
            shutil.copyfile(source / name, target / name)
    return target


def method_facts(folder: Path, kind: str) -> MethodFacts:
    config = read_config(folder)
    targets = config.get("target_modules") or ()
    names = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    size = sum(fact.num_elements for fact in check_safetensors(folder / WEIGHTS).values())
    return MethodFacts(kind=kind, rank=config.get("r"), alpha=config.get("lora_alpha"), targets=names, num_trainable=size)


def base_facts(recipe: Recipe) -> BaseFacts:
    return BaseFacts(
        id=recipe.model.path, revision=recipe.model.revision, weights=_weights(recipe.model), dtype=recipe.model.dtype,
        quantisation=recipe.method.quantisation(recipe.model.dtype), model_type=model_type(recipe.model),
    )  # fmt: skip


def data_facts(manifest: Mapping[str, Any]) -> DataFacts:
    """Digest and flat counts of the prepared data."""
    counts: dict[str, int | float] = {}
    for key, value in manifest.get("counts", {}).items():
        inner = value if isinstance(value, dict) else {"": value}
        counts |= {f"{key}.{part}".rstrip("."): number for part, number in inner.items() if type(number) in (int, float)}
    return DataFacts(digest=manifest["digest"], counts=counts)


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float | int | str | None]:
    """Flat and writable as JSON: what is not finite becomes None."""
    found: dict[str, float | int | str | None] = {}
    for key, value in metrics.items():
        if value is None or isinstance(value, int | str):
            found[key] = value
        elif isinstance(value, float):
            found[key] = value if math.isfinite(value) else None
    return found


def _template_digest(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, manifest: Mapping[str, Any]) -> str:
    known = manifest.get("digests", {}).get("template")
    if isinstance(known, str):
        return known
    return Chat.open(tokenizer, data=recipe.data, template=recipe.model.chat_template, family=model_type(recipe.model)).template_digest


def _weights(model: Model) -> str:
    folder = base_folder(model.path, model.revision)
    check_base(folder)
    return weights_digest(folder)
