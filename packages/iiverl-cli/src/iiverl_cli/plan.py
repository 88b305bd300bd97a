"""The command `iiverl plan`: memory per device, and devices to train and to generate, without a device."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iiverl_cli.arguments import (
    AllowUnknown,
    Backend,
    ConfigFile,
    ConfigPath,
    Overrides,
    load_config,
)
from iiverl_cli.output import format_table, report_problems

if TYPE_CHECKING:
    from iiverl_core.config import Loaded, RunConfig
    from iiverl_core.config.model_facts import ModelFacts
    from iiverl_core.config.roles import Role
    from iiverl_core.division import DivisionPlan
    from iiverl_core.memory import MemoryPlan, Pass, RoleMemory

GB = 10**9
"""Bytes per GB in the tables. A driver's 80 GB is 85 of these; the difference is reserved for uncounted memory."""
WIDTH = 80
STATES = ("weights", "gradients", "optimizer", "gathered")
EXIT_TOO_LARGE = 3
"""Exit code for a valid configuration that does not fit; an invalid one exits with 2."""


def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    config_path: ConfigPath = None,
    backend: Backend = None,
    allow_unknown: AllowUnknown = False,
    device_memory: Annotated[
        float, typer.Option("--device-memory", metavar="GB", min=0.001, help="Memory per device.")
    ] = 80,
    disk_bandwidth: Annotated[
        float,
        typer.Option(
            metavar="GB/s", min=0.001, help="Write bandwidth of the file system, all processes together."
        ),
    ] = 1,
    divide: Annotated[
        int | None,
        typer.Option(
            metavar="DEVICES",
            min=2,
            help="Divide so many devices between training and generating; by default those of a run with trainer.rollout_devices.",
        ),
    ] = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="FOLDER",
            help="Divide by the times of a run with this configuration; by default that in trainer.default_local_dir.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="The device for which other times are estimated.")
    ] = "H100",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """Estimate the memory that a run needs per device, and the size of a checkpoint, from each model's config.json.

    Also says how to divide devices between training and generating, and how long both then wait.

    Exits with 2 if the configuration is invalid, with 3 if the run does not fit.
    """
    from iiverl_core.errors import ConfigError
    from iiverl_core.memory import checkpoint_size, find_facts, plan_memory

    loaded = load_config(config, overrides, config_path, backend, allow_unknown=allow_unknown)
    report_problems(tuple(dict.fromkeys([*loaded.errors, *loaded.unknown_keys])))
    if loaded.errors:
        raise typer.Exit(2)
    try:
        facts = find_facts(loaded.run)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    planned = plan_memory(loaded.run, facts, round(device_memory * GB))
    division = _divide(loaded, facts, device, divide, run_folder)
    saved = checkpoint_size(loaded.run, facts)
    seconds = saved.total / (disk_bandwidth * GB)
    if as_json:
        checkpoint = {"bytes": saved.total, "bytes_per_rank": saved.per_rank, "seconds": seconds}
        divided = {"division": _division_as_json(division)} if division else {}
        typer.echo(json.dumps({**_as_json(planned), "checkpoint": checkpoint, **divided}, indent=2))
    else:
        written = (
            f"A checkpoint has {_gb(saved.total)} GB, at most {_gb(saved.per_rank)} GB from one process: {seconds:.0f} s at "
            f"{disk_bandwidth:g} GB/s"
        )
        _show(loaded.run, planned, written)
        if division:
            folder = run_folder or Path(loaded.run.trainer.default_local_dir)
            typer.echo(f"\n{_division(loaded.run, division, device, folder)}")
    if not planned.fits:
        raise typer.Exit(EXIT_TOO_LARGE)


def _divide(
    loaded: "Loaded", facts: "dict[Role, ModelFacts]", device: str, divide: int | None, folder: Path | None
) -> "DivisionPlan | None":
    """Plan the division of devices, if that is asked for or the run has some that only generate."""
    from iiverl_core.division import plan_division
    from iiverl_core.errors import ConfigError

    run = loaded.run
    if divide is None and folder is None and run.trainer.rollout_devices is None:
        return None
    try:
        if folder is None:
            try:
                own = Path(run.trainer.default_local_dir)
                return plan_division(run, facts, device, devices=divide, folder=own)
            except ConfigError:
                pass  # there is no run yet, or one too short: estimate
        return plan_division(run, facts, device, devices=divide, folder=folder)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _division(run: "RunConfig", found: "DivisionPlan", device: str, folder: Path) -> str:
    from iiverl_core.division.costs import BANDWIDTH_SHARE, MFU

    rows = [("max_staleness", "partial", "train", "generate", "step", "gain", "idle: train", "generate")]
    in_turn = found.in_turn.times.step if found.in_turn else None
    for each in found.divisions:
        rows.append(
            (
                str(each.max_staleness),
                "yes" if each.partial else "no",
                str(each.training) if each.max_staleness else "all",
                str(each.generating) if each.max_staleness else "all",
                f"{each.times.step:.3g} s",
                f"{in_turn / each.times.step:.2f}" if in_turn else "–",
                f"{each.times.training_idle:.0%}",
                f"{each.times.generating_idle:.0%}",
            )
        )
    lengths = found.lengths
    if found.measured:
        source = (
            f"By the medians of {found.measured.steps} steps in {folder}: {found.measured.generating:.3g} s of generating and "
            f"{found.measured.training:.3g} s of training, each scaled to other numbers of devices by a simulation."
        )
        spread = "as in that run"
    else:
        source = (
            f"Estimated for {device}, at {MFU:.0%} of its FLOP/s and {BANDWIDTH_SHARE:.0%} of its memory's bandwidth; --run "
            "with the folder of a few steps is better."
        )
        spread = "with a long tail, as is assumed"
    lines = [
        source,
        f"Responses of {lengths.mean:,.0f} tokens on average, up to {lengths.limit:,}, {spread}.",
        *_shortest(run, found),
    ]
    heading = f"{found.devices} devices, divided between training and generating (docs/async.md):"
    table = format_table(rows, align="<<>>>>>>", rule=True)
    return "\n".join([heading, table, "", *map(_wrapped, lines)])


def _shortest(run: "RunConfig", found: "DivisionPlan") -> list[str]:
    """Say what to set for the shortest step, and what the run's own division takes."""
    from iiverl_core.config import ROLLOUT

    best = min(found.divisions, key=lambda each: each.times.step)
    if not best.max_staleness:
        return ["In turn is as fast as any division."]
    partial = f", {ROLLOUT}.partial: true" if best.partial else ""
    lines = [
        f"The shortest step: trainer.rollout_devices: {best.generating}, {best.training} devices that train, "
        f"trainer.max_staleness: {best.max_staleness}{partial}"
    ]
    if found.current:
        now = found.current
        lines.append(
            f"Now, with rollout_devices: {now.generating}: {now.times.step:.3g} s, training idle {now.times.training_idle:.0%}, "
            f"generating {now.times.generating_idle:.0%}"
        )
    return lines


def _division_as_json(found: "DivisionPlan") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "devices": found.devices,
        "measured": asdict(found.measured) if found.measured else None,
        "lengths": asdict(found.lengths),
        "divisions": [asdict(each) for each in found.divisions],
        "current": asdict(found.current) if found.current else None,
    }


def _show(run: "RunConfig", planned: "MemoryPlan", checkpoint: str) -> None:
    from iiverl_core.memory import compiling_tradeoff, gradient_sync_tradeoff

    tradeoffs = [*gradient_sync_tradeoff(run, planned), *compiling_tradeoff(run, planned)]
    paragraphs = [
        "\n".join(map(_wrapped, _heading(run, planned))),
        _models(planned),
        _phases(planned),
        "\n".join(map(_wrapped, [*_engine(run, planned), checkpoint, *_verdict(run, planned)])),
        "\n".join(map(_wrapped, tradeoffs)),
    ]
    typer.echo("\n\n".join(filter(None, paragraphs)))


def _wrapped(line: str) -> str:
    """Wrap a line at spaces; keys and paths stay whole, so that they can be copied."""
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _heading(run: "RunConfig", planned: "MemoryPlan") -> list[str]:
    from iiverl_core.memory import trained_parameters

    actor = planned.roles[0]
    facts, layout = actor.facts, actor.layout
    active = f", {_billions(facts.active_parameters)} of them per token" if facts.experts else ""
    model = f"{run.actor.model.path}: {_billions(facts.parameters)} parameters{active}"
    if rank := run.actor.model.lora_rank:
        trained = trained_parameters(facts, run.actor.model, language=True)
        model += f"; LoRA adapters of rank {rank} with {_billions(trained)}"
    if vision := facts.vision_parameters:
        frozen = ", as if it were trained" if run.actor.freeze_vision_tower else ""
        model += f" ({_billions(vision)} in the vision tower{frozen}; its activations are not counted)"
    if layout.sharded:
        spread = f"{run.backend}, each model over all {layout.devices} devices"
        if layout.context > 1:
            spread += f", each sequence of the actor over {layout.context}"
    else:
        spread = (
            f"{run.backend}, tensor {layout.tensor} × pipeline {layout.pipeline} × context {layout.context} × "
            f"data {layout.data} = {layout.devices} devices, expert {layout.expert}"
        )
    stage = f"; shown is the {planned.stage} pipeline stage" if layout.pipeline > 1 else ""
    return [model, f"{spread}{stage}"]


def _models(planned: "MemoryPlan") -> str:
    states = [kind for kind in STATES if any(getattr(model.states, kind) for model in planned.roles)]
    works = [_largest(model) for model in planned.roles]
    rows = [(kind, [getattr(model.states, kind) for model in planned.roles]) for kind in states]
    rows.append(("activations", [work.activations for work in works]))
    if any(work.head for work in works):
        rows.append(("head", [work.head for work in works]))
    rows += [
        ("in use", [model.most for model in planned.roles]),
        ("waiting", [sum(model.resident.values()) for model in planned.roles]),
    ]
    heading = ("GB per device", *(model.role for model in planned.roles))
    return format_table([heading, *((kind, *map(_gb, sizes)) for kind, sizes in rows)], align="<>", rule=True)


def _phases(planned: "MemoryPlan") -> str:
    rows = [("GB in each phase", "needed", "largest part", "")]
    for phase in planned.phases:
        who, kind = phase.biggest
        marks = ["peak"] * (phase == planned.peak)
        marks += ["TOO LARGE"] * (phase.total > planned.device_memory)
        largest = f"{who}: {kind} {_gb(phase.items[phase.biggest])}"
        rows.append((phase.name, _gb(phase.total), largest, " ".join(marks)))
    return format_table(rows, align="<><", rule=True)


def _engine(run: "RunConfig", planned: "MemoryPlan") -> list[str]:
    engine = planned.engine
    over = f" over {engine.devices} devices" if engine.devices > 1 else ""
    longest = run.data.max_prompt_length + run.data.max_response_length
    return [
        f"{engine.name}{over}: weights {_gb(engine.weights)}, work {_gb(engine.work)}, "
        f"cache {_gb(engine.cache)} GB per device",
        f"{engine.name}'s cache holds {engine.tokens:,} tokens of {engine.token / 1000:,.0f} kB: "
        f"{engine.sequences:,} sequences of {longest:,}",
    ]


def _verdict(run: "RunConfig", planned: "MemoryPlan") -> list[str]:
    from iiverl_core.memory import advice, suggest_for_engine

    of = f"{_gb(planned.device_memory)} GB"
    lines = []
    for phase in planned.too_large:
        who, kind = phase.biggest
        lines.append(
            f"{phase.name} needs {_gb(phase.total)} of {of}, most for {who}: {kind}; {advice(run, planned, phase)}"
        )
    if not planned.engine.has_room:
        lines.append(f"the engine has no room for one sequence; {suggest_for_engine(run, planned)}")
    return lines or [f"It fits: at most {_gb(planned.peak.total)} of {of}, in: {planned.peak.name}"]


def _largest(model: "RoleMemory") -> "Pass":
    return model.update if model.update and model.update.total > model.forward.total else model.forward


def _gb(size: int) -> str:
    return f"{size / GB:.1f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e8 else f"{count / 1e6:.2g} M"


def _as_json(planned: "MemoryPlan") -> dict[str, Any]:
    from dataclasses import asdict

    roles = {
        model.role: {
            "parameters": model.facts.parameters,
            "layout": {
                **asdict(model.layout),
                "offloaded": sorted(model.layout.offloaded),
                "data": model.layout.data,
            },
            "states": asdict(model.states),
            "forward": asdict(model.forward),
            "update": asdict(model.update) if model.update else None,
            "in_use": model.most,
            "waiting": sum(model.resident.values()),
        }
        for model in planned.roles
    }
    return {
        "fits": planned.fits,
        "device_memory": planned.device_memory,
        "stage": planned.stage,
        "peak": {"phase": planned.peak.name, "bytes": planned.peak.total},
        "phases": {
            phase.name: {
                "bytes": phase.total,
                "items": {f"{who}: {kind}": size for (who, kind), size in phase.items.items()},
            }
            for phase in planned.phases
        },
        "roles": roles,
        "engine": {**asdict(planned.engine), "bytes": planned.engine.total},
    }
