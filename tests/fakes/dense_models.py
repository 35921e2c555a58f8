"""Small dense models with tokenizers, as transformers saves them: sources of upcycling."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
}
TEXT = (
    "How deep is a pond? It is 12 metres deep, or 21. A pond is small and the sea is deep. ",
    "été über 汉字 ",
)


def byte_tokenizer(texts: Iterable[str] = TEXT, size: int = 300) -> Tokenizer:
    """A byte-level BPE with special tokens, trained on texts."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def dense_model(kind: str, seed: int = 1, **changed: Any) -> Qwen3ForCausalLM | LlamaForCausalLM:
    """A random Qwen3 or Llama in fp32: every tensor differs from its neutral value."""
    sizes = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}} | changed
    torch.manual_seed(seed)
    model = (
        Qwen3ForCausalLM(Qwen3Config(**sizes)) if kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**sizes))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.eval()


def save_dense_model(
    folder: Path,
    kind: str = "qwen3",
    *,
    model: Qwen3ForCausalLM | LlamaForCausalLM | None = None,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **changed: Any,
) -> Qwen3ForCausalLM | LlamaForCausalLM:
    """Save a model, by default a new one, and a tokenizer into `folder`. Returns the model in fp32, its
    numbers rounded to `dtype`."""
    model = model or dense_model(kind, **changed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    (tokenizer or byte_tokenizer()).save(str(folder / "tokenizer.json"))
    return model.float()
