"""Checks of what scores the responses, and of the parts of a score."""

import os

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.registry import REWARD_MODEL, REWARD_SOURCES
from iiverl_core.registry.rewards import MANAGER_KEY

checks = Checks()

URL = "reward_api.api_url"
FUNCTION = "custom_reward_function.path"
OF_FUNCTION = tuple(
    f"custom_reward_function.{name}" for name in ("name", "reward_kwargs", "timeout", "workers")
)
LIMIT, WORKERS = "custom_reward_function.timeout", "custom_reward_function.workers"
STALL = "trainer.stall_timeout"
MODEL = "reward_model.enable"
OVERLONG = "reward_model.overlong_buffer"
RESPONSE = "data.max_response_length"


@checks.add("C501", "error", URL, "reward_api.enable")
def _server_has_an_address(view: ConfigView) -> str | None:
    urls = view[URL]
    if not view["reward_api.enable"]:
        return None
    if urls is None:
        return f"a reward server needs its URL; set {URL}, for example to http://localhost:8000"
    wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
    return f"{wrong[0]!r} is not a URL; it has to begin with http:// or https://" if wrong else None


@checks.add("C502", "unsupported", "reward_api.token_env", "reward_api.enable")
def _token_is_there(view: ConfigView) -> str | None:
    name = view["reward_api.token_env"]
    if not view["reward_api.enable"] or name is None or os.environ.get(name):
        return None
    return f"the environment variable {name}, which holds the reward server's token, is not set"


@checks.add("C503", "error", FUNCTION, "reward_api.enable", MANAGER_KEY)
def _one_source(view: ConfigView) -> str | None:
    names = [source.name for source in view.config.reward_sources if source is not REWARD_MODEL]
    if len(names) < 2:
        return None
    return f"{' and '.join(names)} cannot both score the responses; remove one of them"


@checks.add("C508", "warning", MANAGER_KEY)
def _manager_is_a_source(view: ConfigView) -> str | None:
    if not view.is_set(MANAGER_KEY) or any(
        source.key == MANAGER_KEY for source in view.config.reward_sources
    ):
        return None
    offered = [source.name for source in REWARD_SOURCES.external]
    known = f"; installed packages offer {', '.join(offered)}" if offered else ""
    return f"has no effect: iiverl has no reward managers; the built-in rules, custom_reward_function or reward_api score the responses{known}"


@checks.add("C504", "warning", *OF_FUNCTION, FUNCTION)
def _function_is_read(view: ConfigView) -> str | None:
    return f"has no effect without {FUNCTION}" if view.is_set(*OF_FUNCTION) and not view[FUNCTION] else None


@checks.add("C509", "warning", LIMIT, WORKERS, STALL, FUNCTION)
def _limit_is_kept(view: ConfigView) -> str | None:
    if not view[FUNCTION]:
        return None
    if view[WORKERS] == 0:
        return f"has no effect with {WORKERS}: 0" if view.is_set(LIMIT) else None
    if 0 < view[STALL] <= view[LIMIT]:
        return f"a call may take {view[LIMIT]:g} s, but {STALL} ends a run in which nothing happens for {view[STALL]} s"
    return None


@checks.add("C505", "warning", MODEL, FUNCTION, "reward_api.enable", MANAGER_KEY)
def _scores_add_up(view: ConfigView) -> str | None:
    other = view.config.reward_source
    if not view[MODEL] or other is None:
        return None
    return f"its score is added to that of {other.name}; each is a component of the reward"


@checks.add("C506", "error", f"{OVERLONG}.len", f"{OVERLONG}.enable", RESPONSE)
def _penalty_has_a_length(view: ConfigView) -> str | None:
    length, longest = view[f"{OVERLONG}.len"], view[RESPONSE]
    if not view[f"{OVERLONG}.enable"] or 1 <= length <= longest:
        return None
    return (
        f"the penalty grows over the last {OVERLONG}.len ({length}) tokens of {RESPONSE} ({longest}); "
        f"set it between 1 and {longest}"
    )


@checks.add("C507", "warning", f"{OVERLONG}.penalty_factor", f"{OVERLONG}.enable")
def _penalty_has_a_weight(view: ConfigView) -> str | None:
    if not view[f"{OVERLONG}.enable"] or view[f"{OVERLONG}.penalty_factor"] > 0:
        return None
    return f"has no effect: {OVERLONG}.penalty_factor is 0"
