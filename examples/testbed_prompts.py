"""Files to try `safedelta eval` on, about the tiny model that comes with the package.

python examples/testbed_prompts.py FOLDER    # harmful.jsonl, benign.jsonl, refusals.jsonl, task.jsonl
"""

import json
import sys
from pathlib import Path

from safedelta_hf.testbed import attack_questions, new_skill_questions, safety_data, skill_questions

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
files = {
    "harmful": [{"messages": question.messages} for question in attack_questions(100)],
    "benign": [{"messages": question.messages} for question in skill_questions(100, skills=("make",))],
    "refusals": safety_data(64, seed=1),
    "task": [question.conversation() for question in new_skill_questions(100)],
}
for name, rows in files.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
