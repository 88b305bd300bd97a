"""Choosing what scores the samples of a run."""

from collections.abc import Iterable

from iiverl_core.config import Config
from iiverl_core.errors import ConfigError
from iiverl_core.rewards.custom import load_custom_function
from iiverl_core.rewards.functions import FunctionScorer
from iiverl_core.rewards.remote import RemoteScorer, make_client
from iiverl_core.rewards.rules import check_data_sources, rule_for
from iiverl_core.rewards.scorer import Scorer
from iiverl_core.samples import Prompt, Sample
from iiverl_reward_client import Failed, Outcome, Scored


def make_scorer(config: Config) -> Scorer:
    """Build what scores the samples: a reward server or the user's function where asked for, else built-in rules.

    Raises:
        ConfigError: the function cannot be loaded, or the configuration asks for what cannot score yet.
    """
    if config.reward_model.enable:
        raise ConfigError(
            "reward_model.enable is true, and nothing can score that way yet. Set it to false and give "
            "custom_reward_function.path, a reward server, or a dataset whose data_source has a built-in rule."
        )
    if config.reward_api.enable:
        return RemoteScorer(config.reward_api, make_client(config.reward_api))
    if config.custom_reward_function.path is not None:
        return FunctionScorer(load_custom_function(config.custom_reward_function))
    return FunctionScorer(score_by_rule)


def check_prompts(config: Config, prompts: Iterable[Prompt]) -> None:
    """See that every prompt can be scored, as far as that shows before the run.

    A user's function decides by itself what it can score, and what a reward server verifies is seen by
    `check_before_run`. For the built-in rules, every prompt needs a data source that has one, and a ground truth.

    Raises:
        ConfigError: a prompt cannot be scored; names its row.
    """
    if not config.reward_api.enable and config.custom_reward_function.path is None:
        check_data_sources(prompts)


def score_by_rule(sample: Sample) -> Outcome:
    """Score a sample by the built-in rule of its data source.

    Raises:
        UnknownDataSource: there is none.
    """
    rule = rule_for(sample.prompt.data_source)
    try:
        return Scored(rule(sample.text, sample.prompt.ground_truth))
    except ValueError as error:
        return Failed("function", detail=f"row {sample.prompt.row} of the dataset: {error}")
