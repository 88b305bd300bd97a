"""The reward server: verifiers behind HTTP, each type with its own places and queue. Needs the extra `server`."""

from iiverl_reward_client.server.app import create_app
from iiverl_reward_client.server.scoring import Scoring
from iiverl_reward_client.server.serve import serve
from iiverl_reward_client.server.settings import Settings, SettingsError, load_settings

__all__ = ["Scoring", "Settings", "SettingsError", "create_app", "load_settings", "serve"]
