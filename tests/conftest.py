"""Fixtures every room may use: a tiny real model on disk and one shared local Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3_server import s3 as s3
from tests.s3_server import s3_credentials as s3_credentials
from tests.s3_server import s3_endpoint as s3_endpoint

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # tests that run beside would starve them
os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "10")  # a replica that is late to tell its queue is not passed over

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is your name? My name is Ada, and I answer questions about computers, files and programs.",
    "Open the report, rename it to final.txt, then move it to the archive folder: /home/ada/archive/final.txt",
    "0123456789 alpha beta gamma delta; one two three four five six seven eight nine ten.",
]


def make_tiny_model(folder: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2, vocab: int = 400) -> Path:
    """A random Qwen2 with grouped-query attention and a byte-level BPE tokenizer with ChatML, saved as fp32 safetensors."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


LONG_FILES = ("test_zero.py", "test_exact_resume.py", "test_invariants.py", "test_serving_api.py", "test_torch_engine.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that the processes of `make test JOBS=...` end at the same time."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: 0 if in_one_process(item.nodeid) else 1 if item.path.name in LONG_FILES else 2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Names that are no text are logged by tests of them; between the processes of `make test JOBS=...` reports travel as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def in_one_process(nodeid: str) -> bool:
    return nodeid.startswith("tests/ray/") or "test_netns.py" in nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`make test JOBS=2` runs two at a time: what needs Ray or network namespaces in one process, in order, the rest beside it by file."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if in_one_process(nodeid) else nodeid.partition("::")[0]

    return OneRay(config, log)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local single-node Ray for the whole run: 8 logical CPUs, one compute thread a worker."""
    import ray

    from cluster.connect import patiently

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    patiently(lambda: ray.init(
        address="local",  # not the one that somebody else runs on this machine
        num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    ))  # fmt: skip
    yield
    ray.shutdown()
