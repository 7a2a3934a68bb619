import json

import pytest

from safedelta_hf.errors import DataError
from safedelta_hf.evaluation.responses import ResponseFile

MADE = {"model": "m", "prompts": "p", "settings": "s"}


@pytest.fixture
def path(tmp_path):
    file = ResponseFile(tmp_path / "responses.jsonl")
    file.begin("harmful", MADE)
    file.append("harmful", {0: {"response": "no"}, 2: {"response": "line\nbreak \u2028"}})
    file.begin("benign", {**MADE, "prompts": "q"})
    file.append("benign", {0: {"response": "yes"}})
    return tmp_path / "responses.jsonl"


def test_what_was_written_is_found_again_part_by_part(path):
    file = ResponseFile(path)
    assert file.begin("harmful", MADE) == {0: {"response": "no"}, 2: {"response": "line\nbreak \u2028"}}
    assert file.begin("benign", {**MADE, "prompts": "q"}) == {0: {"response": "yes"}}
    assert file.begin("task", MADE) == {}


def test_going_on_writes_no_second_head(path):
    file = ResponseFile(path)
    file.begin("harmful", MADE)
    file.append("harmful", {1: {"response": "never"}})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("made_with" in line for line in lines) == 2 and len(lines) == 6


@pytest.mark.parametrize("changed", ["model", "prompts", "settings"])
def test_a_part_made_with_something_else_is_refused_and_kept(path, changed):
    before = path.read_bytes()
    with pytest.raises(DataError, match=f"harmful results there were made with other {changed}; choose another"):
        ResponseFile(path).begin("harmful", {**MADE, changed: "other"})
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_was_cut_short_is_dropped_and_the_others_stay(path, cut):
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: len(whole) - min(cut, len(whole) - last)])
    file = ResponseFile(path)
    assert path.read_bytes() == whole[:last]
    assert file.begin("benign", {**MADE, "prompts": "q"}) == {}
    file.append("benign", {0: {"response": "yes"}})
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"index": 0}', '{"part": "unknown", "index": 0}', '{"part": "harmful"}']
)
def test_foreign_files_are_refused_with_the_line(path, line):
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 6 is no line of a response file"):
        ResponseFile(path)
