"""Client and server for rewards: each sample gets a score or a typed failure, never a made-up zero."""

from iiverl_reward_client.asyncio_transport import AsyncioTransport
from iiverl_reward_client.client import RewardClient
from iiverl_reward_client.dialects import Capabilities, ProtocolName
from iiverl_reward_client.endpoint import Breaker
from iiverl_reward_client.outcomes import Failed, FailureKind, Outcome, Scored
from iiverl_reward_client.protocol import outcome_of, request_payload
from iiverl_reward_client.retrying import Retries, Timeouts
from iiverl_reward_client.rl_verifier import RLVerifierClient, VerificationFailed
from iiverl_reward_client.sample import RewardSample
from iiverl_reward_client.sync_client import SyncRewardClient

__all__ = [
    "AsyncioTransport",
    "Breaker",
    "Capabilities",
    "Failed",
    "FailureKind",
    "Outcome",
    "ProtocolName",
    "RLVerifierClient",
    "Retries",
    "RewardClient",
    "RewardSample",
    "Scored",
    "SyncRewardClient",
    "Timeouts",
    "VerificationFailed",
    "outcome_of",
    "request_payload",
]
