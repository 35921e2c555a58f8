"""The shape of the tiny GPT-OSS checkpoints of the demonstration and the tests.

It is the whole architecture (experts, sinks, sliding window, YaRN) and vocabulary, in 100 MB.
"""

from typing import Any

from vpmoe.data.vocabulary import PADDING, RETURN, VOCABULARY_SIZE

TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "vocab_size": VOCABULARY_SIZE,
    "max_position_embeddings": 4096,
    "pad_token_id": PADDING,
    "eos_token_id": RETURN,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
"""Arguments of GptOssConfig; all others keep GPT-OSS's defaults. vLLM's kernels need head_dim 32 or more."""
