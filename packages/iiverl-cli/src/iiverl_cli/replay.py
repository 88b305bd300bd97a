"""The command `iiverl replay`: steps of a run, computed again from what it recorded."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iiverl_cli.arguments import run_folder
from iiverl_cli.output import clean_exit, format_table, report_problems

if TYPE_CHECKING:
    from iiverl_core.controller.replay import ReplayedStep

EXIT_REFUSED, EXIT_DIFFERENT = 2, 1
SHOWN = ("actor/pg_loss", "actor/grad_norm", "critic/vf_loss", "critic/grad_norm")
"""Metrics that are shown of a step that is equal."""


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")],
    step: Annotated[int, typer.Option("--step", min=1, help="The step to compute again.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values that override those of the run.", show_default=False
        ),
    ] = None,
    first: Annotated[
        int | None,
        typer.Option(
            "--from",
            min=1,
            help="The first of several steps, up to --step. [default: as late as checkpoints allow]",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="A new folder for metrics, samples and checkpoints, as those of a run."
        ),
    ] = None,
) -> None:
    """Compute a step of a run again, without an engine, from its checkpoint and its recorded rollouts.

    Without overrides, loss, gradient norm and all other metrics are those of the run to the last bit; the exit code is 1 if
    they are not. Overrides such as `algorithm.norm_adv_by_std_in_grpo=false` change the configuration, and the metrics that
    differ are shown. Times, memory and validations are left out.
    """
    if first is not None and first > step:
        raise typer.BadParameter(f"{first} comes after --step {step}", param_hint="--from")
    folder = run_folder(run)
    target = Path(output).expanduser() if output else None
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise typer.BadParameter(f"{target} is there already; name a new folder", param_hint="--output")
    with clean_exit():
        from iiverl_core.config.diagnostics import COMMAND_LINE
        from iiverl_core.controller.replay import load_run, replay

        loaded = load_run(folder, overrides or (), target)
        report_problems(
            [each for each in loaded.problems if each.file == COMMAND_LINE or each in loaded.refused]
        )
        if loaded.refused:
            raise typer.Exit(EXIT_REFUSED)
        steps = replay(folder, loaded, step, first=first, output=target)
        for each in steps:
            typer.echo(_shown(each))
    if not overrides and any(each.different for each in steps if each.recorded is not None):
        raise typer.Exit(EXIT_DIFFERENT)


def _shown(step: "ReplayedStep") -> str:
    if step.recorded is None:
        rows = [(name, _number(value)) for name, value in sorted(step.replayed.items())]
        return f"step {step.step}: the run has no metrics of it; now they are\n" + _indented(rows)
    count = f"{len(step.replayed)} metrics"
    if not step.different:
        known = ", ".join(f"{name} {step.replayed[name]}" for name in SHOWN if name in step.replayed)
        return f"step {step.step}: {count} equal to the last bit ({known})"
    rows = [("metric", "in the run", "now", "relative")]
    for name in step.different:
        before, now = step.recorded.get(name), step.replayed.get(name)
        rows.append((name, _number(before), _number(now), _relative(before, now)))
    return f"step {step.step}: {len(step.different)} of {count} differ\n" + _indented(rows)


def _indented(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"  {line}" for line in format_table(rows, align="<>").splitlines())


def _number(value: float | None) -> str:
    return "-" if value is None else str(value)


def _relative(before: float | None, now: float | None) -> str:
    if before is None or now is None or not before:
        return ""
    return f"{(now - before) / abs(before):+.3g}"
