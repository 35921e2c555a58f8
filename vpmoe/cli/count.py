"""Count the student's parameters by part: in all, and those that a token passes through.

By the definitions of docs/reference/student.md; --without leaves out a part of the architecture. Needs
neither a GPU nor torch.
"""

import argparse
import json
import sys
from dataclasses import replace

HELP = "parameters of a student by part, total and active"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", required=True, metavar="NAME", help="vpmoe-6b or tiny")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="PART",
        help="a part of the architecture to leave out, such as alibi; may be repeated",
    )
    parser.add_argument("--output", choices=("text", "json"), default="text")


def run(arguments: argparse.Namespace) -> int:
    """Print the count and return 0. Raises Invalid if the shape or a part is not known."""
    from vpmoe.api.invalid import Invalid
    from vpmoe.model.shapes import PARTS, SHAPES, Shape

    if arguments.shape not in SHAPES:
        raise Invalid(
            [f"--shape: {arguments.shape} is not a student. Use {' or '.join(SHAPES)}."], "vpmoe count"
        )
    for part in arguments.without:
        if part not in PARTS:
            raise Invalid([f"--without: {part} is not a part. Use one of {', '.join(PARTS)}."], "vpmoe count")
    off = {name: getattr(Shape, name) for name in arguments.without}
    shape = replace(SHAPES[arguments.shape], **off)
    by_part, active = shape.parameters_by_part(), shape.active_parameters()
    ends = by_part["embeddings"] + by_part["output"]
    sums = {
        "total": shape.parameters(),
        "active": active,
        "active without embeddings and output": active - ends,
    }
    if arguments.output == "json":
        sys.stdout.write(json.dumps({"shape": shape.name, "parts": by_part, **sums}, indent=1) + "\n")
        return 0
    for name, number in {**by_part, **sums}.items():
        sys.stdout.write(f"{name:<37}{number:>15,}\n")
    return 0
