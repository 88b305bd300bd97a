"""The commands `iiverl launch slurm|kuberay|skypilot`: files that start a run on several machines."""

from typing import TYPE_CHECKING, Annotated

import typer

from iiverl_cli.arguments import (
    Backend,
    ConfigCommand,
    ConfigFile,
    ConfigPath,
    Overrides,
    load_config,
    split_arguments,
)
from iiverl_cli.output import EXIT_REFUSED, clean_exit, report_problems

if TYPE_CHECKING:
    from iiverl_core.launch import Job

IMAGE = "iiverl:latest"

Nodes = Annotated[
    int | None,
    typer.Option("--nodes", metavar="N", min=1, help="Machines that train, instead of trainer.nnodes."),
]
Interface = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Network interface of NCCL and Gloo, such as ib0; without, they choose."
    ),
]
Image = Annotated[str, typer.Option(metavar="IMAGE", help="Container image with iiverl (docker/Dockerfile).")]
Volume = Annotated[
    str, typer.Option(metavar="NAME", help="Volume that all machines share, mounted as /shared.")
]

launch_app = typer.Typer(
    help="Print files that start a run on several machines.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@launch_app.command(cls=ConfigCommand)
def slurm(
    config: ConfigFile = None,
    overrides: Overrides = None,
    config_path: ConfigPath = None,
    backend: Backend = None,
    nodes: Nodes = None,
    interface: Interface = None,
    time: Annotated[str, typer.Option(metavar="TIME", help="Time limit, as sbatch takes it.")] = "24:00:00",
) -> None:
    """Print a script for sbatch; pre-empted jobs are queued again and resume."""
    from iiverl_core.launch import slurm as write

    typer.echo(
        write(_job(config, overrides, config_path, backend, nodes), interface=interface, time=time), nl=False
    )


@launch_app.command(cls=ConfigCommand)
def kuberay(
    config: ConfigFile = None,
    overrides: Overrides = None,
    config_path: ConfigPath = None,
    backend: Backend = None,
    nodes: Nodes = None,
    interface: Interface = None,
    image: Image = IMAGE,
    volume: Volume = "iiverl",
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of each worker.")] = "256Gi",
) -> None:
    """Print a RayJob for KubeRay, and a ConfigMap with the configuration."""
    from iiverl_core.launch import kuberay as write

    job = _job(config, overrides, config_path, backend, nodes)
    typer.echo(write(job, image=image, claim=volume, interface=interface, memory=memory), nl=False)


@launch_app.command(cls=ConfigCommand)
def skypilot(
    config: ConfigFile = None,
    overrides: Overrides = None,
    config_path: ConfigPath = None,
    backend: Backend = None,
    nodes: Nodes = None,
    interface: Interface = None,
    image: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", help="Container image; by default, iiverl is installed with pip."),
    ] = None,
    volume: Volume = "iiverl",
    accelerator: Annotated[str, typer.Option(metavar="GPU", help="SkyPilot's name of the GPU.")] = "H100",
) -> None:
    """Print a task for SkyPilot, on spot machines of a cloud or of Kubernetes."""
    from iiverl_core.launch import skypilot as write

    job = _job(config, overrides, config_path, backend, nodes)
    typer.echo(write(job, accelerator=accelerator, volume=volume, interface=interface, image=image), nl=False)


def _job(
    config: str | None,
    overrides: list[str] | None,
    config_path: str | None,
    backend: str | None,
    nodes: int | None,
) -> "Job":
    """Describe the run, after its configuration is checked; what this machine lacks is no obstacle."""
    file, words = split_arguments(config, overrides, config_path)
    if nodes is not None:
        words.append(f"trainer.nnodes={nodes}")
    loaded = load_config(file, words, None, backend, allow_unknown=False)
    report_problems([problem for problem in loaded.problems if problem.severity in ("error", "input")])
    if loaded.errors:
        raise typer.Exit(EXIT_REFUSED)
    with clean_exit():
        from iiverl_core.launch.job import job_of, warnings

        if backend is not None:
            words.append(f"--backend={backend}")
        job = job_of(loaded, file, words)
        for warning in warnings(loaded):
            typer.echo(f"warning: {warning}", err=True)
    return job
