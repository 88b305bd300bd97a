"""The sources of rewards.

Packages add theirs under the entry-point group `iiverl.rewards`; `reward_model.reward_manager` chooses one by name.
"""

from dataclasses import dataclass

from iiverl_core.registry.registry import Info, Registry

GROUP = "iiverl.rewards"
CHOOSER = "reward_model.reward_manager"


@dataclass(frozen=True, kw_only=True)
class RewardSource(Info):
    """What scores responses: `code` is a function of a `RunConfig` that gives a `Scorer`.

    `key` asks for it in a configuration: by being set and not false or, if it is `CHOOSER`, by holding the name. None
    stands for the source that is taken if nothing else is asked for. With `needs_workers` it runs on the workers that
    train, is built after them, and adds its score to that of another source.
    """

    key: str | None = CHOOSER
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
            summary="a Python function in a file of the user's",
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
