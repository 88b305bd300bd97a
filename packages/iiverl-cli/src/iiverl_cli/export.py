"""The command `iiverl export`: a trained model as a folder for transformers and vLLM."""

from enum import StrEnum
from typing import Annotated

import typer

from iiverl_cli.output import clean_exit


class ExportedRole(StrEnum):
    """The models that a checkpoint holds."""

    actor = "actor"
    critic = "critic"


class ExportedDtype(StrEnum):
    """The dtypes that weights can be written in."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder `…/global_step_N`.")],
    target: Annotated[str, typer.Argument(metavar="DIR", help="The folder to write; new or empty.")],
    dtype: Annotated[
        ExportedDtype | None, typer.Option(help="Dtype of the weights; by default the checkpoint's.")
    ] = None,
    role: Annotated[ExportedRole, typer.Option(help="The model to export.")] = ExportedRole.actor,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Write LoRA adapters in PEFT's format instead of merging them."),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Also upload the folder to a repository on the Hugging Face Hub, private if it is new.",
        ),
    ] = None,
) -> None:
    """Write a trained model as safetensors, with tokenizer and model card, on a machine that needs no GPU."""
    with clean_exit():
        from pathlib import Path

        from iiverl_core.cluster.export import Upload
        from iiverl_core.cluster.export import export as write

        upload = Upload(push) if push is not None else None  # fails before anything is written
        folder = Path(target).expanduser()
        write(
            Path(checkpoint).expanduser().absolute(),
            folder,
            role.value,
            dtype.value if dtype else None,
            adapter=adapter,
            log=lambda line: typer.echo(line, err=True),
        )
        if upload is not None:
            typer.echo(f"uploaded: {upload.send(folder)}", err=True)
    typer.echo(target)
