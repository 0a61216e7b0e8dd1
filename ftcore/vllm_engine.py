"""The vllm engine: requests, adapters and sampling in vLLM's words, and its outputs in ours.

In: requests and adapter folders from an event loop. Out: tokens. Runs in: serving replicas that have vLLM, whose processes compute.

Weights and cached keys cannot be mistaken for another version's: every load of a digest gets a number that no other load had, vLLM knows
the adapter by that number alone, and the number and the caller's salt are part of the key of every cached block. What vLLM would leave out
of an adapter without a word is refused here first: `read_updates` binds every tensor to a layer of this base.

vLLM is never given more adapters than it may keep in memory: one that it dropped it would read again, from a folder that may have changed.

On a CPU, vLLM computes rows without an adapter with the weights in its last slot, whoever put them there. So such rows name an adapter of
zeros here, for which there is one slot more.

Not as the torch engine: temperatures are at most 2 and at least 0.01, presence and frequency penalties -2 to 2, and min_p counts before
top_p; a seed gives the same text on this engine, not the torch engine's; a constrained answer comes without log-probabilities.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config.lora import MaxLoRARanks
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from ftcore.adapter_files import CONFIG, WEIGHTS
from ftcore.engines.base import EngineEnded, FinishReason, LiveEngine, Request, Stats, Token, check_prompt
from ftcore.errors import ConfigError, ModelError
from ftcore.lora_updates import read_updates
from ftcore.models import DTYPES
from ftcore.probes import PRECISIONS
from ftcore.residents import Residents
from ftcore.vllm_requests import BACKEND, followed, params_of

if TYPE_CHECKING:
    from ftcore.engines.vllm import Vllm


@dataclass
class Adapter:
    """A digest that vLLM holds."""

    lora: LoRARequest
    num_bytes: int
    num_users: int = 0
    is_idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def used(self) -> Iterator[None]:
        self.num_users += 1
        self.is_idle.clear()
        try:
            yield
        finally:
            self.num_users -= 1
            if not self.num_users:
                self.is_idle.set()


class Watch(StatLoggerBase):
    """What the scheduler said last."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.last = SchedulerStats()

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
        if scheduler_stats is not None:
            self.num_steps += 1
            self.last = scheduler_stats

    def log_engine_initialized(self) -> None:
        """Nothing to say: vLLM logs it."""


@dataclass
class Counts:
    tokens: int = 0
    prompt: int = 0
    reused: int = 0


class VllmEngine(LiveEngine):
    """See LiveEngine. `start` opens one."""

    gives_logprobs = True

    def __init__(self, section: Vllm, llm: AsyncLLM, watch: Watch, layers: dict[str, tuple[int, int]]) -> None:
        model = llm.vllm_config.model_config
        self.max_context, self.vocabulary = model.max_model_len, model.get_vocab_size()
        self.precision = model.quantization or PRECISIONS[model.dtype]
        self._section, self._llm, self._watch, self._layers, self._dtype = section, llm, watch, layers, model.dtype
        self._residents = Residents()
        self._adapters: dict[str, Adapter] = {}
        self._digests: dict[int, str] = {}
        """Of every adapter that vLLM holds, by the number it knows it by."""
        self._numbers = itertools.count(1)
        self._bare: LoRARequest | None = None
        """What rows without an adapter name: nothing, or zeros."""
        self._open: Counter[str] = Counter()
        """Requests under way, by id."""
        self._counts = Counts()
        self._is_closed = False
        self._eos = llm.get_tokenizer().eos_token_id

    @classmethod
    async def start(cls, section: Vllm, base: str) -> VllmEngine:
        watch = Watch()
        config = await asyncio.to_thread(AutoConfig.from_pretrained, base)
        layers = await asyncio.to_thread(adaptable, config)
        args = arguments(section, base, config)
        try:
            llm = await asyncio.to_thread(AsyncLLM.from_engine_args, args, stat_loggers=[lambda config, index: watch])
        except (ValueError, RuntimeError, NotImplementedError) as error:
            what = f"{type(error).__name__}: {str(error).strip()}"[:500]
            raise ModelError("vLLM cannot open this base", where=base, got=what, remedy="see vLLM's own log above") from error
        engine = cls(section, llm, watch, layers)
        if section.max_loras and current_platform.is_cpu():
            await engine._load_zeros()
        return engine

    async def _load_zeros(self) -> None:
        number = next(self._numbers)
        with tempfile.TemporaryDirectory(prefix="ftcore-zeros-") as folder:
            await asyncio.to_thread(write_zeros, Path(folder), *next(iter(self._layers.items())))
            lora = LoRARequest(f"{number}-zeros", number, folder)
            await self._add(lora)
        self._bare, self._digests[number] = lora, ""

    async def load_adapter(self, digest: str, folder: Path) -> None:
        await self._residents.bring_in(digest, lambda: self._load(digest, folder))

    async def unload_adapter(self, digest: str) -> None:
        await self._residents.take_out(digest, lambda: self._unload(digest))

    async def _load(self, digest: str, folder: Path) -> None:
        self._require_live()
        if not self._section.max_loras:
            raise ConfigError("this engine serves its bare base alone", where="engine.max_loras", got="0", wanted="1 or more")
        if len(self._digests) >= self._section.max_cpu_loras + (self._bare is not None):
            raise ModelError(
                "this engine holds as many adapters as it may", where="engine.max_cpu_loras", got=f"{self._section.max_cpu_loras} held",
                remedy="unload some, or allow more: only those that are loaded take memory",
            )  # fmt: skip
        number = next(self._numbers)
        self._digests[number] = digest
        try:
            num_bytes = await asyncio.to_thread(self._checked_bytes, folder)
            lora = LoRARequest(f"{number}-{digest}", number, str(folder))
            await self._add(lora)
        except BaseException:
            del self._digests[number]
            raise
        self._adapters[digest] = Adapter(lora, num_bytes)
        self._adapters[digest].is_idle.set()
        self._residents.known.add(digest)

    def _checked_bytes(self, folder: Path) -> int:
        """Memory of the adapter's matrices. Raises for whatever vLLM would not compute as it was trained."""
        updates = read_updates(folder, self._layers, self._section.max_rank, self._dtype)
        return sum(update.a.nbytes + update.b.nbytes for update in updates.values())

    async def _add(self, lora: LoRARequest) -> None:
        try:
            is_in = await self._llm.add_lora(lora)
        except Exception as error:
            self._require_live()
            raise ModelError("vLLM refused this adapter", got=str(error).strip()[:500], wanted="plain LoRA") from error
        if not is_in:
            raise ModelError("vLLM did not take this adapter in", got=lora.lora_name[:40], remedy="see vLLM's own log")

    async def _unload(self, digest: str) -> None:
        self._residents.known.discard(digest)
        adapter = self._adapters[digest]
        await adapter.is_idle.wait()
        self._require_live()
        await self._llm.remove_lora(adapter.lora.lora_int_id)
        del self._adapters[digest], self._digests[adapter.lora.lora_int_id]

    def check(self, request: Request) -> None:
        super().check(request)
        self._params(request)

    def _params(self, request: Request) -> SamplingParams:
        return params_of(request, self.max_context - len(request.prompt), self._eos)

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        self.check(request)
        params, walk = self._params(request), request.constraint.begin() if request.constraint is not None else None
        self._require_live()
        with self._using(request.adapter) as lora:
            self._open[request.id] += 1
            ended = False
            try:
                prompt = self._prompt(request.prompt, lora, request.salt)
                async with aclosing(self._llm.generate(prompt, params, request.id, lora_request=lora)) as outputs:
                    async for output in outputs:
                        for token in self._tokens(output, request):
                            checked = token if walk is None else await followed(token, walk)
                            ended = checked.finish is not None
                            yield checked
                            if checked.problem:
                                return
            except VLLMValidationError as error:
                raise ConfigError("vLLM refused this request", where=request.id[:80], got=str(error)[:300]) from error
            except (EngineDeadError, EngineGenerateError):
                if not ended:
                    yield Token(-1, request.adapter, finish="abort")
            finally:
                self._open[request.id] -= 1
                if not self._open[request.id]:
                    del self._open[request.id]

    def _tokens(self, output: RequestOutput, request: Request) -> Iterator[Token]:
        """What an output brings. The digest is that of the adapter number which vLLM gives back with it."""
        made, num_logprobs = output.outputs[0], request.sampling.num_logprobs
        digest = self._digests[output.lora_request.lora_int_id] if output.lora_request is not None else ""
        finish: FinishReason | None = None
        if made.finish_reason is not None:
            finish = made.finish_reason if made.finish_reason in ("stop", "length") else "abort"
            self._counts.reused += output.num_cached_tokens or 0
            self._counts.prompt += len(request.prompt) - (output.num_cached_tokens or 0)
        self._counts.tokens += len(made.token_ids)
        for at, number in enumerate(made.token_ids):
            is_last = finish != "abort" and at == len(made.token_ids) - 1
            logprob: float | None = None
            top: tuple[tuple[int, float], ...] = ()
            if num_logprobs is not None:
                given = made.logprobs[at]
                logprob = given[number].logprob
                ranked = sorted((each.rank, token, each.logprob) for token, each in given.items() if each.rank <= num_logprobs)
                top = tuple((token, value) for _, token, value in ranked[:num_logprobs])
            yield Token(number, digest, logprob, top, finish if is_last else None)
        if finish == "abort":
            yield Token(-1, digest, finish="abort")

    @contextmanager
    def _using(self, digest: str) -> Iterator[LoRARequest | None]:
        """What a request of this digest names, held for as long as it takes. Raises ConfigError when it is not loaded."""
        if not digest:
            yield self._bare
            return
        if digest not in self._residents.known:
            raise ConfigError("this adapter is not loaded", where="adapter", got=digest[:80], remedy="load it first")
        adapter = self._adapters[digest]
        with adapter.used():
            yield adapter.lora

    def _prompt(self, prompt: Sequence[int], lora: LoRARequest | None, salt: str) -> TokensPrompt:
        return TokensPrompt(prompt_token_ids=list(prompt), cache_salt=f"{lora.lora_name if lora else ''}:{salt}")

    async def abort(self, request_id: str) -> None:
        if request_id in self._open and not self._is_closed:
            await self._llm.abort(request_id)

    async def next_logits(self, prompts: Sequence[Sequence[int]], digest: str = "") -> Sequence[Any]:
        for prompt in prompts:
            check_prompt(prompt, self.max_context - 1, self.vocabulary)
        self._require_live()
        with self._using(digest) as lora:
            return await asyncio.gather(*(self._next_logprobs(prompt, lora) for prompt in prompts))

    async def _next_logprobs(self, prompt: Sequence[int], lora: LoRARequest | None) -> Any:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, flat_logprobs=True, detokenize=False, ignore_eos=True)
        name = f"probe-{next(self._numbers)}"
        try:
            async with aclosing(self._llm.generate(self._prompt(prompt, lora, ""), params, name, lora_request=lora)) as outputs:
                async for output in outputs:
                    given = output.outputs[0].logprobs
                    if given is not None and len(given.token_ids) >= self.vocabulary:
                        row = torch.full((self.vocabulary,), float("nan"))
                        row[torch.tensor(given.token_ids)] = torch.tensor(given.logprobs)
                        return row.numpy()
        except (EngineDeadError, EngineGenerateError) as error:
            raise self._end_error() from error
        raise EngineEnded("vLLM gave no logits", where=f"a prompt of {len(prompt)} tokens", remedy="ask again")

    def embed(self, prompts: Sequence[Sequence[int]], digest: str = "", salt: str = "") -> AsyncGenerator[Any, None]:
        raise ConfigError(
            "this engine gives no embeddings: vLLM opens a base to generate or to pool, never both", wanted="the torch engine"
        )

    def stats(self) -> Stats:
        last, cache, num_open = self._watch.last, self._llm.vllm_config.cache_config, self._open.total()
        capacity = (cache.num_gpu_blocks or 0) * cache.block_size
        num_waiting = min(num_open, last.num_waiting_reqs + last.num_skipped_waiting_reqs)
        return Stats(
            num_open - num_waiting, num_waiting, self._watch.num_steps, self._counts.tokens, self._counts.prompt, self._counts.reused,
            tuple(self._adapters), sum(adapter.num_bytes for adapter in self._adapters.values()),
            round(last.kv_cache_usage * capacity) if num_open else 0, capacity,
        )  # fmt: skip

    async def health(self) -> None:
        self._require_live()
        try:
            await self._llm.is_sleeping()
        except Exception as error:
            raise self._end_error() from error

    async def close(self) -> None:
        if self._is_closed:
            return
        with contextlib.suppress(EngineDeadError):
            await self._llm.abort(list(self._open))
        self._is_closed = True
        await asyncio.to_thread(self._llm.shutdown)
        for adapter in self._adapters.values():
            adapter.is_idle.set()
        await self._residents.settle()

    def _require_live(self) -> None:
        if self._is_closed or self._llm.errored:
            raise self._end_error()

    def _end_error(self) -> EngineEnded:
        got = "closed" if self._is_closed else "vLLM's process ended; its log says why"
        return EngineEnded("this engine has ended", got=got, remedy="open it again")


def arguments(section: Vllm, base: str, config: Any) -> AsyncEngineArgs:
    """`section` as vLLM's own arguments. The context is no longer than the base's configuration allows."""
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", section.max_context))
    options: dict[str, Any] = {}
    if section.max_loras:
        rank = min(size for size in get_args(MaxLoRARanks) if size >= section.max_rank)
        slots = section.max_loras + current_platform.is_cpu()  # the zeros'
        options = {"max_loras": slots, "max_cpu_loras": max(section.max_cpu_loras + 1, slots), "max_lora_rank": rank}
    return AsyncEngineArgs(
        model=base, tokenizer_mode="hf", generation_config="vllm", max_logprobs=-1, disable_log_stats=True,
        structured_outputs_config=StructuredOutputsConfig(backend=BACKEND),
        dtype="auto" if section.dtype == "auto" else DTYPES[section.dtype], quantization=section.quantization or None,
        max_model_len=min(section.max_context, longest), max_num_seqs=section.max_batch, enable_prefix_caching=True,
        tensor_parallel_size=section.tensor_parallel_size, gpu_memory_utilization=section.gpu_memory_utilization,
        kv_cache_memory_bytes=section.kv_cache_mib << 20 or None, enforce_eager=section.enforce_eager,
        enable_lora=bool(section.max_loras), **options,
    )  # fmt: skip


def adaptable(config: Any) -> dict[str, tuple[int, int]]:
    """(in, out) features of every linear layer below the head, by name; no weights are read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: (each.in_features, each.out_features) for name, each in modules if isinstance(each, nn.Linear) and each is not head}


def write_zeros(folder: Path, layer: str, features: tuple[int, int]) -> None:
    """An adapter folder that changes nothing."""
    a, b = torch.zeros(1, features[0]), torch.zeros(features[1], 1)
    key = f"base_model.model.{layer}.lora_"
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [layer.rsplit(".", 1)[-1]]}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
