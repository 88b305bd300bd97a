"""The reward server's wire protocol: what is sent, and what an answer means."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_reward_client import Failed, Scored, outcome_of, request_payload

INFO = {"answer": {"value": "½ · 日本"}, "type": "math_verifiable"}


def test_a_string_passes_through_unread():
    assert request_payload("out", "{ no json") == {"llm_output": "out", "verification_info": "{ no json"}


def test_a_mapping_is_written_as_json():
    payload = request_payload("out", INFO)
    assert json.loads(payload["verification_info"]) == INFO
    assert json.loads(json.dumps(payload)) == payload


@pytest.mark.parametrize("info", [None, 3, ["x"], b"{}"])
def test_anything_else_is_refused(info):
    with pytest.raises(TypeError, match="verification_info must be a JSON string or a mapping"):
        request_payload("out", info)


def test_a_mapping_that_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        request_payload("out", {"value": math.nan})
    with pytest.raises(TypeError):
        request_payload("out", {"value": {1, 2}})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"score": 1.0}', Scored(1.0)),
        ('{"score": 0}', Scored(0.0)),
        (b'{"score": -0.5}', Scored(-0.5)),
        ('{"score": 0.9, "format": 1, "why": "x"}', Scored(0.9, info={"format": 1, "why": "x"})),
    ],
)
def test_a_finite_number_is_a_score(body, expected):
    assert outcome_of(200, body) == expected


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("", 'expected {"score": number}'),
        ("OK", "'OK'"),
        ("0.5", "'0.5'"),
        ("[0.5]", "'[0.5]'"),
        ("null", "'null'"),
        ("{}", "'{}'"),
        ('{"reward": 1}', "reward"),
        ('{"score": 1', "score"),
        (b"\xff\xfe", 'expected {"score": number}'),
        ("[" * 100_000, 'expected {"score": number}'),
        ('{"score": NaN}', "not a finite number: nan"),
        ('{"score": Infinity}', "not a finite number: inf"),
        ('{"score": 1e999}', "not a finite number: inf"),
        ('{"score": 1' + "0" * 400 + "}", "not a finite number: 1000"),
        ('{"score": "1.0"}', "not a finite number: '1.0'"),
        ('{"score": true}', "not a finite number: True"),
        ('{"score": null}', "not a finite number: None"),
        ('{"score": [1]}', "not a finite number: [1]"),
    ],
)
def test_a_success_without_a_score_is_a_bad_response(body, detail):
    outcome = outcome_of(200, body)
    assert isinstance(outcome, Failed)
    assert outcome.kind == "bad_response"
    assert detail in outcome.detail
    assert len(outcome.detail) < 250


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "bad_request"),
        (401, "bad_request"),
        (404, "bad_request"),
        (422, "bad_request"),
        (408, "timeout"),
        (429, "overload"),
        (503, "overload"),
        (500, "server"),
        (502, "server"),
        (504, "server"),
        (204, "bad_response"),
        (302, "bad_response"),
        (700, "bad_response"),
    ],
)
def test_the_status_decides_the_kind_of_failure(status, kind):
    # A score in the body of an error is no score.
    outcome = outcome_of(status, '{"score": 1.0}', attempts=4)
    assert isinstance(outcome, Failed)
    assert (outcome.kind, outcome.attempts) == (kind, 4)
    assert outcome.detail.startswith(f"HTTP {status}")


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ('{"detail": "unknown type: maths"}', "HTTP 422: unknown type: maths"),
        (b'{"detail": "no sandbox\\nset up"}', "HTTP 422: no sandbox set up"),
        ('{"detail": [{"loc": ["body"], "msg": "field required"}]}', "field required"),
        ("<html>Bad\n\nGateway</html>", "HTTP 422: <html>Bad Gateway</html>"),
    ],
)
def test_what_the_server_says_is_told(body, detail):
    outcome = outcome_of(422, body)
    assert isinstance(outcome, Failed)
    assert detail in outcome.detail


def test_an_empty_or_endless_body_is_told_briefly():
    assert outcome_of(500, "") == Failed("server", 1, "HTTP 500")
    outcome = outcome_of(500, "x" * 1_000_000)
    assert isinstance(outcome, Failed)
    assert len(outcome.detail) < 350


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["score", "detail"]) | st.text(), inner),
    max_leaves=8,
)


@given(st.integers(100, 599) | st.just(200), JSON.map(json.dumps) | st.text() | st.binary())
def test_no_answer_raises_and_none_but_a_finite_number_is_a_score(status, body):
    outcome = outcome_of(status, body)
    if isinstance(outcome, Scored):
        answer = json.loads(body)
        assert status == 200
        assert type(answer["score"]) in (int, float)
        assert math.isfinite(outcome.score)


@given(st.integers(0, 5000), st.sampled_from([200, 422, 500]))
def test_deep_nesting_raises_nothing(depth, status):
    assert isinstance(outcome_of(status, '{"detail": ' + "[" * depth + "]" * depth + "}"), Failed)


def test_the_package_imports_none_of_the_heavy_ones():
    heavy = ["torch", "ray", "pydantic", "numpy", "iiverl_core"]
    code = f"import sys, iiverl_reward_client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
