"""Tokenizers and chats made on the spot, for tests of masks and templates."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ftcore.data.chat import Chat
from ftcore.data.types import Conversation, Example, Message, Origin
from ftcore.recipe import Data

BAR = "\uff5c"
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eot|>", "<|eos|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|end|>", "[gMASK]", "<sop>"),
    *(f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"),
]
CORPUS = "Hello! Who are you? A cat. A cat is a cat. Be brief. ASSISTANT: Hello! Hello!"
ORIGIN = Origin("rows.jsonl", 1)
TALK = (
    Message("system", "Be brief."),
    Message("user", "Hi."),
    Message("assistant", "Hello!"),
    Message("user", "Who are you?"),
    Message("assistant", "A cat."),
)


def make_tokenizer(
    *, vocab: int = 330, corpus: str = CORPUS, special: tuple[str, ...] = tuple(SPECIAL), **tokens: str | None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges, so that a token is a character or a little more."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([corpus], trainer)
    chosen = {"bos_token": "<s>", "eos_token": "</s>", **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **{name: token for name, token in chosen.items() if token in special})


TOKENIZER = make_tokenizer()


def open_chat(template: str, *, train_on: str = "answers", tokenizer: PreTrainedTokenizerFast = TOKENIZER, family: str = "") -> Chat:
    data = Data.model_validate({"sources": "unused.jsonl", "train_on": train_on})
    return Chat.open(tokenizer, data=data, template=template, family=family)


def inline_chat(template: str, **kwargs: str) -> Chat:
    """A tokenizer that carries this template itself."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return open_chat("auto", tokenizer=tokenizer, **kwargs)


def marked(example: Example, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    """The text with trained runs in brackets."""
    edges = np.flatnonzero(np.diff(example.mask.astype(int), prepend=0, append=0))
    pieces = np.split(example.ids, edges)
    return "".join(("⟦" if i % 2 else "⟧" if i else "") + tokenizer.decode(piece) for i, piece in enumerate(pieces))


def talk(*messages: Message, tools: tuple[dict[str, object], ...] = ()) -> Conversation:
    return Conversation(messages, ORIGIN, tools)
