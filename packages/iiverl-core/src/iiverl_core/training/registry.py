"""Training backends by name, found among the installed packages: core never imports one."""

from importlib.metadata import entry_points

from iiverl_core.config.checks.devices import BACKENDS, missing_backend
from iiverl_core.errors import ConfigError
from iiverl_core.training.backend import TrainingBackend


def load_backend(name: str) -> type[TrainingBackend]:
    """Import the backend that an installed package offers as `name` in the entry-point group `iiverl.backends`.

    Raises:
        ConfigError: no installed package offers it.
    """
    if reason := missing_backend(name):
        raise ConfigError(reason)
    return next(entry.load() for entry in entry_points(group=BACKENDS) if entry.name == name)
