"""vLLM's scheduler without its work for sequences that need no new block of the key-value cache.

In each step vLLM asks, for each sequence and each group of layers, how many blocks it has, needs, and no
longer needs. vpmoe-6b has four groups, so with 512 sequences that took half of the host's time of a step,
which was twice the GPU's (docs/benchmarks.md). A sequence gets a block for every 16 tokens, so
15 of 16 answers are known: none. Everything else is vLLM's, which takes another scheduler as an option.
"""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request


class BlocksOnDemand:
    """A KVCacheManager that answers at once where a sequence's blocks hold its next tokens."""

    def __init__(self, manager: KVCacheManager) -> None:
        """Raises ValueError if `manager` caches prefixes: it then has to see every token."""
        if manager.enable_caching:
            raise ValueError("the sampler's scheduler needs enable_prefix_caching=False")
        self._manager = manager
        self._nothing = manager.empty_kv_cache_blocks
        self._groups = [
            (group.req_to_blocks, group.block_size) for group in manager.coordinator.single_type_managers
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *others: Any, **options: Any
    ) -> KVCacheBlocks | None:
        """KVCacheManager.allocate_slots. Blocks that left a window are freed with the next new block."""
        end = request.num_computed_tokens + num_new_tokens + options.get("num_lookahead_tokens", 0)
        name = request.request_id
        if not others and all(
            name in blocks_of and len(blocks_of[name]) * size >= end for blocks_of, size in self._groups
        ):
            return self._nothing
        return self._manager.allocate_slots(request, num_new_tokens, *others, **options)


class SamplingScheduler(AsyncScheduler):  # type: ignore[misc]
    kv_cache_manager: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kv_cache_manager = BlocksOnDemand(self.kv_cache_manager)
