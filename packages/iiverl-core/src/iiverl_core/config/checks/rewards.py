"""Does something score the responses, and do the parts of a score fit together?"""

import os

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.registry import REWARD_SOURCES
from iiverl_core.registry.rewards import CHOOSER

checks = Checks()

URL = "reward_api.api_url"
FUNCTION = "custom_reward_function.path"
MODEL = "reward_model.enable"
OVERLONG = "reward_model.overlong_buffer"
RESPONSE = "data.max_response_length"


@checks.add("C501", "error", URL, "reward_api.enable")
def server_has_an_address(view: View) -> str | None:
    """A reward server is named by URLs."""
    urls = view[URL]
    if not view["reward_api.enable"]:
        return None
    if urls is None:
        return f"a reward server needs its address, {URL}, as in http://localhost:8000"
    wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
    return f"an address begins with http:// or https://, and {wrong[0]!r} does not" if wrong else None


@checks.add("C502", "here", "reward_api.token_env", "reward_api.enable")
def token_is_there(view: View) -> str | None:
    """The variable that holds the server's token is set."""
    name = view["reward_api.token_env"]
    if not view["reward_api.enable"] or name is None or os.environ.get(name):
        return None
    return f"the environment variable {name} is not set; it holds the reward server's token"


@checks.add("C503", "error", FUNCTION, "reward_api.enable", CHOOSER)
def one_source(view: View) -> str | None:
    """One source scores, beside a reward model."""
    names = [source.name for source in view.config.reward_sources if not source.needs_workers]
    if len(names) < 2:
        return None
    return f"{' and '.join(names)} cannot both score the responses; leave one of them out"


@checks.add("C508", "warning", CHOOSER)
def manager_is_a_source(view: View) -> str | None:
    """A reward manager of verl's does nothing; a reward source that a package offers does."""
    if not view.given(CHOOSER) or any(source.key == CHOOSER for source in view.config.reward_sources):
        return None
    offered = [source.name for source in REWARD_SOURCES.external]
    known = f"; installed packages offer {', '.join(offered)}" if offered else ""
    return f"has no effect: the rules, custom_reward_function and reward_api score each response on its own{known}"


@checks.add(
    "C504", "warning", "custom_reward_function.name", "custom_reward_function.reward_kwargs", FUNCTION
)
def function_is_read(view: View) -> str | None:
    """A function is named only where there is a file to find it in."""
    if view[FUNCTION] or not view.given(
        "custom_reward_function.name", "custom_reward_function.reward_kwargs"
    ):
        return None
    return f"has no effect without {FUNCTION}"


@checks.add("C505", "warning", MODEL, FUNCTION, "reward_api.enable", CHOOSER)
def scores_add_up(view: View) -> str | None:
    """A reward model stands beside another source, not in its place."""
    other = view.config.reward_source
    if not view[MODEL] or other is None:
        return None
    return f"its score and that of {other.name} are added; each is a component of the reward"


@checks.add("C506", "error", f"{OVERLONG}.len", f"{OVERLONG}.enable", RESPONSE)
def penalty_has_a_length(view: View) -> str | None:
    """The penalty on long responses begins within a response."""
    length, longest = view[f"{OVERLONG}.len"], view[RESPONSE]
    if not view[f"{OVERLONG}.enable"] or 1 <= length <= longest:
        return None
    return (
        f"the penalty grows over the last {OVERLONG}.len ({length}) tokens of {RESPONSE} ({longest}); "
        f"set it between 1 and {longest}"
    )


@checks.add("C507", "warning", f"{OVERLONG}.penalty_factor", f"{OVERLONG}.enable")
def penalty_has_a_weight(view: View) -> str | None:
    """The penalty on long responses is one."""
    if not view[f"{OVERLONG}.enable"] or view[f"{OVERLONG}.penalty_factor"] > 0:
        return None
    return f"has no effect: {OVERLONG}.penalty_factor is 0"
