"""Chat: turns conversations and documents into ids and masks. THE place where the mask is born.

In: a tokenizer, the recipe's data section, a conversation. Out: Example, prompt ids, stop ids. Runs in: Ray Data tasks, engines; no torch.

The text is tokenised once, whole, so the ids are those of `tokenizer.apply_chat_template`; a token is a label when it covers characters
of a span that is trained (see `turns.py`). The one exception: where the template writes no stop token after the last answer, the
end-of-sequence token is appended and trained.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from ftcore.data.families import GENERIC, family_of, read_template, template_names
from ftcore.data.turns import Span, Turns
from ftcore.data.types import ROLES, Conversation, Example, Message, Text
from ftcore.errors import DataError, ModelError
from ftcore.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE, _TEXT, _ASSISTANT = ROLES.index("template"), ROLES.index("text"), ROLES.index("assistant")
_PROBE = ("user", "assistant", "user", "assistant")


class Chat:
    """A tokenizer with one chat template and the recipe's rule of what is trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, origin: str, train_on: str) -> None:
        self.tokenizer, self.template, self.origin, self.train_on = tokenizer, template, origin, train_on
        self.template_digest = hashlib.sha256(template.encode()).hexdigest()
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._control = _control_tokens(tokenizer)
        self._turns: dict[str, Turns] = {}
        self._forged = re.compile(r"(?!)")
        self.notes: list[str] = []
        self._probe()

    @classmethod
    def open(cls, tokenizer: PreTrainedTokenizerBase, *, data: Data, template: str = "auto", family: str = "") -> Chat:
        """`template`: auto, a family template's name, or a path ending in .jinja; `family`: a config's `model_type` (or a family's name).

        Raises ModelError for a tokenizer that cannot give offsets, has no stop token, or whose template cannot be split into turns.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                "this tokenizer has no offsets, so the mask cannot be placed",
                got=type(tokenizer).__name__,
                wanted="a fast tokenizer (tokenizer.json)",
                remedy="convert it: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)",
            )
        text, origin = _choose(tokenizer, template, family)
        return cls(tokenizer, text, origin, data.train_on)

    def render(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), generation_prompt: bool = False) -> str:
        """The template's text. Raises DataError with the template's own words where it refuses the messages."""
        try:
            try:
                return self._render(messages, tools, generation_prompt)
            except TypeError:  # some templates (DeepSeek's) join a call's arguments as text, where most write the object out themselves
                if not any("tool_calls" in message for message in messages):
                    raise
                return self._render([_text_arguments(message) for message in messages], tools, generation_prompt)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError("the chat template refuses the row", got=f"{type(error).__name__}: {error}"[:300]) from error

    def _render(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, chat_template=self.template, tokenize=False, add_generation_prompt=generation_prompt
            )
        )

    def encode(self, conversation: Conversation) -> Example:
        """A conversation as ids with its mask. Raises DataError for a row the template refuses or cannot be split."""
        messages = conversation.messages
        self.require_no_forgery(messages, conversation.tools)
        self.require_place_for_tools(messages, conversation.tools)
        text, spans = self._turns_for(conversation.tools).find([_plain(message) for message in messages])
        ids, starts, ends = self._tokens(text)
        mask = np.zeros(len(ids), np.uint8)
        roles = np.full(len(ids), _TEMPLATE, np.uint8)
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
        num_answers = num_stopped = 0
        for i, (message, span) in enumerate(zip(messages, spans, strict=True)):
            first, after = _covering(text, span, starts, ends)
            roles[first:after] = ROLES.index(message.role)
            trained = self.trains(message, is_last=i == last)
            mask[first:after] = trained
            if message.role == "assistant" and trained:
                num_answers += 1
                num_stopped += span.stopped
        if last == len(messages) - 1 and last >= 0 and not spans[last].stopped and self.tokenizer.eos_token_id is not None:
            trained = self.trains(messages[last], is_last=True)
            ids, roles = np.append(ids, np.int32(self.tokenizer.eos_token_id)), np.append(roles, np.uint8(_ASSISTANT))
            mask = np.append(mask, np.uint8(trained))
            num_stopped += trained
        if self.train_on == "all":
            mask |= np.isin(roles, [_TEMPLATE])
        mask[:1] = 0
        return Example(ids, mask, roles, conversation.origin, num_answers=num_answers, num_stopped=num_stopped)

    def require_no_forgery(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> None:
        """Raises DataError where a turn's text, a call or a tool holds tokens that the template itself ends and begins turns with."""
        texts = [turn.content for turn in messages] + [turn.tool_call_id for turn in messages]
        for structure in [*(turn.tool_calls for turn in messages), tools]:
            texts += [json.dumps(structure, ensure_ascii=False)] if structure else []
        for text in texts:
            if found := self._forged.search(text):
                raise DataError(
                    "a turn holds the template's own control tokens", got=repr(found.group()),
                    remedy="remove them: they would end or forge a turn",
                )  # fmt: skip

    def require_place_for_tools(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        """A template that has no place for tools would leave them out without a word."""
        if tools and "tools" not in self.template:
            raise DataError("the chat template has no place for tools", got=f"{len(tools)} tool definitions")
        if "tool_calls" not in self.template and any(message.tool_calls for message in messages):
            raise DataError("the chat template has no place for tool calls")

    def trains(self, message: Message, *, is_last: bool) -> bool:
        """Whether this turn is a label: its own weight if it has one, else the recipe's `train_on`."""
        if message.weight is not None:
            return bool(message.weight)
        if self.train_on == "all":
            return True
        return message.role == "assistant" and (self.train_on == "answers" or is_last)

    def encode_text(self, text: Text) -> Example:
        """A document: every token a label, the end-of-sequence token last (where the tokenizer has one), its own first token in front."""
        ids = self._backend.encode(text.text, add_special_tokens=True).ids
        eos = self.tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        mask = np.ones(len(ids), np.uint8)
        mask[:1] = 0
        return Example(np.array(ids, np.int32), mask, np.full(len(ids), _TEXT, np.uint8), text.origin)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of the messages and the generation prompt: what a model is given to answer, the same tokens as before a trained answer."""
        return self.ids(self.prompt_text(messages, tools))

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        return self._turns_for(tuple(tools)).prompt([_plain(message) for message in messages])

    def ids(self, text: str) -> list[int]:
        """Of what the template made."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def describe(self) -> str:
        stops = ", ".join(repr(token) for token in self.tokenizer.convert_ids_to_tokens(list(self.stop_ids)))
        return f"chat template: {self.origin} ({self.template_digest[:12]}); stop tokens: {stops}; trained on: {self.train_on}" + "".join(
            f"; {note}" for note in self.notes
        )

    def _turns_for(self, tools: tuple[dict[str, Any], ...]) -> Turns:
        key = json.dumps(tools, sort_keys=True) if tools else ""
        if key not in self._turns:
            if len(self._turns) > 64:
                self._turns.clear()
            self._turns[key] = Turns(lambda messages, prompt: self.render(messages, tools, prompt), self._control)
        return self._turns[key]

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1]

    def _probe(self) -> None:
        """Two exchanges through the template: it must split into turns, and an answer must end in a stop token."""
        turns = self._turns_for(())
        try:
            _, spans = turns.find(_dicts(_PROBE))
        except DataError as error:
            raise ModelError(
                "this chat template cannot be used for training",
                where=self.origin,
                got=f"{error.what}: {error.got}",
                remedy="name another with model.chat_template (chatml, alpaca, ... or a .jinja file)",
            ) from error
        eos = self.tokenizer.eos_token_id
        vocabulary = self.tokenizer.get_vocab()
        texts = list(dict.fromkeys(span.stop for span in spans if span.stop))
        stops = [vocabulary[text] for text in texts]
        if not stops and eos is None:
            raise ModelError(
                "no stop token: the template writes none after an answer and the tokenizer has no eos_token",
                where=self.origin,
                remedy="set eos_token in the tokenizer's config, or name another template with model.chat_template",
            )
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*stops, *([] if eos is None else [eos])]))
        shape = turns.shape(_PROBE)
        markup = "".join(shape.gaps) if shape else ""
        used = [token for token in self._control if token in markup or token in texts or token == self.tokenizer.eos_token]
        if used:
            self._forged = re.compile("|".join(re.escape(token) for token in used))
        if not stops:
            self.notes.append(f"the template writes no stop token; {self.tokenizer.eos_token!r} is put after the last answer")
        if "strftime_now" in self.template:
            self.notes.append("the template writes today's date into every row")
        with suppress(DataError):  # a template without system turns refuses them row by row, with its own words
            if "probe 9" not in self.render([{"role": "system", "content": "probe 9"}, *_dicts(_PROBE)]):
                self.notes.append("the template leaves system turns out")


def _choose(tokenizer: PreTrainedTokenizerBase, template: str, family: str) -> tuple[str, str]:
    """(Jinja text, where it came from)."""
    if template.endswith(".jinja"):
        path = Path(template)
        if not path.is_file():
            raise ModelError("there is no such chat template", where=template, wanted="a .jinja file", remedy="check model.chat_template")
        return path.read_text(encoding="utf-8"), f"file {path.name}"
    if template != "auto":
        return read_template(template), f"`{template}`, named by the recipe"
    if tokenizer.chat_template:
        return _own(tokenizer), "the tokenizer's own"
    known = family_of(family)
    name = known.template
    vocabulary = tokenizer.get_vocab()
    if known is GENERIC and not {"<|im_start|>", "<|im_end|>"} <= set(vocabulary):
        name = "alpaca"
    assert name in template_names()
    return read_template(name), f"`{name}`, usual for {known.name} models (the tokenizer has none)"


def _own(tokenizer: PreTrainedTokenizerBase) -> str:
    """Some tokenizers carry several templates by name; `default` is the one for chat."""
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise ModelError(
            "the tokenizer has several chat templates and none is the default",
            got=", ".join(sorted(named)),
            remedy="write the one to use into a file and name it with model.chat_template: FILE.jinja",
        )
    return str(named["default"] if isinstance(named, dict) else named)


def _dicts(roles: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"probe {i}"} for i, role in enumerate(roles)]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens as text, without those that can only begin a text or stand for nothing."""
    skipped = {tokenizer.bos_token, tokenizer.unk_token} - {tokenizer.eos_token, None}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [token for token in dict.fromkeys([*added, *tokenizer.all_special_tokens]) if token not in skipped]


def _plain(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _covering(text: str, span: Span, starts: np.ndarray, ends: np.ndarray) -> tuple[int, int]:
    """Tokens [first, after) that cover characters of the span; one that begins before it only if more than blanks of it lie inside."""
    first, after = int(np.searchsorted(ends, span.start, "right")), int(np.searchsorted(starts, span.end, "left"))
    if first < after and starts[first] < span.start and not text[span.start : int(ends[first])].strip():
        first += 1
    return first, max(first, after)
