"""Find the layers by which the model recognises harmful requests, and fine-tune all others (SPPFT).

python examples/safety_layers.py    # writes safety-layers.json and safety-layers.png
"""

import tempfile
from pathlib import Path

from safedelta_hf.testbed import CASES, fine_tune, load_aligned, safety_data, skill_questions
from safedelta_hf.testbed.model import behaviour_scores
from safedelta_hf.training import FreezeSafetyLayers, freeze_layers, locate_safety_layers

model, tokenizer = load_aligned()
normal, harmless = (skill_questions(48, seed=seed, skills=("make",)) for seed in (0, 3))
layers = locate_safety_layers(
    model,
    tokenizer,
    normal=[{"messages": question.messages} for question in normal],
    malicious=safety_data(48),
    over_refusal=[{"messages": question.messages} for question in harmless],
    alpha=0.9,  # this model refuses more where it is weakened, and never where it is strengthened
)
print(layers)
layers.save("safety-layers.json")
layers.plot("safety-layers.png")

for is_frozen in (False, True):
    model, tokenizer = load_aligned()
    frozen = freeze_layers(model, layers) if is_frozen else ()
    callbacks = [FreezeSafetyLayers(layers)] if is_frozen else []
    with tempfile.TemporaryDirectory() as folder:
        fine_tune(model, tokenizer, CASES["identity"], seed=0, output=Path(folder), callbacks=callbacks, progress=False)
    scores = behaviour_scores(model, tokenizer, has_new_skill=False, questions=60)
    shares = ", ".join(f"{name.replace('_', ' ')} {score.value:.0%}" for name, score in scores.items())
    print(f"{len(frozen):2d} parameters frozen: {shares}")
