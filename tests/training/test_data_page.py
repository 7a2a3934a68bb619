"""What docs/training/data.md shows runs as it stands."""

import json
import re
from pathlib import Path

import pytest

from tests.fixtures import tiny

PAGE = Path(__file__).parents[2] / "docs" / "training" / "data.md"


@pytest.mark.filterwarnings("ignore::safedelta_hf.errors.SafeDeltaWarning")
def test_the_script_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [row["messages"] for row in tiny.conversations(2)]
    triples = [{"prompt": one[:1], "chosen": one[1:], "rejected": [one[1] | {"content": "yes sure"}]} for one in turns]
    Path("triples.jsonl").write_text("\n".join(map(json.dumps, triples)))
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    script = script.replace('output_dir="out"', 'output_dir="out", use_cpu=True')  # a GPU is not everywhere
    names = {"model": tiny.llama(), "tokenizer": tiny.tokenizer(), "task": tiny.conversations(40)}
    names["tokenizer"].add_tokens(["Sorry,"])
    exec(compile(script, str(PAGE), "exec"), names)
    assert len(names["rows"]) == 42 and not tiny.same(tiny.weights(names["model"]), tiny.weights(tiny.llama()))
