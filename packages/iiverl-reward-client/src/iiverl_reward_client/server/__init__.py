"""The reward server: verifiers behind HTTP, each with its own workers and queue. Requires the extra `server`.

Names are imported on first use, so that the command can report missing packages if the extra is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iiverl_reward_client.server.app import create_app
    from iiverl_reward_client.server.running import serve
    from iiverl_reward_client.server.scoring import Scoring
    from iiverl_reward_client.server.settings import Settings, SettingsError, load_settings

__all__ = ["Scoring", "Settings", "SettingsError", "create_app", "load_settings", "serve"]

_MODULES = {
    "create_app": "app",
    "Scoring": "scoring",
    "serve": "running",
    "Settings": "settings",
    "SettingsError": "settings",
    "load_settings": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
