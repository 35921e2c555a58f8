"""The student in vLLM: samples completions with the log-probability of each sampled token, and scores
sequences.

`python -m vpmoe.inference.engine` is one engine process, on a GPU that others may share, or on the CPU.
engine_pool.py starts it and sends it requests; `vllm_options` says why vLLM runs in this process. On the CPU
the same requests in the same order give the same bits from `sample`, whether the weights were loaded first or
replaced others.
"""

import json
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vpmoe import failure
from vpmoe.api.card import GIB
from vpmoe.api.memory import StudentSize
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import STOP_IDS
from vpmoe.failure import Permanent, Retriable
from vpmoe.inference.engine_pool import Completion, SamplingRequest
from vpmoe.inference.request_queue import admitted
from vpmoe.inference.vllm_options import (
    BATCH_TOKENS,
    STEP_TOKENS,
    Device,
    check_attention,
    check_device,
    cpu_memory_error,
    engine_options,
    gpu_sampling_options,
    is_about_memory,
    prepare_environment,
    prompt_logp,
    scoring_params,
    token_batches,
)
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.plan.sampling import SEQUENCES, EngineMemory, divide_card, needed_to_sample, share_card
from vpmoe.process.launcher import set_parent_death_signal
from vpmoe.process.memory import no_collection

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine import EngineCoreOutput

MAX_SEQUENCES: dict[Device, int] = {"cpu": 32, "cuda": SEQUENCES}
"""Completions that are sampled at the same time, at most. If they grow longer than the cache has room for,
vLLM preempts some and computes them again."""

Call = tuple[int, str, tuple[Any, ...]]
"""Number, name of a method of StudentEngine, arguments."""


class Growing:
    """A completion that vLLM has not finished."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._ids: list[int] = []
        self._logp: list[np.float32] = []

    def grow(self, output: "EngineCoreOutput") -> None:
        """Take over a step's tokens.

        Raises RuntimeError if their log-probabilities are of other tokens, or if vLLM gave up.
        """
        if output.finish_reason is not None and output.finish_reason.name not in ("STOP", "LENGTH"):
            raise RuntimeError(f"vLLM ended request {self.number} with {output.finish_reason.name}")
        for at, token in enumerate(output.new_token_ids):
            logprobs = output.new_logprobs
            if logprobs is None or logprobs.logprob_token_ids[at, 0] != token:
                raise RuntimeError(
                    f"vLLM sampled token {token} of request {self.number} and returned the log-probability "
                    f"of {logprobs and logprobs.logprob_token_ids[at, 0]}"
                )
            self._ids.append(token)
            self._logp.append(logprobs.logprobs[at, 0])

    def completion(self) -> Completion:
        return Completion(np.array(self._ids, np.int32), np.array(self._logp, np.float32))


class StudentEngine:
    """A student in vLLM; `load` comes before `sample` and `score`.

    One per process, until the process ends.
    """

    def __init__(self, shape: Shape, max_length: int) -> None:
        """`max_length`: tokens of prompt and completion together.

        Raises Permanent if there is no GPU for it.
        """
        prepare_environment()
        with no_collection():
            from vpmoe.inference.weight_reader import WeightReader  # imports torch

            self.device = check_device("the sampler", "stages[].sampler.gpus")
        self.shape, self.max_length = shape, max_length
        self.size = shape.size()
        self.sequences = MAX_SEQUENCES[self.device]
        """Completions that are sampled at the same time, at most, by `step`."""
        self.waiting: deque[tuple[int, SamplingRequest]] = deque()
        """Requests that were added and not yet given to vLLM, with their numbers."""
        self.growing: dict[str, Growing] = {}
        """What vLLM has and has not finished, by vLLM's name of the request."""
        self._names = count()
        self._llm: Any = None
        self._reader = WeightReader(pinned=self.device == "cuda")

    def divide(self, most: int) -> EngineMemory:
        """How many engines, at most `most`, share this engine's GPU, and the memory of each.

        Raises Permanent if the GPU holds none.
        """
        return divide_card(self.size, self._card(), self.max_length, most)

    def load(self, folder: Path, engines: int = 1) -> None:
        """Use the weights in `folder` from now on. `engines`: those that share this engine's GPU; the first
        load divides its memory.

        Raises Permanent if they are not a whole student of this shape, or if the GPU holds no engine.
        """
        from vpmoe.model import hf_export

        hf_export.check_export(folder, self.shape)
        if self._llm is None:
            self._llm = self._start(folder, engines)
        else:
            weights = self._reader.read(folder)
            self._llm.apply_model(lambda model: model.load_weights(weights))

    def sample(self, requests: Sequence[SamplingRequest]) -> list[Completion]:
        """One completion per request, at temperature 1 and from the whole vocabulary, stop token included.

        All requests form one batch. Raises ValueError if a request may grow beyond `max_length`.
        """
        for one in requests:
            self._check_length(one)
        params = [self._params(one) for one in requests]
        prompts = [{"prompt_token_ids": one.ids_P.tolist()} for one in requests]
        return [_completion(output) for output in self._llm.generate(prompts, params, use_tqdm=False)]

    def add(self, numbered: Sequence[tuple[int, SamplingRequest]]) -> None:
        """Add requests, each with a number of its own; `step` samples them.

        Raises ValueError if a request may grow beyond `max_length`.
        """
        for _, one in numbered:
            self._check_length(one)
        self.waiting.extend(numbered)

    def step(self) -> list[tuple[int, Completion]]:
        """Compute one step of vLLM: a token of each completion that grows, and prompts. Returns the numbers
        of the requests that it finished, with their completions.

        Asks vLLM's core. LLMEngine would make an output of each completion in each step, which took 4 ms
        with 512 of them, in a step whose kernels take 13 ms (docs/benchmarks.md).
        """
        from vllm.inputs.engine import tokens_input

        engine = self._llm.llm_engine
        for _ in range(admitted(len(self.waiting), len(self.growing), self.sequences)):
            number, one = self.waiting.popleft()
            # A name is used once: vLLM may still compute a step of a request that was dropped.
            name = f"sampled{next(self._names)}"
            request = engine.input_processor.process_inputs(
                name, tokens_input(one.ids_P.tolist()), self._params(one), engine.get_supported_tasks()
            )
            engine.engine_core.add_request(request)
            self.growing[name] = Growing(number)
        finished = []
        for output in engine.engine_core.get_output().outputs:
            growing = self.growing[output.request_id]
            growing.grow(output)
            if output.finish_reason is not None:
                finished.append((growing.number, growing.completion()))
                del self.growing[output.request_id]
        return finished

    def drop(self) -> None:
        """Drop all requests that were added."""
        self.waiting.clear()
        if self.growing:
            self._llm.llm_engine.engine_core.abort_requests(list(self.growing))
            self.growing.clear()

    def score(self, sequences: Sequence[Ids]) -> list[NDArray[np.float32]]:
        """For each sequence of T < `max_length` ids, [T − 1]: the log-probability of each id but the first.

        Computes batches of BATCH_TOKENS, like the teacher.
        """
        params = scoring_params()
        logp = []
        for batch in token_batches(sequences, BATCH_TOKENS[self.device]):
            prompts = [{"prompt_token_ids": ids_T.tolist()} for ids_T in batch]
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
            logp += [prompt_logp(output, ids_T) for output, ids_T in zip(outputs, batch, strict=True)]
        return logp

    def attention(self) -> list[tuple[str, int | None]]:
        """Of each layer, in order: vLLM's implementation of its attention, and the number of positions of a
        sequence whose keys and values it keeps; None: all.

        For diagnosis. vLLM decides both by itself, and where it does not keep windows it keeps all positions.
        """
        from vllm.v1.kv_cache_interface import SlidingWindowSpec

        engine = self._llm.llm_engine
        layers = engine.vllm_config.compilation_config.static_forward_context
        spec_of = {
            name: group.kv_cache_spec
            for group in engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
            for name in group.layer_names
        }
        return [
            (
                layer.get_attn_backend().get_name(),
                spec.sliding_window if isinstance(spec := spec_of[name], SlidingWindowSpec) else None,
            )
            for name, layer in layers.items()
        ]

    def _check_length(self, request: SamplingRequest) -> None:
        if len(request.ids_P) + request.max_tokens > self.max_length:
            raise ValueError(
                f"{request.max_tokens} tokens after a prompt of {len(request.ids_P)}, and the student was "
                f"loaded for {self.max_length}"
            )

    def _params(self, request: SamplingRequest) -> "SamplingParams":
        """vLLM's parameters for a request."""
        import vllm
        from vllm.sampling_params import RequestOutputKind

        return vllm.SamplingParams(
            max_tokens=request.max_tokens,
            temperature=1.0,
            top_p=1.0,
            seed=request.seed,
            stop_token_ids=list(STOP_IDS),
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _card(self) -> int:
        """Bytes of this engine's GPU. Raises Permanent if it holds no engine."""
        import torch

        card: int = torch.cuda.get_device_properties(0).total_memory
        check_card(self.shape.name, self.size, card, self.max_length)
        return card

    def _device_options(self, engines: int) -> dict[str, Any]:
        """Options of vllm.LLM for one of `engines` engines on this device. Raises Permanent if a GPU holds
        none."""
        if self.device == "cpu":
            return {}
        return gpu_sampling_options(share_card(self.size, self._card(), self.max_length, engines).cache)

    def _start(self, folder: Path, engines: int, **options: Any) -> Any:
        """vLLM with the weights in `folder`, as one of `engines` on its GPU. `options`: of vllm.LLM, in place
        of this engine's."""
        with no_collection():
            from vllm import LLM

            from vpmoe.inference import vllm_model

        vllm_model.register()
        dtype = json.loads((folder / "config.json").read_text())["dtype"]  # "auto" would downcast float32
        # The logits of scored prompts are held whole, so a GPU computes prompts in chunks. The CPU cannot:
        # vLLM samples a token after each chunk and discards it by rewinding the random generator, and a CPU
        # generator has no offset to rewind. So there a step holds a whole prompt.
        chunked = self.device == "cuda"
        step_tokens = STEP_TOKENS["cuda"] if chunked else max(STEP_TOKENS["cpu"], self.max_length)
        device_options = self._device_options(engines)
        try:
            llm = LLM(
                str(folder),
                **engine_options(dtype, self.max_length)
                | {
                    "max_num_batched_tokens": step_tokens,
                    "enable_chunked_prefill": chunked,
                    "max_num_seqs": MAX_SEQUENCES[self.device],
                }
                | device_options
                | options,
            )
        except ValueError as error:
            if not is_about_memory(error):
                raise
            if self.device == "cpu":
                raise cpu_memory_error(error, "the student", "training.sequenceLength") from error
            raise Retriable(
                f"the student does not fit on this pod's GPU (stages[].sampler.gpus) now: {error} See that "
                "no other process uses the GPU."
            ) from error
        check_attention(llm, "the student")
        return llm


def check_card(name: str, size: StudentSize, card: int, max_length: int) -> None:
    """Raise Permanent if a card of `card` bytes holds no engine of the shape `name`."""
    needed = needed_to_sample(size, max_length)
    if needed > card:
        raise Permanent(
            f"{name} with sequences of {max_length} tokens needs GPUs of {needed / GIB:.1f} GiB, and this "
            f"pod's (stages[].sampler.gpus) has {card / GIB:.1f}. Use GPUs with more memory."
        )


def _completion(output: "RequestOutput") -> Completion:
    """vLLM's answer to a request.

    Raises RuntimeError if its log-probabilities are not of the sampled tokens.
    """
    (sampled,) = output.outputs
    if list(sampled.logprobs.token_ids) != list(sampled.token_ids):
        raise RuntimeError(
            f"vLLM sampled {len(sampled.token_ids)} tokens and returned {len(sampled.logprobs.token_ids)} "
            "log-probabilities of other tokens"
        )
    return Completion(np.array(sampled.token_ids, np.int32), np.array(sampled.logprobs.logprobs, np.float32))


def serve(make: Callable[[str, int], StudentEngine]) -> None:
    """Serve calls over the connection whose file descriptor is the first argument of this process, until it
    is closed. `make`: makes the engine, of the next two arguments: a shape's name, and the longest sequence.

    A call is (number, name of a method of StudentEngine, arguments); the reply is (number, result or
    TerminationRecord). After `add` the engine calls `step` by itself until it has finished all that was
    added, and takes further calls in between. These two have a reply only if they finished a request or
    failed. A call with another number drops what was added before.
    """
    set_parent_death_signal()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # the process that started this one decides when it ends
    connection, engine = Connection(int(sys.argv[1])), None
    calls: SimpleQueue[Call | None] = SimpleQueue()
    # In a thread: the caller never waits for a step, so both cannot wait for each other with full pipes.
    threading.Thread(target=_receive, args=(connection, calls), daemon=True).start()
    current, stepping = 0, False
    while True:
        call = (current, "step", ()) if stepping and calls.empty() else calls.get()
        if call is None:
            return
        number, name, arguments = call
        try:
            engine = engine or make(sys.argv[2], int(sys.argv[3]))
            if number != current:
                engine.drop()
                current = number
            reply = getattr(engine, name)(*arguments)
            stepping = bool(engine.waiting or engine.growing)
        except Exception as error:  # noqa: BLE001 (the caller raises it)
            reply, stepping = failure.classify_error(error), False
            if reply.kind == "Internal":
                sys.__excepthook__(type(error), error, error.__traceback__)
        if reply or name not in ("add", "step"):
            connection.send((number, reply))


def _receive(connection: Connection, calls: "SimpleQueue[Call | None]") -> None:
    """Put every call into `calls`; None at the end of the connection."""
    while True:
        try:
            calls.put(connection.recv())
        except EOFError:
            calls.put(None)
            return


def main() -> None:
    """Be an engine of a registered shape."""
    serve(lambda shape, max_length: StudentEngine(SHAPES[shape], max_length))


if __name__ == "__main__":
    main()
