"""The section `reward_api`: a server that scores responses."""

from typing import Annotated

from iiverl_core.config.sections.section import Count, Names, NotYet, OnlyWhen, Path, Positive, Section, Share

WHEN_ENABLED = OnlyWhen("reward_api.enable", (True,))


class RewardAPIConfig(Section):
    """A server that scores responses, and what happens to samples that nothing could score."""

    enable: Annotated[bool, NotYet("the reward server", (False,))] = False
    """Score on a reward server."""
    api_url: Annotated[Names | None, WHEN_ENABLED] = None
    """URL of the server, or a list of them."""
    max_workers: Annotated[Count, WHEN_ENABLED] = 10
    """Requests at a time."""
    timeout: Annotated[Positive, WHEN_ENABLED] = 30.0
    """Seconds that a request may take."""
    verification_info_column: Annotated[str, WHEN_ENABLED] = "verification_info"
    """Column of the dataset that is sent with a response."""
    save_dir: Annotated[Path | None, WHEN_ENABLED] = "debug_data"
    """Folder for scored samples, under `train/` and `val/`; null for none."""
    save_freq: Annotated[Count, WHEN_ENABLED] = 1
    """Training steps from one such file to the next; validation is always written."""
    max_failed_fraction: Share = 0.1
    """Share of a step's samples that may stay without a score before the run stops, whatever scores them."""
