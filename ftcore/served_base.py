"""Served base: a base as serving needs it (digests, tokenizer, chat template), and the proof that an adapter is what its card says on it.

In: a base's folder or hub name, adapter versions, a running engine. Out: prompts as ids; a ProbeReport, or an error with the reason.
Runs in: serving replicas, `ftcore chat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch

from ftcore.card import Card
from ftcore.data.chat import Chat
from ftcore.data.tokenizer import load_tokenizer, longest_token, tokenizer_digest
from ftcore.data.types import Message
from ftcore.devices import device_here
from ftcore.engines.base import LiveEngine
from ftcore.errors import ConfigError, DataError, IntegrityError, ModelError
from ftcore.models import model_type
from ftcore.probes import ProbeReport, Probes, compare
from ftcore.recipe import Data, Model
from ftcore.tool_calls import ToolFormat, format_of
from ftcore.weights import base_folder, check_base, weights_digest

HELD_AS_TRAINED = "hold the base as the adapter was trained, or in fp32 (`ftcore adapters show` has base.dtype, base.quantisation, probes)"


class ServedBase:
    """One base; opened once a replica."""

    def __init__(self, path: str, revision: str = "main", chat_template: str = "auto") -> None:
        folder = base_folder(path, revision)
        check_base(folder)
        model = Model(path=str(folder), chat_template=chat_template)
        self.folder = folder
        self.weights = weights_digest(folder)
        self.tokenizer = load_tokenizer(model)
        self.tokenizer_digest = tokenizer_digest(self.tokenizer)
        self.longest_token = longest_token(self.tokenizer)
        self.chat: Chat | None = None
        self.no_chat = ""
        try:
            self.chat = Chat.open(self.tokenizer, data=Data(sources="served"), template=chat_template, family=model_type(model))
        except ModelError as error:  # completions need no template
            self.no_chat = error.what
        eos = self.tokenizer.eos_token_id
        self.stop_ids = frozenset(self.chat.stop_ids if self.chat else () if eos is None else (eos,))

    def chat_prompt(self, messages: Sequence[Message], tools: tuple[dict[str, Any], ...] = (), max_tokens: int = 0) -> tuple[int, ...]:
        """`max_tokens`: raises ConfigError for what is told to be longer before it is read; 0: nothing is."""
        chat = self._chat()
        chat.require_no_forgery(messages, tools)
        chat.require_place_for_tools(messages, tools)
        text = chat.prompt_text(messages, tools)
        self._require_short(text, max_tokens)
        return tuple(chat.ids(text))

    def tool_format(self, setting: str) -> ToolFormat:
        return format_of(self._chat().template, setting)

    def _chat(self) -> Chat:
        if self.chat is None:
            raise DataError("this base has no chat template", got=self.no_chat, remedy="ask /v1/completions")
        return self.chat

    def text_prompt(self, text: str, max_tokens: int = 0) -> tuple[int, ...]:
        """`max_tokens`: as in `chat_prompt`."""
        self._require_short(text, max_tokens)
        return tuple(self.tokenizer(text)["input_ids"])

    def _require_short(self, text: str, max_tokens: int) -> None:
        most = self.longest_token * max_tokens
        if most and len(text) > most and (num := len(normalize("NFC", text))) > most:
            got, wanted = f"{num} characters", f"at most {most}, if all of its tokens were as long as the longest"
            raise ConfigError("the prompt does not fit the context", where="prompt", got=got, wanted=wanted)

    def require_card(self, card: Card) -> None:
        """Raises IntegrityError unless the adapter was trained on this base, with this tokenizer and this template."""
        template = self.chat.template_digest if self.chat else ""
        for what, got, wanted in (
            ("base", card.base.weights, self.weights),
            ("tokenizer", card.tokenizer, self.tokenizer_digest),
            ("chat template", card.template or template, template),
        ):
            if got != wanted:
                raise IntegrityError(
                    f"this adapter belongs to another {what}", where=f"{card.tenant}/{card.name}@{card.digest[:12]}",
                    got=got[:12], wanted=wanted[:12], remedy=f"serve it on {card.base.id}, or train it on this base",
                )  # fmt: skip

    async def prove(self, engine: LiveEngine, digest: str, folder: Path, precision: str) -> ProbeReport:
        """Runs the version's probes through the engine's own path, with the adapter and without. Raises IntegrityError when they fail.

        `require_card` comes before: that the base's files are the adapter's own is taken as known.
        """
        probes = Probes.load(folder)
        tuned = torch.stack([torch.as_tensor(row) for row in await engine.next_logits(probes.prompts, digest)])
        bare = torch.stack([torch.as_tensor(row) for row in await engine.next_logits(probes.prompts)])
        report = compare(probes, tuned, bare, precision, device_here(), logprobs=engine.gives_logprobs, same_files=True)
        report.require(digest[:12], inconclusive=HELD_AS_TRAINED)
        return report
