"""Tiny random GPT-OSS checkpoints: the whole architecture (experts, sinks, sliding window, YaRN) and vocabulary, none of the size."""

import json
from pathlib import Path

TINY = {
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
    "vocab_size": 201_088,
    "max_position_embeddings": 4096,
    "pad_token_id": 199_999,
    "eos_token_id": 200_002,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
"""What GPT-OSS' configuration says of this checkpoint; the rest is GPT-OSS' own. vLLM's kernels want head_dim 32 or more."""


def write(folder: Path, seed: int = 0, dtype: str = "float32", **changes: object) -> Path:
    """Write a Hugging Face model directory of random weights, without tokenizer files (100 MB in float32); returns it.

    Weights are large enough for every part of the model to matter to every logit. `changes` are made to its configuration.
    """
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**{**TINY, **changes}, dtype=dtype)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GptOssForCausalLM(config)
        for name, weights in model.named_parameters():
            if "norm" not in name:
                weights.normal_(std=1.0 if "sinks" in name else 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    if said.get("dtype") != dtype:
        raise ValueError(f"{folder}/config.json says dtype {said.get('dtype')}, not {dtype}")
    return folder
