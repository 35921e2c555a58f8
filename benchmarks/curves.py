"""Whether training on a device is right over many steps: loss curves beside those of the CPU in float32, a
resumed run beside one that was not interrupted, and the load of the experts.

    CUDA_VISIBLE_DEVICES= python -m benchmarks.curves --reference FILE [--parquet ROWS] [--steps 200]
    python -m benchmarks.curves --against FILE [--balance 500]
    python -m benchmarks.curves --against FILE --shape vpmoe-6b --layers 4 --tokens 16384 --vocabulary 201088

The first command trains `tiny` on the CPU, where every operation is torch's own in float32, from the initial
weights of each seed, on the same batches: documents of rows with SYNTH's columns (default: the repository's
sample), encoded and packed as a run does it. FILE gets the documents, the settings and the curves.

The second trains the first seed's student on this device, on the same batches, from the same float32
weights, and prints a table. It ends with exit code 1 unless
  the first step's loss and gradient norm, of the same weights, are those of the reference within FIRST;
  the loss, smoothed over WINDOW steps, differs from the reference of the same seed by no more than the
    references of all seeds differ from each other near that step, or by FLOOR of the value if that is more;
  every parameter, and every expert by itself, moved as far from its start as in the references, within MOVED,
    if it has FEWEST elements;
  a new student, restored from the copy of the state that a checkpoint is made of in the middle of the curve,
    has the state's bits, and the same losses, norms and state at the end, bit for bit;
  over the last LOADS steps every expert had tokens, and the busiest at most BUSIEST times the mean.
The last two need no reference curve. The third command checks them alone, with another student on the same
documents: its weights are random ones of the device.

Adam's step does not depend on a gradient's scale, so an error that scales a parameter's gradient moves no
loss. Scaled gradients of all parameters show in the first norm; those of one in tests/gpu/test_student.py.
Later norms are printed only: a few large ones decide each mean, and rounding alone moves them.

The vocabulary is reduced by default: the documents' most frequent ids, renumbered, and one id for all others.
With 201,088 logits a token two cores would compute little else.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpmoe.data.packing import PackedDocument, SequenceStream
from vpmoe.data.spans import spans_of_documents
from vpmoe.model import device as devices
from vpmoe.model import distributed, initial, state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.router import ExpertLoad, routers
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.objectives.vanilla import vanilla
from vpmoe.trainer.checkpoint.state_copy import StateCopy
from vpmoe.trainer.data.collate import assemble

WEIGHTS = {"reasoning": 1.0, "final": 1.0}
WARMUP = 20
"""Steps over which the learning rate rises from 0."""
WINDOW = 10
"""Steps of which a curve's point is the mean."""
FIRST = 0.02
"""Allowed relative difference of the first step's loss and gradient norm, whose weights are the same. bf16
rounds each tensor by up to 2⁻⁹, in either direction: of single parameters' gradients 3 in 100 were measured
(tests/gpu/test_student.py), and their sum differs by less."""
NEAR = 25
"""Points on either side in which the largest spread of the seeds counts: curves of three seeds cross each
other."""
FLOOR = 0.005
"""Difference of a smoothed value, relative to it, that is allowed if the seeds differ by less."""
FEWEST = 256
"""Elements of a parameter, or of one expert of a stack, whose distance is compared. Those with fewer walk at
random: one by up to eleven times as far for one seed as for another, those of 64 by up to twice."""
MOVED = 1.5
"""Factor by which a parameter may have moved less than in the reference in which it moved least, or more than
in that in which it moved most. Products rounded to bf16, emulated on the CPU, gave 0.82 and 1.19."""
LOADS = 50
"""Steps whose loads are added: a step's tokens are too few to tell of one expert of 256."""
BUSIEST = 2.0
"""Largest allowed ratio of the busiest expert's tokens to the mean over LOADS steps."""
DATA_SEED = 1
"""Of the order of documents, for all students."""


@dataclass(frozen=True)
class Case:
    """A student and how it is trained."""

    shape: str
    layers: int
    vocabulary: int
    tokens: int
    """Positions of a step, one packed row."""
    rate: float
    """Learning rate after WARMUP steps."""

    def student(self) -> Shape:
        return replace(SHAPES[self.shape], layers=self.layers, vocabulary=self.vocabulary)


@dataclass
class Curve:
    """What one student did, step by step."""

    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    """Of the gradient, before clipping."""
    moved: dict[str, float] = field(default_factory=dict)
    """By parameter of FEWEST elements or more, the norm of the difference to its initial value after the
    curve's steps; one entry for each expert of a stack."""


@dataclass(frozen=True)
class Document:
    """Token ids and the span of each."""

    tokens: NDArray[np.int32]
    spans: NDArray[np.uint8]


def documents_of(parquet: Path | None, longest: int) -> list[Document]:
    """The documents that preprocessing makes of these rows, or of the sample's, in the rows' order. Longer
    ones are left out, and those that its filters drop."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from demo import sample
    from vpmoe.api.dataset import Conversation
    from vpmoe.data.preprocess import encode, sampling

    columns = list(encode.COLUMNS)
    table = (
        pq.read_table(parquet, columns=columns)
        if parquet
        else pa.Table.from_pylist(sample.rows(), schema=sample.SCHEMA).select(columns)
    )
    (batch,) = table.combine_chunks().to_batches()
    every_row = sampling.Thresholds((sampling.BINS,) * 4)
    context = encode.PreprocessContext("curves", Conversation(), longest, 0.0, every_row)
    found = encode.encode_chunk(encode.make_chunk(0, "rows", 0, batch), context)
    spans_T = np.frombuffer(spans_of_documents(found.lengths_D3), np.uint8)
    ends = np.cumsum(found.lengths_D3.sum(1) + 1)[:-1]
    return [Document(*one) for one in zip(np.split(found.ids_T, ends), np.split(spans_T, ends), strict=True)]


def reduced(documents: Sequence[Document], vocabulary: int) -> list[Document]:
    """The documents with their most frequent ids renumbered from 0 by frequency, and all others as the last
    id, so that there are at most `vocabulary`. With all ids of o200k they stay as they are."""
    if vocabulary == SHAPES["tiny"].vocabulary:
        return list(documents)
    ids, counts = np.unique(np.concatenate([one.tokens for one in documents]), return_counts=True)
    kept = ids[np.argsort(-counts, kind="stable")][: vocabulary - 1]
    number_V = np.full(int(ids.max()) + 1, vocabulary - 1, np.int32)
    number_V[kept] = np.arange(len(kept), dtype=np.int32)
    return [replace(one, tokens=number_V[one.tokens]) for one in documents]


def batch_of_step(documents: Sequence[Document], tokens: int) -> Callable[[int], Batch]:
    """The batch of each step from 0: one row of packed documents."""
    lengths = np.asarray([len(one.tokens) for one in documents], np.int32)
    stream = SequenceStream([lengths], DATA_SEED, tokens)

    def read(document: PackedDocument) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        one = documents[document.number]
        return one.tokens, one.spans

    def batch(step: int) -> Batch:
        row = assemble([stream.sequence(step)], read, tokens)
        # Padding's id may be beyond a reduced vocabulary; nothing depends on it.
        return replace(row, tokens=row.tokens.masked_fill(row.padding, 0))

    return batch


def new_learner(case: Case, device: torch.device, seed: int) -> Learner:
    return Learner.build(
        case.student(), device, sequence_length=case.tokens, seed=seed, weight_decay=0.1, gradient_clip=1.0
    )


def set_weights(learner: Learner, seed: int) -> None:
    """Give it the initial weights of `seed` that it would have on the CPU: each kind of device has random
    numbers of its own."""
    shape, start = learner.student.shape, {}
    for name, parameter in learner.student.named_parameters():
        values = torch.empty(parameter.shape)
        if name == "log_frequency":
            values.copy_(initial.log_frequencies(shape.head_width, shape.rope_base))
        elif values.dim() == 1:
            values.fill_(initial.initial_vector(name))
        else:
            generator = initial.generator_for(name, seed, values.device)
            values.normal_(0, initial.initial_std(name, shape), generator=generator)
        start[f"main/{name}"] = values.flatten()
    biases = {held.name: torch.zeros(held.stop) for held in state.slices(learner) if "buffer/" in held.name}
    values_of = start | biases
    state.restore(learner, lambda name, start, stop: values_of[name][start:stop], 0, moments=False)


def copy_of(learner: Learner) -> dict[str, Tensor]:
    """By name, the whole state on the CPU."""
    return {held.name: held.tensor.detach().flatten().cpu().clone() for held in state.slices(learner)}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits are not the same."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )


def distances(learner: Learner, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Curve.moved."""
    experts, moved = learner.student.shape.experts, {}
    for name, _ in learner.student.named_parameters():
        difference = (after[f"main/{name}"] - before[f"main/{name}"]).double()
        by_expert = ".mlp.experts." in name
        parts = difference.view(experts if by_expert else 1, -1)
        if parts.shape[1] >= FEWEST:
            for number, norm in enumerate(parts.norm(dim=1).tolist()):
                moved[f"{name}[{number}]" if by_expert else name] = norm
    return moved


class Training:
    """A student that is trained step by step, its curve, and the loads of its experts."""

    def __init__(self, learner: Learner, batch: Callable[[int], Batch], rate: float) -> None:
        self.learner, self.curve = learner, Curve()
        self.loads: list[ExpertLoad] = []
        self._batch, self._rate = batch, rate

    def run(self, first: int, stop: int, before_step: Callable[[], None] | None = None) -> None:
        """Steps [first, stop). `before_step` is called once, between forward and step of the first of
        them."""
        for step in range(first, stop):
            batch = self._batch(step)
            outcome = self.learner.forward_backward(
                [batch], vanilla(batch.counts, WEIGHTS), int(batch.counts[0])
            )
            if before_step is not None and step == first:
                before_step()
            self.curve.loss.append(outcome.loss)
            self.curve.norm.append(self.learner.step(self._rate * min(1, (step + 1) / WARMUP)))
            assert outcome.load is not None
            self.loads.append(outcome.load)

    def bias_range(self) -> list[float]:
        """By mixture layer, the largest expert bias minus the smallest."""
        biases = [router.expert_bias for router in routers(self.learner.student).values()]
        return [float(bias.max() - bias.min()) for bias in biases]


def smoothed(values: Sequence[float]) -> NDArray[np.float64]:
    """Means of WINDOW values in a row, or the mean of all if there are fewer."""
    width = min(WINDOW, len(values))
    return np.convolve(values, np.full(width, 1 / width), "valid")


@dataclass(frozen=True)
class Comparison:
    """A smoothed curve beside those of the reference. Point i is the mean of steps i to i + WINDOW − 1."""

    found: NDArray[np.float64]
    same_seed: NDArray[np.float64]
    """The reference from the same weights."""
    spread: NDArray[np.float64]
    """Largest of the references minus the smallest."""

    @property
    def band(self) -> NDArray[np.float64]:
        """Largest allowed difference to the reference from the same weights."""
        around = np.lib.stride_tricks.sliding_window_view(np.pad(self.spread, NEAR), 2 * NEAR + 1)
        allowed: NDArray[np.float64] = np.maximum(around.max(1), FLOOR * np.abs(self.same_seed))
        return allowed

    @property
    def of_band(self) -> NDArray[np.float64]:
        """The difference as a share of the allowed one: above 1, or NaN, it is outside."""
        share: NDArray[np.float64] = np.abs(self.found - self.same_seed) / self.band
        return share

    @property
    def inside(self) -> bool:
        return bool((self.of_band <= 1).all())


def compare(found: Sequence[float], references: Sequence[Sequence[float]]) -> Comparison:
    """A curve beside those of all seeds; the first is of the curve's own seed. Raises ValueError if their
    lengths differ or there are fewer than two references."""
    if len(references) < 2 or {len(found)} != {len(one) for one in references}:
        raise ValueError(
            f"A curve of {len(found)} steps beside references of {[len(one) for one in references]}: the "
            "band needs two or more of as many steps."
        )
    every = np.stack([smoothed(one) for one in references])
    return Comparison(smoothed(found), every[0], np.ptp(every, axis=0))


def moved_wrongly(found: dict[str, float], references: Sequence[dict[str, float]]) -> dict[str, str]:
    """By parameter that moved too little or too far: how far, and how far in the references."""
    wrong = {}
    for name, distance in found.items():
        least, most = (pick(one[name] for one in references) for pick in (min, max))
        if not least / MOVED <= distance <= most * MOVED:
            wrong[name] = f"{distance:.3g}, references {least:.3g} to {most:.3g}"
    return wrong


def print_curves(found: Curve, references: Sequence[Curve]) -> list[str]:
    """The table of a comparison. Returns what is wrong."""
    wrong = []
    for name in ("loss", "norm"):
        value, same, *_ = first = [getattr(one, name)[0] for one in (found, *references)]
        print(
            f"first step, {name}: {value:.5f}, reference {same:.5f} ({value / same - 1:+.2e}), other seeds "
            + " · ".join(f"{one:.5f}" for one in first[2:])
        )
        if not abs(value / same - 1) <= FIRST:
            wrong.append(f"the first step's {name} differs by more than {FIRST:.0%}")
        beside = compare(getattr(found, name), [getattr(one, name) for one in references])
        print(f"{name + ', mean of steps':24} {'device':>10} {'reference':>10} {'difference':>11} "
              f"{'spread':>9} {'band':>9} {'of band':>8}")  # fmt: skip
        points = len(beside.found)
        for point in sorted({round(share * (points - 1)) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)}):
            steps = f"{point + 1} to {point + len(found.loss) - points + 1}"
            values = [
                of[point]
                for of in (beside.found, beside.same_seed, beside.spread, beside.band, beside.of_band)
            ]
            print(
                f"{steps:>24} {values[0]:10.4f} {values[1]:10.4f} {values[0] - values[1]:+11.4f} "
                f"{values[2]:9.4f} {values[3]:9.4f} {values[4]:8.2f}"
            )
        print(f"{'largest, median':>24} {'':53} {beside.of_band.max():.2f}, {np.median(beside.of_band):.2f}")
        if name == "loss" and not beside.inside:
            worst = int(beside.of_band.argmax())
            wrong.append(f"the loss leaves the band, most in the {WINDOW} steps from step {worst + 1}")
    ratios = [found.moved[name] / (of or math.inf) for name, of in references[0].moved.items()]
    print(
        f"{len(ratios)} parameters and experts moved {min(ratios):.2f} to {max(ratios):.2f} times as far as "
        f"in the reference, median {statistics.median(ratios):.3f}"
    )
    sys.stdout.flush()
    outside = moved_wrongly(found.moved, [one.moved for one in references])
    return wrong + [f"{name} moved {how}" for name, how in outside.items()]


def print_balance(training: Training, biases_before: Sequence[float]) -> list[str]:
    """The experts' load at the start and at the end. Returns what is wrong."""
    wrong, rows = [], []
    names = training.loads[0].layers
    for label, loads in (("first", training.loads[:LOADS]), ("last", training.loads[-LOADS:])):
        tokens = torch.stack([load.tokens for load in loads]).sum(0)
        total = ExpertLoad(names, tokens, loads[0].aux)
        ratios, dead = total.max_over_mean.tolist(), total.dead.tolist()
        rows.append((ratios, dead))
        print(
            f"load of the {label} {len(loads)} steps: busiest over mean "
            + " · ".join(f"{ratio:.2f}" for ratio in ratios)
            + f"; experts without a token {' · '.join(map(str, dead))}"
        )
    after = training.bias_range()
    print(
        "range of expert biases: "
        + " · ".join(f"{a:.3f} → {b:.3f}" for a, b in zip(biases_before, after, strict=True))
    )
    for name, ratio, dead in zip(names, *rows[-1], strict=True):
        if dead:
            wrong.append(f"{name}: {dead} experts without a token in the last {LOADS} steps")
        if ratio > BUSIEST:
            wrong.append(f"{name}: the busiest expert has {ratio:.2f} times the mean, allowed {BUSIEST}")
    return wrong


def check_device(
    case: Case,
    documents: Sequence[Document],
    device: torch.device,
    seed: int,
    steps: int,
    balance: int,
    references: Sequence[Curve] | None,
) -> list[str]:
    """Train on this device, print everything, and return what is wrong."""
    batch = batch_of_step(reduced(documents, case.vocabulary), case.tokens)
    learner = new_learner(case, device, seed)
    if references is not None:
        set_weights(learner, seed)
    training, middle = Training(learner, batch, case.rate), steps // 2
    start, biases = {} if references is None else copy_of(learner), training.bias_range()
    began = time.perf_counter()
    training.run(0, middle)
    # As the trainer saves: copied beside the next forward, which waits before the state changes.
    saved = StateCopy(learner)
    saved.take(learner)
    training.run(middle, steps, saved.hold_changes)
    saved.wait()
    end = copy_of(learner)
    moved = {} if references is None else distances(learner, start, end)
    whole = Curve(training.curve.loss[:], training.curve.norm[:], moved)
    training.run(steps, balance)
    print(f"{len(training.loads)} steps in {time.perf_counter() - began:.0f} s", flush=True)
    wrong = print_curves(whole, references) if references is not None else []
    if references is None:
        print(f"loss {whole.loss[0]:.4f} → {whole.loss[-1]:.4f}; without a reference curve of this student")

    middle_state = {
        held.name: saved.views[f"{held.name}[{held.start}:{held.stop}]"].clone()
        for held in state.slices(learner)
    }
    saved.close()
    wrong += print_balance(training, biases)
    del training, learner
    learner = new_learner(case, device, seed + 1)  # with other weights, which must all be replaced
    state.restore(learner, lambda name, start, stop: middle_state[name][start:stop], middle)
    restored = different(middle_state, copy_of(learner))
    resumed = Training(learner, batch, case.rate)
    resumed.run(middle, steps)
    curves = (resumed.curve.loss, resumed.curve.norm) == (whole.loss[middle:], whole.norm[middle:])
    ended = different(end, copy_of(learner))
    for what, right, names in (
        (f"state restored after step {middle}", not restored, restored),
        (f"losses and norms of steps {middle + 1} to {steps}", curves, []),
        (f"state after step {steps}", not ended, ended),
    ):
        print(f"resumed, {what}: {'the same bits' if right else 'DIFFERENT'}")
        if not right:
            wrong.append(f"resumed: {what} differs{': ' if names else ''}{', '.join(names[:4])}")
    return wrong


def make_reference(
    case: Case, documents: Sequence[Document], device: torch.device, seeds: int, steps: int
) -> list[Curve]:
    """The curves of seeds 1, 2, …"""
    batch = batch_of_step(reduced(documents, case.vocabulary), case.tokens)
    curves = []
    for seed in range(1, seeds + 1):
        began, learner = time.perf_counter(), new_learner(case, device, seed)
        set_weights(learner, seed)
        start, training = copy_of(learner), Training(learner, batch, case.rate)
        training.run(0, steps)
        training.curve.moved = distances(learner, start, copy_of(learner))
        curves.append(training.curve)
        loss = training.curve.loss
        print(
            f"seed {seed}: loss {loss[0]:.4f} → {loss[-1]:.4f}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return curves


DEFAULTS = {"seeds": 3, "steps": 200, "tokens": 2048, "vocabulary": 8192, "rate": 3e-3}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    file = parser.add_mutually_exclusive_group(required=True)
    file.add_argument("--reference", type=Path, metavar="FILE", help="write the CPU's curves")
    file.add_argument("--against", type=Path, metavar="FILE", help="compare with that file's curves")
    add("--balance", type=int, default=500, help="steps after which the load is checked (default: 500)")
    add("--shape", choices=sorted(SHAPES), help="with --against: another student than the reference's")
    own = parser.add_argument_group("of the reference or of --shape")
    own.add_argument("--parquet", type=Path, help="rows of the reference (default: the repository's sample)")
    own.add_argument("--seeds", type=int, help="of the reference, 2 or more (default: 3)")
    own.add_argument("--layers", type=int, help="the shape's first layers alone (default: all)")
    own.add_argument("--steps", type=int, help="of a curve (default: 200)")
    own.add_argument("--tokens", type=int, help="positions of a step, one row (default: 2048)")
    own.add_argument("--vocabulary", type=int, help="ids that the student has (default: 8192)")
    own.add_argument("--rate", type=float, help=f"learning rate after {WARMUP} steps (default: 3e-3)")
    given = parser.parse_args()
    if given.reference and given.shape:
        parser.error("--shape is of --against: the reference is tiny's, which a CPU can train.")
    of_reference = ["parquet", "seeds", *(["layers", *DEFAULTS] if not given.shape else [])]
    if given.against and (unused := [name for name in of_reference if getattr(given, name) is not None]):
        parser.error(f"--{unused[0]}: the file of --against decides it. Give it to --reference.")
    for name, value in DEFAULTS.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.seeds < 2:
        parser.error(f"--seeds {given.seeds}: the band is the spread of two or more.")
    if given.steps < 2:
        parser.error(f"--steps {given.steps}: the state is saved after half of them, so at least 2.")
    return given


def main() -> None:
    given = arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vpmoe").setLevel(logging.INFO)  # says why layers run without CUDA graphs, if they do
    device = devices.choose()
    if given.reference and device.type != "cpu":
        sys.exit("--reference is of the CPU: set CUDA_VISIBLE_DEVICES to the empty string.")
    distributed.start(device)
    name = given.shape or "tiny"
    case = Case(name, given.layers or SHAPES[name].layers, given.vocabulary, given.tokens, given.rate)
    if given.reference:
        documents = documents_of(given.parquet, case.tokens)
        print(f"{len(documents)} documents of {sum(len(one.tokens) for one in documents):,} tokens; {case}")
        curves = make_reference(case, documents, device, given.seeds, given.steps)
        content = {
            "case": asdict(case),
            "steps": given.steps,
            "documents": [[one.tokens.tolist(), one.spans.tolist()] for one in documents],
            "curves": [asdict(one) for one in curves],
        }  # fmt: skip
        given.reference.write_text(json.dumps(content))
        distributed.stop()
        return
    read = json.loads(given.against.read_text())
    documents = [
        Document(np.asarray(tokens, np.int32), np.asarray(spans, np.uint8))
        for tokens, spans in read["documents"]
    ]
    references, steps = None, given.steps
    if given.shape is None:
        case, steps = Case(**read["case"]), read["steps"]
        references = [Curve(**one) for one in read["curves"]]
    print(f"{case}, {steps} steps, on {device}", flush=True)
    wrong = check_device(case, documents, device, 1, steps, given.balance, references)
    distributed.stop()
    for what in wrong:
        print(f"WRONG: {what}")
    print("wrong" if wrong else "right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
