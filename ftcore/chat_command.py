"""Chat: `ftcore chat`, a conversation with an adapter (or a bare base) in the terminal, through the engine that serves it.

In: lines from the terminal or a pipe. Out: answers as they come. Runs in: a person's terminal.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing

from ftcore.data.types import Message
from ftcore.engines.base import Sampling
from ftcore.engines.torch import Torch, add_base_options
from ftcore.errors import ConfigError, DataError
from ftcore.speaker import Answer, Speaker, Voice

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C cuts an answer short"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ftcore chat", description="talk to an adapter, or to a bare base", epilog=HELP)
    parser.add_argument("ref", nargs="?", default="", metavar="REF", help="tenant/name, tenant/name@digest; left out: the bare base")
    parser.add_argument("--base", default="", help="the base's folder or hub name; else the one that the adapter's card names")
    parser.add_argument("--store", default="adapters", help="the adapter store (default: adapters)")
    parser.add_argument("--system", default="", help="a system message")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token each time (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: 512)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the whole conversation at most (default: 2048)")
    parser.add_argument("--seed", type=int, help="the same answers to the same words")
    add_base_options(parser)
    parsed = parser.parse_args(list(arguments))
    voice = Voice.find(parsed.ref, parsed.store, parsed.base)
    sampling = Sampling(temperature=parsed.temperature, top_p=parsed.top_p, seed=parsed.seed)
    started = time.monotonic()
    with asyncio.Runner() as runner:
        speaker = runner.run(
            Speaker.open(voice, Torch(max_batch=1, max_context=parsed.context, dtype=parsed.dtype, quantise=parsed.quantise))
        )
        print(f"{voice}: ready in {time.monotonic() - started:.1f} s; {HELP}", file=sys.stderr)
        try:
            _talk(runner, speaker, parsed.system, parsed.max_tokens, sampling)
        finally:
            runner.run(speaker.close())
    return 0


def _talk(runner: asyncio.Runner, speaker: Speaker, system: str, max_tokens: int, sampling: Sampling) -> None:
    opening = [Message("system", system)] if system else []
    turns = list(opening)
    while (line := _line()) is not None:
        words = line.strip()
        if words in ("/quit", "/exit"):
            return
        if words == "/reset":
            turns = list(opening)
            continue
        if not words:
            continue
        said: list[str] = []
        try:
            runner.run(_answer(speaker, [*turns, Message("user", words)], max_tokens, sampling, said))
        except KeyboardInterrupt:
            print(" [cut short]", end="")
        except (DataError, ConfigError) as error:
            print(f"{error}\n  /reset begins anew", file=sys.stderr)
            continue
        print(flush=True)
        turns += [Message("user", words), Message("assistant", "".join(said))]


async def _answer(speaker: Speaker, turns: Sequence[Message], max_tokens: int, sampling: Sampling, said: list[str]) -> None:
    async with aclosing(speaker.say(turns, max_tokens, sampling)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Answer):
                if piece.finish == "length":
                    print(" [cut at the limit of tokens]", end="", file=sys.stderr)
                continue
            said.append(piece)
            print(piece, end="", flush=True)


def _line() -> str | None:
    """What was typed; None at the end."""
    try:
        return input("> ") if sys.stdin.isatty() else input()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return None
