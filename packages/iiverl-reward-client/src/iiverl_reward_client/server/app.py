"""The HTTP application: `/reward` and `/ping` as existing clients use them, `/v1/*` in batches, `/metrics`."""

import asyncio
import json
import math
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from iiverl_reward_client.outcomes import FailureKind, Scored
from iiverl_reward_client.server import messages
from iiverl_reward_client.server.guard import Guard
from iiverl_reward_client.server.scoring import Result, Scoring
from iiverl_reward_client.verifiers import UnavailableError, VerifierError

_T = TypeVar("_T")

PROTOCOL = "iiverl-rewards/1"

_STATUS: dict[FailureKind, int] = {
    "bad_request": 422,
    "overload": 503,
    "timeout": 504,
    "transport": 502,
    "bad_response": 502,
    "server": 500,
    "function": 500,
    "environment": 500,
}
_CLIENT_GONE = 499
_TOKEN = [Security(HTTPBearer(auto_error=False))]  # only for the OpenAPI document; Guard checks the token
_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": messages.Detail, "description": "The bearer token is missing or wrong."},
    413: {"model": messages.Detail, "description": "The body or the batch is too large."},
    422: {"model": messages.Detail, "description": "The request is malformed."},
    503: {"model": messages.Detail, "description": "The server is busy; see Retry-After."},
}
_REWARD_ERRORS: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    400: {"model": messages.Detail, "description": "The type cannot be verified by this server."},
    500: {"model": messages.Detail, "description": "The verifier failed."},
    502: {"model": messages.Detail, "description": "What the verifier relies on failed."},
    504: {"model": messages.Detail, "description": "The verifier took too long."},
}


class _Json(JSONResponse):
    """JSON in ASCII, since UTF-8 cannot encode unpaired surrogates, which an `id` may hold."""

    def render(self, content: Any) -> bytes:
        """Write JSON without white space, as clients of `/reward` expect."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def create_app(scoring: Scoring) -> FastAPI:
    """Build the application around verifiers, which the caller starts and closes."""
    settings = scoring.settings
    app = FastAPI(
        title="iiverl rewards",
        version=PROTOCOL.rpartition("/")[2],
        description="Scores of language-model outputs: a score or a typed failure, never a made-up zero.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(RequestValidationError, _malformed)
    _add_old_routes(app, scoring)
    _add_batch_routes(app, scoring)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(scoring.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(
        Guard,
        token=settings.token.get_secret_value() if settings.token else None,
        max_body_bytes=settings.max_body_bytes,
        max_bodies_bytes=settings.max_bodies_bytes,
        requests=scoring.metrics.requests,
        paths=frozenset(path for route in app.routes if (path := getattr(route, "path", None))),
    )
    return app


def _add_old_routes(app: FastAPI, scoring: Scoring) -> None:
    @app.get("/ping", response_model=messages.Ping)
    async def ping() -> Response:
        """Check that the server is up."""
        return _Json({"status": "ok", "message": "the reward server is running"})

    @app.post(
        "/reward", response_model=messages.RewardResponse, responses=_REWARD_ERRORS, dependencies=_TOKEN
    )
    async def reward(request: Request, sample: messages.RewardRequest) -> Response:
        """Score one sample."""
        work = scoring.score(sample.llm_output, None, None, sample.verification_info)
        result = await _unless_gone(request, work)
        if result is None:
            return Response(status_code=_CLIENT_GONE)
        if isinstance(result, Scored):
            return _Json({"score": result.score})
        status = 400 if isinstance(result, UnavailableError) else _STATUS[result.kind]
        refusal = _error(status, result.detail, result.retry_after)
        if result.kind == "timeout":  # unlike a proxy's 504, it would take as long again
            refusal.headers["X-Should-Retry"] = "false"
        return refusal


def _add_batch_routes(app: FastAPI, scoring: Scoring) -> None:
    settings = scoring.settings

    @app.post("/v1/rewards", response_model=messages.BatchResponse, responses=_ERRORS, dependencies=_TOKEN)
    async def rewards(request: Request, batch: messages.BatchRequest) -> Response:
        """Score a batch of samples; each has its own result, in order."""
        samples = batch.samples
        if len(samples) > settings.max_batch:
            return _error(
                413, f"{len(samples)} samples in one request; this server takes {settings.max_batch}"
            )
        tasks = [scoring.score(s.llm_output, s.prompt, s.response, s.verification_info) for s in samples]
        results = await _unless_gone(request, _all(tasks))
        if results is None:
            return Response(status_code=_CLIENT_GONE)
        if results and all(isinstance(each, VerifierError) and each.kind == "overload" for each in results):
            waits = [each.retry_after or 1.0 for each in results if isinstance(each, VerifierError)]
            return _error(503, "no sample found a place; the server is busy", min(waits))
        answers = [_answer(sample.id, result) for sample, result in zip(samples, results, strict=True)]
        return _Json({"server_version": scoring.version, "results": answers})

    @app.get(
        "/v1/capabilities",
        response_model=messages.Capabilities,
        responses={401: _ERRORS[401]},
        dependencies=_TOKEN,
    )
    async def capabilities() -> Response:
        """Return what the server can verify, and its limits."""
        return _Json(
            {
                "protocol": PROTOCOL,
                "server_version": scoring.version,
                "types": scoring.types,
                "unavailable": scoring.unavailable,
                "max_batch": settings.max_batch,
                "max_body_bytes": settings.max_body_bytes,
                "max_seconds": scoring.max_seconds,
            }
        )

    @app.get("/v1/health", response_model=messages.Health)
    async def health() -> Response:
        """Return how busy the server is."""
        return _Json({"status": "ok", "in_flight": scoring.in_flight, "waiting": scoring.waiting})


def _answer(id: str, result: Result) -> dict[str, Any]:
    if isinstance(result, Scored):
        return {"id": id, "score": result.score, "components": result.components, "info": result.info}
    error = {"kind": result.kind, "detail": result.detail, "retry_after": result.retry_after}
    return {"id": id, "error": error}


def _error(status: int, detail: Any, retry_after: float | None = None) -> _Json:
    headers = {"Retry-After": str(max(1, math.ceil(retry_after or 0)))} if status == 503 else None
    return _Json({"detail": detail}, status, headers)


async def _all(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    return await asyncio.gather(*works)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T | None:
    """Await the work, and cancel it if the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _malformed(request: Request, error: Exception) -> _Json:
    """Report an invalid body in FastAPI's format, without repeating the body."""
    assert isinstance(error, RequestValidationError)
    detail = [{key: each[key] for key in ("type", "loc", "msg")} for each in error.errors()]
    return _error(422, detail)
