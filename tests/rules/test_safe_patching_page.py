"""What docs/rules/safe_patching.md shows runs as it stands, on a whole model."""

import re
from pathlib import Path

import torch

from tests.fixtures import adapters, tiny

PAGE = Path(__file__).parents[2] / "docs" / "rules" / "safe_patching.md"


def test_the_script_of_the_page_patches_a_model():
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    names = {
        "base": tiny.llama(),
        "tuned": tiny.perturbed(tiny.llama(), seed=1),
        "forgetful": tiny.perturbed(tiny.llama(), seed=2),
        "loosened": tiny.perturbed(tiny.llama(), seed=3),
        "harmful_questions": {"input_ids": tokens, "labels": tokens},
        "profile": adapters.profile_of(tiny.llama()),
    }
    before = tiny.weights(names["tuned"])
    exec(compile(script, str(PAGE), "exec"), names)
    found = tiny.weights(names["tuned"])
    changed = {name: int((found[name] != before[name]).sum()) for name in before}
    for name, count in changed.items():
        assert count <= int(0.1 * before[name].numel()) + int(0.05 * before[name].numel()), name
    assert sum(count > 0 for count in changed.values()) > 10
    assert "patched" in names["report"].parameters[0].notes[0]
