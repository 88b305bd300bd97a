"""The section `reward_api`: a server that scores responses."""

from typing import Annotated, Literal

from iiverl_core.config.sections.section import (
    Count,
    Float,
    Names,
    Nonnegative,
    OnlyWhen,
    Path,
    Positive,
    Section,
    Share,
)

WHEN_ENABLED = OnlyWhen("reward_api.enable", (True,))


class RewardAPIConfig(Section):
    """A server that scores responses, and what happens to samples that nothing could score."""

    enable: bool = False
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
    protocol: Annotated[Literal["auto", "reward", "v1", "openrlhf", "slime"], WHEN_ENABLED] = "auto"
    """What the server speaks; `auto` asks it, and takes `POST /reward` where it offers nothing better."""
    token_env: Annotated[str | None, WHEN_ENABLED] = None
    """Environment variable that holds the server's bearer token; null for none."""
    cache_dir: Annotated[Path | None, WHEN_ENABLED] = None
    """Folder in which scores are kept and found again, by content and server version; null for none."""
    outage_patience: Annotated[Nonnegative, WHEN_ENABLED] = 600.0
    """Seconds to wait for a server that leaves more than `max_failed_fraction` of the samples without a score."""
    on_failure: Literal["exclude", "fail", "constant"] = "exclude"
    """A sample without a score is left out of its group and of the loss, ends the run, or gets `failure_score`."""
    failure_score: Annotated[Float, OnlyWhen("reward_api.on_failure", ("constant",))] = 0.0
    """The score that `on_failure: constant` gives."""
    max_failed_fraction: Share = 0.1
    """Share of a step's samples that may stay without a score before the run stops, whatever scores them."""
