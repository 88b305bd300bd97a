"""The protocol as an OpenAPI document: `python -m iiverl_reward_client.server.openapi > docs/reward-protocol.openapi.json`."""

import json

from iiverl_reward_client.server.app import create_app
from iiverl_reward_client.server.scoring import Scoring
from iiverl_reward_client.server.settings import Settings


def document() -> str:
    """Write the OpenAPI document as JSON, the same for every installation."""
    return json.dumps(create_app(Scoring(Settings())).openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(document(), end="")
