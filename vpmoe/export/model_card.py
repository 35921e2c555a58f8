"""The model card, README.md of an exported student: what the run knows about it, and nothing else.

Pure. Equal facts give equal bytes. The front matter has the fields of the Hugging Face hub; a licence is not
among them, because a run does not know the licences of its teacher and of its data.
"""

from dataclasses import dataclass
from typing import Any, get_args

from vpmoe.api import DistillRun, Stage
from vpmoe.api.effort import Effort
from vpmoe.api.progress import SpanLoss
from vpmoe.api.text import write_yaml
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data.inputs import Inputs
from vpmoe.model.shapes import SHAPES
from vpmoe.rollout.evaluation_record import EvaluationRecord
from vpmoe.storage.manifest import Input, Manifest

HUB = "hf://"
UNKNOWN = "not known"


@dataclass(frozen=True)
class StageFacts:
    """A stage that the student has gone through.

    end, manifest: of its last checkpoint, None if that is gone or damaged. evaluation: None if it was not
    evaluated.
    """

    stage: Stage
    end: TrainState | None
    manifest: Manifest | None
    evaluation: EvaluationRecord | None


@dataclass(frozen=True)
class ModelFacts:
    """What the card is made from.

    config: hash of the run's configuration. url: of the run's folder. checkpoint: URL of the manifest.
    stages: up to the exported one, in order.
    """

    run: DistillRun
    stage: Stage
    config: str
    url: str
    checkpoint: str
    checkpoint_sha256: str
    stages: tuple[StageFacts, ...]
    inputs: Inputs
    dataset: Manifest

    @property
    def init(self) -> Input | None:
        """The initial weights that were made from a dense model. None if there are none, or if the first
        stage's last checkpoint, whose manifest names them, is gone."""
        first = self.stages[0].manifest
        return first.inputs.get("init") if first is not None else None


def model_card(facts: ModelFacts) -> str:
    """The text of README.md."""
    parts = [
        f"---\n{write_yaml(front_matter(facts))}---",
        f"# {facts.run.metadata.name}, stage {facts.stage.name}",
        _introduction(facts),
        _use(),
        _training(facts),
        _evaluation(facts.stages[-1]),
        _data(facts),
        _provenance(facts),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: ModelFacts) -> dict[str, Any]:
    """The card's metadata in the form of the Hugging Face hub."""
    source = facts.inputs.source
    datasets = {"datasets": [_hub_name(source)]} if source.startswith(HUB) else {}
    upcycle = facts.run.upcycle
    base = {"base_model": _hub_name(upcycle.model)} if upcycle and upcycle.model.startswith(HUB) else {}
    tags = ["vpmoe", "mixture-of-experts", "distillation"]
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
        **base,
        **datasets,
    }


def _hub_name(url: str) -> str:
    """owner/name of hf://owner/name@revision."""
    return url.removeprefix(HUB).partition("@")[0]


def _introduction(facts: ModelFacts) -> str:
    spec = facts.run.spec
    shape = SHAPES[spec.student.shape]
    teachers = [
        found
        for one in facts.stages
        if one.manifest is not None and (found := one.manifest.inputs.get("teacher")) is not None
    ]
    origin = f"distilled from {_code(teachers[-1].uri)}" if teachers else "trained without a teacher"
    text = (
        f"A mixture-of-experts language model of {shape.parameters():,} parameters (shape {shape.name}: "
        f"{shape.layers} layers, {shape.experts} experts, {shape.experts_per_token} per token), {origin} by "
        "vpMoE. It answers in the Harmony format: reasoning first, then the final answer. Longest sequence: "
        f"{spec.training.sequence_length:,} tokens."
    )
    return "\n\n".join([text, *_beginning(facts)])


def _beginning(facts: ModelFacts) -> list[str]:
    """What the weights began with: a sentence, or none if they were random."""
    spec, upcycle = facts.run.spec, facts.run.upcycle
    if upcycle is None:
        checkpoint = spec.student.init.checkpoint if spec.student.init is not None else None
        return [f"Its weights begin with {_code(url)}." for url in (checkpoint, spec.resume_from) if url]
    text = f"Its weights begin with those of the dense model {_code(upcycle.model)}"
    if facts.init is None:
        return [f"{text}."]
    commit = facts.init.facts.get("gitCommit")
    at = f" at commit {_code(str(commit))}" if commit else ""
    return [
        f"{text}{at}, made into this architecture: {_code(facts.init.uri)}, sha256 "
        f"{_code(facts.init.digest.get('sha256', UNKNOWN))}."
    ]


def _use() -> str:
    return """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where these files are
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is a prime number?"}],
    add_generation_prompt=True,
    reasoning_effort="medium",  # or low, or high
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=512)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```

The code of the model is in this folder. `vpmoe chat .` shows reasoning and final answer apart."""


def _training(facts: ModelFacts) -> str:
    rows = []
    for one in facts.stages:
        tokens, steps, losses = UNKNOWN, UNKNOWN, "not measured"
        if one.end is not None:
            tokens, steps = f"{one.end.tokens:,}", f"{one.end.steps:,}"
            if one.end.before is not None and one.end.latest is not None:
                losses = f"{_loss(one.end.before)} → {_loss(one.end.latest)}"
        rows.append(f"| {one.stage.name} | {one.stage.kind} | {tokens} | {steps} | {losses} |")
    return "\n".join(
        [
            "## Training",
            "",
            "| stage | kind | tokens | optimizer steps | held-out loss (reasoning / final), before → after |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Losses are means in nats per token on documents that were held out from training.",
        ]
    )


def _loss(found: SpanLoss) -> str:
    return " / ".join("–" if loss is None else f"{loss:.4f}" for loss in (found.reasoning, found.final))


def _evaluation(last: StageFacts) -> str:
    found, heading = last.evaluation, "## Evaluation"
    if found is None:
        return (
            f"{heading}\n\nThe run did not evaluate this stage: no completion was sampled, so the share of "
            "valid answers is not known."
        )
    lines = [heading, ""]
    if found.held_out is not None:
        lines.append(
            f"Held-out loss (reasoning / final), {found.documents:,} documents: {_loss(found.held_out)} nats "
            "per token."
        )
    if found.canary is not None:
        lines.append(
            f"Text that is in no training data: {found.canary.bits_per_byte:.4f} bits per byte over "
            f"{found.canary.bytes:,} bytes (sha256 {_code(found.canary.sha256)})."
        )
    if not found.completions:
        lines.append("No completion was sampled, so the share of valid answers is not known.")
        return "\n".join(lines)
    shares = found.valid_share_by_effort()
    efforts = [effort for effort in get_args(Effort) if effort in shares]
    rows = [
        f"| {effort} | {sum(found.efforts[effort].validity.values()):,} | {shares[effort]:.1%} "
        f"| {found.efforts[effort].mean_tokens:.1f} | {found.efforts[effort].most_tokens:,} |"
        for effort in efforts
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"{found.valid_share:.1%} of {found.completions:,} sampled completions are valid Harmony: "
            "reasoning, then one final answer.",
            "",
            "| reasoning effort | completions | valid | mean tokens | most tokens |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def _data(facts: ModelFacts) -> str:
    source, splits = facts.inputs.source, facts.dataset.facts["splits"]
    commit = f" at commit {_code(facts.inputs.commit)}" if facts.inputs.commit else ""
    licence = "Its licence is that of its source; the run does not record it."
    if source.startswith(HUB):
        licence = f"Its licence is on <https://huggingface.co/datasets/{_hub_name(source)}>."
    return (
        f"## Data\n\n{_code(source)}{commit}, {len(facts.inputs.shards):,} files: "
        f"{splits['train']['documents']:,} documents for training, {splits['valid']['documents']:,} held "
        f"out. {licence}"
    )


def _provenance(facts: ModelFacts) -> str:
    rows = []
    for one in facts.stages:
        made = one.manifest.provenance if one.manifest is not None else None
        commit = _code(made.git_sha) if made and made.git_sha else UNKNOWN
        image = _code(made.image) if made and made.image else UNKNOWN
        rows.append(f"| {one.stage.name} | {commit} | {image} |")
    return "\n".join(
        [
            "## Provenance",
            "",
            f"- Run: {_code(facts.run.identity)}, {_code(facts.url)}",
            f"- Configuration: sha256 {_code(facts.config)}",
            f"- Checkpoint: {_code(facts.checkpoint)}, sha256 {_code(facts.checkpoint_sha256)}",
            f"- Dataset: {_code(facts.dataset.facts['id'])}, manifest sha256 {_code(facts.dataset.sha256)}",
            "",
            "| stage | commit | image |",
            "|---|---|---|",
            *rows,
            "",
            "`manifest.json` is an in-toto statement with SLSA provenance: the sha256 of each file, and "
            "of what they were made from.",
        ]
    )


def _code(text: str) -> str:
    """The text as a code span of Markdown, also within a table."""
    fence = "``" if "`" in text else "`"
    shown = " ".join(text.split()).replace("|", "\\|")
    return f"{fence} {shown} {fence}" if fence == "``" else f"{fence}{shown}{fence}"
