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
    name. A source without a key is the default of some
    rollouters. A source of another package is selected by `MANAGER_KEY`.
    """

    key: str | None = MANAGER_KEY

    def unusable(self) -> str | None:
        """See `Info.unusable`."""
        if self.key == MANAGER_KEY:
            return None
        return f"the key of the reward source {self.name} is {self.key!r}; leave it out, {MANAGER_KEY} selects it"


REWARD_MODEL = RewardSource(
    name="reward_model",
    summary="a sequence-classification model on the devices of the run",
    code="iiverl_core.rewards.build:add_reward_model",
    key="reward_model.enable",
)
"""The one source that needs the trainer workers: it is built after them, from the scorer to whose scores it adds its own."""

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
        REWARD_MODEL,
        RewardSource(
            name="environment",
            summary="the rewards of the environment that answered the model",
            code="iiverl_core.rewards.build:environment_scorer",
            key=None,
        ),
        RewardSource(
            name="rules",
            summary="the built-in rule of each prompt's data source",
            code="iiverl_core.rewards.build:rule_scorer",
            key=None,
        ),
    ),
)
