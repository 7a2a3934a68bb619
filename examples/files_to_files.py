"""Adjust a model in files, one weight at a time: base, fine-tune and profile are folders, and so is the result.

python examples/files_to_files.py FOLDER

The first half makes such folders of the tiny model that comes with the package.
"""

import sys
from pathlib import Path

from safedelta_hf import Ridge, adjust_checkpoint, collect_profile
from safedelta_hf.testbed import CASES, fine_tune, load_aligned, safety_data

folder = Path(sys.argv[1])
model, tokenizer = load_aligned()
model.save_pretrained(folder / "base")
collect_profile(model, safety_data(), tokenizer).save(folder / "profile")
fine_tune(model, tokenizer, CASES["harmful"], seed=0, output=folder / "trainer")
model.save_pretrained(folder / "tuned", max_shard_size="500KB")
tokenizer.save_pretrained(folder / "tuned")

report = adjust_checkpoint(
    base=folder / "base",
    tuned=folder / "tuned",
    profile=folder / "profile",
    output=folder / "adjusted",
    rule=Ridge(strength=10.0),
)
print(report.summary())
