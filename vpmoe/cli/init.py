"""Start a student from a dense Llama or Qwen3 model: print which tensor becomes which, and with --out write
it.

The folder has model.safetensors, fp32 under the trainer's names, and manifest.json. Needs no GPU. In a run
the step `init` does the same (docs/guides/upcycle.md).
"""

import argparse
import sys
from pathlib import Path

from vpmoe.api.termination import EXIT_CODES

HELP = "start a student from a dense model: the plan, and its weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="the dense model: config.json, *.safetensors and tokenizer.json",
    )
    parser.add_argument("--shape", required=True, metavar="NAME", help="vpmoe-6b or tiny")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of what is drawn (default: 0)")
    parser.add_argument(
        "--donor",
        type=Path,
        metavar="FOLDER",
        help="a model with the student's vocabulary, such as GPT-OSS, in whose embeddings tokens that the "
        "source has not are combined of those that it has (default: they are made of their pieces)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the new folder for the weights")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, 75 if the disk is full, else 65. Raises Invalid if the shape is not known."""
    from vpmoe.api.invalid import Invalid
    from vpmoe.failure import classify_error
    from vpmoe.model.shapes import SHAPES
    from vpmoe.upcycle.build import prepare
    from vpmoe.upcycle.model_folder import weight_bytes, write_model_folder

    if arguments.shape not in SHAPES:
        raise Invalid(
            [f"--shape: {arguments.shape} is not a student. Use {' or '.join(SHAPES)}."], "vpmoe init"
        )
    try:
        made = prepare(arguments.model, SHAPES[arguments.shape], arguments.seed, arguments.donor)
        for line in made.table():
            say(line)
        if arguments.out is not None:
            say(f"Writing {weight_bytes(made.sizes()):,} bytes into {arguments.out}")
            write_model_folder(arguments.out, made)
    except Exception as error:
        found = classify_error(error)
        if found.kind == "Internal":
            raise
        sys.stderr.write(f"vpmoe init: {found.message}\n")
        return EXIT_CODES[found.kind]
    return 0


def say(line: str) -> None:
    """Print one line at once, because a large model takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
