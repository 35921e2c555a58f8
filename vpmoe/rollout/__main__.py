"""`python -m vpmoe.rollout plan --run distillrun.yaml`: what the run's OnPolicy stages are expected to do. Needs neither bucket nor GPU."""

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
from vpmoe.rollout.forecast import Assumptions, expect, table

PROMPT = 128
"""Tokens of a prompt where nothing else is said: SYNTH's have 103 on average."""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 where the run cannot be planned."""
    parser = argparse.ArgumentParser(prog="python -m vpmoe.rollout")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("plan", help="what each phase of the curriculum is expected to come to")
    command.add_argument("--run", type=Path, required=True, help="the DistillRun, YAML or JSON")
    command.add_argument(
        "--prompt", type=int, default=PROMPT, metavar="TOKENS", help=f"length of a prompt (assumed: {PROMPT})"
    )
    command.add_argument(
        "--completion",
        type=lengths,
        default={},
        metavar="low=N,…",
        help="length of a completion by effort (assumed: half of maxTokens)",
    )
    asked = parser.parse_args(arguments)
    try:
        run = load_run(asked.run)
        stages = [stage for stage in run.spec.stages if isinstance(stage, OnPolicy)]
        if not stages:
            raise Permanent(
                f"{asked.run}: spec.stages has no OnPolicy stage, so there are no rollouts to plan."
            )
        said = "\n\n".join(plan(run.spec, stage, asked.prompt, asked.completion) for stage in stages)
    except (Invalid, Permanent, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(said + "\n")
    return 0


def plan(spec: Spec, stage: OnPolicy, prompt: int, completion: Mapping[str, int]) -> str:
    """The stage's table below what it rests on."""
    allowed = stage.rollout.max_tokens
    assumed = Assumptions(
        prompt, {name: completion.get(name, -(-getattr(allowed, name) // 2)) for name in EFFORTS}
    )
    phases = expect(spec, stage, assumed)
    steps = sum(phase.windows for phase in phases)
    each = ", ".join(
        f"{name} {assumed.completion[name]:,}{'' if name in completion else ' (half of maxTokens)'}"
        for name in EFFORTS
    )
    return (
        f"{stage.name}: {format_tokens(stage.tokens)} tokens in {steps:,} windows of {stage.rollout.prompts_per_window:,} prompts and in "
        f"anchor steps, which are {stage.anchor:.3g} of all steps; a policy version every {stage.publish_every} windows, at most "
        f"{stage.staleness + stage.publish_every - 1} windows old.\n"
        f"Assumed: prompts of {assumed.prompt:,} tokens; completions of {each}; anchor steps without padding. Change it with --prompt and "
        f"--completion.\n\n{table(phases)}"
    )


def lengths(text: str) -> dict[str, int]:
    """Tokens by effort, from text such as low=300,high=2000; a refusal in argparse's words."""
    found: dict[str, int] = {}
    for each in text.split(","):
        name, _, tokens = each.partition("=")
        if name not in EFFORTS or not tokens.isdecimal() or int(tokens) < 1:
            raise argparse.ArgumentTypeError(
                f"{each!r} is no effort with its tokens, such as low=300,medium=700,high=2000"
            )
        found[name] = int(tokens)
    return found


if __name__ == "__main__":
    sys.exit(main())
