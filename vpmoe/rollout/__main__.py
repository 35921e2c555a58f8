"""`python -m vpmoe.rollout plan --run distillrun.yaml`: forecast the run's OnPolicy stages.

Needs no bucket and no GPU.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from vpmoe.api import Invalid, load_run
from vpmoe.api.quantities import format_tokens
from vpmoe.api.spec import Spec
from vpmoe.api.stages import OnPolicy
from vpmoe.failure import Permanent
from vpmoe.rollout.curriculum import EFFORTS
from vpmoe.rollout.forecast import Assumptions, forecast_phases, forecast_table

PROMPT_TOKENS = 128
"""Default length of a prompt. SYNTH's have 103 tokens on average."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if the run cannot be planned."""
    parser = argparse.ArgumentParser(prog="python -m vpmoe.rollout")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("plan", help="print a forecast of each phase of the curriculum")
    command.add_argument("--run", type=Path, required=True, help="the DistillRun, in YAML or JSON")
    command.add_argument(
        "--prompt",
        type=int,
        default=PROMPT_TOKENS,
        metavar="TOKENS",
        help=f"length of a prompt (default: {PROMPT_TOKENS})",
    )
    command.add_argument(
        "--completion",
        type=parse_lengths,
        default={},
        metavar="low=N,…",
        help="length of a completion by effort (default: half of maxTokens)",
    )
    options = parser.parse_args(arguments)
    try:
        run = load_run(options.run)
        stages = [stage for stage in run.spec.stages if isinstance(stage, OnPolicy)]
        if not stages:
            raise Permanent(
                f"{options.run}: spec.stages has no OnPolicy stage, so there are no rollouts to plan."
            )
        text = "\n\n".join(
            describe_stage(run.spec, stage, options.prompt, options.completion) for stage in stages
        )
    except (Invalid, Permanent, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(text + "\n")
    return 0


def describe_stage(spec: Spec, stage: OnPolicy, prompt: int, completion: Mapping[str, int]) -> str:
    """The assumptions and the forecast of a stage, for people."""
    allowed = stage.rollout.max_tokens
    assumed = Assumptions(
        prompt, {name: completion.get(name, -(-getattr(allowed, name) // 2)) for name in EFFORTS}
    )
    phases = forecast_phases(spec, stage, assumed)
    windows = sum(phase.windows for phase in phases)
    lengths = ", ".join(
        f"{name} {assumed.completion[name]:,}{'' if name in completion else ' (half of maxTokens)'}"
        for name in EFFORTS
    )
    return (
        f"{stage.name}: {format_tokens(stage.tokens)} tokens in {windows:,} windows of "
        f"{stage.rollout.prompts_per_window:,} prompts and in anchor steps, which are {stage.anchor:.3g} of "
        f"all steps; a policy version every {stage.publish_every} windows, at most "
        f"{stage.staleness + stage.publish_every - 1} windows old.\nAssumed: prompts of {assumed.prompt:,} "
        f"tokens; completions of {lengths}; anchor steps without padding. Change it with --prompt and "
        f"--completion.\n\n{forecast_table(phases)}"
    )


def parse_lengths(text: str) -> dict[str, int]:
    """Tokens by effort, from text such as low=300,high=2000. Raises ArgumentTypeError if it is malformed."""
    lengths: dict[str, int] = {}
    for each in text.split(","):
        name, _, tokens = each.partition("=")
        if name not in EFFORTS or not tokens.isdecimal() or int(tokens) < 1:
            raise argparse.ArgumentTypeError(
                f"{each!r} is not an effort and a number of tokens, such as low=300,medium=700,high=2000"
            )
        lengths[name] = int(tokens)
    return lengths


if __name__ == "__main__":
    sys.exit(main())
