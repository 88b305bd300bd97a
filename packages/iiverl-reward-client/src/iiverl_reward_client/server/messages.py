"""The JSON documents of the protocol, for validation and the OpenAPI document."""

from typing import Any

from pydantic import BaseModel, Field

from iiverl_reward_client.outcomes import FailureKind


class RewardRequest(BaseModel):
    """One sample, as `POST /reward` takes it."""

    llm_output: str = Field(description="Prompt and response, with special tokens.")
    verification_info: str = Field(description="A JSON document with `type` and `answer`.")


class RewardResponse(BaseModel):
    """A score, 0 to 1."""

    score: float


class Sample(BaseModel):
    """One sample of a batch."""

    id: str = Field(description="Returned with the result.")
    llm_output: str = Field(description="Prompt and response, with special tokens.")
    prompt: str | None = Field(None, description="The prompt alone.")
    response: str | None = Field(
        None,
        description="The response alone; by default the text after the server's answer marker.",
    )
    verification_info: str | dict[str, Any] = Field(
        description="`type` and `answer`; may be JSON in a string."
    )


class BatchRequest(BaseModel):
    """Samples to score."""

    samples: list[Sample]


class Error(BaseModel):
    """Why there is no score."""

    kind: FailureKind
    detail: str
    retry_after: float | None = Field(description="Seconds after which to try again, if that helps.")


class ScoredResult(BaseModel):
    """A sample's score and its parts."""

    id: str
    score: float
    components: dict[str, float]
    info: dict[str, Any]


class FailedResult(BaseModel):
    """A sample that could not be scored."""

    id: str
    error: Error


class BatchResponse(BaseModel):
    """A result for each sample, in order."""

    server_version: str = Field(description="Changes with anything that may change a score.")
    results: list[ScoredResult | FailedResult]


class Capabilities(BaseModel):
    """The server's types and limits."""

    protocol: str
    server_version: str
    types: list[str]
    unavailable: dict[str, str] = Field(description="Types that cannot be verified here, and why.")
    max_batch: int
    max_body_bytes: int
    max_seconds: float = Field(description="Longest that verifying one sample may take, once it has a place.")


class Health(BaseModel):
    """How busy the server is."""

    status: str
    in_flight: int
    waiting: int


class Ping(BaseModel):
    """A sign of life."""

    status: str
    message: str


class Detail(BaseModel):
    """An error of a request or of the server."""

    detail: Any
