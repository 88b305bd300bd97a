"""Try the folders that a run writes to before anything is started."""

import tempfile
from collections.abc import Callable

from iiverl_core.config import Loaded
from iiverl_core.config.checks.files import output_folders
from iiverl_core.errors import CheckpointError, ConfigError


def check_folders(loaded: Loaded) -> None:
    """Create the folders that the run writes to, and a temporary file in each.

    Raises:
        ConfigError: a folder cannot be created or written; names its key.
    """
    for key, folder in output_folders(loaded.config.at):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0")
        except OSError as error:
            raise ConfigError(f"{key}: {folder} cannot be written: {error.strerror}.") from error


class Dumps:
    """Writes files for later inspection, without which the run goes on.

    If one cannot be written, because the disk is full or the folder is gone, that is logged once per key.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._reported: set[str] = set()

    def write(self, key: str, write: Callable[[], object]) -> None:
        """Call `write`, which writes to the folder that `key` names."""
        try:
            write()
        except (OSError, CheckpointError) as error:
            if key not in self._reported:
                self._reported.add(key)
                self._log(
                    f"warning: {key}: the samples could not be written: {error}. The run goes on without them; this is "
                    "reported once."
                )
