"""The HTML report: what it holds, how large it may be, and that the page works in a browser."""

import json
import re
import shutil
import subprocess
import threading
from base64 import b64decode
from html.parser import HTMLParser
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.data import write_tokenizer
from iiverl_core.registry.metrics import METRICS, describe
from iiverl_core.samples import SampleId, TokenSequence
from iiverl_core.sequence_files import write_sequences
from iiverl_core.telemetry.html_report import ReportedRun, ReportServer, write_html_report
from iiverl_core.telemetry.html_report.charts import CHARTS, MAX_POINTS, curves, shown_charts
from iiverl_core.telemetry.html_report.chosen_samples import MAX_TEXT, choose_samples, spread
from iiverl_core.telemetry.html_report.token_numbers import add_token_numbers
from iiverl_core.telemetry.samples import SCHEMA

HOSTILE = "</script><script>throw new Error('ran')</script>\u2028<!-- <b>"
CHROMIUM = next(
    (path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None
)


def sample(step: int, group: int, member: int, **values: Any) -> dict[str, Any]:
    score = float((group + member) % 2)
    return {
        "step": step, "group": group, "member": member, "prompt": f"prompt {group}", "response": f"response {step} {member}",
        "outcome": "scored", "score": score, "response_length": 7, "finish_reason": "stop", "weights_version": step - 1,
        "components": "{}",
    } | values  # fmt: skip


def dump(folder: Path, step: int, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / f"{step}.parquet")


def write_run(folder: Path, steps: int, rows: int = 4, **values: Any) -> ReportedRun:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "step": step, "time": 0.0, "critic/score/mean": step / steps, "critic/score/min": 0.0, "critic/score/max": 1.0,
            "timing_s/gen": 0.5, "timing_s/update_actor": 0.25, "timing_s/step": 0.8, "rollout/kl": None,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(1, steps + 1):
        dump(folder / "samples", step, [sample(step, i // 2, i % 2, **values) for i in range(rows)])
    return ReportedRun(folder.name, folder)


def dump_tokens(folder: Path, step: int, rows: list[dict[str, Any]], tokenizer: Any) -> None:
    """Write the sequences of a dump beside it: a token per byte, and one that ends the response, as it is sampled."""
    write_tokenizer(tokenizer, folder)
    sequences: list[TokenSequence] = []
    numbers: dict[str, dict[int, np.ndarray]] = {"advantages": {}, "old_log_probs": {}}
    for i, row in enumerate(rows):
        prompt, response = (tokenizer(row[name] or "")["input_ids"] for name in ("prompt", "response"))
        written = np.array([*response, tokenizer.eos_token_id])
        engine = -np.linspace(0, 3, len(written), dtype=np.float32)
        sequences.append(TokenSequence.single_turn(prompt, written, engine))
        if row["outcome"] == "scored":
            numbers["advantages"][i] = np.full(len(written), 0.5, np.float32)
            numbers["old_log_probs"][i] = engine + np.float32(0.25)
    ids = [SampleId("train", step, row["group"], row["member"]) for row in rows]
    write_sequences(folder / f"{step}.safetensors", sequences, ids, numbers)


def with_tokens(folder: Path) -> list[dict[str, Any]]:
    samples = choose_samples(folder).samples
    add_token_numbers(folder, samples, 10_000)
    return samples


def test_tokens_have_their_text_and_numbers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [
        sample(1, 0, 0, response="naïve 🙂"),
        sample(1, 0, 1, outcome="timeout"),
        sample(1, 1, 0, response=None),
    ]
    dump(tmp_path, 1, rows)
    dump_tokens(tmp_path, 1, rows, tiny_tokenizer)
    tokens = {(each["group"], each["member"]): each["tokens"] for each in with_tokens(tmp_path)}
    scored = tokens[0, 0]
    assert scored["after"] == "<|im_end|>" and "text" not in scored and "trained" not in scored
    # A byte that ends no character adds nothing; 🙂 is two units of UTF-16.
    assert list(b64decode(scored["lengths"])) == [1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 2, 10]
    assert (scored["advantage"], scored["mismatch"]) == (0.5, 0.25)  # of all tokens
    found = np.frombuffer(b64decode(scored["log_prob"]), "<f2")
    assert found == pytest.approx(-np.linspace(0, 3, 12), abs=2e-3)
    assert tokens[0, 1].keys() == {"lengths", "after", "log_prob"}  # it was not trained on
    assert tokens[1, 0]["text"] == "<|im_end|>"


def test_tokens_of_several_turns_say_which_the_policy_wrote(tmp_path: Path, tiny_tokenizer: Any) -> None:
    dump(tmp_path, 1, [sample(1, 0, 0, response="cd")])
    write_tokenizer(tiny_tokenizer, tmp_path)
    ids = np.array(tiny_tokenizer("qab..cd")["input_ids"])
    mask = np.array([False, True, True, False, False, True, True])
    turns = TokenSequence(ids, mask, np.where(mask, -1.0, 0.0).astype(np.float32))
    write_sequences(tmp_path / "1.safetensors", [turns], [SampleId("train", 1, 0, 0)])
    tokens = with_tokens(tmp_path)[0]["tokens"]
    assert tokens["text"] == "ab..cd" and list(b64decode(tokens["trained"])) == [1, 1, 0, 0, 1, 1]
    assert tokens["log_prob"] == -1.0


def test_without_tokens_or_a_tokenizer_there_are_no_colours(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [sample(1, 0, 0)]
    dump(tmp_path, 1, rows)
    assert "tokens" not in with_tokens(tmp_path)[0]
    for damaged in ("1.safetensors", "tokenizer.json"):
        dump_tokens(tmp_path, 1, rows, tiny_tokenizer)
        assert "tokens" in with_tokens(tmp_path)[0]
        (tmp_path / damaged).write_bytes(b"{half")
        assert "tokens" not in with_tokens(tmp_path)[0]


class Page(HTMLParser):
    """The scripts of a page, and every attribute that can make a browser ask for something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.links: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def data_of(path: Path) -> dict[str, Any]:
    return json.loads(Page(path.read_text("utf-8")).scripts[0])


def test_what_is_in_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=12)
    write_html_report(tmp_path / "report.html", [run])
    data = data_of(tmp_path / "report.html")
    assert data["runs"][0]["curves"]["values"]["critic/score/mean"][-1] == 1.0
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert charts["Reward"]["band"] == ["critic/score/min", "critic/score/max"]
    assert charts["Time of a step"]["metrics"] == ["timing_s/gen", "timing_s/update_actor"]  # not their sum
    assert data["meanings"]["critic/score/mean"][0] == "score"
    assert len(data["samples"]) == data["samples_total"] == 48
    assert data["samples"][0]["response"] == "response 1 0"
    assert not list(tmp_path.glob(".*"))


def test_texts_cannot_leave_their_place(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", steps=1, response=HOSTILE, outcome="environment", failure_detail=HOSTILE
    )
    write_html_report(tmp_path / "report.html", [ReportedRun("a <b> & {{ data }}", run.folder)])
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert len(page.scripts) == 2
    assert json.loads(page.scripts[0])["samples"][0]["response"] == HOSTILE


def test_it_asks_for_nothing(tmp_path: Path) -> None:
    write_html_report(tmp_path / "report.html", [write_run(tmp_path / "run", steps=2)])
    text = (tmp_path / "report.html").read_text("utf-8")
    assert all(link.startswith("#") for link in Page(text).links)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|sendBeacon|WebSocket", text)
    assert set(re.findall(r"https?://[^\s\"')]*", text)) == {"http" + "://www.w3.org/2000/svg"}  # a name


def test_a_hundred_steps_of_many_long_samples_take_two_megabytes(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "run"
    write_run(folder, steps=100, rows=0)
    for step in range(1, 101):
        rows = [sample(step, i // 4, i % 4, response="é" * 3000) for i in range(100)]
        dump(folder / "samples", step, rows)
        if step % 33 == 1:
            dump_tokens(folder / "samples", step, rows, tiny_tokenizer)
    assert write_html_report(tmp_path / "report.html", [ReportedRun("run", folder)]) < 2_000_000
    data = data_of(tmp_path / "report.html")
    assert data["samples_total"] == 10_000 and data["samples_estimated"]  # not all of the dumps are read
    coloured = [each["tokens"] for each in data["samples"] if "tokens" in each]
    assert coloured and all(
        each["total"] == 6001 and "text" not in each for each in coloured
    )  # the first 2000
    steps = {each["step"] for each in data["samples"]}
    assert {1, 100} <= steps and len(steps) > 20
    for _, group in groupby(data["samples"], key=lambda each: (each["step"], each["group"])):
        assert len(list(group)) == 4  # whole groups


def test_groups_with_failures_come_first_and_one_sample_is_always_there(tmp_path: Path) -> None:
    rows = [sample(1, i // 2, i % 2, response="x" * 400) for i in range(20)]
    rows[15] |= {"outcome": "timeout", "score": None, "failure_detail": "too late"}
    dump(tmp_path, 1, rows)
    chosen = choose_samples(tmp_path, max_bytes=1300).samples
    assert [(each["group"], each["outcome"]) for each in chosen] == [(7, "scored"), (7, "timeout")]
    assert "score" not in chosen[1]
    assert len(choose_samples(tmp_path, max_bytes=10).samples) == 1


def test_images_are_shown_once_and_count_for_the_size(tmp_path: Path) -> None:
    names = [f"{number:02}" for number in range(12)]
    for name in names:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.jpg").write_bytes(bytes(3000))
    dump(tmp_path, 1, [sample(1, i // 2, i % 2, images=[names[i // 2], "gone"]) for i in range(24)])
    chosen = choose_samples(tmp_path)
    assert [len(image) for image in chosen.images.values()] == [4000] * 4  # of 18 kB for a step
    assert {name for each in chosen.samples for name in each["images"]} - {"gone"} == set(chosen.images)
    assert len(chosen.samples) == 8
    run = write_run(tmp_path / "run", steps=1, images=["ca"])
    write_html_report(tmp_path / "report.html", [run])
    assert data_of(tmp_path / "report.html")["images"] == {}
    (run.folder / "samples" / "images").mkdir()
    (run.folder / "samples" / "images" / "ca.jpg").write_bytes(b"cat")
    write_html_report(tmp_path / "report.html", [run])
    assert data_of(tmp_path / "report.html")["images"] == {"ca": "Y2F0"}


def test_long_texts_are_cut_in_the_middle_and_damaged_dumps_left_out(tmp_path: Path) -> None:
    dump(tmp_path, 1, [sample(1, 0, 0, response="a" * MAX_TEXT + "b" * MAX_TEXT)])
    (tmp_path / "2.parquet").write_bytes(b"PAR1 half")
    (tmp_path / "notes.parquet").write_bytes(b"")
    (chosen,) = choose_samples(tmp_path).samples
    assert chosen["response"].startswith("aaa") and chosen["response"].endswith("bbb")
    assert f"{MAX_TEXT} characters are left out" in chosen["response"]
    assert choose_samples(tmp_path / "none").samples == []


@given(st.integers(0, 300))
def test_the_first_of_the_spread_steps_are_spread(count: int) -> None:
    steps = list(range(count))
    order = spread(steps)
    assert sorted(order) == steps
    for size in (5, 9, 17, 33):
        if size < count:
            first = sorted(order[:size])
            gaps = [b - a for a, b in pairwise(first)]
            assert (first[0], first[-1]) == (0, count - 1) and max(gaps) <= 2 * min(gaps) + 2


def test_long_runs_keep_some_steps_and_the_last() -> None:
    history = [{"step": step, "a": float(step), "b": None} for step in range(1, 3 * MAX_POINTS)]
    thinned = curves(history)
    assert len(thinned["steps"]) <= MAX_POINTS + 1
    assert thinned["steps"][0] == 1 and thinned["steps"][-1] == 3 * MAX_POINTS - 1
    assert thinned["values"] == {"a": [float(step) for step in thinned["steps"]]}


def test_charts_name_metrics_that_exist() -> None:
    for chart in CHARTS:
        for name in (*chart.metrics, *(chart.band or ())):
            before, star, after = name.partition("*")
            known = [each for each in METRICS if each.startswith(before) and each.endswith(after)]
            assert known if star else describe(name), name
    assert shown_charts(["step", "time", "my/metric"]) == []


ACTIONS = """
const seen = {}, problems = [];
window.addEventListener("error", (event) => problems.push(event.message));
const set = (id, value, kind) => { byId(id).value = value; byId(id).dispatchEvent(new Event(kind, { bubbles: true })); };
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const rows = () => [...document.querySelectorAll("#list li[data-key]")].map((row) => row.dataset.key);
seen.charts = [...document.querySelectorAll(".chart h2")].map((each) => each.textContent);
seen.paths = [...document.querySelectorAll(".chart path")].filter((each) => each.getAttribute("d")).length;
seen.curves = byId("part-samples").hidden;
press("s");
seen.samples = byId("part-curves").hidden;
seen.all = rows().length;
set("kind", "failed", "change"); seen.failed = rows();
seen.why = byId("detail").textContent.includes("ran too long");
set("kind", "best", "change"); seen.best = rows().length;
set("kind", "", "change"); set("text", "RESPONSE 2 1", "input"); seen.text = rows();
seen.found = [...document.querySelectorAll(".found")].map((each) => each.textContent).join("");
set("colour", "", "change"); seen.marks = document.querySelectorAll("mark").length;
set("text", "", "input"); seen.colours = {};
for (const name of ["", "advantage", "log_prob", "mismatch", "trained"]) {
  set("colour", name, "change");
  const spans = [...document.querySelectorAll(".token")];
  const colours = new Set(spans.map((each) => getComputedStyle(each).backgroundColor));
  seen.colours[name] = [spans.map((each) => each.textContent).join(""), spans.length, colours.size];
}
press("t"); press("t"); press("t"); seen.colour = byId("colour").value;
const box = document.querySelector(".tokens");
for (const key of ["ArrowRight", "ArrowRight"]) box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
seen.token = document.querySelector(".token-numbers").textContent;
set("order", "high", "change"); seen.first = document.querySelector("#list .score").textContent;
set("order", "", "change"); press("j"); press("j"); press("k");
seen.address = location.hash;
document.querySelector('.group button[aria-current="false"]').click();
seen.other = location.hash;
set("metric", "timing_s/gen", "input"); seen.extra = document.querySelector(".chart h2").textContent;
showStep(3); seen.step = [...new Set(rows().map((each) => each.split(".")[0]))];
seen.wide = document.documentElement.scrollWidth > window.innerWidth;
seen.problems = problems;
const result = document.createElement("pre"); result.id = "result"; result.textContent = JSON.stringify(seen); document.body.append(result);
"""


def dumped(address: str, profile: Path, width: int = 1300) -> str:
    """The page's elements after some seconds in a browser."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--dump-dom",
    ]
    command += ["--virtual-time-budget=8000", f"--user-data-dir={profile}", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_in_a_browser(tmp_path: Path, width: int, tiny_tokenizer: Any) -> None:
    run = write_run(tmp_path / "run", steps=3, response=None)
    for step in (1, 2, 3):
        rows = [sample(step, i // 2, i % 2) for i in range(4)]
        if step == 3:
            rows[3] |= {
                "outcome": "timeout",
                "score": None,
                "failure_detail": "ran too long",
                "response": HOSTILE,
            }
        dump(run.folder / "samples", step, rows)
        dump_tokens(run.folder / "samples", step, rows, tiny_tokenizer)
    page = tmp_path / "report.html"
    write_html_report(page, [run, write_run(tmp_path / "other", steps=2)])
    page.write_text(
        page.read_text("utf-8").replace(
            "</body>", f"<script>setTimeout(() => {{{ACTIONS}}}, 300)</script></body>"
        )
    )
    dom = dumped(page.as_uri(), tmp_path / "profile", width)
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["problems"] == [] and not seen["wide"]
    assert seen["charts"] == ["Reward", "Time of a step"] and seen["paths"] >= 4
    assert seen["curves"] and seen["samples"] and seen["all"] == 12
    assert seen["failed"] == ["3.1.1"] and seen["why"]
    assert seen["best"] == 6
    assert seen["text"] == ["2.0.1", "2.1.1"] and seen["marks"] == 1
    assert seen["found"] == "response 2 1"
    text = "response 2 1<|im_end|>"
    assert seen["colours"] == {
        "": ["", 0, 0], "advantage": [text, 13, 1], "log_prob": [text, 13, 13], "mismatch": [text, 13, 1], "trained": [text, 13, 1],
    }  # fmt: skip
    assert seen["colour"] == "log_prob"
    assert seen["token"] == 'token 2 of 13 "e": log-prob -0.25, mismatch 0.25, advantage 0.5'
    assert seen["first"] == "1"
    assert seen["address"] == "#samples=2.1.0" and seen["other"] == "#samples=2.1.1"
    assert seen["extra"] == "timing_s/gen" and seen["step"] == ["3"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_served_page_shows_new_steps_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", steps=2)
    pages: list[str] = []
    make = ReportServer.page

    def noted(self: ReportServer) -> str:
        pages.append(make(self))
        if len(pages) == 1:
            write_run(run.folder, steps=3)
        return pages[-1]

    monkeypatch.setattr(ReportServer, "page", noted)
    with ReportServer(("127.0.0.1", 0), [run]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dom = dumped(f"http://127.0.0.1:{server.server_port}/", tmp_path / "profile")
        server.shutdown()
    assert len(pages) == 2
    assert "step <b>3</b>" in dom
