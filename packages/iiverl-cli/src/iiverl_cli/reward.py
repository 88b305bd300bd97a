"""The commands `iiverl reward check` and `iiverl reward rescore`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iiverl_cli.output import clean_exit, format_table

if TYPE_CHECKING:
    import pyarrow as pa

    from iiverl_core.rewards.checking import RewardCheck
    from iiverl_core.rewards.rescoring import Comparison
    from iiverl_reward_client import Outcome

PROTOCOLS = ("auto", "reward", "v1", "openrlhf", "slime")
_BOXED = ("math_verifiable", "llm_judge")  # types whose answer is in a box
_MAX_DIFFERENCES = 10
_TEXT_WIDTH = 60

reward_app = typer.Typer(
    help="Check a reward server, and score earlier samples again.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@reward_app.command()
def check(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Values that override the file's, such as reward_api.timeout=60.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=0, max=100, help="Rows of the training dataset to score answers to.")
    ] = 3,
) -> None:
    """Check a run's reward server and dataset: does it answer, can it verify the rows, how does it score answers?

    Exits with 2 if something is wrong, with 1 if the server does not answer.
    """
    from iiverl_core.config import load, render

    loaded = load(config, overrides or (), None)
    # The server can be checked even if the model or the engine cannot run on this machine.
    wrong = [
        each for each in loaded.obstacles if each.severity == "error" or each.key.startswith("reward_api.")
    ]
    if wrong:
        typer.echo(render(wrong, running=True), err=True)
        raise typer.Exit(2)
    with clean_exit():
        from iiverl_core.rewards.checking import check_rewards

        found = check_rewards(loaded.run, rows)
        _report_check(found)
        code = _verdict(found)
    raise typer.Exit(code)


@reward_app.command()
def rescore(
    dump: Annotated[
        Path,
        typer.Argument(
            metavar="DUMP", help="A file of reward_api.save_dir, or a folder of them.", show_default=False
        ),
    ],
    url: Annotated[
        list[str],
        typer.Option(help="URL of the reward server. May be given several times.", show_default=False),
    ],
    token_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable that holds the server's bearer token."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(metavar="|".join(PROTOCOLS), help="Protocol of the server.")
    ] = "auto",
    max_workers: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 10,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Parquet file for the samples with their new scores."),
    ] = None,
) -> None:
    """Score the samples of an earlier run again, and report what changed.

    Exits with 2 if something is wrong, with 1 if nothing could be scored.
    """
    if protocol not in PROTOCOLS:
        raise typer.BadParameter(f"one of {', '.join(PROTOCOLS)}, not {protocol}", param_hint="--protocol")
    with clean_exit():
        from iiverl_core.rewards.rescoring import compare, dump_files, read_dumps, with_outcomes

        files = dump_files(dump)
        if out is not None and out.resolve() in [file.resolve() for file in files]:
            raise typer.BadParameter(f"{out} is one of the input files; use another one", param_hint="--out")
        table = read_dumps(dump)
        outcomes = _rescore(table, url, token_env, protocol, max_workers)
        comparison = compare(table, outcomes)
        _report_comparison(comparison, len(outcomes), len(files))
        if out is not None:
            from iiverl_core.telemetry.samples import write_parquet

            write_parquet(out, with_outcomes(table, outcomes))
            typer.echo(f"wrote {out}")
    if outcomes and len(comparison.failed) == len(outcomes):
        raise typer.Exit(1)


def _rescore(
    table: "pa.Table", urls: Sequence[str], token_env: str | None, protocol: str, max_workers: int
) -> "list[Outcome]":
    """Connect, check that a server answers, and score with a progress bar."""
    import os
    import sys

    from rich.console import Console
    from rich.progress import Progress

    from iiverl_core.config import RewardAPIConfig
    from iiverl_core.errors import ConfigError, IIVerlError
    from iiverl_core.rewards.remote import make_client
    from iiverl_core.rewards.rescoring import rescore
    from iiverl_core.telemetry.terminal import takes_escape_codes
    from iiverl_reward_client import Failed

    if token_env is not None and not os.environ.get(token_env):
        raise ConfigError(f"--token-env: the environment variable {token_env} is not set")
    settings = RewardAPIConfig.model_validate(
        {
            "enable": True,
            "api_url": list(urls),
            "token_env": token_env,
            "protocol": protocol,
            "max_workers": max_workers,
        }
    )
    console = Console(stderr=True)
    with (
        make_client(settings) as client,
        Progress(console=console, transient=True, disable=not takes_escape_codes(sys.stderr)) as bar,
    ):
        pings = client.ping()
        if away := {server: each for server, each in pings.items() if isinstance(each, Failed)}:
            reasons = "; ".join(f"{server} ({each.kind}: {each.detail})" for server, each in away.items())
            if len(away) == len(pings):
                raise IIVerlError(f"no reward server answers: {reasons}. Start it, or fix --url.")
            typer.echo(
                f"warning: these reward servers do not answer; the others are used: {reasons}", err=True
            )
        task = bar.add_task("scoring", total=len(table))
        return rescore(table, client, lambda: bar.advance(task))


def _report_check(found: "RewardCheck") -> None:
    from iiverl_reward_client import Failed, Scored

    lines = [("server", "answers in", "version", "verifies")]
    for server in found.servers:
        capabilities = server.capabilities
        seconds = (
            f"no answer: {server.ping.kind}"
            if isinstance(server.ping, Failed)
            else f"{server.ping * 1e3:.1f} ms"
        )
        lines.append(
            (
                server.url,
                seconds,
                capabilities.server_version if capabilities else "-",
                ", ".join(capabilities.types) if capabilities else "-",
            )
        )
    typer.echo(format_table(lines))
    for server in found.servers:
        for kind, reason in (server.capabilities.unavailable if server.capabilities else {}).items():
            typer.echo(f"{server.url} does not verify {kind}: {reason}")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo()
    typer.echo(format_table([("dataset", "rows checked"), *((name, str(rows)) for name, rows in found.rows)]))
    if not found.tried:
        return
    typer.echo()
    lines = [("row", "type", "answer", "score")]
    for tried in found.tried:
        outcome = tried.outcome
        score = f"{outcome.score:.3f}" if isinstance(outcome, Scored) else f"{outcome.kind}: {outcome.detail}"
        lines.append((str(tried.row), tried.type, tried.answer, score))
    typer.echo(format_table(lines))


def _verdict(found: "RewardCheck") -> int:
    """Report the result of the scored rows, and return the exit code."""
    from iiverl_core.rewards.failures import describe_failures
    from iiverl_reward_client import Failed, Scored

    failed = [tried.outcome for tried in found.tried if isinstance(tried.outcome, Failed)]
    if failed:
        typer.echo(f"error: {describe_failures(failed, len(found.tried))}", err=True)
        return 1 if all(failure.outage for failure in failed) else 2
    scores: dict[str, list[float]] = {"wrong": [], "right": []}
    for tried in found.tried:
        if tried.type in _BOXED and isinstance(tried.outcome, Scored):
            scores[tried.answer].append(tried.outcome.score)
    if scores["right"] and max(scores["right"]) <= max(scores["wrong"]):
        typer.echo(
            "note: no row's own answer, written as \\boxed{…}, scores more than a wrong one: check that the server finds "
            "the box, and that the dataset's answers are right",
            err=True,
        )
    return 0


def _report_comparison(found: "Comparison", samples: int, files: int) -> None:
    from iiverl_core.rewards.failures import describe_failures

    both = found.same + found.higher + found.lower
    typer.echo(
        f"{samples} samples of {files} file{'' if files == 1 else 's'}: {found.same} same, {found.higher} higher, "
        f"{found.lower} lower, {len(found.failed)} failed"
        + (f", {found.gained} that had no score before" if found.gained else "")
    )
    if both and not math.isnan(found.mean_before):
        typer.echo(
            f"mean score {found.mean_before:.4f} -> {found.mean_after:.4f} ({both} samples scored both times)"
        )
    if found.failed:
        typer.echo(describe_failures(found.failed, samples), err=True)
    if found.differences:
        typer.echo()
        rows = [("file", "row", "before", "after", "text")]
        for each in found.differences[:_MAX_DIFFERENCES]:
            text = repr(each.text)
            text = text if len(text) <= _TEXT_WIDTH else f"…{text[1 - _TEXT_WIDTH :]}"
            rows.append((each.file, str(each.row), f"{each.before:.3f}", f"{each.after:.3f}", text))
        typer.echo(format_table(rows))
        if (more := len(found.differences) - _MAX_DIFFERENCES) > 0:
            typer.echo(f"… and {more} smaller differences")
