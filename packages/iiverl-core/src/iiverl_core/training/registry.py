"""Training backends by name, found among the installed packages: core never imports one."""

from importlib.metadata import entry_points

from iiverl_core.errors import ConfigError
from iiverl_core.training.backend import TrainingBackend

GROUP = "iiverl.backends"


def load_backend(name: str) -> type[TrainingBackend]:
    """Import the backend that an installed package offers as `name` in the entry-point group `iiverl.backends`.

    Raises:
        ConfigError: no installed package offers it.
    """
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return entry.load()
    raise ConfigError(
        f"the training backend '{name}' is not installed; install it with: pip install 'iiverl[{name}]'"
    )
