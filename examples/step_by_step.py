"""Without the callback: collect a profile once, keep it, and adjust any fine-tune of that base later."""

import tempfile
from pathlib import Path

from safedelta_hf import ProfileConfig, SafetyProfile, TaskRidge, adjust_model, collect_profile
from safedelta_hf.testbed import ALIGNED_MODEL, CASES, load_aligned, safety_data

base, tokenizer = load_aligned()
with tempfile.TemporaryDirectory() as folder:
    collect_profile(base, safety_data(), tokenizer).save(Path(folder) / "profile")
    profile = SafetyProfile.load(Path(folder) / "profile")

    task = collect_profile(
        base, CASES["benign"].examples()[:100], tokenizer, config=ProfileConfig(holdout=0.0), purpose="task data"
    )
    tuned, _ = load_aligned()
    for parameter in tuned.parameters():  # stands for a fine-tuning
        parameter.data.mul_(1.01)

    report = adjust_model(tuned, base=ALIGNED_MODEL, profile=profile, task_profile=task, rule=TaskRidge())
print(report)
