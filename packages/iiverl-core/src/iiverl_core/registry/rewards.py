"""The reward sources.

Packages add theirs under the entry-point group `iiverl.rewards`; `reward_model.reward_manager` selects one by name.
"""

from dataclasses import dataclass

from iiverl_core.registry.registry import Info, Registry

GROUP = "iiverl.rewards"
MANAGER_KEY = "reward_model.reward_manager"


@dataclass(frozen=True, kw_only=True)
class RewardSource(Info):
    """A source of scores: `code` is a function of a `RunConfig` that returns a `Scorer`.

    `key` enables it in a configuration: if it is set and not false or, for `MANAGER_KEY`, if its value is the source's
    name. The source without a key is the default. With `needs_workers`, it runs on the trainer workers, is built after
    them, and its score is added to that of another source.
    """

    key: str | None = MANAGER_KEY
    needs_workers: bool = False


REWARD_SOURCES = Registry(
    "reward source",
    GROUP,
    RewardSource,
    (
        RewardSource(
            name="reward_api",
            summary="a reward server, by HTTP",
            code="iiverl_core.rewards.build:server_scorer",
            key="reward_api.enable",
        ),
        RewardSource(
            name="custom_reward_function",
            summary="a Python function in the user's own file",
            code="iiverl_core.rewards.build:function_scorer",
            key="custom_reward_function.path",
        ),
        RewardSource(
            name="reward_model",
            summary="a sequence-classification model on the devices of the run",
            code="iiverl_core.rewards.build:add_reward_model",
            key="reward_model.enable",
            needs_workers=True,
        ),
        RewardSource(
            name="rules",
            summary="the built-in rule of each prompt's data source",
            code="iiverl_core.rewards.build:rule_scorer",
            key=None,
        ),
    ),
)
