import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.data.phrases import is_refusal
from safedelta_hf.errors import ConfigurationError, DataError, OutputError
from safedelta_hf.evaluation import generate_responses, read_prompts
from safedelta_hf.evaluation.refusals import ModelAnswers, ServerAnswers, collect_refusals, whole_sentences
from safedelta_hf.testbed import attack_questions, load_aligned, skill_questions


@pytest.fixture(scope="module")
def aligned():
    return load_aligned()


def prompts(harmful=6, benign=4):
    return read_prompts([{"messages": q.messages} for q in (*attack_questions(harmful), *skill_questions(benign))])


class Scripted:
    fingerprint = "scripted"

    def __init__(self, *texts, dies_after=None):
        self.texts, self.asked, self.dies_after = texts, [], dies_after

    def __call__(self, conversations, *, known, on_batch, progress):
        answers = dict(known)
        for index in range(len(conversations)):
            if index not in answers:
                if len(self.asked) == self.dies_after:
                    raise KeyboardInterrupt
                self.asked.append(index)
                answers[index] = self.texts[index]
                on_batch({index: self.texts[index]})
        return [answers[index] for index in range(len(conversations))]


def test_rows_are_the_prompts_with_the_very_refusals_that_the_model_generates(aligned):
    asked = prompts()
    found = collect_refusals(ModelAnswers(*aligned), asked, progress=False)
    responses = generate_responses(*aligned, [one.messages for one in asked], max_new_tokens=64, batch_size=8)
    expected = [(one.text, text) for one, text in zip(asked, responses, strict=True) if is_refusal(text)]
    assert len(expected) >= 6 and found.asked == 10
    assert [(row["messages"][-2]["content"], row["messages"][-1]["content"]) for row in found.rows] == expected
    assert found.share.value == len(expected) / 10
    assert len(read_safety_data(found.rows, aligned[1])) == len(expected)


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path):
    texts = ("I'm sorry.", "Sure!", "I cannot do that.", "Here.")
    log, asked = tmp_path / "answers.jsonl", read_prompts(["a", "b", "c", "d"])
    with pytest.raises(KeyboardInterrupt):
        collect_refusals(Scripted(*texts, dies_after=2), asked, log=log, progress=False)
    again = Scripted(*texts)
    found = collect_refusals(again, asked, log=log, progress=False)
    assert again.asked == [2, 3]
    assert found == collect_refusals(Scripted(*texts), asked, progress=False)
    with pytest.raises(OutputError, match="other prompts"):
        collect_refusals(Scripted(*texts), asked[:2], log=log, progress=False)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("I'm sorry, I cannot help. It would be wro", "I'm sorry, I cannot help."),
        ("Well. I'm sorry, but I cannot", "Well. I'm sorry, but I cannot"),  # the sentence alone would not refuse
        ("I cannot help", "I cannot help"),
        ("I cannot say 3.5 is right. No.", "I cannot say 3.5 is right. No."),
        ("I cannot\u3002\u4e0d", "I cannot\u3002\u4e0d"),  # no space after: the end is not told
    ],
)
def test_what_was_broken_off_ends_with_its_last_whole_sentence_that_refuses(text, cut):
    assert whole_sentences(text) == cut


def test_a_base_that_hardly_refuses_and_few_refusals_are_told():
    asked = read_prompts([str(number) for number in range(250)])
    hardly = collect_refusals(Scripted(*["I cannot"] * 50 + ["Sure"] * 200), asked, progress=False)
    assert "refuses 20%" in hardly.warning
    assert "90 refusals are few" in collect_refusals(Scripted(*["I cannot"] * 90), asked[:90], progress=False).warning
    assert not collect_refusals(Scripted(*["I cannot"] * 250), asked, progress=False).warning
    with pytest.raises(DataError, match="no prompts"):
        collect_refusals(Scripted(), [], progress=False)


@pytest.fixture
def server():
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, request, self.headers.get("Authorization")))
            content = "I cannot." if request["messages"][-1]["content"].startswith("bad") else "Sure."
            status = 500 if request["messages"][-1]["content"] == "broken" else 200
            body = json.dumps(
                {
                    "id": "1",
                    "created": 0,
                    "model": "m",
                    "system_fingerprint": "",
                    "object": "chat.completion",
                    "choices": [
                        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                    ],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                }
            ).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1", seen
    running.shutdown()


def test_a_server_is_asked_greedily_and_answers_keep_their_order(server):
    address, seen = server
    texts = [f"{'bad' if number % 3 else 'good'} {number}" for number in range(20)]
    found = collect_refusals(ServerAnswers(address, "m", max_new_tokens=5), read_prompts(texts), progress=False)
    assert [row["messages"][0]["content"] for row in found.rows] == [text for text in texts if text.startswith("bad")]
    assert {path for path, _, _ in seen} == {"/v1/chat/completions"} and len(seen) == 20
    assert all(one["temperature"] == 0 and one["max_tokens"] == 5 and one["model"] == "m" for _, one, _ in seen)
    assert {key for _, _, key in seen} == {"Bearer none"}


def test_a_server_that_fails_is_named_and_what_was_answered_is_kept(server, tmp_path):
    address, seen = server
    log, asked = tmp_path / "log.jsonl", read_prompts(["bad 1", "bad 2", "broken"])
    with pytest.raises(ConfigurationError, match="does not answer as model 'm'"):
        collect_refusals(ServerAnswers(address, "m", requests=1), asked, log=log, progress=False)
    before = len(seen)
    with pytest.raises(ConfigurationError):
        collect_refusals(ServerAnswers(address, "m", requests=1), asked, log=log, progress=False)
    assert {one["messages"][0]["content"] for _, one, _ in seen[before:]} == {"broken"}
