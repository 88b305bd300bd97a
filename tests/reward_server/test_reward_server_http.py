"""The protocol over raw HTTP: the old routes byte for byte, and the batch route."""

import json
from typing import Any

import pytest

from reward_server.served import Server, batch_sample, request

PROMPT = "q<｜Assistant｜>"


def test_ping(server: Server) -> None:
    answer = server.raw(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.body.startswith(b'{"status":"ok","message":"')


def reward_bytes(llm_output: str, verification_info: str) -> bytes:
    """A request as `requests.post(url, json=…)` writes it."""
    body = json.dumps({"llm_output": llm_output, "verification_info": verification_info}).encode()
    return request("POST", "/reward", body, {"user-agent": "python-requests/2.32", "accept": "*/*"})


def info(type: str, answer: Any) -> str:
    return json.dumps({"type": type, "answer": answer})


@pytest.mark.parametrize(
    ("llm_output", "answer", "body"),
    [
        (PROMPT + "\\boxed{420}", "420", b'{"score":1.0}'),
        (PROMPT + "\\boxed{7}", "420", b'{"score":0.0}'),
        (PROMPT + "420", "420", b'{"score":0.0}'),
        ("in \\boxed{420}" + PROMPT + "nothing", "420", b'{"score":0.0}'),
        ("\\boxed{420}", "420", b'{"score":1.0}'),
        (PROMPT + "\\boxed{0.5}<｜end▁of▁sentence｜>", "\\frac12", b'{"score":1.0}'),
    ],
)
def test_reward(server: Server, llm_output: str, answer: str, body: bytes) -> None:
    got = server.raw(reward_bytes(llm_output, info("math_verifiable", {"value": answer})))
    assert (got.status, got.headers["content-type"], got.body) == (200, "application/json", body)


@pytest.mark.parametrize(
    ("verification_info", "body"),
    [
        ("{", b'{"detail":"verification_info is not JSON: '),
        ("[" * 100_000, b'{"detail":"verification_info is not JSON: '),
        ("9" * 5000, b'{"detail":"verification_info is not JSON: '),
        ("[]", b'{"detail":"verification_info must be a JSON object, not list"}'),
        ('{"answer": {"value": "1"}}', b'{"detail":"verification_info has no \'type\'"}'),
        ('{"type": "math_verifiable"}', b'{"detail":"verification_info has no \'answer\'"}'),
        (
            '{"type": "x", "answer": {}}',
            b'{"detail":"verification_info has the unknown type \'x\'; known: math',
        ),
        ('{"type": ["x"], "answer": {}}', b'{"detail":"verification_info has the unknown type ['),
        (
            '{"type": "math_verifiable", "answer": {"value": 1}}',
            b'{"detail":"math_verifiable: answer.value is a string, not int"}',
        ),
    ],
)
def test_a_bad_verification_info_is_422_with_a_detail(
    server: Server, verification_info: str, body: bytes
) -> None:
    answer = server.raw(reward_bytes("x", verification_info))
    assert answer.status == 422
    assert answer.body.startswith(body)
    assert list(answer.json) == ["detail"]


def test_a_bad_body_is_422_in_the_form_of_fastapi(server: Server) -> None:
    answer = server.post("/reward", {"llm_output": "a secret"})
    assert answer.status == 422
    assert answer.body == (
        b'{"detail":[{"type":"missing","loc":["body","verification_info"],"msg":"Field required"}]}'
    )
    assert server.raw(request("POST", "/reward", b"{", {})).status == 422


def test_what_cannot_be_set_up_is_400(server: Server) -> None:
    answer = server.raw(reward_bytes("x", info("llm_judge", {"value": "1"})))
    assert answer.status == 400
    assert b"LLM_JUDGE_MODEL" in answer.body


def test_a_batch_has_a_result_for_each_in_order(server: Server) -> None:
    samples = [
        {**batch_sample("\\boxed{1}", "math_verifiable", {"value": "1"}), "id": "a"},
        {**batch_sample("x", "nothing", {}), "id": "b"},
        {
            "id": "\ud800",
            "llm_output": "q\\boxed{1}",
            "prompt": "q\\boxed{2}",
            "response": "\\boxed{3}",
            "verification_info": info("math_verifiable", {"value": "3"}),
        },
    ]
    answer = server.post("/v1/rewards", {"samples": samples})
    assert answer.status == 200
    first, second, third = answer.json["results"]
    assert first == {"id": "a", "score": 1.0, "components": {}, "info": {}}
    assert second["id"] == "b"
    assert second["error"]["kind"] == "bad_request"
    assert second["error"]["retry_after"] is None
    assert (third["id"], third["score"]) == ("\ud800", 1.0)
    assert answer.json["server_version"] == server.get("/v1/capabilities").json["server_version"]


def test_an_empty_batch(server: Server) -> None:
    assert server.post("/v1/rewards", {"samples": []}).json["results"] == []


@pytest.mark.parametrize("document", [{}, [], {"samples": [{"id": "a"}]}, {"samples": [{"id": 1}]}])
def test_a_malformed_batch_is_422(server: Server, document: Any) -> None:
    assert server.post("/v1/rewards", document).status == 422


def test_capabilities_and_health(server: Server) -> None:
    capabilities = server.get("/v1/capabilities").json
    assert capabilities["protocol"] == "iiverl-rewards/1"
    assert {"math_verifiable", "swe_verifiable"} <= set(capabilities["types"])
    assert "LLM_JUDGE_MODEL" in capabilities["unavailable"]["llm_judge"]
    assert (capabilities["max_batch"], capabilities["max_body_bytes"]) == (256, 32 * 2**20)
    assert server.get("/v1/health").json == {"status": "ok", "in_flight": 0, "waiting": 0}


EDIT = ("swe_verifiable", {"input": "a", "ground_truth": "b"})


def test_the_format_score_and_another_marker(start: Any) -> None:
    server = start(use_format_verifier=True, answer_marker="assistant\n", end_token="<|im_end|>")
    answer = server.reward("```\nc\n```assistant\n```\nb\n```", *EDIT)
    assert answer.json == {"score": pytest.approx(0.9)}
    good = "q assistant\n<think>x</think>```\nb\n```\n<|im_end|>"
    (result,) = server.rewards((good, *EDIT))
    assert result["score"] == pytest.approx(1.0)
    assert result["components"] == {"answer": 1.0, "format": 1.0}


def test_metrics_tell_requests_scores_and_failures(start: Any) -> None:
    server = start()
    server.reward("```\nb\n```", *EDIT)
    server.reward("", "x" * 100, {})
    server.get("/nowhere")
    lines = server.get("/metrics").body.decode().splitlines()
    for line in (
        'iiverl_reward_requests_total{path="/reward",status="200"} 1.0',
        'iiverl_reward_requests_total{path="/reward",status="422"} 1.0',
        'iiverl_reward_requests_total{path="other",status="404"} 1.0',
        'iiverl_reward_score_sum{type="swe_verifiable"} 1.0',
        'iiverl_reward_score_count{type="swe_verifiable"} 1.0',
        'iiverl_reward_failures_total{kind="bad_request",type="unknown"} 1.0',
        'iiverl_reward_seconds_count{type="swe_verifiable"} 1.0',
        'iiverl_reward_in_flight{type="swe_verifiable"} 0.0',
        'iiverl_reward_waiting{type="swe_verifiable"} 0.0',
    ):
        assert line in lines
