"""The command `iiverl algorithms`."""

import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from iiverl_core.registry import AlgorithmInfo, Registry

EXAMPLE = """\
def centred(batch, settings):
    reward_B = batch.segments.sum(batch.rewards_T)
    advantages_T = batch.segments.expand(reward_B - reward_B.mean())
    return advantages_T, advantages_T
"""
"""An advantage estimator as a user may write it: how much better a response is than the step's mean."""


@dataclass(frozen=True)
class Section:
    """The algorithms of one registry, and the keys of the YAML file that take their names."""

    title: str
    keys: tuple[str, ...]
    registry: "Registry[Any]"
    suffix: str = ""
    suffix_summary: str = ""

    def find(self, name: str) -> "AlgorithmInfo | None":
        """Find an algorithm by name; None if there is none."""
        return self.registry.get(name.removesuffix(self.suffix) if self.suffix else name)


def algorithms(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="The algorithm to read about; by default all are listed."),
    ] = None,
) -> None:
    """List the algorithms that a configuration can name, or explain one: formula, paper, edge cases."""
    sections = all_sections()
    if name is None:
        broken = [f"left out: {entry}: {reason}" for entry, reason in sections[0].registry.broken.items()]
        typer.echo("\n\n".join([*(_listed(section) for section in sections), _user_function(), *broken]))
        return
    found = [(section, info) for section in sections if (info := section.find(name))]
    if not found:
        typer.echo(f"error: {_unknown(name, sections)}", err=True)
        raise typer.Exit(2)
    typer.echo("\n\n".join(_explained(section, info, name) for section, info in found))


def all_sections() -> list[Section]:
    """Give the sections of the list, in the order in which a step uses the algorithms."""
    from iiverl_core.config.roles import ACTOR
    from iiverl_core.registry import AGGREGATIONS, ESTIMATORS, KL_KINDS, POLICY_LOSSES
    from iiverl_core.registry.algorithms import UNBIASED

    return [
        Section("advantage estimators", ("algorithm.adv_estimator",), ESTIMATORS),
        Section("policy losses", (f"{ACTOR}.policy_loss.loss_mode",), POLICY_LOSSES),
        Section(
            "from the losses of tokens to the loss of a batch", (f"{ACTOR}.loss_agg_mode",), AGGREGATIONS
        ),
        Section(
            "KL divergence, with x = log π(token) - log π_ref(token)",
            (f"{ACTOR}.kl_loss_type", "algorithm.kl_penalty"),
            KL_KINDS,
            UNBIASED,
            f"A {UNBIASED} behind a name keeps the value and takes the gradient of k2",
        ),
    ]


def _listed(section: Section) -> str:
    """Write the algorithms of a section, one line each, under the keys that take their names."""
    infos = list(section.registry.values())
    names = [", ".join(info.names) for info in infos]
    width = max(map(len, names), default=0)
    lines = [_cut(f"  {name.ljust(width)}  {info.summary}") for name, info in zip(names, infos, strict=True)]
    if section.suffix:
        lines.append(_cut(f"  {section.suffix_summary}"))
    return "\n".join([f"{section.title}: {', '.join(section.keys)}", *lines])


def _explained(section: Section, info: "AlgorithmInfo", name: str) -> str:
    """Write under which keys an algorithm is named, and what its module says of it."""
    keys = " or ".join(f"{key}: {name}" for key in section.keys)
    return f"{keys}\n{info.file}\n\n{info.documentation}"


def _user_function() -> str:
    """Write how a user's own algorithm is named, by an example."""
    return (
        "your own advantage estimator or policy loss\n"
        "  a function of batch and settings, named by its file: algorithm.adv_estimator: path/to/my_file.py:centred\n\n"
        + textwrap.indent(EXAMPLE, "    ").rstrip()
    )


def _cut(line: str) -> str:
    """Cut a line at a word where the terminal ends; what is piped elsewhere stays whole."""
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or len(line) <= width:
        return line
    return f"{line[: width - 1].rpartition(' ')[0].rstrip(' ,;:(')}…"


def _unknown(name: str, sections: list[Section]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [word for section in sections for word in section.registry.names], n=1)
    meant = f"; did you mean {near[0]}?" if near else "."
    return f"there is no algorithm {name!r}{meant} All of them: iiverl algorithms"
