"""The engine processes of benchmarks.decode: the sampler's engine, or vLLM with a peer's shape, with random
weights, and with records of its steps.

engine_pool.py starts `python -m benchmarks.decode_engine` in place of vpmoe.inference.engine.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpmoe.api.card import GIB
from vpmoe.api.memory import StudentSize
from vpmoe.inference.engine import StudentEngine, serve
from vpmoe.inference.engine_pool import Completion, SamplingRequest
from vpmoe.inference.vllm_options import STEP_TOKENS
from vpmoe.model.shapes import SHAPES
from vpmoe.plan.sampling import EngineMemory, divide_card, share_card

PEERS: dict[str, dict[str, Any]] = {
    "granite": {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "vocab_size": 49155,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "num_local_experts": 40,
        "num_experts_per_tok": 8,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
}
EVERY = 8
"""Steps from one record of the sampled tokens to the next: to count them takes the host a moment."""
PROFILED = 32
"""Steps of a profile."""
CPU_MEMORY = 64 * GIB
"""In place of a card's, to try the benchmark on the CPU. Nothing is allocated by it."""


class Settings(NamedTuple):
    """What an engine process is, as JSON in place of the shape's name."""

    shape: str
    peer: str | None
    exact: bool
    """Whether as many engines are started as were asked for, however small their caches are."""
    seed: int


class Record(NamedTuple):
    """What an engine has sampled by a time."""

    time: float
    """Seconds of the machine's monotonic clock, which all processes share."""
    steps: int
    tokens: int
    """Of all completions, finished or not."""
    full: bool
    """Whether as many completions grow as were asked for, each with a token at least."""


def peer_size(config: dict[str, Any]) -> StudentSize:
    """What decides the memory of a peer whose output matrix is its embeddings."""
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    width = hidden // config["num_attention_heads"]
    keys = config["num_key_value_heads"] * width
    experts = config["num_local_experts"] * 3 * hidden * inner
    others = 2 * hidden * hidden + 2 * hidden * keys + config["num_local_experts"] * hidden + 2 * hidden
    computed = 8 * hidden + config["num_experts_per_tok"] * (2 * hidden + 3 * inner)
    return StudentSize(
        parameters=config["vocab_size"] * hidden + layers * (experts + others) + hidden,
        expert_parameters=layers * experts,
        layers=layers,
        hidden=hidden,
        kept=2 * computed,
        stem=0,
        backward=0,
        backward_weights=0,
        graphed=0,
        shared=0,
        shared_backward=0,
        cached=layers * 2 * 2 * keys,
        window=0,
    )


class MeasuredEngine(StudentEngine):
    """Samples as the sampler's engine does. So a completion also ends at a stop token, which random weights
    draw once in some 70,000 tokens."""

    def __init__(self, settings: Settings, max_length: int) -> None:
        super().__init__(SHAPES[settings.shape], max_length)
        self.settings = settings
        self.records: list[Record] = []
        self._steps = self._finished = 0
        if settings.peer is not None:
            self.size = peer_size(PEERS[settings.peer])

    def divide(self, most: int) -> EngineMemory:
        """`most` engines if that is exact, otherwise as many as the sampler would start."""
        card = CPU_MEMORY if self.device == "cpu" else self._card()
        how = share_card if self.settings.exact else divide_card
        return how(self.size, card, self.max_length, most)

    def load(self, folder: Path, engines: int = 1) -> None:
        """Start vLLM with random weights: every expert is as likely as any other. `folder` is not read."""
        import torch

        from vpmoe.model import hf_export

        torch.manual_seed(self.settings.seed)
        with tempfile.TemporaryDirectory() as made:
            if self.settings.peer is not None:
                self._llm = self._start_peer(Path(made), engines, PEERS[self.settings.peer])
                return
            config = hf_export.hf_config(self.shape, self.max_length, torch.bfloat16)
            (Path(made) / "config.json").write_text(json.dumps(config))
            self._llm = self._start(Path(made), engines, load_format="dummy")
        self._llm.apply_model(_randomise)

    def _start_peer(self, folder: Path, engines: int, config: dict[str, Any]) -> Any:
        import vllm

        (folder / "config.json").write_text(json.dumps(config))
        options = self._device_options(engines)
        shared = ("kv_cache_memory_bytes", "gpu_memory_utilization", "compilation_config")
        return vllm.LLM(
            str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=self.max_length,
            max_num_seqs=self.sequences,
            max_num_batched_tokens=STEP_TOKENS["cuda"],
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
            **{name: options[name] for name in shared if name in options},
        )

    def _params(self, request: SamplingRequest) -> Any:
        """Of a peer without the student's stop tokens, which are not in its vocabulary."""
        params = super()._params(request)
        if self.settings.peer is not None:
            params.stop_token_ids = []
        return params

    def describe(self) -> str:
        """Device, model and versions."""
        import torch
        import vllm

        device = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        model = self.settings.peer or self.shape.name
        return f"{device}, {model}, vLLM {vllm.__version__}, torch {torch.__version__}"

    def allocated(self) -> tuple[int, int]:
        """Bytes: the most that this process's PyTorch had of the GPU, and what all processes have now."""
        import torch

        if self.device == "cpu":
            return 0, 0
        free, card = torch.cuda.mem_get_info()
        return torch.cuda.max_memory_reserved(), card - free

    def begin(self, sequences: int) -> None:
        """Forget the records; from now on `sequences` completions grow at the same time."""
        self.sequences, self.records, self._steps, self._finished = sequences, [], 0, 0

    def recorded(self) -> list[Record]:
        """The records since `begin`."""
        return self.records

    def step(self) -> list[tuple[int, Completion]]:
        finished = super().step()
        self._steps += 1
        self._finished += sum(len(completion.ids_C) for _, completion in finished)
        if self._steps % EVERY == 0:
            tokens = self._tokens()
            full = len(tokens) >= self.sequences and 0 not in tokens
            self.records.append(Record(time.monotonic(), self._steps, self._finished + sum(tokens), full))
        return finished

    def _tokens(self) -> list[int]:
        """Tokens of each completion that vLLM has and has not finished."""
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        return [request.num_output_tokens for request in scheduler.requests.values()]

    def step_times(
        self, counts: Sequence[int], prompt: int, length: int, begin: int, steps: int
    ) -> list[float]:
        """For each of `counts`, the mean seconds of `steps` steps in which so many sequences, of prompts of
        `prompt` tokens, get a token each, from `begin` tokens on."""
        times = []
        for count in counts:
            self._grow(count, prompt, length, begin)
            times.append(self._seconds(steps))
            self.drop()
            while self._tokens():
                super().step()
        return times

    def profile(self, count: int, prompt: int, length: int) -> None:
        """Print the kernels of steps of `count` sequences, and where the host is meanwhile; nothing if it is
        0."""
        if not count:
            return
        self._grow(count, prompt, length, 256)
        print(f"{PROFILED} steps of {count} sequences of some {prompt + 256} tokens: ", end="")
        self._print_kernels()
        self._print_host_times()
        self.drop()

    def _grow(self, sequences: int, prompt: int, length: int, tokens: int) -> None:
        """Add completions of `length`, and step until each of `sequences` has `tokens`."""
        self.sequences = sequences
        random = np.random.default_rng(self.settings.seed)
        added = 0

        def add(count: int) -> None:
            nonlocal added
            self.add(
                [
                    (number, SamplingRequest(random_prompt(random, prompt), number, length))
                    for number in range(added, added + count)
                ]
            )
            added += count

        add(sequences)
        while len(grown := self._tokens()) < sequences or min(grown) < tokens:
            add(len(super().step()))  # in place of those that drew a stop token

    def _seconds(self, steps: int) -> float:
        """Seconds of a step, the mean of `steps`."""
        import torch

        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            super().step()
        wait()
        return (time.perf_counter() - started) / steps

    def _print_kernels(self) -> None:
        """Print the kernels of PROFILED steps that take longest, each as milliseconds a step."""
        from torch.autograd import DeviceType  # type: ignore[attr-defined]
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(PROFILED):
                super().step()
        by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for event in recorded.events():
            if event.device_type == DeviceType.CUDA:
                by_name[event.name[:110]][0] += 1
                by_name[event.name[:110]][1] += event.device_time / 1e3 / PROFILED
        total = sum(ms for _, ms in by_name.values())
        launches = sum(count for count, _ in by_name.values()) / PROFILED
        print(f"{total:.2f} ms and {launches:.0f} kernels a step, of which")
        for name, (count, ms) in sorted(by_name.items(), key=lambda item: -item[1][1])[:40]:
            print(f"{ms:8.3f} ms  {count / PROFILED:7.1f}  {name}")

    def _print_host_times(self) -> None:
        """Print where the host is during PROFILED steps, as milliseconds a step: in vLLM's scheduler,
        launching, waiting for the GPU's results and reading them, and taking them into account; the rest of
        the step is this project's, and what lies between."""
        core = self._llm.llm_engine.engine_core.engine_core
        from vllm.v1.worker.gpu.async_utils import AsyncOutput

        spent: dict[str, float] = defaultdict(float)

        def timed(owner: Any, name: str, label: str) -> Callable[[], None]:
            call = getattr(owner, name)

            def measured(*arguments: Any, **options: Any) -> Any:
                started = time.perf_counter()
                result = call(*arguments, **options)
                spent[label] += time.perf_counter() - started
                return result

            setattr(owner, name, measured)
            return lambda: setattr(owner, name, call)

        restore = [
            timed(core.scheduler, "schedule", "schedule"),
            timed(core.model_executor, "execute_model", "launch"),
            timed(core.model_executor, "sample_tokens", "launch sampling"),
            timed(AsyncOutput, "get_output", "wait"),
            timed(core.scheduler, "update_from_output", "update"),
        ]
        spent["step"] = self._seconds(PROFILED) * PROFILED
        for each in restore:
            each()
        listed = ", ".join(f"{name} {took / PROFILED * 1e3:.2f} ms" for name, took in spent.items())
        print(f"host: {listed}", flush=True)


def random_prompt(random: np.random.Generator, tokens: int) -> Any:
    """Ids that are in every model's vocabulary."""
    return random.integers(0, 40_000, tokens).astype(np.int32)


def _randomise(model: Any) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1)
        elif parameter.dim() == 1 and not name.endswith("log_frequency"):
            parameter.data.zero_()
        elif name.endswith("log_frequency"):
            parameter.data.copy_(torch.linspace(0, -140, len(parameter)))
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)


if __name__ == "__main__":
    serve(lambda settings, max_length: MeasuredEngine(Settings(**json.loads(settings)), max_length))
