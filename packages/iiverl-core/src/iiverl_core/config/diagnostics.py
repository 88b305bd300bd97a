"""Diagnostics of a configuration: `Problem`, how problems are rendered, and the code and name of each kind.

Users see codes, so a code never changes: that of a removed diagnostic is not used again. Each code is used in one place,
where its message is made; a new check takes the next free code of its group.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["error", "input", "unsupported", "warning"]

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Problem:
    """One diagnostic of a configuration; `DIAGNOSTICS` names its code.

    `error`: the configuration is wrong. `input`: a file that it names is missing or unusable. `unsupported`: it is right,
    but cannot run with this version or on this machine. `warning`: it runs, perhaps not as intended. `file` is the YAML
    file or `COMMAND_LINE`; `line` counts from 1.
    """

    code: str
    severity: Severity
    key: str
    message: str
    file: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class SourceLocation:
    """Where the user set a value."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


def by_line(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Sort by line: first the file's, then those without a line, then the command line's."""
    return tuple(sorted(problems, key=lambda p: (p.file == COMMAND_LINE, p.line is None, p.line or 0)))


def render(problems: Iterable[Problem], *, running: bool = False) -> str:
    """Write one line per problem, for a terminal: `file:line: severity[code]: key: message`.

    What is unsupported is shown as an error if a run is about to start (`running`), otherwise as a warning.
    """
    return "\n".join(_render(problem, running) for problem in problems)


def _render(problem: Problem, running: bool) -> str:
    severity = problem.severity
    if severity == "input":
        severity = "error"
    elif severity == "unsupported":
        severity = "error" if running else "warning"
    location = [str(SourceLocation(problem.file, problem.line))] if problem.file else []
    key = [problem.key] if problem.key else []
    line = ": ".join([*location, f"{severity}[{problem.code}]", *key, problem.message])
    # bytes that are not UTF-8 are in it as surrogates, which no terminal can print
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


DIAGNOSTICS = {
    # the file, its keys and its values
    "C001": "unreadable-file",
    "C002": "invalid-yaml",
    "C003": "unreadable-value",
    "C004": "duplicate-key",
    "C010": "invalid-override",
    "C011": "dotted-key",
    "C012": "unknown-key",
    "C013": "not-a-section",
    "C014": "unresolved-reference",
    "C015": "invalid-value",
    "C016": "unknown-backend",
    "C017": "contradictory-backends",
    "C018": "contradictory-names",
    # keys without effect
    "C031": "unused-key",
    "C032": "unsupported-value",
    "C033": "unsupported-verl-key",
    # batches
    "C101": "mini-batch-mismatch",
    "C102": "batch-not-divisible-by-devices",
    "C103": "idle-devices",
    "C104": "two-micro-batch-sizes",
    "C105": "micro-batch-not-divisible-by-devices",
    "C106": "micro-batch-size-unused",
    "C107": "token-budget-too-small",
    "C108": "contradictory-lengths",
    "C109": "engine-length-too-small",
    "C110": "engine-budget-too-small",
    "C111": "engine-budget-below-sequences",
    "C112": "sequence-longer-than-positions",
    "C113": "conversation-longer-than-positions",
    # sampling
    "C201": "group-too-small",
    "C202": "greedy-baseline-without-sampling",
    "C203": "filtered-group-too-small",
    "C204": "unavailable-filter-metric",
    "C205": "unfillable-step",
    "C206": "identical-responses",
    "C207": "zero-temperature",
    "C208": "validation-temperature-unused",
    "C209": "identical-validation-responses",
    # turns
    "C251": "contradictory-turns",
    "C252": "missing-environment",
    "C253": "turns-on-several-devices",
    "C254": "environment-timeout-unused",
    "C255": "environment-reward-unused",
    "C256": "missing-tools",
    "C257": "tool-timeout-unused",
    "C258": "missing-agent",
    "C259": "agent-server-not-installed",
    "C260": "agent-timeout-unused",
    "C261": "invalid-agent-command",
    "C262": "environment-not-installed",
    "C263": "invalid-mcp-server",
    "C264": "mcp-not-installed",
    # images
    "C271": "images-without-fsdp",
    "C272": "critic-without-images",
    "C273": "reward-model-without-images",
    "C274": "images-in-split-sequences",
    "C275": "images-with-adapters",
    "C277": "image-packages-not-installed",
    "C278": "contradictory-image-sizes",
    "C279": "image-settings-unused",
    # objective
    "C301": "incomplete-adaptive-kl",
    "C302": "kl-target-unused",
    "C303": "kl-in-reward-unused",
    "C304": "kl-loss-unused",
    "C305": "kl-counted-twice",
    "C306": "implicit-kl-in-reward",
    "C307": "reference-unused",
    "C308": "loss-scale-unused",
    "C309": "aggregation-unused",
    "C310": "empty-covariance-range",
    "C311": "moved-importance-cap",
    "C312": "empty-rejection-range",
    "C313": "importance-weights-unused",
    "C314": "bypass-without-sampling",
    "C315": "truncated-sampling-unknown-to-trainer",
    "C316": "stale-responses-not-corrected",
    # critic
    "C401": "gae-without-critic",
    "C402": "actor-not-trained",
    "C403": "mixed-backends",
    # rewards
    "C501": "invalid-reward-server-url",
    "C502": "missing-reward-server-token",
    "C503": "two-reward-sources",
    "C504": "reward-function-unused",
    "C505": "added-scores",
    "C506": "invalid-overlong-length",
    "C507": "overlong-penalty-zero",
    "C508": "reward-manager-unused",
    "C509": "reward-timeout-unused",
    # schedule
    "C601": "two-warm-ups",
    "C602": "warm-up-too-long",
    "C603": "min-lr-unused",
    "C604": "nothing-to-do",
    "C605": "no-validation-data",
    "C606": "late-validation",
    "C607": "min-lr-beside-ratio",
    "C608": "two-gradient-norms",
    # devices and installation
    "C701": "backend-not-installed",
    "C702": "engine-not-installed",
    "C703": "tracker-not-installed",
    "C704": "local-runtime-on-several-devices",
    "C705": "local-runtime-with-rollout-devices",
    "C706": "unsupported-fsdp-size",
    "C707": "invalid-fsdp-size",
    "C708": "engines-not-divisible",
    "C709": "unsupported-head-size",
    "C710": "sequence-split-not-divisible",
    "C711": "nothing-profiled",
    "C712": "profiled-rank-missing",
    "C713": "too-few-cpus-for-ray",
    "C714": "staleness-without-rollout-devices",
    "C715": "partial-rollouts-in-turns",
    "C716": "more-engines-needed-than-exist",
    # layouts
    "C801": "copies-not-divisible",
    "C802": "experts-not-divisible-over-devices",
    "C803": "no-experts",
    "C804": "different-layouts",
    "C805": "unsupported-model",
    "C806": "unscaled-fp16",
    "C807": "packing-unused",
    "C808": "chunks-without-stages",
    "C809": "layers-not-divisible",
    "C810": "stages-not-equal",
    "C811": "experts-not-divisible",
    "C812": "experts-without-sequence-parallel",
    "C813": "engine-not-divisible-by-model",
    "C814": "heads-not-divisible",
    "C815": "sequence-split-without-packing",
    "C816": "uneven-recomputation",
    # adapters
    "C842": "adapter-options-unused",
    "C843": "reward-model-adapters",
    "C844": "reference-layout-unused",
    "C845": "adapter-sync-unsupported",
    "C846": "experts-without-adapters",
    # data
    "C901": "missing-data-file",
    "C902": "prompt-too-long",
    "C903": "validation-on-training-data",
    "C904": "splits-mismatch",
    "C910": "unreadable-data-file",
    "C911": "missing-column",
    "C912": "missing-prompt",
    "C913": "no-ground-truth",
    "C914": "ground-truth-not-seen",
    "C915": "missing-verification-info",
    "C916": "too-few-rows",
    "C918": "reserved-template-variable",
    # models, modules and checkpoints
    "C905": "missing-model",
    "C906": "missing-tokenizer",
    "C907": "missing-module",
    "C908": "invalid-resume",
    "C909": "missing-checkpoint",
    "C917": "folder-or-hub-name",
    "C920": "unresumable-checkpoints",
    # folders that a run writes to
    "C919": "unwritable-folder",
    # user functions
    "C921": "missing-function-file",
    "C922": "undefined-function",
    "C923": "uncallable-reward-function",
    "C924": "reserved-reward-argument",
    "C925": "tools-column-unused",
    # installed packages
    "C931": "broken-entry-point",
}
