"""The command `iiverl plan`: what a run needs of each device's memory, before there is a device."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iiverl_cli.arguments import Backend, ConfigFile, ConfigPath, Overrides, load_config, tell

if TYPE_CHECKING:
    from rich.table import Table

    from iiverl_core.config import Config
    from iiverl_core.memory import MemoryPlan, Pass, RoleMemory

GB = 10**9
"""Bytes in the GB of the tables. What a driver calls 80 GB is 85 of these: the rest is for what is not counted."""
WIDTH = 110
STATES = ("weights", "gradients", "optimizer", "gathered")


def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    config_path: ConfigPath = None,
    backend: Backend = None,
    device_memory: Annotated[
        float, typer.Option("--device-memory", metavar="GB", min=0.001, help="Memory of a device.")
    ] = 80,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """Count the memory that a run needs on each device, from the configuration and each model's config.json."""
    from iiverl_core.errors import ConfigError
    from iiverl_core.memory import find_facts, plan_memory

    loaded = load_config(config, overrides, config_path, backend)
    tell(loaded.errors)
    if loaded.errors:
        raise typer.Exit(2)
    try:
        facts = find_facts(loaded.config)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    planned = plan_memory(loaded.config, facts, round(device_memory * GB))
    if as_json:
        typer.echo(json.dumps(_as_json(planned), indent=2))
    else:
        _show(loaded.config, planned)


def _show(config: "Config", planned: "MemoryPlan") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    typer.echo(_heading(config, planned) + "\n")
    for table in (_models(planned), _phases(planned)):
        with console.capture() as written:
            console.print(table)
        typer.echo("\n".join(line.rstrip() for line in written.get().splitlines()) + "\n")
    typer.echo(_engine(config, planned))
    for line in _verdict(config, planned):
        typer.echo(line)


def _heading(config: "Config", planned: "MemoryPlan") -> str:
    actor = planned.roles[0]
    facts, layout = actor.facts, actor.layout
    active = f", {_billions(facts.active_parameters)} of them for a token" if facts.experts else ""
    model = f"{config.actor_rollout_ref.model.path}: {_billions(facts.parameters)} parameters{active}"
    if layout.sharded:
        spread = f"{config.backend}, each model over all {layout.devices} devices"
    else:
        spread = (
            f"{config.backend}, tensor {layout.tensor} × pipeline {layout.pipeline} × context {layout.context} × "
            f"data {layout.data} = {layout.devices} devices, expert {layout.expert}"
        )
    stage = f"; shown is the {planned.stage} pipeline stage" if layout.pipeline > 1 else ""
    return f"{model}\n{spread}{stage}"


def _models(planned: "MemoryPlan") -> "Table":
    states = [kind for kind in STATES if any(getattr(model.states, kind) for model in planned.roles)]
    table = _table("GB on a device", *states, "activations", "logits", "in use", "waiting")
    for model in planned.roles:
        work = _largest(model)
        here = [getattr(model.states, kind) for kind in states]
        waiting = sum(model.resident.values())
        table.add_row(model.role, *map(_gb, [*here, work.activations, work.logits, model.most, waiting]))
    return table


def _phases(planned: "MemoryPlan") -> "Table":
    table = _table("GB in each phase", "needed", "of which most", "")
    for phase in planned.phases:
        who, kind = phase.biggest
        fits = phase.total <= planned.device_memory
        table.add_row(
            phase.name,
            _gb(phase.total),
            f"{who}: {kind} {_gb(phase.items[phase.biggest])}",
            "peak" * (phase == planned.peak) + (" TOO LARGE" if not fits else ""),
        )
    return table


def _engine(config: "Config", planned: "MemoryPlan") -> str:
    engine = planned.engine
    over = f" over {engine.devices} devices" if engine.devices > 1 else ""
    longest = config.data.max_prompt_length + config.data.max_response_length
    return (
        f"{engine.name}{over}: weights {_gb(engine.weights)}, work {_gb(engine.work)}, cache {_gb(engine.cache)} GB on a "
        f"device; {engine.token / 1000:,.0f} kB a token, so {engine.tokens:,} tokens or {engine.sequences:,} sequences "
        f"of {longest:,}"
    )


def _verdict(config: "Config", planned: "MemoryPlan") -> list[str]:
    from iiverl_core.memory import advice, no_room

    of = f"{_gb(planned.device_memory)} GB"
    lines = []
    for phase in planned.too_large:
        who, kind = phase.biggest
        lines.append(
            f"{phase.name} needs {_gb(phase.total)} of {of}, most for {who}: {kind}; {advice(config, planned, phase)}"
        )
    if not planned.engine.has_room:
        lines.append(f"the engine has no room for one sequence; {no_room(config, planned)}")
    return lines or [f"It fits: at most {_gb(planned.peak.total)} of {of}, in: {planned.peak.name}"]


def _largest(model: "RoleMemory") -> "Pass":
    return model.update if model.update and model.update.total > model.forward.total else model.forward


def _table(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    first, *others = columns
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name in ("", "of which most") else "right")
    return table


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
