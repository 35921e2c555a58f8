"""The dense model that a student starts from: what its config.json and its tensors' names say. No tensor is
read.

Llama and Qwen3 in Hugging Face's layout. Anything that such a model cannot be is an error here, so that
plan.py meets complete models only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpmoe.failure import Permanent

MODEL_TYPES = {"llama": False, "qwen3": True}
"""The model types that are read, and whether they normalise queries and keys."""

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
IGNORED = ".rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints have and no model reads."""
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
COPY_AGAIN = "Copy the whole model directory again, or write it with save_pretrained."


@dataclass(frozen=True)
class Source:
    """A dense model in numbers."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    width: int
    """Units of a feed-forward layer."""
    vocabulary: int
    """Rows of the embeddings."""
    tied: bool
    """Whether the output matrix is the embeddings."""
    norm_epsilon: float
    rope_theta: float
    rope_type: str
    """"default", or the name of a scaling for long contexts."""

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return MODEL_TYPES[self.model_type]

    @property
    def output(self) -> str:
        """Name of the output matrix."""
        return EMBEDDING if self.tied else HEAD

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        query, key = self.heads * self.head_width, self.kv_heads * self.head_width
        found: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            of = f"model.layers.{layer}"
            found |= {
                f"{of}.input_layernorm.weight": (self.hidden,),
                f"{of}.self_attn.q_proj.weight": (query, self.hidden),
                f"{of}.self_attn.k_proj.weight": (key, self.hidden),
                f"{of}.self_attn.v_proj.weight": (key, self.hidden),
                f"{of}.self_attn.o_proj.weight": (self.hidden, query),
                f"{of}.post_attention_layernorm.weight": (self.hidden,),
                f"{of}.mlp.gate_proj.weight": (self.width, self.hidden),
                f"{of}.mlp.up_proj.weight": (self.width, self.hidden),
                f"{of}.mlp.down_proj.weight": (self.hidden, self.width),
            }
            if self.qk_norm:
                found |= {f"{of}.self_attn.{x}_norm.weight": (self.head_width,) for x in "qk"}
        found[FINAL_NORM] = (self.hidden,)
        return found if self.tied else found | {HEAD: (self.vocabulary, self.hidden)}


def read_source(config: Mapping[str, Any], names_and_shapes: Mapping[str, tuple[int, ...]]) -> Source:
    """The model of a config.json and of the tensors beside it.

    Raises Permanent, naming the field or the tensor, its value and the remedy, unless it is a whole dense
    Llama or Qwen3 without biases and without quantization.
    """
    _check_kind(config)
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    source = Source(
        model_type=config["model_type"],
        layers=_count(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads") if "num_key_value_heads" in config else heads,
        head_width=_count(config, "head_dim") if config.get("head_dim") is not None else hidden // heads,
        width=_count(config, "intermediate_size"),
        vocabulary=_count(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=_number(rope if "rope_theta" in rope else config, "rope_theta", 10_000.0),
        rope_type=str(rope.get("rope_type", rope.get("type", "default"))),
    )
    if source.heads % source.kv_heads:
        raise Permanent(
            f"config.json: num_key_value_heads: {source.kv_heads} does not divide the {source.heads} query "
            "heads. The configuration is damaged: copy the model again."
        )
    _check_tensors(source, names_and_shapes)
    return source


def _check_kind(config: Mapping[str, Any]) -> None:
    for field in EXPERT_FIELDS:
        if config.get(field):
            raise Permanent(
                f"config.json: {field} is {config[field]}: a mixture of experts. Use a dense model; experts "
                "are made from its feed-forward layers."
            )
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        raise Permanent(f"config.json: model_type is {kind}. Use a model of type {' or '.join(MODEL_TYPES)}.")
    if config.get("quantization_config"):
        raise Permanent(
            "config.json: quantization_config is given. Use the weights that were not quantized: bfloat16, "
            "float16 or float32."
        )
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise Permanent(
                f"config.json: {field} is true. Biases of a source are not carried over; use a model without "
                "them, as Llama 3 and Qwen3 are."
            )
    if config.get("use_sliding_window"):
        raise Permanent(
            "config.json: use_sliding_window is true. Use a model whose attention is full in all layers."
        )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise Permanent(f"config.json: hidden_act is {activation}. Use a model with SwiGLU: hidden_act silu.")


def _check_tensors(source: Source, found: Mapping[str, tuple[int, ...]]) -> None:
    wanted = source.tensors()
    for name, size in wanted.items():
        if name not in found:
            raise Permanent(f"{name} is missing, and config.json implies it. {COPY_AGAIN}")
        if tuple(found[name]) != size:
            raise Permanent(
                f"{name} is {list(found[name])}, and config.json implies {list(size)}. {COPY_AGAIN}"
            )
    allowed = (
        {HEAD} if source.tied else set()
    )  # a tied model's head is the embeddings, also where it is stored
    for name in sorted(set(found) - set(wanted) - allowed):
        if name.endswith(".bias"):
            raise Permanent(
                f"{name}: biases of a source are not carried over. Use a model without them, as Llama 3 and "
                "Qwen3 are."
            )
        if not name.endswith(IGNORED):
            raise Permanent(
                f"{name} is no tensor of a dense {source.model_type} of {source.layers} layers. Merge "
                "adapters, and use weights that were not quantized."
            )


def _count(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Permanent(f"config.json: {field} is {value}, expected a positive whole number. {COPY_AGAIN}")
    return value


def _number(config: Mapping[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise Permanent(f"config.json: {field} is {value}, expected a positive number. {COPY_AGAIN}")
    return float(value)
