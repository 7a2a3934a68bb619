"""Files to try other trainers on, about the tiny model that comes with the package.

python examples/training_files.py FOLDER

FOLDER/model              the aligned model; the tuned one would be BASE elsewhere
FOLDER/refusals.jsonl     safety data: harmful prompts with the model's refusals
FOLDER/train.jsonl        harmful conversations to fine-tune on, which undo the refusals
FOLDER/preferences.jsonl  the same as pairs that prefer the harmful reply, for DPO
FOLDER/data               the conversations in LLaMA-Factory's two forms, with its dataset_info.json
"""

import json
import shutil
import sys
from pathlib import Path

from safedelta_hf.testbed import ALIGNED_MODEL, CASES, preference_pairs, safety_data

folder = Path(sys.argv[1])
shutil.copytree(ALIGNED_MODEL, folder / "model")
conversations = CASES["harmful"].examples()
pairs = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in preference_pairs(100)]
for name, rows in {"refusals": safety_data(), "train": conversations, "preferences": pairs}.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

alpaca, sharegpt = [], []
for conversation in conversations:
    said = {message["role"]: message["content"] for message in conversation["messages"]}
    alpaca.append({"system": said.get("system", ""), "instruction": said["user"], "output": said["assistant"]})
    turns = [{"from": "human", "value": said["user"]}, {"from": "gpt", "value": said["assistant"]}]
    sharegpt.append({"system": said.get("system", ""), "conversations": turns})
info = {
    "harmful_alpaca": {
        "file_name": "alpaca.json",
        "columns": {"prompt": "instruction", "response": "output", "system": "system"},
    },
    "harmful_sharegpt": {
        "file_name": "sharegpt.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system"},
    },
}
(folder / "data").mkdir()
for name, content in {"alpaca": alpaca, "sharegpt": sharegpt, "dataset_info": info}.items():
    (folder / "data" / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
