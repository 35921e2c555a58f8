"""Tokens per second of the student in vLLM, beside the floor of its memory traffic or beside a peer.

    python -m benchmarks.decode [--shape vpmoe-6b] [--engines N] [--sequences 1,64,512] [--profile]
    python -m benchmarks.decode --peer granite [--engines N]

Runs the sampler's own engines (vpmoe/inference/engine.py) on one GPU, in bf16 with random weights, on random
prompts of --prompt tokens: as many as the sampler would start on this card (vpmoe/plan/sampling.py), or
exactly --engines. Their pool and queue are the sampler's too.

First, with one engine while the others are idle: for each N of --sequences, the mean time of --steps steps in
which N sequences get a token each, with scheduling and sampling, from some 40 tokens of completion on. Floor:
reading the weights once (of the experts, those that some sequence chose, for uniformly random choices), and
the keys and values of the mean context once, at --bandwidth. A straight line through the times over N gives
the cost of a step, and that per sequence: DECODE of vpmoe/plan/throughput.py for one engine.
`--sequences ""` leaves this out.

Then, for each number of --steadily and for --seconds, so many sequences grow in each engine, with completions
of --shortest to --longest tokens, each replaced by another when it ends. At the start each has an age as if
that had gone on for long. Of several numbers, a straight line through the times of a step over them is DECODE
for so many engines.

`--peer` runs another model's shape in the same vLLM instead, asked in the same way, in as many engines, with
the same CUDA graphs, vLLM's own scheduler and dummy weights: `granite` is Granite-MoE 3B-A0.8B, which has
about as many active parameters as vpmoe-6b, in 32 layers. Needs a GPU, and vLLM for CUDA; on the CPU
(CUDA_VISIBLE_DEVICES set and empty) a small shape shows that it runs.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.decode_engine import PEERS, Record, Settings, random_prompt
from vpmoe.api.card import GIB
from vpmoe.inference.engine_pool import EnginePool, SamplingRequest, describe_gpu
from vpmoe.inference.request_queue import ADMITTED
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.plan.sampling import ENGINES, SEQUENCES, EngineMemory

BEGIN = 40
"""Tokens of the completions when a step is timed."""
SETTLING = 5.0, 0.02
"""Seconds of steady sampling in addition to --seconds, and for each sequence of an engine: prompts are then
computed and all engines fill up."""


class MeasuredPool(EnginePool):
    """The sampler's pool, with engines of benchmarks.decode_engine on one GPU."""

    def __init__(self, given: argparse.Namespace) -> None:
        settings = Settings(given.shape, given.peer, given.engines is not None, seed=0)
        super().__init__(
            gpus=1,
            shape=json.dumps(settings._asdict()),
            max_length=given.prompt + given.longest,
            per_gpu=given.engines or ENGINES,
            module="benchmarks.decode_engine",
        )

    @property
    def engines(self) -> int:
        return len(self.gpu_of)

    def of_first(self, method: str, *arguments: object, idle: tuple[object, ...] | None = None) -> object:
        """What the first engine returns. `idle`: the arguments of the others; None: the same."""
        others = arguments if idle is None else idle
        return self._call(method, [arguments, *[others] * (self.engines - 1)], lambda: None)[0]

    def of_each(self, method: str, *arguments: object) -> list[object]:
        """What each engine returns."""
        return self._call(method, [arguments] * self.engines, lambda: None)


def floor_ms(shape: Shape, sequences: int, context: int, bandwidth: float) -> float:
    """Milliseconds to read a step's weights, keys and values once."""
    unused = (1 - shape.experts_per_token / shape.experts) ** sequences
    weights = 2 * (shape.parameters() - shape.vocabulary * shape.hidden - shape.expert_parameters() * unused)
    window = min(context / (shape.local_window or context), 1.0)
    return (weights + sequences * (shape.cached_bytes() * context + shape.window_bytes() * window)) / (
        bandwidth * 1e6
    )


def line(counts: Sequence[int], seconds: Sequence[float]) -> str:
    """The straight line through the times of a step over the number of sequences, in words."""
    slope, start = np.polyfit(counts, seconds, 1)
    return f"a step costs {start:.4f} s and {slope:.6f} s a sequence"


def print_steps(pool: MeasuredPool, given: argparse.Namespace) -> None:
    """Print the times of a step of one engine."""
    lengths = given.prompt, given.longest, BEGIN, given.steps
    times = pool.of_first("step_times", given.sequences, *lengths, idle=((), *lengths))
    assert isinstance(times, list)
    print("One engine, the others idle:" if pool.engines > 1 else "One engine:")
    print(f"{'N':>5}  {'ms a step':>9}  {'floor ms':>8}  {'tokens/s':>9}")
    for count, seconds in zip(given.sequences, times, strict=True):
        floor = ""
        if given.peer is None:
            context = given.prompt + BEGIN + given.steps // 2
            floor = f"{floor_ms(SHAPES[given.shape], count, context, given.bandwidth):.2f}"
        print(f"{count:>5}  {seconds * 1e3:>9.2f}  {floor:>8}  {count / seconds:>9,.0f}", flush=True)
    if len(times) > 1:
        print(line(given.sequences, times))


def requests(
    engines: int, sequences: int, given: argparse.Namespace
) -> Iterator[tuple[int, SamplingRequest]]:
    """Endless requests of random lengths; the first ones, for all places of all engines, ask for what is left
    of completions of random ages."""
    random = np.random.default_rng(0)
    lengths = np.arange(given.shortest, given.longest + 1)
    places = engines * sequences
    # A completion is met in proportion to its length, at an age that is uniform. Only what is left is asked
    # for, so contexts are shorter at the start than they become.
    met = random.choice(lengths, places, p=lengths / lengths.sum())
    first = np.maximum(met * random.random(places), 1).astype(int).tolist()
    number = 0
    while True:
        length = first[number] if number < places else int(random.choice(lengths))
        yield number, SamplingRequest(random_prompt(random, given.prompt), number, length)
        number += 1


def between(records: Sequence[Record], start: float, end: float) -> tuple[float, float]:
    """(tokens, steps) of an engine from one time to another, interpolated between its records."""
    times = [one.time for one in records]
    tokens = np.interp([start, end], times, [one.tokens for one in records])
    steps = np.interp([start, end], times, [one.steps for one in records])
    return float(tokens[1] - tokens[0]), float(steps[1] - steps[0])


def print_steadily(pool: MeasuredPool, given: argparse.Namespace, sequences: int) -> float:
    """Print the tokens a second while `sequences` completions grow in each engine and finished ones are
    replaced; returns the seconds of a step."""
    pool.of_each("begin", sequences)
    pool.depth = sequences + 2 * ADMITTED
    settling, each_sequence = SETTLING
    until = time.monotonic() + settling + sequences * each_sequence + given.seconds

    def check() -> None:
        if time.monotonic() > until:
            raise TimeoutError

    try:
        for _ in pool.sample_in_order(requests(pool.engines, sequences, given), check):
            pass
    except TimeoutError:
        records: list[list[Record]] = pool.of_each("recorded")  # type: ignore[assignment]
    # The same time of all engines, in which each is full.
    start = max(next((one.time for one in each if one.full), until) for each in records)
    end = min(each[-1].time for each in records)
    if end <= start:
        raise SystemExit(f"{sequences} completions did not fill the engines in time: raise --seconds")
    sampled = [between(each, start, end) for each in records]
    tokens = sum(of_engine for of_engine, _ in sampled)
    step = (end - start) * pool.engines / sum(steps for _, steps in sampled)
    each = " in each" if pool.engines > 1 else ""
    print(
        f"steadily {sequences} completions{each} of {given.shortest} to {given.longest} tokens, for "
        f"{end - start:.0f} s: {tokens / (end - start):,.0f} tokens/s on the GPU with {pool.engines} "
        f"engine{'s' * (pool.engines > 1)}, {step * 1e3:.1f} ms a step",
        flush=True,
    )
    return step


def print_allocated(pool: MeasuredPool, memory: EngineMemory) -> None:
    """Print the memory that engines have in fact, beside what was planned."""
    allocated: list[tuple[int, int]] = pool.of_each("allocated")  # type: ignore[assignment]
    most, used = (max(numbers) / GIB for numbers in zip(*allocated, strict=True))
    each = memory.total / pool.engines - memory.context
    print(
        f"memory: PyTorch of an engine had at most {most:.1f} GiB, planned {each / GIB:.1f}; all on the GPU "
        f"have {used:.1f} GiB, planned {memory.total / GIB:.1f}",
        flush=True,
    )


def whole_numbers(text: str) -> list[int]:
    """Numbers of sequences, from text such as 1,64; none from the empty text. Raises ArgumentTypeError."""
    found = [int(each) for each in text.split(",") if each]
    if not all(1 <= each <= SEQUENCES for each in found):
        raise argparse.ArgumentTypeError(f"an engine samples 1 to {SEQUENCES} sequences at a time")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="vpmoe-6b")
    parser.add_argument("--peer", choices=PEERS, help="another model instead of the student")
    parser.add_argument(
        "--engines", type=int, help="engines on the GPU (default: as many as the sampler would start)"
    )
    parser.add_argument("--prompt", type=int, default=103, help="tokens of a prompt")
    parser.add_argument("--shortest", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=100, help="steps to time for each N")
    parser.add_argument("--seconds", type=float, default=15.0, help="of steady sampling")
    parser.add_argument(
        "--sequences", type=whole_numbers, default=[1, 64, 512], help="values of N, comma-separated"
    )
    parser.add_argument(
        "--steadily",
        type=whole_numbers,
        default=[512],
        help="numbers of sequences to sample steadily in each engine, comma-separated",
    )
    parser.add_argument("--bandwidth", type=float, default=4800.0, help="of the GPU's memory, GB/s")
    parser.add_argument(
        "--profile", action="store_true", help="list the kernels of the largest N, and where the host is"
    )
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    with MeasuredPool(given) as pool:
        pool.load(Path())  # it has no files
        memory = pool.of_first("divide", pool.engines)
        assert isinstance(memory, EngineMemory)
        print(f"{pool.of_first('describe')}; started in {time.perf_counter() - started:.0f} s")
        print(describe_gpu(0, pool.gpu_of, memory), flush=True)
        if given.sequences:
            print_steps(pool, given)
        steps = [print_steadily(pool, given, count) for count in given.steadily]
        if len(steps) > 1:
            print(f"beside each other {line(given.steadily, steps)}")
        print_allocated(pool, memory)
        if given.profile:
            largest = max([*given.sequences, *given.steadily])
            shown = given.prompt, given.longest
            pool.of_first("profile", largest, *shown, idle=(0, *shown))


if __name__ == "__main__":
    main()
