"""How the student's engines share a GPU: how many processes of vLLM sample on it, and the memory of each.

One engine leaves the GPU idle while its Python loop prepares a step; the kernels of others fill that time.
Every engine holds the weights, so how many a card takes, and how long a cache each then has, is arithmetic:
the plan prints it before a run, and engines are started by it (inference/engine_pool.py).
"""

from dataclasses import dataclass

from vpmoe.api.card import GIB
from vpmoe.api.memory import VOCABULARY, StudentSize

ENGINES = 2
"""Engines of the sampler on one GPU, at most. On an H200 two sample a third more tokens a second than one; a
third engine adds 2 %: two fill the GPU (docs/benchmarks.md)."""
SEQUENCES = 1024
"""Completions that an engine on a GPU samples at the same time, at most. Of those it holds, as many grow as
its cache has room for. A step reads the experts once for all of them: two engines of 1,024 sample a quarter
more tokens a second than two of 512."""
LEAST_SEQUENCES = 96
"""Sequences of the longest length that each of several engines must have room for; with less, fewer engines
share the card. From some 87 sequences on, more of a step's time goes into its sequences than into the step
(benchmarks.decode), so smaller engines would cost more than they add."""
SAMPLING_SHARE = (9, 10)
"""Share of the card that all engines use together, as a fraction. The rest is for the driver, for what
allocators cannot use, and for errors of the estimates below."""
STEP_TOKENS = 4096
"""Tokens of one forward of the student on a GPU: a token of each completion that grows, and the prompts of
those that start together (request_queue.ADMITTED), in one pass for prompts of up to 112 tokens. Longer
sequences are computed in chunks."""
PART_SECONDS = 20.0
"""Seconds from one part of a sampler's rollouts to the next (vpmoe/sampler/part_log.py). A sampler that is
killed loses what has finished since the last part, and what still grows."""
PROMPT_LOGITS = 1024
"""Positions of a scored prompt whose logits vLLM holds at the same time, in float32 (CHUNK_SIZE of its
prompt_logprob.py). Those of the next are computed before these are dropped."""
LOGITS = 2 * PROMPT_LOGITS * VOCABULARY * 4
"""Bytes of logits, at most. Those of SEQUENCES that draw a token are half of it."""
ENGINE_CONTEXT = 5 * GIB // 2
"""Of each engine: the CUDA context with its kernels, workspaces of libraries, and the CUDA graphs of decoding
steps. Two engines of tiny took 2.3 GiB each on an H200, where all else is small."""


@dataclass(frozen=True)
class EngineMemory:
    """A GPU that engines share: how many, and the bytes of each."""

    card: int
    """Bytes of the GPU."""
    engines: int
    weights: int
    activations: int
    """Of a forward of STEP_TOKENS."""
    logits: int
    context: int
    cache: int
    """Keys and values."""
    sequences: int
    """Sequences of the longest length that the cache holds."""

    @property
    def total(self) -> int:
        """Bytes of the GPU that all engines use."""
        one = self.weights + self.activations + self.logits + self.context + self.cache
        return self.engines * one


def sequence_bytes(size: StudentSize, length: int) -> int:
    """Bytes of the keys and values of a sequence of `length` tokens."""
    return size.cached * length + size.window


def share_card(size: StudentSize, card: int, length: int, engines: int) -> EngineMemory:
    """The memory of each of `engines` engines on a card of `card` bytes, for sequences of up to `length`
    tokens.

    Equal shares of SAMPLING_SHARE; a cache is not larger than SEQUENCES of the longest length can fill. The
    card must have needed_to_sample(…) bytes for one engine.
    """
    share, whole = SAMPLING_SHARE
    of_one = sequence_bytes(size, length)
    rest = card * share // whole // engines - sum(_fixed(size))
    cache = max(0, min(rest, SEQUENCES * of_one))
    return EngineMemory(card, engines, *_fixed(size), cache, cache // of_one)


def divide_card(size: StudentSize, card: int, length: int, most: int) -> EngineMemory:
    """The memory of the largest number of engines, at most `most`, that each have room for LEAST_SEQUENCES of
    `length` tokens; of one engine if no more have."""
    for engines in range(most, 1, -1):
        found = share_card(size, card, length, engines)
        if found.sequences >= LEAST_SEQUENCES:
            return found
    return share_card(size, card, length, 1)


def needed_to_sample(size: StudentSize, length: int) -> int:
    """Bytes that a card must have for one engine with a cache of one sequence of `length` tokens."""
    share, whole = SAMPLING_SHARE
    one = sum(_fixed(size)) + sequence_bytes(size, length)
    return -(-one * whole // share)


def _fixed(size: StudentSize) -> tuple[int, int, int, int]:
    """Bytes of an engine whatever its cache: weights, activations, logits, context."""
    return size.weights, STEP_TOKENS * size.forward, LOGITS, ENGINE_CONTEXT
