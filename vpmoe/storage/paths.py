"""Keys of all objects in the bucket: one pure function for each kind. `Bucket` adds the bucket's prefix.

    datasets/<id>/{train,valid}/part-00000.{tokens,spans}.{bin,idx}, part-00000.documents.parquet
    datasets/<id>/manifest.json
    datasets/<id>/census/part-00000.json         counts of one input shard, for the sampling thresholds
    datasets/<id>/hashes/part-00000.bin          hashes of a part's documents, to count duplicates
    datasets/<id>/parts/part-00000.json          record of one finished part
    scores/<id>/train/part-00000.logp.{bin,idx}, part-00000.documents.parquet
    scores/<id>/manifest.json
    scores/<id>/origin.json                      dataset, teacher and subset; written before the first part
    scores/<id>/parts/part-00000.json            record of one finished part
    runs/<namespace>/<name>-<uid8>/run.json      the resolved, immutable configuration
      …/inputs.json                              the dataset and input objects that the run was resolved to
      …/teacher.json                             the teacher files that the run was resolved to
      …/init.json                                the dense model's files that the run was resolved to
      …/init/…, manifest.json                    the initial weights that are made from it
      …/steps/<step>/{progress.json, metrics/*.jsonl}
      …/steps/<stage>-validity/evaluation-000003.json
      …/steps/<stage>/validity-<iteration>.json  what the stage knew when it decided about `stop`
      …/steps/<stage>-evaluate/evaluation.json, parts/<part>-<checkpoint>.json
      …/checkpoints/<stage>/<iteration>/…, manifest.json
      …/weights/<stage>/v000012/…, manifest.json
      …/rollouts/<stage>/window-000000.{rollouts,scores}.arrow, turn-000001.json
      …/rollouts/<stage>/v000012/part-000003.rollouts.arrow, part-000003.scores-00.arrow
      …/models/<stage>/…, manifest.json          the exported student of a stage
      …/steps/<stage>-export/parts/<file>.json   what an export has uploaded so far
      …/tasks/<stage>.json                       right answers to benchmark tasks
      …/report/index.html                        what happened in the run, for people

Folders have no slash at their end.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vpmoe.api import DistillRun

Split = Literal["train", "valid"]
PartFile = Literal["tokens.bin", "tokens.idx", "spans.bin", "spans.idx", "documents.parquet"]
ScoresFile = Literal["logp.bin", "logp.idx", "documents.parquet"]


def split_url(url: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key; the key may be empty. Raises ValueError for any other address."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise ValueError(f"{url!r} is not an S3 URL. Write s3://bucket/key.")
    return bucket, key


def manifest(folder: str) -> str:
    """The manifest of a folder."""
    return f"{folder}/manifest.json"


def dataset(dataset_id: str) -> str:
    """Folder of a dataset."""
    return f"datasets/{dataset_id}"


def dataset_part(dataset_id: str, split: Split, part: int, file: PartFile) -> str:
    """One file of part `part`, the counterpart of input shard `part`."""
    return f"{dataset(dataset_id)}/{split}/part-{part:05d}.{file}"


def census(dataset_id: str, part: int) -> str:
    """Counts of an input shard, made before anything is written."""
    return f"{dataset(dataset_id)}/census/part-{part:05d}.json"


def document_hashes(dataset_id: str, part: int) -> str:
    """Hashes of the ids and questions of a part's documents, written before the part's record."""
    return f"{dataset(dataset_id)}/hashes/part-{part:05d}.bin"


def part_record(dataset_id: str, part: int) -> str:
    """Record of a finished part. It exists when all files of the part do."""
    return f"{dataset(dataset_id)}/parts/part-{part:05d}.json"


def scores(scores_id: str) -> str:
    """Folder of the scores of a dataset."""
    return f"scores/{scores_id}"


def scores_part(scores_id: str, part: int, file: ScoresFile) -> str:
    """One file of the scores of training part `part`."""
    return f"{scores(scores_id)}/train/part-{part:05d}.{file}"


def scores_origin(scores_id: str) -> str:
    """Dataset, teacher, effort and subset of the scores. A worker that continues them compares."""
    return f"{scores(scores_id)}/origin.json"


def scores_record(scores_id: str, part: int) -> str:
    """Record of a finished part. It exists when all files of the part do."""
    return f"{scores(scores_id)}/parts/part-{part:05d}.json"


def run(run: "DistillRun") -> str:
    """Folder of a run."""
    return run.folder


def run_json(of: "DistillRun") -> str:
    """The configuration that the run started with."""
    return f"{run(of)}/run.json"


def inputs(of: "DistillRun") -> str:
    """The dataset and input objects that the run was resolved to; written once, and deleted if one of them
    turns out to be unusable."""
    return f"{run(of)}/inputs.json"


def teacher(of: "DistillRun") -> str:
    """The teacher files that the run was resolved to; written once."""
    return f"{run(of)}/teacher.json"


def init_source(of: "DistillRun") -> str:
    """The files of the dense model that the run was resolved to; written once."""
    return f"{run(of)}/init.json"


def init(of: "DistillRun") -> str:
    """Folder of the initial weights that are made from a dense model."""
    return f"{run(of)}/init"


def progress(of: "DistillRun", step: str) -> str:
    """The progress of a step; the only object that is overwritten."""
    return f"{run(of)}/steps/{step}/progress.json"


def metrics(of: "DistillRun", step: str, name: str) -> str:
    """One file of a step's metrics, a line an optimizer step."""
    return f"{run(of)}/steps/{step}/metrics/{name}.jsonl"


def evaluation(of: "DistillRun", stage: str) -> str:
    """The evaluation of the student after a stage; written once."""
    return f"{run(of)}/steps/{stage}-evaluate/evaluation.json"


def evaluation_parts(of: "DistillRun", stage: str) -> str:
    """Folder of the parts of an evaluation."""
    return f"{run(of)}/steps/{stage}-evaluate/parts"


def evaluation_part(of: "DistillRun", stage: str, part: str, checkpoint: str) -> str:
    """One part of an evaluation, written once; `checkpoint` is the sha256 of the checkpoint's manifest."""
    return f"{evaluation_parts(of, stage)}/{part}-{checkpoint[:16]}.json"


def task_evaluation(of: "DistillRun", stage: str) -> str:
    """Right answers of the student of a stage to benchmark tasks; replaced by a later evaluation."""
    return f"{run(of)}/tasks/{stage}.json"


def validity(of: "DistillRun", stage: str, number: int) -> str:
    """The validity of a checkpoint of a stage after `number` times evaluation.everyTokens, or some more;
    written once."""
    return f"{run(of)}/steps/{stage}-validity/evaluation-{number:06d}.json"


def known_validity(of: "DistillRun", stage: str, iteration: int) -> str:
    """The validity that a stage's evaluation after `iteration` optimizer steps had; written once."""
    return f"{run(of)}/steps/{stage}/validity-{iteration}.json"


def checkpoints(of: "DistillRun", step: str) -> str:
    """Folder of a stage's checkpoints."""
    return f"{run(of)}/checkpoints/{step}"


def checkpoint(of: "DistillRun", step: str, iteration: int) -> str:
    """Folder of the checkpoint after `iteration` optimizer steps; the number is not padded."""
    return f"{checkpoints(of, step)}/{iteration}"


def weights(of: "DistillRun", step: str, version: int) -> str:
    """Folder of a policy version for the sampler."""
    return f"{run(of)}/weights/{step}/v{version:06d}"


def window(of: "DistillRun", step: str, index: int, kind: Literal["rollouts", "scores"]) -> str:
    """The rollouts or the scores of a window."""
    return f"{run(of)}/rollouts/{step}/window-{index:06d}.{kind}.arrow"


def part(of: "DistillRun", step: str, version: int, number: int) -> str:
    """Part `number` of the rollouts of a version, written before their windows."""
    return f"{run(of)}/rollouts/{step}/v{version:06d}/part-{number:06d}.rollouts.arrow"


def part_scores(of: "DistillRun", step: str, version: int, number: int, worker: int) -> str:
    """The scores that a worker of the teacher has made of a part: those of its own windows."""
    return f"{run(of)}/rollouts/{step}/v{version:06d}/part-{number:06d}.scores-{worker:02d}.arrow"


def turn(of: "DistillRun", step: str, number: int) -> str:
    """A back-pressure adjustment."""
    return f"{run(of)}/rollouts/{step}/turn-{number:06d}.json"


def model(of: "DistillRun", stage: str) -> str:
    """Folder of the exported student of a stage: a model folder for transformers and vLLM."""
    return f"{run(of)}/models/{stage}"


def report(of: "DistillRun") -> str:
    """The report of the run, a page for people; overwritten after each stage."""
    return f"{run(of)}/report/index.html"


def export_part(of: "DistillRun", stage: str, file: str) -> str:
    """Record of a file of the exported student that is uploaded."""
    return f"{run(of)}/steps/{stage}-export/parts/{file}.json"
