"""Which tensor of the student comes from which tensors of a dense model, and how.

Pure: sizes and names only, and no torch. build.py carries a plan out. The rules are in
docs/guides/upcycle.md. The function is preserved by inserted layers, by copied norms, and by copied attention
where the student's layer has linear projections and the source's positions; by pooled attention if the heads
of a pool are identical.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vpmoe.failure import Permanent
from vpmoe.model.shapes import Shape
from vpmoe.upcycle.source import EMBEDDING, FINAL_NORM, Source, read_source

Method = Literal["copied", "pooled", "chosen", "combined", "drawn", "zeroed", "neutral", "identity"]
"""copied: the source's numbers. pooled: heads are averaged, their columns of the output projection summed.
chosen: the units with the largest down projections. combined: rows of the vocabulary, copied or sparse
combinations. drawn: random, as the trainer initialises. zeroed: a new part that adds nothing at first.
neutral: a new part's value that changes nothing or least. identity: zero, so that an inserted layer adds
nothing."""

OPEN_OFFSET = -10.0
"""Softmax offset of a layer with the source's attention: exp(−10) = 5e-5 in the denominator, against
exp(largest logit). Lower would change less, but the offset's gradient is as small as what it changes."""

EXPERTS_BEGIN_AFTER_SHARED = "the units after the shared expert's, over and over"


@dataclass(frozen=True)
class LayerOrigin:
    """The layer of the source that a layer of the student is made from."""

    source: int
    inserted: bool
    """Whether the student's layer is one more than the source has: it is the identity at first."""


@dataclass(frozen=True)
class TensorOrigin:
    """How one tensor of the student is made."""

    size: tuple[int, ...]
    method: Method
    sources: tuple[str, ...] = ()
    """Names of the source's tensors."""
    value: float | None = None
    """The value of all elements (zeroed, neutral, identity)."""
    note: str = ""


@dataclass(frozen=True)
class UpcyclePlan:
    """The origin of every tensor of a student, by its name in the trainer's checkpoint ("main/…",
    "buffer/…")."""

    shape: Shape
    source: Source
    layers: tuple[LayerOrigin, ...]
    """One for each of the student's."""
    tensors: Mapping[str, TensorOrigin]
    notes: tuple[str, ...]
    """What of the source is lost or changed."""

    def table(self) -> list[str]:
        """The plan as lines of text: sizes, layers, tensors, and what is lost."""
        source, shape = self.source, self.shape
        tied = " (output tied)" if source.tied else ""
        own = [f"{n} ← {layer.source}" for n, layer in enumerate(self.layers) if not layer.inserted]
        lines = [
            f"source    {source.model_type}: {source.layers} layers, hidden {source.hidden:,}, {source.heads}"
            f"/{source.kv_heads} heads of {source.head_width}, feed-forward {source.width:,}, vocabulary "
            f"{source.vocabulary:,}{tied}",
            f"student   {shape.name}: {shape.layers} layers, hidden {shape.hidden:,}, {shape.heads}/"
            f"{shape.kv_heads} heads of {shape.head_width}, {shape.experts} experts of "
            f"{shape.expert_width:,}, shared expert {shape.shared_width:,}, vocabulary {shape.vocabulary:,}",
            f"parts     {', '.join(shape.parts) or 'none'}",
            f"layers    student ← source: {', '.join(own)}",
        ]
        kinds = self._kinds()
        lines += [f"{name:<10}{ranges(kinds[name])}" for name in ("inserted", "global") if kinds[name]]
        order = [split_name(name)[1] for name in self.tensors]
        rows = [
            (group.tensor, self._layers(group.layers), group.method, group.source, group.note)
            for group in sorted(self.groups(), key=lambda group: order.index(group.tensor))
        ]
        head = ("tensor", "layers", "method", "from", "")
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(4)]
        for row in [head, *rows]:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]).rstrip())
        return lines + [f"note      {note}" for note in self.notes]

    def _kinds(self) -> dict[str, tuple[int, ...]]:
        """The layers of each kind by its name in the table."""
        shape, every = self.shape, range(self.shape.layers)
        inserted = {n for n in every if self.layers[n].inserted}
        whole = {
            "all": set(every),
            "dense": set(range(shape.dense_layers)),
            "mixture": set(range(shape.dense_layers, shape.layers)),
            "global": {n for n in every if shape.is_global(n)},
            "local": {n for n in every if not shape.is_global(n)},
        }
        found = {**whole, "inserted": inserted, "from source": set(every) - inserted}
        for name in ("mixture", "global", "local"):
            found[f"{name}, inserted"] = whole[name] & inserted
            found[f"{name}, from source"] = whole[name] - inserted
        return {name: tuple(sorted(layers)) for name, layers in found.items()}

    def _layers(self, layers: tuple[int, ...]) -> str:
        """The name of these layers' kind, or their numbers if they are no whole kind."""
        names = [name for name, own in self._kinds().items() if own == layers]
        return names[0] if layers and names else ranges(layers)

    def groups(self) -> list["TensorGroup"]:
        """The tensors in groups of one name and origin over several layers."""
        found: dict[tuple[str, Method, str, str], list[int]] = {}
        for name, origin in self.tensors.items():
            layer, inner = split_name(name)
            source = ", ".join(split_name(one)[1].removesuffix(".weight") for one in origin.sources)
            found.setdefault((inner, origin.method, source, origin.note), []).extend(
                [] if layer is None else [layer]
            )
        return [TensorGroup(*key, layers=tuple(layers)) for key, layers in found.items()]

    def as_json(self) -> dict[str, Any]:
        """The mapping for a manifest."""
        return {
            "layers": [{"source": layer.source, "inserted": layer.inserted} for layer in self.layers],
            "tensors": [
                {
                    "tensor": group.tensor,
                    "layers": ranges(group.layers),
                    "method": group.method,
                    "from": group.source,
                    "note": group.note,
                }
                for group in self.groups()
            ],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one name and one origin. `layers` is empty for a tensor outside of layers."""

    tensor: str
    method: Method
    source: str
    note: str
    layers: tuple[int, ...]


def plan(
    config: Mapping[str, Any], names_and_shapes: Mapping[str, tuple[int, ...]], shape: Shape
) -> UpcyclePlan:
    """How a student of `shape` is made from the model of a config.json and its tensors' names and shapes.

    Raises Permanent, naming the field of config.json or the tensor, its value and the remedy, if the source
    cannot be used.
    """
    source = read_source(config, names_and_shapes)
    _check_fit(source, shape)
    layers = spread(source.layers, shape)
    tensors = dict(_Tensors(source, shape, layers).all())
    return UpcyclePlan(shape, source, layers, tensors, tuple(_notes(source, shape, layers)))


def spread(source: int, shape: Shape) -> tuple[LayerOrigin, ...]:
    """The origin of each of the student's layers.

    With more layers than the source, source layer i is the student's layer ⌊i · layers / source⌋, or a free
    layer beside it if only that one can hold its attention. The other layers are inserted, made from the
    source layer before them. With fewer, the student has the first, the last and those evenly between.
    """
    layers = shape.layers
    if layers < source:
        last = max(layers - 1, 1)
        return tuple(
            LayerOrigin((2 * number * (source - 1) + last) // (2 * last), False) for number in range(layers)
        )
    place = {index * layers // source: index for index in range(source)}
    for even in list(place):
        free = [
            near
            for near in (even + 1, even - 1)
            if near in range(layers) and near not in place and holds_source_attention(shape, near)
        ]
        if free and not holds_source_attention(shape, even):
            place[free[0]] = place.pop(even)
    found: list[LayerOrigin] = []
    for number in range(layers):
        before = found[-1].source if found else 0
        found.append(LayerOrigin(place.get(number, before), number not in place))
    return tuple(found)


def holds_source_attention(shape: Shape, layer: int) -> bool:
    """Whether the student's layer has linear projections, which can hold those of the source."""
    return shape.ranks(layer) is None


def rotates_source_attention(shape: Shape) -> bool:
    """Whether a layer with the source's projections rotates queries and keys, as the source does."""
    return any(
        holds_source_attention(shape, layer) and shape.slopes(layer) is None for layer in range(shape.layers)
    )


def split_name(name: str) -> tuple[int | None, str]:
    """The layer in a name of the student or source, None outside of layers, and the name inside the layer."""
    for prefix in ("main/", "buffer/", "decoder.", "model.", "layers."):
        name = name.removeprefix(prefix)
    number, _, inner = name.partition(".")
    return (int(number), inner) if number.isdecimal() else (None, name)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: "0, 3–5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@dataclass(frozen=True)
class _Tensors:
    """The student's tensors, part by part: (name, origin)."""

    source: Source
    shape: Shape
    layers: tuple[LayerOrigin, ...]
    root: str = field(default="main/decoder")

    def all(self) -> Iterator[tuple[str, TensorOrigin]]:
        shape, source = self.shape, self.source
        table = (shape.vocabulary, shape.hidden)
        yield "main/embedding.weight", TensorOrigin(table, "combined", (EMBEDDING,))
        for number in range(shape.layers):
            yield from self._attention(number)
            yield from self._feed_forward(number)
        yield f"{self.root}.final_layernorm.weight", TensorOrigin((shape.hidden,), "copied", (FINAL_NORM,))
        tied = "untied" if source.tied else ""
        yield "main/output", TensorOrigin(table, "combined", (source.output,), note=tied)
        if shape.learned_frequencies:
            size = (shape.head_width // 2,)
            if rotates_source_attention(shape):
                note = f"the source's rotation, base {source.rope_theta:,.0f}"
                yield "main/log_frequency", TensorOrigin(size, "copied", note=note)
            else:
                note = f"base {shape.rope_base:,}: no layer rotates the source's heads"
                yield "main/log_frequency", TensorOrigin(size, "neutral", note=note)

    def _attention(self, number: int) -> Iterator[tuple[str, TensorOrigin]]:
        shape, source, layer = self.shape, self.source, self.layers[number]
        to, of = f"{self.root}.layers.{number}", f"model.layers.{layer.source}"
        attention, theirs = f"{to}.self_attention", f"{of}.self_attn"
        held = holds_source_attention(shape, number)
        yield f"{to}.input_layernorm.weight", self._norm(f"{of}.input_layernorm.weight", shape.hidden)
        size, pools = (shape.hidden, shape.heads * shape.head_width), self._pools()
        if layer.inserted:
            projection = _filled(size, "identity", 0.0)
        elif not held:
            projection = _filled(size, "zeroed", 0.0, "their tensor products are drawn")
        else:
            note = f"columns of {source.heads // shape.heads} query heads summed" if pools else ""
            projection = TensorOrigin(size, pools or "copied", (f"{theirs}.o_proj.weight",), note=note)
        yield f"{attention}.linear_proj.weight", projection
        if shape.linear_biases:
            yield f"{attention}.linear_proj.bias", _filled((shape.hidden,), "neutral", 0.0)
        kind = "linear_qkv" if held else "tensor_product"
        if held:
            names = tuple(f"{theirs}.{x}_proj.weight" for x in "qkv")
            note = ""
            if pools:
                queries, keys = source.heads // shape.heads, source.kv_heads // shape.kv_heads
                note = f"means of {queries} query heads and {keys} key-value heads"
            yield (
                f"{attention}.linear_qkv.weight",
                TensorOrigin((shape.qkv_width, shape.hidden), pools or "copied", names, note=note),
            )
        else:
            note = "quadratic: cannot hold the source's linear projections"
            yield (
                f"{attention}.tensor_product.weight",
                TensorOrigin((shape.factors_width, shape.hidden), "drawn", note=note),
            )
        if shape.linear_biases:
            yield f"{attention}.{kind}.bias", _filled((shape.qkv_width,), "neutral", 0.0)
        for x in "qk":
            name = f"{attention}.{x}_layernorm.weight"
            if held and source.qk_norm:
                yield name, self._norm(f"{theirs}.{x}_norm.weight", shape.head_width)
            else:
                note = "" if not held else "the source does not normalise queries and keys"
                yield name, _filled((shape.head_width,), "neutral", 1.0, note)
        if shape.softmax_offset:
            value = OPEN_OFFSET if held else 0.0
            yield (
                f"{attention}.core_attention.offset",
                _filled((shape.heads,), "neutral", value, f"{value:g}"),
            )
        if shape.value_residual and number > 0:
            yield (
                f"{attention}.value_mix",
                TensorOrigin((1,), "neutral", note="λ ≈ 1, as the trainer starts it"),
            )

    def _feed_forward(self, number: int) -> Iterator[tuple[str, TensorOrigin]]:
        shape, layer = self.shape, self.layers[number]
        to, of = f"{self.root}.layers.{number}", f"model.layers.{layer.source}"
        mlp, up, down = f"{to}.mlp", f"{of}.mlp.up_proj.weight", f"{of}.mlp.down_proj.weight"
        yield (
            f"{to}.pre_mlp_layernorm.weight",
            self._norm(f"{of}.post_attention_layernorm.weight", shape.hidden),
        )
        if number < shape.dense_layers:
            yield from self._chosen(mlp, up, down, shape.dense_width, layer.inserted)
            return
        norm = f"{of}.post_attention_layernorm.weight"
        yield (
            f"{mlp}.router.weight",
            TensorOrigin((shape.experts, shape.hidden), "drawn", (norm,), note="near uniform"),
        )
        if shape.router_bias:
            yield f"{mlp}.router.bias", _filled((shape.experts,), "neutral", 0.0)
        bias = f"buffer/{mlp.removeprefix('main/')}.router.expert_bias"
        yield bias, _filled((shape.experts,), "neutral", 0.0)
        experts, width, hidden = shape.experts, shape.expert_width, shape.hidden
        note = f"{EXPERTS_BEGIN_AFTER_SHARED}; plus noise"
        yield f"{mlp}.experts.up", TensorOrigin((experts, width, hidden), "chosen", (up, down), note=note)
        size = (experts, hidden, width)
        yield (
            f"{mlp}.experts.down",
            _filled(size, "identity", 0.0)
            if layer.inserted
            else TensorOrigin(
                size,
                "chosen",
                (down,),
                note=f"{note}; · {shape.experts_per_token} / {shape.routed_scaling:g}",
            ),
        )
        if shape.linear_biases:
            yield f"{mlp}.experts.up_bias", _filled((experts * width,), "neutral", 0.0)
            yield f"{mlp}.experts.down_bias", _filled((experts * hidden,), "neutral", 0.0)
        yield from self._chosen(f"{mlp}.shared_experts", up, down, shape.shared_width, layer.inserted)

    def _chosen(
        self, to: str, up: str, down: str, width: int, inserted: bool
    ) -> Iterator[tuple[str, TensorOrigin]]:
        """A feed-forward layer of `width` units with the largest down projections."""
        shape, units = self.shape, self.source.width
        if width < units:
            note, scale = (
                f"the {width:,} units with the largest down projections",
                f"; · √({units:,} / {width:,})",
            )
        elif width > units:
            note, scale = f"all {units:,} units, {width - units:,} drawn", f"; {width - units:,} units zero"
        else:
            note, scale = "all units", ""
        yield f"{to}.linear_fc1.weight", TensorOrigin((width, shape.hidden), "chosen", (up, down), note=note)
        size = (shape.hidden, width)
        yield (
            f"{to}.linear_fc2.weight",
            _filled(size, "identity", 0.0)
            if inserted
            else TensorOrigin(size, "chosen", (down,), note=note + scale),
        )
        if shape.linear_biases:
            yield f"{to}.linear_fc1.bias", _filled((width,), "neutral", 0.0)
            yield f"{to}.linear_fc2.bias", _filled((shape.hidden,), "neutral", 0.0)

    def _norm(self, name: str, size: int) -> TensorOrigin:
        return TensorOrigin((size,), "copied", (name,))

    def _pools(self) -> Literal["pooled"] | None:
        """ "pooled" if the student has fewer heads than the source."""
        same = (self.source.heads, self.source.kv_heads) == (self.shape.heads, self.shape.kv_heads)
        return None if same else "pooled"


def _filled(
    size: tuple[int, ...], method: Literal["zeroed", "neutral", "identity"], value: float, note: str = ""
) -> TensorOrigin:
    return TensorOrigin(size, method, value=value, note=note)


def _check_fit(source: Source, shape: Shape) -> None:
    for name, found, wanted in (
        ("hidden_size", source.hidden, shape.hidden),
        ("head_dim", source.head_width, shape.head_width),
    ):
        if found != wanted:
            raise Permanent(
                f"config.json: {name} is {found:,}, and {shape.name} has {wanted:,}. Use a source with "
                f"{wanted:,}: neither is changed."
            )
    for name, found, wanted in (
        ("num_attention_heads", source.heads, shape.heads),
        ("num_key_value_heads", source.kv_heads, shape.kv_heads),
    ):
        if found % wanted:
            raise Permanent(
                f"config.json: {name} is {found}, and {shape.name} has {wanted}. Use a source with a "
                f"multiple of {wanted}: heads are pooled in groups of equal size."
            )


def _notes(source: Source, shape: Shape, layers: Sequence[LayerOrigin]) -> Iterator[str]:
    yield (
        "feed-forward: SwiGLU's gate is dropped. down(silu(gate x) · up x) becomes down(relu(up x)²), which "
        "is another function; what a unit writes is kept, when it writes is learned again"
    )
    own = [n for n, layer in enumerate(layers) if not layer.inserted]
    if drawn := [n for n in own if not holds_source_attention(shape, n)]:
        yield (
            f"layers {ranges(drawn)}: the source's attention is lost. Tensor products are drawn, and their "
            "output begins at 0"
        )
    if unrotated := [n for n in own if holds_source_attention(shape, n) and shape.slopes(n) is not None]:
        yield f"layers {ranges(unrotated)}: the source's rotation is dropped, ALiBi takes its place"
    windowed = [n for n in own if holds_source_attention(shape, n) and shape.window(n) is not None]
    if windowed:
        yield f"layers {ranges(windowed)}: queries see the last {shape.local_window} positions only"
    if rotates_source_attention(shape):
        if source.rope_type != "default":
            yield f"the rotation's scaling for long contexts ({source.rope_type}) is not carried over"
        if not shape.learned_frequencies and source.rope_theta != shape.rope_base:
            yield f"the rotation's base becomes {shape.rope_base:,}, in the source {source.rope_theta:,.0f}"
    if source.norm_epsilon != shape.norm_epsilon:
        yield f"norms: epsilon becomes {shape.norm_epsilon:g}, in the source {source.norm_epsilon:g}"
    if not source.qk_norm and any(holds_source_attention(shape, n) for n in own):
        yield "queries and keys are normalised with weight 1, in the source they are not: attention changes"
    if left_out := sorted({*range(source.layers)} - {layer.source for layer in layers}):
        yield f"layers {ranges(left_out)} of the source are left out"
    if source.tied:
        yield "the output matrix begins as the embeddings, and is no longer tied to them"
