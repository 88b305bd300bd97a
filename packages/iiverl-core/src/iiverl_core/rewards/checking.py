"""Check a reward server and the datasets it scores, without a model, for `iiverl reward check` and before a run."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from iiverl_core.columns import ground_truth_of, verification_info_of
from iiverl_core.config import DataConfig, RunConfig
from iiverl_core.data.chat import PromptError, as_prompt
from iiverl_core.data.sources import load_tables
from iiverl_core.errors import ConfigError
from iiverl_core.rewards.remote import ROWS_CHECKED, check_rows, check_server, make_client, too_slow
from iiverl_core.samples import Prompt, place_of
from iiverl_reward_client import Capabilities, Failed, Outcome, RewardSample, SyncRewardClient

logger = logging.getLogger(__name__)

WRONG_ANSWER = r"\boxed{this is not the answer}"


@dataclass(frozen=True)
class ServerAnswer:
    """A server, the seconds it took to answer a ping, and its capabilities if it reports them."""

    url: str
    ping: float | Failed
    capabilities: Capabilities | None


@dataclass(frozen=True)
class TriedAnswer:
    """The outcome of an answer made up for a row: an obviously wrong one, or the row's own."""

    row: int
    type: str
    answer: Literal["wrong", "right"]
    outcome: Outcome


@dataclass(frozen=True)
class RewardCheck:
    """The results of `check_rewards`; `rows` has the name of each dataset and the number of its rows checked.

    `warnings` are about servers that may need more time than the run allows.
    """

    servers: list[ServerAnswer]
    rows: list[tuple[str, int]]
    tried: list[TriedAnswer]
    warnings: list[str]


def check_rewards(run: RunConfig, rows: int) -> RewardCheck:
    """Query the servers, check the first rows of the datasets, and score made-up answers to `rows` training prompts.

    The rows are checked as before a run. Prompts are sent as plain text, without the model's chat template, so that no
    tokenizer is needed.

    Raises:
        ConfigError: no reward server is configured, or the servers cannot verify a row.
        DataError: a dataset cannot be read.
        IIVerlError: no server answers.
    """
    if not run.rewards.api.enable:
        raise ConfigError(
            "reward_api.enable is false, so there is no reward server to check. "
            "Set it to true, and reward_api.api_url to the server's address."
        )
    with make_client(run.rewards.api) as client:
        capabilities, datasets = _check(run, client)
        pings = client.ping()
        servers = [ServerAnswer(url, pings[url], each) for url, each in capabilities.items()]
        tried = _score_made_up(client, datasets[0][1][:rows], run.rewards.api.verification_info_column)
    return RewardCheck(
        servers,
        [(name, len(prompts)) for name, prompts in datasets],
        tried,
        too_slow(capabilities, run.rewards.api.timeout),
    )


def check_before_run(run: RunConfig) -> None:
    """Check that the reward server answers and can verify the first rows of the datasets.

    Raises:
        ConfigError: the servers cannot verify a row.
        DataError: a dataset cannot be read.
        IIVerlError: no server answers.
    """
    with make_client(run.rewards.api) as client:
        capabilities, _ = _check(run, client)
        for warning in too_slow(capabilities, run.rewards.api.timeout):
            logger.warning(warning)


def _check(
    run: RunConfig, client: SyncRewardClient
) -> tuple[dict[str, Capabilities | None], list[tuple[str, list[Prompt]]]]:
    """Query the servers' capabilities, and check the datasets' first rows against them."""
    capabilities = check_server(client)
    datasets = _datasets(run)
    for _, prompts in datasets:
        check_rows(run, prompts, capabilities)
    return capabilities, datasets


def _datasets(run: RunConfig) -> list[tuple[str, list[Prompt]]]:
    """Read the first rows of each dataset of a run as prompts without tokens; training data comes first."""
    data, trainer = run.data, run.trainer
    tables = load_tables(data.train_files, data.train_split)
    if data.val_files and (trainer.val_before_train or trainer.val_only or trainer.test_freq > 0):
        tables += load_tables(data.val_files, data.val_split)
    return [
        (
            table.name,
            [_prompt(table.name, i, table.row(i), data) for i in range(min(len(table), ROWS_CHECKED))],
        )
        for table in tables
    ]


def _prompt(source: str, number: int, row: Mapping[str, Any], data: DataConfig) -> Prompt:
    columns = {name: value for name, value in row.items() if name != data.prompt_key}
    return Prompt(
        row=number,
        ids=(),
        text=_text(row.get(data.prompt_key), place_of(source, number), data.prompt_key),
        ground_truth=ground_truth_of(row, data.ground_truth_key),
        columns=columns,
        source=source,
        source_row=number,
    )


def _text(prompt: Any, place: str, prompt_key: str) -> str:
    try:
        read = as_prompt(prompt)
    except PromptError as error:
        raise ConfigError(f"{place}, column {prompt_key!r} (data.prompt_key): it {error}") from None
    return read if isinstance(read, str) else "\n".join(message["content"] for message in read)


def _score_made_up(client: SyncRewardClient, prompts: Sequence[Prompt], column: str) -> list[TriedAnswer]:
    """Score a wrong answer to each prompt, and the row's own if `verification_info` has one."""
    tries: list[tuple[int, str, Literal["wrong", "right"]]] = []
    samples: list[RewardSample] = []
    for prompt in prompts:
        info = verification_info_of(prompt.columns, column)
        document = _as_mapping(info)
        answer = document.get("answer")
        value = answer.get("value") if isinstance(answer, Mapping) else None
        responses: dict[Literal["wrong", "right"], str] = {"wrong": WRONG_ANSWER}
        if value is not None:
            responses["right"] = rf"\boxed{{{value}}}"
        for kind, response in responses.items():
            tries.append((prompt.row, str(document.get("type", "")), kind))
            samples.append(
                RewardSample(
                    id=f"{prompt.row}-{kind}",
                    llm_output=f"{prompt.text}\n{response}",
                    verification_info=info,
                    prompt=prompt.text,
                    response=response,
                    label=prompt.ground_truth,
                )
            )
    outcomes = client.score_batch(samples)
    return [TriedAnswer(*each, outcome) for each, outcome in zip(tries, outcomes, strict=True)]


def _as_mapping(info: Any) -> Mapping[str, Any]:
    """Read a row's verification info if it is a JSON object; other protocols may use something else."""
    if isinstance(info, str):
        try:
            info = json.loads(info)
        except ValueError:
            return {}
    return info if isinstance(info, Mapping) else {}
