"""Weights from a dense model: what is said to preserve the function does, against transformers' own model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fakes.dense_models import dense_model, save_dense_model
from tests.fakes.students import COMPLETE, SMALL, new_seed, with_weights
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.model.attention import packed_seq_params_for
from vpmoe.model.batch import Batch
from vpmoe.model.router import routers
from vpmoe.model.shapes import Shape
from vpmoe.model.student import Student, build
from vpmoe.upcycle.build import NOISE, ROUTER_SPREAD, prepare, upcycle

POSITIONS = 12
SEED = 7
LINEAR_GLOBAL = replace(COMPLETE, value_residual=False, softmax_offset=False)
"""All parts but the two that change attention where they begin; layer 3 is global and comes from source layer
1."""


def upcycled(folder: Path, shape: Shape, device: torch.device) -> Student:
    return with_weights(shape, device, upcycle(folder, shape, SEED)[0])


def attention_of(
    student: Student, layer: int, hidden_SH: Tensor, first_value: Tensor | None = None
) -> Tensor:
    """[S, H]: a layer's attention of one document."""
    attention = student.decoder.layers[layer].self_attention
    angle = student._angles(torch.arange(len(hidden_SH)).unsqueeze(1))
    packed = packed_seq_params_for(torch.tensor([0, len(hidden_SH)], dtype=torch.int32), len(hidden_SH))
    (out, bias), _ = attention(hidden_SH.unsqueeze(1), angle, first_value, packed)
    return (out if bias is None else out + bias).squeeze(1)


def attention_of_source(
    model: Any, layer: int, hidden_SH: Tensor, rotates: bool = True, slopes: list[float] | None = None
) -> Tensor:
    """[S, H]: transformers' attention of one document, without its rotation if wanted, with ALiBi's bias."""
    position = torch.arange(len(hidden_SH))
    cos, sin = model.model.rotary_emb(hidden_SH, position.unsqueeze(0))
    if not rotates:
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    distance = position[:, None] - position[None, :]
    mask = torch.zeros(1, 1, *distance.shape).masked_fill(distance < 0, -torch.inf)
    if slopes is not None:
        mask = mask - torch.tensor(slopes)[:, None, None] * distance
    attention = model.model.layers[layer].self_attn
    mask = mask.expand(1, model.config.num_attention_heads, -1, -1)
    out, _ = attention(hidden_SH.unsqueeze(0), (cos, sin), mask)
    return out.squeeze(0)


def hidden_states(width: int = 32) -> Tensor:
    return torch.randn(POSITIONS, width, generator=torch.Generator().manual_seed(new_seed()))


def batch(vocabulary: int = SMALL.vocabulary) -> Batch:
    tokens = torch.randint(0, vocabulary, (1, 40), generator=torch.Generator().manual_seed(new_seed()))
    documents = torch.tensor([[0] * 15 + [1] * 20 + [-1] * 5], dtype=torch.int32)
    return Batch.from_rows(tokens, torch.ones_like(tokens, dtype=torch.uint8), documents)


def residual_stream(student: Student, rows: Batch) -> list[Tensor]:
    """The hidden states before the first layer and after each."""
    kept: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
        for layer in student.decoder.layers
    ]
    before = student.embedding(rows.tokens).transpose(0, 1)
    student(rows)
    for hook in hooks:
        hook.remove()
    return [before, *kept]


@pytest.mark.parametrize("shape", [SMALL, COMPLETE], ids=["without parts", "complete"])
@torch.no_grad()
def test_inserted_layers_are_the_identity_bit_by_bit(
    shape: Shape, tmp_path: Path, device: torch.device
) -> None:
    save_dense_model(tmp_path)
    made = prepare(tmp_path, shape, SEED)
    states = residual_stream(with_weights(shape, device, dict(made.tensors())), batch())
    inserted = [n for n, layer in enumerate(made.plan.layers) if layer.inserted]
    assert inserted == ([2] if shape is SMALL else [1, 2, 4])
    for number in range(shape.layers):
        assert torch.equal(states[number], states[number + 1]) == (number in inserted), number


@torch.no_grad()
def test_attention_without_parts_is_the_sources(tmp_path: Path, device: torch.device) -> None:
    """Heads are not pooled, rotation and norms of queries and keys are the same: fp32 rounding is left."""
    model, hidden = save_dense_model(tmp_path), hidden_states()
    student = upcycled(tmp_path, SMALL, device)
    for layer in (0, 1):
        want = attention_of_source(model, layer, hidden)
        torch.testing.assert_close(attention_of(student, layer, hidden), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_learned_frequencies_take_the_sources_rotation(tmp_path: Path, device: torch.device) -> None:
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    model, hidden = save_dense_model(tmp_path, rope_parameters=rope), hidden_states()
    student = upcycled(tmp_path, replace(SMALL, learned_frequencies=True), device)
    want = attention_of_source(model, 1, hidden)
    torch.testing.assert_close(attention_of(student, 1, hidden), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_global_layers_attention_is_the_sources_with_alibi_for_rotation(
    tmp_path: Path, device: torch.device
) -> None:
    model, hidden = save_dense_model(tmp_path), hidden_states()
    student = upcycled(tmp_path, LINEAR_GLOBAL, device)
    want = attention_of_source(model, 1, hidden, rotates=False, slopes=LINEAR_GLOBAL.slopes(3))
    torch.testing.assert_close(attention_of(student, 3, hidden), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_offset_and_value_residual_change_a_global_layers_attention_little(
    tmp_path: Path, device: torch.device
) -> None:
    """The offset takes exp(−10) of a denominator; the first layer's values, here zeros, 1 − σ(4) = 1.8 % of a
    value."""
    model, hidden = save_dense_model(tmp_path), hidden_states()
    student = upcycled(tmp_path, COMPLETE, device)
    want = attention_of_source(model, 1, hidden, rotates=False, slopes=COMPLETE.slopes(3))
    got = attention_of(student, 3, hidden, first_value=torch.zeros(POSITIONS, 1, 2, 16))
    assert (got - want).norm() < 0.03 * want.norm()


@torch.no_grad()
def test_pooling_identical_heads_keeps_attention(tmp_path: Path, device: torch.device) -> None:
    """8 / 4 heads, each of the student's 4 / 2 twice; the output projection's columns differ within a
    pool."""
    model, hidden = dense_model("qwen3", num_attention_heads=8, num_key_value_heads=4), hidden_states()
    for layer in model.model.layers:
        for name in "qkv":
            weight = getattr(layer.self_attn, f"{name}_proj").weight
            heads = weight.view(-1, 2, 16, 32)
            heads[:, 1] = heads[:, 0]
    save_dense_model(tmp_path, model=model)
    student = upcycled(tmp_path, SMALL, device)
    want = attention_of_source(model, 1, hidden)
    torch.testing.assert_close(attention_of(student, 1, hidden), want, rtol=1e-4, atol=1e-4)


def test_pooled_heads_are_means_and_columns_are_sums(tmp_path: Path) -> None:
    """4 / 4 heads become 2 / 1: in numpy, in float64."""
    model = save_dense_model(tmp_path, num_key_value_heads=4)
    shape = replace(SMALL, heads=2, kv_heads=1)
    made = prepare(tmp_path, shape, SEED)
    own, theirs = "main/decoder.layers.1.self_attention", model.model.layers[1].self_attn
    query, key, value = (
        getattr(theirs, f"{x}_proj").weight.detach().double().numpy().reshape(4, 16, 32) for x in "qkv"
    )
    want = [query[:2].mean(0), query[2:].mean(0), key.mean(0), value.mean(0)]
    got = made.tensor(f"{own}.linear_qkv.weight").double().numpy()
    np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-5, atol=1e-7)
    out = theirs.o_proj.weight.detach().double().numpy().reshape(32, 4, 16)
    want_out = np.concatenate([out[:, 0] + out[:, 1], out[:, 2] + out[:, 3]], 1)
    got = made.tensor(f"{own}.linear_proj.weight").double().numpy()
    np.testing.assert_allclose(got, want_out, rtol=1e-5, atol=1e-6)


def test_a_llama_has_neutral_norms_of_queries_and_keys(tmp_path: Path) -> None:
    save_dense_model(tmp_path, "llama")
    made = prepare(tmp_path, SMALL, SEED)
    for x in "qk":
        assert (made.tensor(f"main/decoder.layers.0.self_attention.{x}_layernorm.weight") == 1).all()
    assert any("normalised with weight 1" in note for note in made.facts()["notes"])


def test_norms_are_the_sources_in_every_layer(tmp_path: Path) -> None:
    model = save_dense_model(tmp_path)
    made = prepare(tmp_path, COMPLETE, SEED)
    for number, layer in enumerate(made.plan.layers):
        theirs = model.model.layers[layer.source]
        for own, want in (
            ("input_layernorm", theirs.input_layernorm),
            ("pre_mlp_layernorm", theirs.post_attention_layernorm),
        ):
            assert torch.equal(made.tensor(f"main/decoder.layers.{number}.{own}.weight"), want.weight)
    assert torch.equal(made.tensor("main/decoder.final_layernorm.weight"), model.model.norm.weight)


def test_the_shared_expert_has_the_units_that_write_most(tmp_path: Path) -> None:
    model = save_dense_model(tmp_path)
    made = prepare(tmp_path, SMALL, SEED)
    mlp = model.model.layers[1].mlp
    norms = mlp.down_proj.weight.detach().double().pow(2).sum(0)
    units = sorted(range(96), key=lambda unit: -float(norms[unit]))[: SMALL.shared_width]
    of = "main/decoder.layers.1.mlp.shared_experts"
    assert torch.equal(made.tensor(f"{of}.linear_fc1.weight"), mlp.up_proj.weight[units])
    want = mlp.down_proj.weight[:, units] * 3**0.5
    torch.testing.assert_close(made.tensor(f"{of}.linear_fc2.weight"), want)


def test_a_layer_wider_than_the_source_computes_the_same_as_all_units(tmp_path: Path) -> None:
    """64 units of the source in a dense layer of 100: relu(up x)² of all, unscaled; the 36 drawn ones write
    nothing."""
    model = save_dense_model(tmp_path, intermediate_size=64)
    made = prepare(tmp_path, replace(SMALL, dense_width=100), SEED)
    up, down = (made.tensor(f"main/decoder.layers.0.mlp.linear_fc{n}.weight").double() for n in (1, 2))
    mlp, hidden = model.model.layers[0].mlp, hidden_states().double()
    want = (hidden @ mlp.up_proj.weight.T.double()).relu() ** 2 @ mlp.down_proj.weight.T.double()
    torch.testing.assert_close((hidden @ up.T).relu() ** 2 @ down.T, want)
    assert (up[64:].std() - SMALL.init_std).abs() < 0.005 and (down[:, 64:] == 0).all()


def test_experts_are_noisy_copies_of_the_units_after_the_shared_experts(tmp_path: Path) -> None:
    """64 units for 8 experts of 16: each unit is in two experts, whose copies differ by the noise."""
    model = save_dense_model(tmp_path)
    made = prepare(tmp_path, SMALL, SEED)
    mlp = model.model.layers[1].mlp
    units = mlp.down_proj.weight.norm(dim=0).argsort(descending=True)[SMALL.shared_width :]
    of = "main/decoder.layers.1.mlp.experts"
    up, down = made.tensor(f"{of}.up").view(2, 64, 32), made.tensor(f"{of}.down").mT.reshape(2, 64, 32)
    scale = SMALL.experts_per_token / SMALL.routed_scaling
    for got, want in ((up, mlp.up_proj.weight[units]), (down, mlp.down_proj.weight.T[units] * scale)):
        noise = (got - want).detach()
        assert not torch.equal(got[0], got[1])
        assert 0.5 * NOISE < noise.std() / want.std() < 2 * NOISE


@torch.no_grad()
def test_the_router_is_near_uniform_whatever_the_norm_weighs(tmp_path: Path, device: torch.device) -> None:
    """Logits have the stated deviation: with 8 experts · 35 positions known to ± 15 %, tested to ± 50 %. A
    chosen expert's weight is within 15 % of its even share."""
    model = dense_model("qwen3")
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.mul_(5)
    save_dense_model(tmp_path, model=model)
    student = upcycled(tmp_path, COMPLETE, device)
    found: list[tuple[Tensor, Tensor]] = []
    hooks = [
        router.register_forward_hook(
            lambda module, inputs, output: found.append((module.gating(inputs[0]), output[0]))
        )
        for router in routers(student).values()
    ]
    student(batch())
    for hook in hooks:
        hook.remove()
    assert len(found) == COMPLETE.moe_layers
    for logits, weights in found:
        assert 0.5 * ROUTER_SPREAD < logits.std() < 1.5 * ROUTER_SPREAD
        chosen = weights[weights > 0]
        even = COMPLETE.routed_scaling / COMPLETE.experts_per_token
        assert ((chosen / even - 1).abs() < 0.15).all()


def test_what_is_drawn_is_what_the_trainer_draws(tmp_path: Path, device: torch.device) -> None:
    save_dense_model(tmp_path)
    made, fresh = prepare(tmp_path, COMPLETE, SEED), build(COMPLETE, device, sequence_length=8, seed=SEED)
    name = "decoder.layers.0.self_attention.tensor_product.weight"
    assert made.plan.tensors[f"main/{name}"].method == "drawn"
    assert torch.equal(made.tensor(f"main/{name}"), fresh.get_parameter(name))
    for name in ("log_frequency", "decoder.layers.1.self_attention.value_mix"):
        assert torch.equal(made.tensor(f"main/{name}"), fresh.get_parameter(name))


def test_the_seed_decides_what_is_drawn_and_nothing_else(tmp_path: Path) -> None:
    save_dense_model(tmp_path)
    (first, facts), (again, same_facts) = (upcycle(tmp_path, COMPLETE, SEED) for _ in range(2))
    assert facts == same_facts and all(torch.equal(first[name], again[name]) for name in first)
    other, _ = upcycle(tmp_path, COMPLETE, SEED + 1)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing == {
        name for name in first if name.endswith(("tensor_product.weight", "router.weight", "experts.up"))
    } | {"main/decoder.layers.3.mlp.experts.down"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_and_sharded_sources_give_the_same_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    model = dense_model("qwen3")
    save_dense_model(tmp_path / "half", model=model, dtype=dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2
    save_dense_model(tmp_path / "single", model=model)  # its numbers are rounded by now
    half, single = (upcycle(tmp_path / name, SMALL, SEED) for name in ("half", "single"))
    assert all(torch.equal(half[0][name], single[0][name]) for name in single[0])
    assert len(half[1]["source"]["files"]) > 4 and half[1]["vocabulary"] == single[1]["vocabulary"]


def test_facts_name_source_mapping_and_counts(tmp_path: Path) -> None:
    save_dense_model(tmp_path)
    _, facts = upcycle(tmp_path, COMPLETE, SEED)
    assert facts["source"]["files"].keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert facts["layers"][3] == {"source": 1, "inserted": False}
    assert facts["parts"] == COMPLETE.parts and facts["seed"] == SEED
    methods = {row["method"] for row in facts["tensors"]}
    assert methods == {"combined", "copied", "chosen", "drawn", "neutral", "identity", "zeroed"}
    counts = facts["vocabulary"]
    assert counts["copied"] + counts["combined"] + counts["drawn"] == COMPLETE.vocabulary


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _integers(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: part.to(torch.int8) for name, part in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (_without_tokenizer, "tokenizer.json cannot be read: .* The tokenizer is needed beside the weights"),
        (_cut, "model.safetensors is cut: .* Copy the whole model directory again"),
        (_integers, "is I8, expected BF16, F16, F32. Use the weights that were not quantized"),
    ],
)
def test_a_damaged_folder_is_refused_with_its_name(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save_dense_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(Permanent, match=f"{tmp_path.name}.*{message}"):
        prepare(tmp_path, SMALL, SEED)


def test_a_source_of_another_width_is_refused_with_its_folder(tmp_path: Path) -> None:
    save_dense_model(tmp_path)
    with pytest.raises(Permanent, match=f"{tmp_path.name}: config.json: hidden_size is 32, and wide has 64"):
        prepare(tmp_path, replace(SMALL, name="wide", hidden=64), SEED)


def _donor(folder: Path, rows: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    table = torch.randn(rows, 8, generator=torch.Generator().manual_seed(new_seed()))
    index = {
        "weight_map": {"model.embed_tokens.weight": "one.safetensors", "lm_head.weight": "two.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.embed_tokens.weight": table.bfloat16()}, folder / "one.safetensors")
    return folder


def test_of_a_donor_only_the_file_with_its_embeddings_is_read(tmp_path: Path) -> None:
    save_dense_model(tmp_path / "source")
    donor = _donor(tmp_path / "donor", VOCABULARY_SIZE)
    weights, facts = upcycle(tmp_path / "source", SMALL, SEED, donor)
    plain, _ = upcycle(tmp_path / "source", SMALL, SEED)
    differing = {name for name in weights if not torch.equal(weights[name], plain[name])}
    assert differing == {"main/embedding.weight", "main/output"}
    assert facts["vocabulary"]["method"] == "donor"
    assert facts["donor"]["files"].keys() == {"config.json", "one.safetensors"}


def test_a_donor_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save_dense_model(tmp_path / "source")
    donor = _donor(tmp_path / "donor", 1_000)
    with pytest.raises(
        Permanent, match=r"donor: .* is BF16 \[1000, 8\], expected .* with 201,088 rows. Use a"
    ):
        prepare(tmp_path / "source", SMALL, SEED, donor)
