"""The sampler's scheduler in vLLM: its cache of keys and values gives the blocks that vLLM's own gives."""

import subprocess
import sys

import pytest

from tests.fakes.students import new_seed

CHECK = """
import random
from types import SimpleNamespace

from vpmoe.process.memory import no_collection
with no_collection():
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor, SlidingWindowSpec
    )
    from vllm.v1.request import RequestStatus
    from vpmoe.inference.sampling_scheduler import BlocksOnDemand

SEED = int(__import__("sys").argv[1])
WINDOW, BLOCK, LONGEST = 40, 16, 400


def manager(blocks, enable_caching=False):
    attention = dict(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    window = SlidingWindowSpec(**attention, sliding_window=WINDOW)
    groups = [KVCacheGroupSpec([f"local{n}"], window) for n in range(2)]
    groups.append(KVCacheGroupSpec(["global"], FullAttentionSpec(**attention)))
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(
        kv_cache_config=config,
        max_model_len=LONGEST,
        max_in_flight_tokens=64,
        enable_caching=enable_caching,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
    )


class Asked:
    def __init__(self, real):
        self.real, self.calls = real, 0

    def __getattr__(self, name):
        return getattr(self.real, name)

    def allocate_slots(self, *arguments, **options):
        self.calls += 1
        return self.real.allocate_slots(*arguments, **options)


def blocks(manager, name):
    return [[block.is_null for block in group.req_to_blocks[name]] for group in
            manager.coordinator.single_type_managers]


def request(name, prompt):
    return SimpleNamespace(
        request_id=name,
        num_computed_tokens=0,
        num_prompt_tokens=prompt,
        num_tokens=prompt,
        status=RequestStatus.RUNNING,
        num_in_flight_tokens=0,
    )


def grow(steps, ours, plain):
    # Sequences grow, end and are refused; returns how many began and were refused.
    growing, begun, refused = [], 0, 0
    for step in range(steps):
        if len(growing) < 4 and rng.random() < 0.2:
            begun += 1
            growing.append(request(f"request{begun}", rng.randrange(1, 60)))
        for one in list(growing):
            count = one.num_prompt_tokens if not one.num_computed_tokens else 1
            found = ours.allocate_slots(one, count, num_lookahead_tokens=0)
            if plain:
                expected = plain.allocate_slots(one, count, num_lookahead_tokens=0)
                new = [len(group) for group in expected.blocks]
                assert new == [len(group) for group in found.blocks]
                if any(new):  # what left the window in between is freed now
                    assert blocks(plain, one.request_id) == blocks(ours, one.request_id)
            one.num_computed_tokens += count
            one.num_tokens = one.num_computed_tokens + 1
            if found is None or one.num_tokens >= LONGEST or rng.random() < 0.005:
                refused += found is None
                for each in filter(None, (ours, plain)):
                    each.free(one)
                growing.remove(one)
            else:
                sizes = [len(group) * BLOCK for group in blocks(ours, one.request_id)]
                assert min(sizes) >= one.num_computed_tokens
    for one in growing:
        for each in filter(None, (ours, plain)):
            each.free(one)
    return begun, refused


rng = random.Random(SEED)
asked, plain = Asked(manager(200)), manager(200)
begun, refused = grow(1500, BlocksOnDemand(asked), plain)
assert begun > 10 and not refused, (begun, refused)
assert asked.calls < 1500 * 4 / 8, asked.calls
assert asked.block_pool.get_num_free_blocks() == plain.block_pool.get_num_free_blocks() == 199
small = BlocksOnDemand(manager(60))
begun, refused = grow(1500, small, None)
assert refused and small.block_pool.get_num_free_blocks() == 59, refused
try:
    BlocksOnDemand(manager(60, enable_caching=True))
except ValueError as error:
    assert "enable_prefix_caching" in str(error)
else:
    raise AssertionError("accepted a cache of prefixes")
"""


@pytest.mark.engine
def test_blocks_are_those_of_vllms_own_scheduler() -> None:
    """In a process of its own: vLLM reads the environment when it is imported."""
    seed = str(new_seed())
    done = subprocess.run([sys.executable, "-c", CHECK, seed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
