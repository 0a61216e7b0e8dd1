"""Makes what the small base model is pre-trained from: its tokenizer, its untrained weights, and a broad mixture of documents.

    python -m ftcore.demo.make_base --out .demo/base
    ftcore sft pipelines/recipes/pretrain-base.yaml

In: seeds. Out: OUT/untrained (a transformers folder) and OUT/corpus/{desktop,shell,english}.jsonl. Runs in: one process, a few minutes.

The population: every document is a new persona, drawn at random, with one to four of its sessions. The base so learns the language, to copy
what it saw before, to take up a habit from the examples in front of it, and what people do on the whole; never what one demo tenant does.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from ftcore.demo.personas import draw_team
from ftcore.demo.rows import conversation, write_rows
from ftcore.demo.shell import shell_session
from ftcore.demo.simulator import simulate

POPULATION_SEED = 20_000
"""Personas of the mixture are drawn from here upwards; the demo's tenants from seeds far below."""
END, PAD = "<|end|>", "<|endoftext|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def document(row: dict[str, Any]) -> str:
    """A conversation as the chat template writes it."""
    turns = [f"<|{m['role']}|>{m['content']}" + (END if m["role"] == "assistant" else "") for m in row["messages"]]
    return "".join(turns)


def desktop_documents(count: int, seed: int = POPULATION_SEED) -> Iterator[dict[str, str]]:
    """One new persona each, one to four sessions of it in a row."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        persona = draw_team(rng, "population", users=1).personas[0]
        made = [simulate(persona, rng, f"p{index}-{n}") for n in range(int(rng.integers(1, 5)))]
        rows = [conversation(event.to_json() for event in session.events) for session in made]
        turns = rows[0]["messages"] + [m for row in rows[1:] for m in row["messages"][1:]]
        yield {"text": document({"messages": turns})}


def shell_documents(count: int, seed: int = POPULATION_SEED) -> Iterator[dict[str, str]]:
    for index in range(count):
        yield {"text": document(shell_session(np.random.default_rng([seed, 1, index])))}


def english_documents() -> Iterator[dict[str, str]]:
    """Paragraphs of the Python manual that comes with the interpreter: general English without a download."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    for paragraph in re.split(r"\n{2,}", text):
        words = " ".join(paragraph.split())
        if len(words) > 120:
            yield {"text": words[:1200]}


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE cut as Qwen2's is (transformers builds that pre-tokenizer for every folder of this architecture): any text can be
    written, the demo's words are one token each, a digit is a token."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in (PAD, END, *ROLE_TOKENS)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=2048)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, *, hidden: int = 160, layers: int = 4, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=16_000, help="desktop documents (a tenth as many shell documents come with them)")
    parser.add_argument("--vocab", type=int, default=1536)
    arguments = parser.parse_args()
    corpus = arguments.out / "corpus"
    kinds = {
        "desktop": desktop_documents(arguments.documents),
        "shell": shell_documents(arguments.documents // 10),
        "english": english_documents(),
    }
    paths = {name: write_rows(rows, corpus / f"{name}.jsonl") for name, rows in kinds.items()}
    for name, path in paths.items():
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB of {name} text")
    sample = [row["text"] for rows in (desktop_documents(2000, 1), shell_documents(1000, 1), english_documents()) for row in rows]
    tokenizer = make_tokenizer(sample, arguments.vocab)
    model = make_model(tokenizer)
    tokenizer.save_pretrained(arguments.out / "untrained")
    model.save_pretrained(arguments.out / "untrained")
    print(f"{arguments.out / 'untrained'}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")


if __name__ == "__main__":
    main()
