"""Build the scorer of a run, and check its inputs before the run."""

import logging
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from iiverl_core.columns import no_ground_truth
from iiverl_core.config import RunConfig
from iiverl_core.errors import ConfigError
from iiverl_core.registry import REWARD_SOURCES
from iiverl_core.rewards.custom import load_custom_function
from iiverl_core.rewards.environment import outcome_of_environment
from iiverl_core.rewards.function_pool import FunctionPool
from iiverl_core.rewards.functions import FunctionScorer
from iiverl_core.rewards.model import ModelScorer, ScoreSequences
from iiverl_core.rewards.remote import ROWS_CHECKED, RemoteScorer, make_client
from iiverl_core.rewards.rules import check_data_sources, rule_for
from iiverl_core.rewards.scorer import Scorer
from iiverl_core.samples import Prompt, Rollout
from iiverl_reward_client import Failed, Outcome, Scored

if TYPE_CHECKING:
    from iiverl_core.data import PromptSet

logger = logging.getLogger(__name__)

REWARD_OUTPUT = "reward_function.log"
"""File of the run's folder with what a reward function prints."""


def make_scorer(run: RunConfig) -> Scorer | None:
    """Build the scorer of `run.rewards.source`; None if only a reward model scores.

    `add_reward_model` adds the reward model once workers are running.

    Raises:
        ConfigError: the function cannot be loaded, or the server's address or token is invalid.
    """
    source = run.rewards.source
    return None if source is None else REWARD_SOURCES[source].load()(run)


def server_scorer(run: RunConfig) -> Scorer:
    """Build a scorer that sends rollouts to a reward server."""
    return RemoteScorer(run.rewards.api, make_client(run.rewards.api))


def function_scorer(run: RunConfig) -> Scorer:
    """Build a scorer that calls the user's function, in processes of its own unless there are to be none."""
    function = run.rewards.function
    if function.workers == 0:
        return FunctionScorer(load_custom_function(function))
    return FunctionPool(function, run.folder / REWARD_OUTPUT)


def environment_scorer(run: RunConfig) -> Scorer:
    """Build a scorer whose outcomes are those that the rollouts bring from their environment."""
    return FunctionScorer(outcome_of_environment)


def rule_scorer(run: RunConfig) -> Scorer:
    """Build a scorer that applies the built-in rules."""
    return FunctionScorer(score_by_rule)


def add_reward_model(run: RunConfig, scorer: Scorer | None, score: ScoreSequences) -> Scorer:
    """Combine the reward model, called through `score`, with the scorer that `make_scorer` returned.

    As in verl, the model replaces the built-in rules. If another source is configured as well, verl ignores it; here
    the two scores are added. The components of a score are named after the sources: `reward_model` and, for example,
    `reward_api`.

    If `reward_model.model.input_tokenizer` is null, `score` is called with the rollouts' own sequences; otherwise, with
    the conversations in the reward model's tokens (`iiverl_core.data.to_reward_tokens`).

    Raises:
        ConfigError: a tokenizer cannot be read.
    """
    from iiverl_core.data import load_conversation_writer, to_reward_tokens

    writer = load_conversation_writer(run)
    return ModelScorer(
        score,
        rewrite=partial(to_reward_tokens, writer=writer) if writer else None,
        other=scorer,
        other_name=run.rewards.source or "",
    )


def check_reward_model(run: RunConfig) -> None:
    """Check the tokenizer and the length limit of the reward model, if the run has one.

    Raises:
        ConfigError: a tokenizer cannot be read, or `reward_model.max_length` would cut sequences that the model reads
            as they are.
    """
    if run.uses_reward_model:
        from iiverl_core.data import load_conversation_writer

        load_conversation_writer(run)


def check_ground_truths(run: RunConfig, prompts: "PromptSet") -> None:
    """Check that rows have a ground truth, if the scorer needs one; warn if only some have none.

    The built-in rules need one, and so does a user function with a parameter `ground_truth`. A reward server reads a
    column of its own, a reward model needs none, and other sources are not checked.

    Raises:
        ConfigError: no row has a ground truth; names the columns there are.
    """
    if run.rewards.source not in ("rules", "custom_reward_function"):
        return
    custom = run.rewards.function
    function = custom.name if run.rewards.source == "custom_reward_function" else None
    if function and not load_custom_function(custom).takes_ground_truth:
        return
    missing = prompts.without_ground_truth()
    if len(missing) == len(prompts):
        key = prompts.ground_truth_key
        raise ConfigError(no_ground_truth(prompts.name, prompts.columns, prompts.prompt_key, key, function))
    if len(missing):
        logger.warning(
            "%d of %d rows of %s have no ground truth, the first is %s",
            len(missing),
            len(prompts),
            prompts.name,
            prompts.place(int(missing[0])),
        )


def check_prompts(run: RunConfig, prompts: Iterable[Prompt]) -> None:
    """Check that the prompts can be scored, as far as that can be known before the run.

    For a reward model with a tokenizer of its own, the first prompts are tokenized with it. For the built-in rules,
    every prompt needs a data source with a rule, and a ground truth. `check_before_run` checks the rows for a reward
    server; other sources are not checked.

    Raises:
        ConfigError: a prompt cannot be scored; names its row.
    """
    if run.uses_reward_model:
        from iiverl_core.data import check_conversations, load_conversation_writer

        if writer := load_conversation_writer(run):
            check_conversations(writer, islice(prompts, ROWS_CHECKED))
    elif run.rewards.source == "rules":
        check_data_sources(prompts)


def score_by_rule(rollout: Rollout) -> Outcome:
    """Score a rollout by the built-in rule of its data source; the extracted answer is `pred` in the score's info.

    Raises:
        UnknownDataSource: no rule scores the data source.
    """
    rule = rule_for(rollout.prompt.data_source)
    try:
        score, answer = rule.score(rollout.text, rollout.prompt.ground_truth), rule.answer(rollout.text)
        return Scored(score, info={} if answer is None else {"pred": answer})
    except ValueError as error:
        return Failed("function", detail=f"{rollout.prompt.place}: {error}")
