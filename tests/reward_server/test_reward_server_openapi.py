"""The published document is the server's."""

from pathlib import Path

from iiverl_reward_client.server.openapi import document

PUBLISHED = Path(__file__).parents[2] / "docs" / "reward-protocol.openapi.json"


def test_the_published_document_is_in_step() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == document(), (
        "make it again: python -m iiverl_reward_client.server.openapi > docs/reward-protocol.openapi.json"
    )
