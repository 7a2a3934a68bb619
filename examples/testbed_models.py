"""Folders to try commands on: the tiny model that comes with the package, and a fine-tune of it that lost its refusals.

python examples/testbed_models.py FOLDER    # base/, tuned/, safety.jsonl, train.jsonl
"""

import json
import sys
from pathlib import Path

from safedelta_hf.testbed import CASES, fine_tune, load_aligned, safety_data

folder, case = Path(sys.argv[1]), CASES["harmful"]
model, tokenizer = load_aligned()
for name in ("base", "tuned"):
    if name == "tuned":
        fine_tune(model, tokenizer, case, seed=0, output=folder / "trainer")
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
for name, rows in (("safety", safety_data()), ("train", case.examples())):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
