"""Writes docs/architectures.md: `python -m tests.architecture_table docs/architectures.md`."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import transformers

from safedelta_hf import collect_profile
from tests import architectures, tiny

INTRODUCTION = """# Architectures

Every key of transformers' causal-LM mapping ({version}), as a tiny model with random weights whose configuration is
shrunk from the default one. {built} of {total} are built and read, and for {covered} at least 95 % of the parameters
that the safety data reaches are under a rule. Written by

```bash
python -m tests.architecture_table docs/architectures.md
```

and tested, one by one, by `pytest tests/test_architectures.py -m "slow or not slow"`: infinite budget gives the
tuned weights and zero budget the base, bit for bit, every parameter is in the report, and the model is left as it was.

*Under a rule* is the share of all parameters, by number of entries, in the tiny model: what lies beside the language
model has another share there than in a model of full size. *Of those reached* leaves out what a text-only forward pass
never calls: cross attention, which a decoder without its encoder skips, and towers for images and audio. Those fall
under `Treatment.uncovered`. Of a parameter that holds many experts those that were never reached keep their delta.
"""


def rows() -> Iterator[tuple[str, float, float, str]]:
    for key in architectures.KEYS:
        if key in architectures.NOT_BUILT:
            continue
        model = architectures.tiny_model(key)
        profile = collect_profile(model, tiny.rows(6, seed=1), progress=False)
        coverage = architectures.coverage(model, profile)
        reasons = "; ".join(
            f"{share:.1%} {reason}" for reason, share in sorted(coverage.reasons.items(), key=lambda item: -item[1])[:3]
        )
        yield key, coverage.adjusted, coverage.read, reasons


def main(path: Path) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = list(rows())
    text = INTRODUCTION.format(
        version=transformers.__version__,
        built=len(found),
        total=len(architectures.KEYS),
        covered=sum(read >= 0.95 for _, _, read, _ in found),
    )
    left = "\n".join(f"* `{key}`: {reason}" for key, reason in architectures.NOT_BUILT.items())
    lines = [f"| `{key}` | {share:.1%} | {read:.1%} | {reasons} |" for key, share, read, reasons in found]
    table = "| key | under a rule | of those reached | the rest |\n|---|---|---|---|\n" + "\n".join(lines)
    path.write_text(f"{text}\nNot built:\n\n{left}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
