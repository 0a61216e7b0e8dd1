"""Masks against hand-written expectations: what is trained stands between ⟦ and ⟧, for several turns, in the templates of the families."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from ftcore.data.families import template_names
from ftcore.data.turns import Turns
from ftcore.data.types import ROLES, Conversation, Message, Text
from tests.chats import BAR, ORIGIN, TALK, TOKENIZER, inline_chat, make_tokenizer, marked, open_chat, talk

EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi. [/INST]⟦ Hello! </s>⟧<s>[INST] Who are you? [/INST]⟦ A cat. </s>⟧",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A cat.<|eot_id|>⟧",
    "mistral": "<s>[INST] Be brief.\n\nHi.[/INST]⟦ Hello!</s>⟧[INST] Who are you?[/INST]⟦ A cat.</s>⟧",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi.<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n"
    "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n⟦A cat.<end_of_turn>⟧\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi.<|end|>\n<|assistant|>\n⟦Hello!<|end|>⟧\n"
    "<|user|>\nWho are you?<|end|>\n<|assistant|>\n⟦A cat.<|end|>⟧\n",
    "glm4": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi.<|assistant|>\n⟦Hello!<|user|>⟧\nWho are you?<|assistant|>\n⟦A cat.</s>⟧",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi.</s>\n<|assistant|>\n⟦Hello!</s>⟧\n"
    "<|user|>\nWho are you?</s>\n<|assistant|>\n⟦A cat.</s>⟧\n",
    "alpaca": "Be brief.\n\n### Instruction:\nHi.\n\n### Response:\n⟦Hello!</s>⟧\n\n"
    "### Instruction:\nWho are you?\n\n### Response:\n⟦A cat.</s>⟧\n\n",
    "vicuna": "Be brief. USER: Hi. ASSISTANT:⟦ Hello!</s>⟧USER: Who are you? ASSISTANT:⟦ A cat.</s>⟧",
    "deepseek3": (
        f"<s>Be brief.<{BAR}User{BAR}>Hi.<{BAR}Assistant{BAR}>⟦Hello!</s>⟧<{BAR}User{BAR}>Who are you?<{BAR}Assistant{BAR}>⟦A cat.</s>⟧"
    ),
}


@pytest.mark.parametrize("template", sorted(EXPECTED))
def test_a_multi_turn_conversation_trains_exactly_the_answers_and_their_stop_tokens(template: str) -> None:
    example = open_chat(template).encode(talk(*TALK))
    assert marked(example) == EXPECTED[template]
    assert (example.num_answers, example.num_stopped) == (2, 2)


@pytest.mark.parametrize("template", template_names())
def test_ids_are_those_of_apply_chat_template(template: str) -> None:
    chat = open_chat(template)
    messages = [message for message in TALK if message.role != "system"]
    plain = [{"role": message.role, "content": message.content} for message in messages]
    wanted = TOKENIZER.apply_chat_template(plain, chat_template=chat.template, tokenize=True, return_dict=False)
    assert chat.encode(talk(*messages)).ids.tolist() == wanted


@pytest.mark.parametrize("template", template_names())
def test_the_prompt_at_inference_is_what_stood_before_the_answer_in_training(template: str) -> None:
    chat = open_chat(template)
    messages = [message for message in TALK if message.role != "system"]
    example = chat.encode(talk(*messages))
    prompt = chat.prompt_ids(messages[:-1])
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.mask[len(prompt) :][0] == 1
    assert TOKENIZER.decode(example.ids[len(prompt) :]).strip().startswith("A cat.")


def test_train_on_last_keeps_the_last_answer_only() -> None:
    example = open_chat("chatml", train_on="last").encode(talk(*TALK[1:]))
    assert marked(example).count("⟦") == 1
    assert marked(example).endswith("⟦A cat.<|im_end|>⟧\n")


def test_train_on_all_trains_everything_but_the_first_token() -> None:
    example = open_chat("chatml", train_on="all").encode(talk(*TALK[1:]))
    assert example.mask.tolist() == [0] + [1] * (len(example.ids) - 1)


def test_a_weight_of_zero_takes_an_answer_out() -> None:
    example = open_chat("chatml").encode(talk(TALK[1], Message("assistant", "Hello!", weight=0), *TALK[3:]))
    assert "Hello!<|im_end|>\n" in marked(example)
    assert "⟦A cat.<|im_end|>⟧" in marked(example)


def test_a_weight_of_one_puts_a_turn_in_whatever_the_recipe_says() -> None:
    example = open_chat("chatml", train_on="last").encode(talk(TALK[1], Message("assistant", "Hello!", weight=1), *TALK[3:]))
    assert "⟦Hello!<|im_end|>⟧" in marked(example)
    assert "⟦A cat.<|im_end|>⟧" in marked(example)


def test_a_weight_of_zero_holds_under_train_on_all() -> None:
    example = open_chat("chatml", train_on="all").encode(talk(Message("user", "Hi.", weight=0), TALK[2]))
    assert "⟧Hi.⟦" in marked(example)


def test_roles_say_who_wrote_each_token() -> None:
    example = open_chat("chatml").encode(talk(*TALK))
    spoken = {role: TOKENIZER.decode(example.ids[example.roles == ROLES.index(role)]) for role in ("system", "user", "assistant")}
    assert spoken == {"system": "Be brief.", "user": "Hi.Who are you?", "assistant": "Hello!<|im_end|>A cat.<|im_end|>"}


def test_contents_a_template_trims_are_found() -> None:
    example = open_chat("llama3").encode(talk(Message("user", "  Hi. \n"), Message("assistant", "\n Hello!  ")))
    assert marked(example).endswith("Hi.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧")


def test_a_token_shared_by_header_and_answer_is_trained_only_if_it_says_something() -> None:
    blanks = make_tokenizer(corpus="\n\n\n\n x \n\n\n\n " * 9)
    example = open_chat("chatml", tokenizer=blanks).encode(talk(TALK[1], Message("assistant", "\n\nHello!")))
    assert "assistant\n\n⟦\nHello!<|im_end|>⟧" in marked(example, blanks)
    words = make_tokenizer(corpus="ASSISTANT: Hello! " * 9)
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    words.chat_template = template
    example = open_chat("auto", tokenizer=words).encode(talk(TALK[1], TALK[2]))
    assert marked(example, words).endswith("assistant:⟦ Hello!</s>⟧")


def test_an_injected_system_turn_is_never_trained() -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    example = inline_chat(template).encode(talk(*TALK[1:3]))
    assert (
        marked(example)
        == "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
    )


THINKING = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' -%}
{%- set shown = '<think>\\n' + thought + '\\n</think>\\n\\n' if loop.index0 > ns.last else '' -%}
{{- '<|im_start|>assistant\\n' + shown + said + '<|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def test_earlier_thinking_that_the_template_drops_moves_no_mask() -> None:
    thought = [
        Message("assistant", f"<think>\nhm\n</think>\n\n{message.content}") if message.role == "assistant" else message
        for message in TALK[1:]
    ]
    example = inline_chat(THINKING).encode(talk(*thought))
    assert marked(example) == (
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n<|im_start|>user\nWho are you?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nA cat.<|im_end|>⟧\n"
    )


def test_an_empty_thought_the_model_has_to_write_itself_is_trained() -> None:
    example = inline_chat(THINKING).encode(talk(*TALK[1:3]))
    assert marked(example).endswith("<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello!<|im_end|>⟧\n")


TOOLS = """{%- if tools -%}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content -}}
{%- for call in m.tool_calls or [] -%}{{- '<call>' + call.function.name + call.function.arguments | tojson + '</call>' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def test_a_tool_call_is_trained_and_its_result_is_not() -> None:
    call = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    turns = (TALK[1], Message("assistant", "", tool_calls=(call,)), Message("tool", "12:00"), Message("assistant", "Noon."))
    tool = {"type": "function", "function": {"name": "time"}}
    example = inline_chat(TOOLS).encode(talk(*turns, tools=(tool,)))
    assert marked(example).startswith('<|im_start|>system\n[{"type": "function", "function": {"name": "time"}}]<|im_end|>')
    assert '<|im_start|>assistant\n⟦<call>time{"zone": "UTC"}</call><|im_end|>⟧\n<|im_start|>tool\n12:00<|im_end|>\n' in marked(example)
    assert marked(example).endswith("<|im_start|>assistant\n⟦Noon.<|im_end|>⟧\n")


def test_a_template_that_joins_call_arguments_as_text_gets_text() -> None:
    call = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    template = TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
    example = inline_chat(template).encode(talk(TALK[1], Message("assistant", "", tool_calls=(call,))))
    assert marked(example).endswith('<|im_start|>assistant\n⟦<call>time{"zone": "UTC"}</call><|im_end|>⟧\n')


def test_a_template_without_a_generation_prompt_still_does_not_train_its_header() -> None:
    chat = inline_chat("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}")
    example = chat.encode(talk(*TALK[1:3]))
    assert marked(example).endswith("<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n")
    assert TOKENIZER.decode(chat.prompt_ids(TALK[1:2])).endswith("<|im_start|>assistant\n")


def test_a_template_without_a_stop_token_gets_the_end_of_sequence_after_the_last_answer() -> None:
    chat = inline_chat(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    example = chat.encode(talk(*TALK[1:]))
    assert marked(example).endswith("assistant:⟦ A cat.\n</s>⟧")
    assert (example.num_answers, example.num_stopped) == (2, 1)
    assert "writes no stop token" in chat.describe()


def test_a_template_that_leaves_system_turns_out_says_so_and_still_finds_the_answers() -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    chat = inline_chat(template)
    example = chat.encode(talk(Message("system", "Hello"), *TALK[1:]))
    assert "leaves system turns out" in chat.describe()
    assert marked(example).count("⟦") == 2
    assert "⟦Hello!<|im_end|>⟧" in marked(example)


def test_a_document_trains_every_token_and_ends_with_eos() -> None:
    example = open_chat("chatml").encode_text(Text("A cat.", ORIGIN))
    assert TOKENIZER.decode(example.ids) == "A cat.</s>"
    assert example.num_trained == len(example.ids) - 1


BITS = [
    *("Hello", "A cat", "\n", "  ", "\n\n", "日本", "é😀", "<think>", "### Response:\n", "USER: "),
    *("assistant\n", "[INST]", "{{x}}", "\t", "user", ":"),
]


def random_talks(count: int) -> Iterator[Conversation]:
    source = random.Random(7)
    for _ in range(count):
        said = ["x" + "".join(source.choices(BITS, k=source.randint(1, 6))) + "y" for _ in range(2 * source.randint(1, 4))]
        yield talk(*(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(said)))


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "gemma", "phi3", "glm4", "zephyr", "vicuna", "deepseek3"])
def test_whatever_is_said_the_trained_runs_are_the_answers(template: str) -> None:
    chat = open_chat(template)
    for conversation in random_talks(40):
        example = chat.encode(conversation)
        edges = np.flatnonzero(np.diff(example.mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
        trained = [TOKENIZER.decode(example.ids[first : last - 1]).strip() for first, last in edges]
        assert trained == [message.content for message in conversation.messages if message.role == "assistant"]
        assert all(example.ids[last - 1] in chat.stop_ids for _, last in edges)


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3", "mistral", "gemma", "phi3", "zephyr", "vicuna", "deepseek3"])
def test_the_slow_way_of_finding_turns_agrees_with_the_fast_one(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = open_chat(template)
    fast = [chat.encode(conversation) for conversation in random_talks(15)]
    monkeypatch.setattr(Turns, "shape", lambda self, roles: None)
    slow = [chat.encode(conversation) for conversation in random_talks(15)]
    assert [marked(example) for example in slow] == [marked(example) for example in fast]


def test_a_sentencepiece_like_tokenizer_gets_the_same_mask() -> None:
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator([EXPECTED["llama2"]] * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    example = open_chat("llama2", tokenizer=tokenizer).encode(talk(*TALK))
    trained = "".join(tokenizer.convert_ids_to_tokens(example.ids[example.mask == 1].tolist()))
    assert trained.replace("▁", " ").split() == ["Hello!", "</s>", "A", "cat.", "</s>"]
