"""What settings of the defences in the training step do to a fine-tuning of the testbed.

python examples/benchmarks/defence_settings.py --case benign --seeds 0 1

Attack success on unseen harmful requests, right answers to the new skill and to the old ones, loss on unseen examples
of the fine-tuning data, seconds of training. "mixed in" adds the safe replies of the probe's own pairs to the data.
Defences beside one another, at one setting each, alone and with a rule after them: safedelta compare --method all.
"""

import argparse
from collections.abc import Callable
from functools import partial

from transformers import Trainer

from safedelta_hf import with_ordinary
from safedelta_hf.evaluation import refusal_likelihood
from safedelta_hf.testbed import CASES, preference_pairs, tokenize
from safedelta_hf.testbed.comparison import CaseScenario
from safedelta_hf.testbed.defences import AlignedModel, Training
from safedelta_hf.training import ProjectedTraining, SafetyProbeConfig, with_safety_probe

PAIRS = preference_pairs(50)


def mixed_in(scenario: CaseScenario) -> Training:
    """The case's examples with the safe replies."""
    safe = [{"messages": row["prompt"] + row["chosen"]} for row in PAIRS]
    return Training(rows=tokenize([*scenario.case.examples(scenario.seed), *safe], scenario.aligned.tokenizer))


def probed(scenario: CaseScenario, **settings: float) -> Training:
    """A Trainer whose steps are probed."""
    config = SafetyProbeConfig(pairs=PAIRS, **settings)
    return Training(make_trainer=partial(with_safety_probe(Trainer), probe=config))


def projected(scenario: CaseScenario, ordinary_weight: float = 0.0, **settings: float) -> Training:
    """A Trainer whose delta is projected."""
    profile = (
        with_ordinary(scenario.profile, scenario.ordinary, ordinary_weight) if ordinary_weight else scenario.profile
    )
    return Training(callbacks=(ProjectedTraining(profile=profile, **settings),))


SETTINGS: dict[str, Callable[[CaseScenario], Training]] = {
    "plain": lambda _: Training(),
    "mixed in": mixed_in,
    "probe": probed,
    "probe, epsilon 0.1": partial(probed, epsilon=0.1),
    "probe, beta 0.5": partial(probed, beta=0.5, epsilon=1e-3),
    "projected, 0.001": partial(projected, strength=1e-3),
    "projected, 0.001, ordinary weight 0.3": partial(projected, ordinary_weight=0.3, strength=1e-3),
    "projected, 0.01, ordinary weight 0.3": partial(projected, ordinary_weight=0.3, strength=1e-2),
    "hard, 0.01": partial(projected, hard=0.01),
    "hard, 0.001": partial(projected, hard=0.001),
}


def main() -> None:
    """Train, measure, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES, default="benign")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    aligned, case = AlignedModel(), CASES[options.case]
    columns = ("case, seed", "settings", "attack", "new skill", "old skills", "nats per token", "seconds")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for seed in options.seeds:
        scenario = CaseScenario(aligned, case, seed, options.questions)
        for name in options.settings:
            model, seconds = scenario.trained(training=SETTINGS[name](scenario))
            scores = scenario.measure(model)
            loss = refusal_likelihood(model, case.examples(seed + 1000)[:200], aligned.tokenizer).mean
            shares = [
                f"{scores[kind].value:.3f}" if kind in scores else "-"
                for kind in ("attack_success", "new_skill", "old_skills")
            ]
            print(f"| {case.name} {seed} | {name} | {' | '.join(shares)} | {loss:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
