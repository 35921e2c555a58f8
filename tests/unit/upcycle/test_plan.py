"""The plan of upcycling: every tensor of every student has an origin, and what cannot be used is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.fakes.students import COMPLETE, SMALL, WITHOUT
from vpmoe.failure import Permanent
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.model.student import build
from vpmoe.upcycle.plan import UpcyclePlan, holds_source_attention, plan, ranges, spread
from vpmoe.upcycle.source import Source

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 384,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
}
QWEN3_0_6B = CONFIG | {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
}


def tensors_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the configuration says them."""
    return Source(
        config["model_type"],
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
        config["intermediate_size"],
        config["vocab_size"],
        config["tie_word_embeddings"],
        1e-6,
        1e4,
        "default",
    ).tensors()


def planned(shape: Shape, config: dict[str, Any] = CONFIG) -> UpcyclePlan:
    return plan(config, tensors_of(config), shape)


@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        COMPLETE,
        *(replace(COMPLETE, **{part: off}) for part, off in WITHOUT.items()),
        *(replace(SMALL, **{part: getattr(COMPLETE, part)}) for part in WITHOUT),
    ],
    ids=["none", "all", *(f"all but {part}" for part in WITHOUT), *(f"only {part}" for part in WITHOUT)],
)
def test_every_tensor_of_the_student_has_an_origin_of_its_shape(shape: Shape, device: torch.device) -> None:
    with torch.device("meta"):
        built = build(shape, torch.device("meta"), sequence_length=64, seed=0)
    own = {f"main/{name}": tuple(part.shape) for name, part in built.named_parameters()}
    own |= {
        f"buffer/{name}": tuple(part.shape)
        for name, part in built.named_buffers()
        if name.endswith("expert_bias")
    }
    found = planned(shape)
    assert {name: origin.size for name, origin in found.tensors.items()} == own
    read = {name for origin in found.tensors.values() for name in origin.sources}
    assert read <= set(tensors_of(CONFIG))


def test_the_whole_student_has_an_origin(device: torch.device) -> None:
    shape = SHAPES["vpmoe-6b"]
    with torch.device("meta"):
        built = build(shape, torch.device("meta"), sequence_length=64, seed=0)
    found = planned(shape, QWEN3_0_6B)
    assert {f"main/{name}": tuple(part.shape) for name, part in built.named_parameters()} == {
        name: origin.size for name, origin in found.tensors.items() if name.startswith("main/")
    }
    own = [n for n, layer in enumerate(found.layers) if not layer.inserted]
    assert [found.layers[n].source for n in own] == list(range(28))
    assert sum(holds_source_attention(shape, n) for n in own) == 19


@pytest.mark.parametrize("parts", [False, True], ids=["without parts", "complete"])
@pytest.mark.parametrize("layers", [1, 2, 5, 7, 80])
@pytest.mark.parametrize("source", [1, 2, 3, 5, 28, 80, 100])
def test_source_layers_are_spread_in_order_and_evenly(source: int, layers: int, parts: bool) -> None:
    shape = replace(COMPLETE if parts else SMALL, layers=layers)
    found = spread(source, shape)
    order = [layer.source for layer in found]
    own = [n for n, layer in enumerate(found) if not layer.inserted]
    assert len(found) == layers and order == sorted(order) and order[0] == 0
    if source <= layers:
        assert [found[n].source for n in own] == list(range(source))
        assert all(abs(n - index * layers // source) <= parts for index, n in enumerate(own))
        assert parts or own[0] == 0
    else:
        assert own == list(range(layers)) and len(set(order)) == layers
        assert layers == 1 or order[-1] == source - 1


def test_equal_depth_is_one_to_one() -> None:
    assert [(layer.source, layer.inserted) for layer in spread(5, COMPLETE)] == [(n, False) for n in range(5)]


def test_the_table_names_every_tensor_and_what_is_lost() -> None:
    lines = "\n".join(planned(SHAPES["vpmoe-6b"], QWEN3_0_6B).table())
    for said in (
        "28 layers, hidden 1,024, 16/8 heads of 128, feed-forward 3,072",
        "self_attention.linear_qkv.weight",
        "means of 2 query heads and 4 key-value heads",
        "the 512 units with the largest down projections; · √(3,072 / 512)",
        "all 3,072 units, 1,024 drawn; 1,024 units zero",
        "SwiGLU's gate is dropped",
        "the source's rotation is dropped, ALiBi takes its place",
        "the source's attention is lost",
    ):
        assert said in lines, said


def test_ranges_are_compact() -> None:
    assert [ranges(numbers) for numbers in ([], [3], [0, 1, 2, 5, 7, 8])] == ["", "3", "0–2, 5, 7–8"]


def test_what_differs_in_positions_and_norms_is_noted() -> None:
    shape = replace(SMALL, learned_frequencies=True)
    assert planned(shape).tensors["main/log_frequency"].method == "copied"
    assert not any("rotation" in note for note in planned(shape).notes)
    assert "the rotation's base becomes 10,000, in the source 1,000,000" in planned(SMALL).notes
    assert planned(COMPLETE).tensors["main/log_frequency"].method == "neutral"
    llama = CONFIG | {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }
    notes = planned(SMALL, llama).notes
    assert "norms: epsilon becomes 1e-06, in the source 1e-05" in notes
    assert "the rotation's scaling for long contexts (llama3) is not carried over" in notes
    assert any("queries and keys are normalised with weight 1" in note for note in notes)


UNREADABLE = [
    ({"model_type": "gpt2"}, "model_type is gpt2. Use a model of type llama or qwen3"),
    ({"num_experts": 8}, "num_experts is 8: a mixture of experts. Use a dense"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is given. Use the weights"),
    ({"attention_bias": True}, "attention_bias is true. Biases of a source"),
    ({"mlp_bias": True}, "mlp_bias is true. Biases of a source"),
    ({"use_sliding_window": True}, "use_sliding_window is true. Use a model whose"),
    ({"hidden_act": "gelu"}, "hidden_act is gelu. Use a model with SwiGLU"),
    ({"hidden_size": "32"}, "hidden_size is 32, expected a positive whole number"),
    ({"intermediate_size": None}, "intermediate_size is None, expected a positive"),
    ({"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide the 8 query heads"),
    ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is no tensor of a dense qwen3 of 1"),
    ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ({"vocab_size": 385}, r"embed_tokens.weight is \[384, 32\], and config.json implies \[385, 32\]"),
    ({"model_type": "llama"}, "self_attn.k_norm.weight is no tensor of a dense llama"),
]


@pytest.mark.parametrize("change, message", UNREADABLE)
def test_a_source_that_cannot_be_read_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Permanent, match=message):
        plan(CONFIG | change, tensors_of(CONFIG), SMALL)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 64}, "hidden_size is 64, and small has 32. Use a source with 32"),
        ({"head_dim": 8}, "head_dim is 8, and small has 16. Use a source with 16"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 2},
            "num_attention_heads is 6, and small has 4. Use a source with a multiple of 4",
        ),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, and small has 2. Use a source with a"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Permanent, match=message):
        planned(SMALL, CONFIG | change)


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.layers.0.self_attn.q_proj.bias", "q_proj.bias: biases of a source are not carried over. Use"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "weight_scale is no tensor of a dense qwen3"),
    ],
)
def test_a_tensor_that_a_dense_model_has_not_is_refused(name: str, message: str) -> None:
    with pytest.raises(Permanent, match=message):
        plan(CONFIG, tensors_of(CONFIG) | {name: (1,)}, SMALL)


def test_an_old_checkpoints_frequencies_and_a_tied_head_are_ignored() -> None:
    more = {"lm_head.weight": (384, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    found = plan(CONFIG, tensors_of(CONFIG) | more, SMALL)
    assert found.tensors == planned(SMALL).tensors
