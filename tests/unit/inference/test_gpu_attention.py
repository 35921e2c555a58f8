"""Attention in vLLM on a GPU: what its kernel is given, without a GPU."""

import os
import subprocess
import sys

CHECK = """
from dataclasses import fields
from types import SimpleNamespace

import torch
from vpmoe.inference import gpu_attention
from vpmoe.inference.gpu_attention import TritonAttentionMetadata, one_query_each

# three sequences with 3, 1 and 4 queries at the end of 3, 9 and 6 keys; the last two queries are padding
given = dict.fromkeys((field.name for field in fields(TritonAttentionMetadata)), None) | {
    "num_actual_tokens": 10,
    "max_query_len": 4,
    "query_start_loc": torch.tensor([0, 3, 4, 8], dtype=torch.int32),
    "seq_lens": torch.tensor([3, 9, 6], dtype=torch.int32),
    "block_table": torch.tensor([[7, 0], [5, 2], [1, 3]], dtype=torch.int32),
}
found = one_query_each(TritonAttentionMetadata(**given))
assert found.max_query_len == 1
assert found.query_start_loc.tolist() == list(range(11))
assert found.seq_lens.tolist() == [1, 2, 3, 9, 3, 4, 5, 6, 6, 6]
assert found.block_table.tolist() == [[7, 0]] * 3 + [[5, 2]] + [[1, 3]] * 6
assert found.seq_lens.dtype == found.query_start_loc.dtype == found.block_table.dtype == torch.int32

# vLLM takes the width of its buffer from the configuration, which has heads of 8; the layers' are padded
def init(self, spec, layers, config, device):
    self.softmax_segm_output = torch.empty(64, 4, 16, 8)


gpu_attention.TritonAttentionMetadataBuilder.__init__ = init
for backend in (gpu_attention.WindowBackend, gpu_attention.ExactAlibiBackend):
    builder = backend.get_builder_cls()(SimpleNamespace(head_size=32), [], None, None)
    assert builder.softmax_segm_output.shape == (64, 4, 16, 32)
assert gpu_attention.WindowBackend.get_name() == "TRITON_ATTN"
# 65 sequences, called as vLLM's layers do: with a single key its value is the output; fewer are vLLM's
class Window(gpu_attention.Implementation):
    def __init__(self):
        self.scale, self.sliding_window, self.alibi_slopes, self.sinks = 1.0, (127, 0), None, None


cache, query = torch.randn(66, 2, 16, 64), torch.randn(65, 4, 32)
metadata = SimpleNamespace(
    num_actual_tokens=65,
    max_query_len=1,
    seq_lens=torch.ones(65, dtype=torch.int32),
    block_table=torch.arange(1, 66, dtype=torch.int32)[:, None],
)
output = torch.empty(65, 4, 32)
arguments = dict(output=output, output_scale=None, output_block_scale=None)
Window().forward(None, query, query, query, cache, metadata, **arguments)
assert torch.allclose(output, cache[1:, :, 0, 32:].repeat_interleave(2, 1))
metadata.seq_lens = metadata.seq_lens[:63]
asked = []
gpu_attention.TritonAttentionImpl.forward = lambda self, *given: asked.append(given) or output
Window().forward(None, query, query, query, cache, metadata, **arguments)
assert len(asked[0]) == 9 and asked[0][5:] == (metadata, output, None, None)
gpu_attention.register()
backend = gpu_attention.AttentionBackendEnum["CUSTOM"].get_class()
assert backend is gpu_attention.ExactAlibiBackend and backend.get_name() == "CUSTOM"
"""


def test_each_query_of_a_prompt_sees_the_keys_before_it() -> None:
    """In a process of its own: vLLM reads the environment when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
