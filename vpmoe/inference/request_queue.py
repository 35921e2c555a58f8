"""The queue of requests that all engines of a pool share on GPUs: its order, and which engine gets the next
request.

Pure; engine_pool.py sends the requests. On the CPU there is no such queue: a completion's bits depend on what
is computed beside it, and a fixed assignment makes them a function of the list of requests. On GPUs they are
not reproducible anyway, and a fixed assignment would leave engines idle while one still has long completions.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vpmoe.plan.sampling import ENGINES, SEQUENCES

GPU_DEPTH = SEQUENCES + 128
"""Requests that an engine on a GPU holds at the same time, at most: those that grow, and some that take the
place of finished ones while the pool is busy with something else, as when it writes to the bucket. More would
make engines end at different times."""
ADMITTED = 32
"""Requests whose prompts an engine on a GPU computes in the same step, unless it has fewer. A step with
prompts is no CUDA graph, so the host takes as long to launch it as for several steps without; waiting for
more keeps places of the batch empty: at most a sixteenth of them."""


class RequestSize(NamedTuple):
    """What is known of a request's work before it is sampled, in tokens."""

    max_tokens: int
    """Length limit of the completion."""
    prompt: int


def queue_depth(environment: Mapping[str, str]) -> int | None:
    """Requests that an engine holds at the same time, from one queue for all engines; None: every engine is
    given its share at once.

    A queue on GPUs, a fixed share on the CPU (CUDA_VISIBLE_DEVICES is set and empty).
    """
    return None if environment.get("CUDA_VISIBLE_DEVICES") == "" else GPU_DEPTH


def engines_per_gpu(environment: Mapping[str, str]) -> int:
    """Engines that a sampler starts on each GPU, at most; on the CPU one in place of each GPU, whose batch
    then is a function of the list of requests and of sampler.gpus."""
    return 1 if queue_depth(environment) is None else ENGINES


def longest_first(sizes: Sequence[RequestSize]) -> list[int]:
    """The order of a queue: indices of the requests, by length limit, then by prompt, longest first.

    A completion that starts last ends last, so the long ones start first and the short ones fill the gaps.
    Equal ones keep their order.
    """
    return sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True)


def next_engines(waiting: int, held: Sequence[int], depth: int) -> list[int]:
    """The engine of each of the next requests of a queue: always the one that holds fewest, until `waiting`
    requests are given or every engine holds `depth`.

    `held`: requests that each engine holds now.
    """
    now, engines = list(held), []
    for _ in range(waiting):
        engine = min(range(len(now)), key=now.__getitem__)
        if now[engine] >= depth:
            break
        now[engine] += 1
        engines.append(engine)
    return engines


def admitted(waiting: int, growing: int, sequences: int) -> int:
    """How many of an engine's `waiting` requests it starts now: as many as there is room for among its
    `sequences`, but only once there is room for ADMITTED, for a sixteenth of them or for all."""
    room = sequences - growing
    return min(waiting, room) if room >= min(ADMITTED, max(1, sequences // 16), waiting) else 0
