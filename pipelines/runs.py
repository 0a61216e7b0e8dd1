"""Runs: the rules a run folder lives by: where it lands, which recipe may continue it, what it continues from, publishing once.

In: a recipe, its RunDir. Out: recipe.yaml, audit.json, prepared.json, parent/, published.json in the folder. Runs in: the driver.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.runtime_env import inside_job
from ftcore.adapters import AdapterRef, AdapterStore, split_ref
from ftcore.card import Card
from ftcore.data.identity import identity
from ftcore.data.prepared import Prepared
from ftcore.errors import ConfigError, IntegrityError, StorageError
from ftcore.history import remember, shown
from ftcore.recipe import Recipe, dump_recipe, parse_recipe
from ftcore.rundir import RunDir
from ftcore.storage import MANIFEST, Folder, digest_of, is_sealed
from pipelines.changes import refuse_changes
from pipelines.same_base import is_same_base, refuse_other_base

Log = Callable[[str], None]

PREPARED, PUBLISHED, SEARCHED = "prepared.json", "published.json", "searched.json"


def at_home(recipe: Recipe, log: Log) -> Recipe:
    """In a submitted job, relative places to write to land under FTCORE_HOME (else ~/ftcore): the job's own folder is Ray's to delete."""
    if not inside_job():
        return recipe
    output, data = recipe.output, recipe.data
    moved = recipe.model_copy(
        update={
            "output": output.model_copy(update={"runs": placed(output.runs), "store": placed(output.store)}),
            "data": data.model_copy(update={"cache": placed(data.cache)}),
        }
    )
    if moved != recipe:
        log(f"job: runs, adapters and prepared blocks with relative paths land under {placed('.')} (FTCORE_HOME)")
    return moved


def placed(path: str) -> str:
    """A place to write to, the same for the driver and its workers."""
    if "://" in path:
        return path
    home = Path(os.environ.get("FTCORE_HOME") or Path.home() / "ftcore") if inside_job() else Path.cwd()
    return str((home / path).absolute())


def began_with(run: RunDir, recipe: Recipe, log: Log) -> Prepared | None:
    """The blocks that the run's sealed steps were learned from; None before the first checkpoint.

    Raises ConfigError when the rows, the tokenizer or the template changed since, or when those blocks are gone.
    """
    if not run.checkpoint_steps():
        return None
    record = run.folder.read_json(PREPARED)
    refuse_other_data(run, recipe, record["identity"], identity(recipe, Folder(recipe.data.cache)))
    try:
        prepared = Prepared.open(record["url"])
    except (IntegrityError, StorageError) as error:
        raise ConfigError(
            "the blocks this run learns from are gone", where=record["url"], got=error.what, remedy=f"put them back, or {_another(recipe)}"
        ) from error
    log(f"going on with the blocks in {prepared.url}")
    return prepared


def begin(run: RunDir, recipe: Recipe, prepared: Prepared, changed: Mapping[str, Any], log: Log) -> None:
    """Writes what the run is about beside it, and what it goes on with that is another now."""
    steps = run.checkpoint_steps()
    if steps and changed:
        log(f"from step {steps[-1]} on with what changed: {shown(changed)}")
    run.folder.write("recipe.yaml", dump_recipe(recipe).encode())
    run.folder.write_json("audit.json", prepared.manifest["audit"])
    url = str(prepared.folder.path.resolve()) if prepared.folder.is_local else prepared.url
    run.folder.write_json(PREPARED, {"digest": prepared.digest, "url": url, "identity": prepared.manifest["identity"]})
    remember(run, "went on" if steps else "began", step=steps[-1] if steps else 0, changed=dict(changed) if steps else {})


def recognise(run: RunDir, recipe: Recipe) -> tuple[bool, dict[str, tuple[Any, Any]]]:
    """Whether this recipe's run is finished already, and which keys changed. Raises ConfigError when the folder holds a run of another
    recipe, of another base or of other rows."""
    changed: dict[str, tuple[Any, Any]] = {}
    if run.folder.exists("recipe.yaml"):
        text = run.folder.read("recipe.yaml").decode()
        before = parse_recipe(text, f"{run.url}/recipe.yaml", plugins=recipe.plugins)
        url = run.folder.read_json(PREPARED)["url"] if run.folder.exists(PREPARED) else ""
        changed = refuse_changes(run, before, recipe, url, _another(recipe), lambda: is_same_base(run, recipe))
    if run.checkpoint_steps() or run.is_finished():
        refuse_other_base(run, recipe, _another(recipe))
    if not run.is_finished():
        return False, changed
    refuse_other_data(run, recipe, run.folder.read_json(PREPARED)["identity"], identity(recipe, Folder(recipe.data.cache)))
    return True, changed


def refuse_other_data(run: RunDir, recipe: Recipe, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError naming what the blocks were made of that is another now. A newer ftcore is no reason: the old blocks are used."""
    names = {"data": "the rows or the data section"}
    changed = [names.get(key, key) for key in sorted({*before, *now} - {"version", "code"}) if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            "what this run learns from changed since it began", where=run.url, got=f"changed: {', '.join(changed)}", remedy=_another(recipe)
        )


def _another(recipe: Recipe) -> str:
    return (
        f"give it another name (name={recipe.name}-2), or begin it again from nothing (--no-resume keeps the old folder under another name)"
    )


def same_command() -> str:
    """What to type to go on: this process's own command line."""
    program = Path(sys.argv[0])
    words = ["ftcore"] if program.name == "ftcore" else ["python", str(program)]
    return shlex.join([*words, *(word for word in sys.argv[1:] if word != "--no-resume")])


def move_aside(run: RunDir, log: Log) -> None:
    """`--no-resume`: what the run's folder holds is kept under another name, and the run begins again from nothing."""
    if not run.folder.exists("recipe.yaml"):
        return
    if not run.folder.is_local:
        raise ConfigError(
            "a remote run folder cannot be moved aside", where=run.url, got="--no-resume",
            remedy=f"begin under another name (name={run.name}-2), or move or delete that folder yourself",
        )  # fmt: skip
    kept = run.folder.path.with_name(f"{run.name}.before-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    run.folder.path.rename(kept)
    log(f"--no-resume: beginning again from nothing; the old run is kept in {kept}")


def parent_into(run: RunDir, recipe: Recipe, log: Log) -> None:
    """Puts the adapter this run continues from into `parent/`, once: a name that moves on later does not move a run that began."""
    named = recipe.model.adapter
    if named is None:
        return
    if is_sealed(run.folder / "parent"):
        if run.folder.read_json(f"parent/{MANIFEST}").get("named") == named:
            return
        run.folder.delete("parent")  # another adapter was named before this run began to train
    if Path(named, "adapter_config.json").is_file():
        _seal_parent(run, Path(named), None, named)
        log(f"continuing from the adapter in {named}")
        return
    split_ref(named)  # raises ConfigError for what is neither a folder nor a name
    store = AdapterStore(recipe.output.store)
    ref = store.resolve(named)
    with tempfile.TemporaryDirectory(prefix="ftcore-parent-") as scratch:
        _seal_parent(run, store.fetch(ref, scratch), ref.full, named)
    log(f"continuing from {ref}")


def _seal_parent(run: RunDir, source: Path, ref: str | None, named: str) -> None:
    with run.sealing("parent", {"ref": ref, "named": named}) as folder:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (source / name).is_file():
                raise IntegrityError(
                    "this adapter is not whole", where=source, got=f"no {name}", remedy="give a folder saved by PEFT, or tenant/name"
                )
            shutil.copyfile(source / name, folder / name)


def publish_once(run: RunDir, recipe: Recipe, log: Log) -> AdapterRef | None:
    """Publishes `final/` under output.adapter, unless this very result is there already. None when the recipe names no adapter."""
    named = recipe.output.adapter
    if named is None:
        log(f"not published: output.adapter is unset; the result is in {run.url}/final")
        return None
    fact = {"adapter": named, "store": recipe.output.store, "final": digest_of(run.folder.read_json(f"final/{MANIFEST}"))}
    before = run.folder.read_json(PUBLISHED) if run.folder.exists(PUBLISHED) else {}
    if {**before, **fact} == before:
        ref = AdapterRef(*split_ref(before["ref"]))
        if AdapterStore(recipe.output.store).is_sealed(ref):
            log(f"already published: {ref}")
            return ref

    from ftcore.publish import publish_run  # loads peft: the first step must not wait for it

    searched = run.folder.read_json(SEARCHED) if run.folder.exists(SEARCHED) else {}
    ref = publish_run(run, recipe, Prepared.open(run.folder.read_json(PREPARED)["url"]), facts=searched, log=log)
    card = AdapterStore(recipe.output.store).card(ref)
    run.folder.write_json(PUBLISHED, {**fact, "ref": ref.full, "card": card_facts(card)})
    return ref


def card_facts(card: Card) -> dict[str, str]:
    """What the report says of a card: what the adapter belongs to, what it learned from, and what proves it."""
    probes = [f"{name}: effect {fact.effect:.4g} on {fact.device}" for name, fact in card.probes.items() if fact.effect is not None]
    return {
        "base": f"{card.base.id} ({card.base.dtype}), weights {card.base.weights[:12]}",
        "tokenizer, template": f"{card.tokenizer[:12]}, {card.template[:12] or 'none'}",
        "data": card.data.digest[:12] if card.data else "none",
        "recipe, seed": f"{card.recipe.digest[:12] if card.recipe else 'none'}, {card.seed}",
        "proven by probes": "; ".join(probes) or "none",
        "signed": card.signature.key_id if card.signature else "no",
    } | ({"continues from": card.parent} if card.parent else {})
