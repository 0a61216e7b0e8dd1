"""The adapter commands: `ftcore adapters list|show|verify|promote|rollback|revoke|gc|tag|import|keygen|push` and `ftcore merge`.

In: a command line. Out: lines on the terminal, with everything from cards made printable; an exit code. Runs in: a person's terminal.

What binds torch is imported inside the command that needs it, so that `list` and `promote` answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from ftcore.adapters import AdapterRef, AdapterStore
from ftcore.card import Card, printable
from ftcore.errors import IntegrityError
from ftcore.quantisation import FOUR_BITS, Form, Quantisation
from ftcore.signing import keygen, verify_card

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str]) -> int:
    """`ftcore adapters ...`"""
    parser = argparse.ArgumentParser(
        prog="ftcore adapters",
        description="look after the adapter store",
        epilog="`ftcore adapters status URL` says which replica of a server serves which version.",
    )
    _add_adapters(parser.add_subparsers(dest="command", required=True))
    return _run(parser.parse_args(list(arguments)))


def merge_main(arguments: Sequence[str]) -> int:
    """`ftcore merge REF --out DIR`"""
    parser = argparse.ArgumentParser(prog="ftcore merge", description="fold an adapter into its base; reloaded and compared")
    _add_merge(parser)
    return _run(parser.parse_args(list(arguments)))


def add_commands(subparsers: Any) -> None:
    """Adds `adapters` and `merge` to another parser's subparsers."""
    _add_adapters(subparsers.add_parser("adapters", help="look after the adapter store").add_subparsers(dest="command", required=True))
    _add_merge(subparsers.add_parser("merge", help="fold an adapter into its base"))


def list_adapters(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    refs = store.list(arguments.tenant)
    for ref in refs:
        share = store.targets(ref.tenant, ref.name).get(ref)
        state = (
            "revoked" if store.revocation(ref) is not None else "" if share is None else "current" if share == 1 else f"current {share:.0%}"
        )
        card = store.card(ref)
        print(f"{ref!s:<40} {state:<12} {printable(card.created)}  {printable(card.method.kind)} on {printable(card.base.id)}")
    print(f"{len(refs)} sealed version{'' if len(refs) == 1 else 's'} in {store}")
    return 0


def show(arguments: argparse.Namespace) -> int:
    """The card, as a list of facts or as JSON; control characters of what others wrote are shown, not obeyed."""
    store = _store(arguments)
    ref = store.find(arguments.ref)
    card = store.card(ref)
    if arguments.json:
        print(json.dumps(card.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=True))
        return 0
    print(ref.full)
    reason = store.revocation(ref)
    if reason is not None:
        print(f"  REVOKED: {printable(reason)}")
    for path, value in _facts(card.model_dump(mode="json", exclude={"recipe": {"resolved"}, "tenant": True, "name": True, "digest": True})):
        print(f"  {printable(path):<34} {printable(value)}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Every hash; the signature when public keys are given; and on a base (`--base`, or the card's with `--probes`) the probes."""
    store = _store(arguments)
    ref = store.resolve(arguments.ref)
    card = store.verify(ref)
    print(f"{ref}: {len(card.files)} files are the ones that were published")
    if arguments.key:
        print(f"{ref}: signed by {verify_card(card, arguments.key)}")
    if arguments.base or arguments.probes:
        print(f"{ref}: {_verify_probes(store, ref, card, arguments.base)}")
    return 0


def _verify_probes(store: AdapterStore, ref: AdapterRef, card: Card, base: str | None) -> str:
    from ftcore.bind import bind_adapter
    from ftcore.data.tokenizer import load_tokenizer, tokenizer_digest
    from ftcore.export.merge import model_of, require_base
    from ftcore.models import load_base
    from ftcore.probes import Probes, check

    model = model_of(card, base)
    require_base(card, model)
    tokenizer = load_tokenizer(model)
    if tokenizer_digest(tokenizer) != card.tokenizer:
        raise IntegrityError(
            "this base's tokenizer is not the one the adapter was trained with", where=model.path, wanted=card.tokenizer[:16]
        )
    with tempfile.TemporaryDirectory(prefix="ftcore-verify-") as scratch:
        folder = store.fetch(ref, scratch)
        tuned = bind_adapter(load_base(model, dtype="fp32"), folder)
        report = check(tuned, tokenizer, Probes.load(folder), "fp32", tuned.disable_adapter)
    report.require(ref)
    return f"every tensor binds, and the probes agree: {report.reason}"


def promote(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    ref = store.resolve(arguments.ref)
    store.promote(ref, arguments.share)
    shares = ", ".join(f"{target} {share:.0%}" for target, share in store.targets(ref.tenant, ref.name).items())
    print(f"{ref.tenant}/{ref.name} now means {shares}")
    return 0


def rollback(arguments: argparse.Namespace) -> int:
    ref = _store(arguments).rollback(arguments.name)
    print(f"{ref.tenant}/{ref.name} now means {ref}")
    return 0


def revoke(arguments: argparse.Namespace) -> int:
    """Takes a version out of use for good; says when its name still points at it."""
    store = _store(arguments)
    ref = store.find(arguments.ref)
    store.revoke(ref, arguments.reason)
    print(f"{ref} is revoked: it will not be served, fetched or published again")
    if ref in store.targets(ref.tenant, ref.name):
        print(f"  {ref.tenant}/{ref.name} still points at it; go back with: ftcore adapters rollback {ref.tenant}/{ref.name}")
    return 0


def tag(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    ref = store.resolve(arguments.ref)
    store.tag(ref, arguments.alias)
    print(f"{ref.tenant}/{ref.name}@{arguments.alias} now means {ref}")
    return 0


def collect(arguments: argparse.Namespace) -> int:
    """`gc`: says what would go, and removes it only with --yes."""
    store = _store(arguments)
    doomed = store.gc(arguments.keep_last, dry_run=not arguments.yes, tenant=arguments.tenant)
    for ref in doomed:
        print(f"{'removed' if arguments.yes else 'would remove'} {ref.full}")
    print(f"{len(doomed)} version{'' if len(doomed) == 1 else 's'}" + ("" if arguments.yes or not doomed else "; add --yes to remove them"))
    return 0


def import_folder(arguments: argparse.Namespace) -> int:
    from ftcore.publish import import_adapter
    from ftcore.recipe import Model

    store, model = _store(arguments), Model(path=arguments.base, revision=arguments.revision)
    held = Quantisation(arguments.quantise, arguments.quantise in FOUR_BITS) if arguments.quantise else None
    import_adapter(Path(arguments.folder), arguments.name, model, store, held=held, sign_key=arguments.sign_key)
    return 0


def make_key(arguments: argparse.Namespace) -> int:
    private = Path(arguments.file)
    print(f"key {keygen(private)}: private {private} (keep it), public {private.with_suffix('.pub.pem')} (hand it out)")
    return 0


def push(arguments: argparse.Namespace) -> int:
    from ftcore.export.hub import push_to_hub

    store = _store(arguments)
    ref = store.resolve(arguments.ref)
    print(push_to_hub(store, ref, arguments.repo, base_model=arguments.base_model, private=not arguments.public))
    return 0


def merge(arguments: argparse.Namespace) -> int:
    from ftcore.export.merge import merge_adapter

    store = _store(arguments)
    ref = store.resolve(arguments.ref)
    with tempfile.TemporaryDirectory(prefix="ftcore-merge-") as scratch:
        folder = store.fetch(ref, scratch)
        merged = merge_adapter(
            ref, folder, Path(arguments.out), base=arguments.base, dtype=arguments.dtype, tolerance=arguments.tolerance,
        )  # fmt: skip
    print(f"{merged.folder}: a plain transformers model, with its tokenizer")
    return 0


def _add_adapters(commands: Any) -> None:
    def add(name: str, run: Command, summary: str, *words: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
        for word in words:
            parser.add_argument(word)
        return _with_store(parser, run)

    ref = "ref"
    add("list", list_adapters, "every sealed version, and which is current").add_argument("--tenant")
    add("show", show, "a version's card", ref).add_argument("--json", action="store_true")
    parser = add("verify", verify, "read a version back: hashes, signature, probes on its base", ref)
    parser.add_argument("--base", help="folder or hub name of the base, to run the probes on")
    parser.add_argument("--probes", action="store_true", help="run the probes on the base that the card names")
    parser.add_argument("--key", action="append", help="public key file (PEM) of a trusted publisher")
    parser = add("promote", promote, "point a name at a version", ref)
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="share of the traffic (a canary), the rest stays: requests are dealt, one x-ftcore-session header or `user` sticks",
    )
    add("rollback", rollback, "point a name back at what it meant before", "name")
    add("revoke", revoke, "take a version out of use for good", ref).add_argument("--reason", required=True)
    add("tag", tag, "give a version an alias: tenant/name@ALIAS", ref, "alias")
    parser = add("gc", collect, "remove old versions; says which, and removes them with --yes")
    parser.add_argument("--keep-last", type=int, default=3)
    parser.add_argument("--yes", action="store_true")
    parser.add_argument("--tenant")
    parser = add("import", import_folder, "publish an adapter that plain PEFT made, with probes recorded now", "folder", "name")
    parser.add_argument("--base", required=True, help="folder or hub name of its base")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--quantise", choices=get_args(Form), help="record probes over the base held so too: needed to serve it so")
    parser.add_argument("--sign-key", help="private key file (PEM)")
    add("keygen", make_key, "make an Ed25519 key pair to sign cards with", "file")
    parser = add("push", push, "push a version to a hub (HF_ENDPOINT, HF_TOKEN)", ref, "repo")
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--base-model", help="the base's name on the hub, where it was trained on a folder")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", help="tenant/name[@version]")
    parser.add_argument("--out", required=True, help="an empty or new folder")
    parser.add_argument("--base", help="where the base lies, if not where the card says")
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="auto: as the base lies on disk")
    parser.add_argument("--tolerance", type=float, help="largest difference of a logit to accept")
    _with_store(parser, merge)


def _with_store(parser: argparse.ArgumentParser, run: Command) -> argparse.ArgumentParser:
    parser.add_argument("--store", default=os.environ.get("FTCORE_STORE", "adapters"), help="the adapter store [FTCORE_STORE, adapters]")
    parser.set_defaults(run=run)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    run: Command = arguments.run
    return run(arguments)


def _store(arguments: argparse.Namespace) -> AdapterStore:
    return AdapterStore(arguments.store)


def _facts(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _facts(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            found.append((prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else value))
    return found
