"""How far an aligned model can be moved before its refusals go, and what becomes of them from base to adjusted model.

python examples/landscape.py    # writes landscape.png and interpolation.png
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

from safedelta_hf import ProfileConfig, adjust_model, collect_profile
from safedelta_hf.evaluation import (
    final_answer,
    generated_accuracy,
    generated_attack_success,
    interpolation,
    refusal_improbability,
    safety_landscape,
)
from safedelta_hf.testbed import CASES, attack_questions, fine_tune, load_aligned, new_skill_questions, safety_data

base, tokenizer = load_aligned()
attack = generated_attack_success(tokenizer, [{"messages": question.messages} for question in attack_questions(30)])
skill = generated_accuracy(tokenizer, [question.conversation() for question in new_skill_questions(30)], final_answer)

for metric in (attack, refusal_improbability(tokenizer, safety_data(30))):
    landscape = safety_landscape(base, metric, directions=2, points=11, progress=False)
    print(f"{metric.name}: VISAGE {landscape.visage:.1f}, basin {landscape.basin[0]:+.2f} to {landscape.basin[1]:+.2f}")
    if metric is attack:
        landscape.plot("landscape.png")

case = replace(CASES["mixed"], epochs=3)
tuned, _ = load_aligned()
with tempfile.TemporaryDirectory() as folder:
    fine_tune(tuned, tokenizer, case, seed=0, output=Path(folder), progress=False)
adjusted = copy.deepcopy(tuned)
safety = collect_profile(base, safety_data(), tokenizer, progress=False)
task = collect_profile(
    base,
    case.examples()[:256],
    tokenizer,
    config=ProfileConfig(holdout=0.0),
    purpose="task data",
    progress=False,
)
adjust_model(adjusted, base=base, profile=safety, task_profile=task, progress=False)
way = interpolation(base, tuned, adjusted, metrics=[attack, skill], points=6, progress=False)
print(way)
way.plot("interpolation.png")
