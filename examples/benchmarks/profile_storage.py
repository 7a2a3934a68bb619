"""What each storage of a profile costs: its size, and what becomes of the weights that are adjusted by it.

    python examples/benchmarks/profile_storage.py [--case mixed] [--questions 200] [--size 1024] [--ranks 8 16 32]

On the testbed, the aligned model is fine-tuned once and adjusted with safety and task profiles that went through each
storage: once at the strength that was measured with the exact profiles, once at a strength measured anew. On
synthetic layers, inputs have a spectrum like those of large models: a power law, with or without a few inputs that are
thirty times larger than the others.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from safedelta_hf import Ridge, SafeDelta, SafetyProfile, TaskRidge, adjust_model
from safedelta_hf.core.curvature import quadratic_loss
from safedelta_hf.core.low_rank import dense
from safedelta_hf.core.transform import Dense
from safedelta_hf.deltas.dense import DenseMatrix
from safedelta_hf.modules.names import parameter_names
from safedelta_hf.profile.encodings import encoding_for, encoding_of
from safedelta_hf.records.uses import Role
from safedelta_hf.rules import LayerMoments
from safedelta_hf.testbed import CASES
from safedelta_hf.testbed.comparison import AlignedModel, CaseScenario

CPU = torch.device("cpu")
BEHAVIOURS = ("attack_success", "new_skill", "old_skills")


def through(profile: SafetyProfile, storage: str) -> tuple[SafetyProfile, int]:
    """A profile as it is after it was saved and loaded, and its size in bytes."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "profile"
        profile.save(folder, storage)
        loaded = SafetyProfile.load(folder)
        read = type(profile.moments)(dict(loaded.moments))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return SafetyProfile(header=loaded.header, uses=loaded.uses, moments=read, held_out=loaded.held_out), size


def error(exact: SafetyProfile, stored: SafetyProfile) -> float:
    """Relative error of all full Hessians together, in Frobenius norm."""
    full = [key for key in exact.moments if len(exact.moments.shape(key)) == 2]
    pairs = [(dense(exact.moments[key].total), dense(stored.moments[key].total)) for key in full]
    off = sum(float((other - one).square().sum()) for one, other in pairs)
    return (off / sum(float(one.square().sum()) for one, _ in pairs)) ** 0.5


def loss(model: PreTrainedModel, base: PreTrainedModel, profile: SafetyProfile) -> float:
    """`q` of a model's delta, over all parameters."""
    weights = {name: parameter.detach() for parameter, name in parameter_names(model).items()}
    start = {name: parameter.detach() for parameter, name in parameter_names(base).items()}
    return sum(
        quadratic_loss(
            DenseMatrix(weights[use.parameter] - start[use.parameter], use.view).inner,
            profile.moments[use.moment].hessian(CPU),
        )
        for use in profile.uses
    )


def difference(one: PreTrainedModel, other: PreTrainedModel, base: PreTrainedModel) -> float:
    """Distance of two models, relative to that of the first from the base."""
    trios = list(zip(one.parameters(), other.parameters(), base.parameters(), strict=True))
    with torch.no_grad():
        apart = sum(float((a - b).square().sum()) for a, b, _ in trios)
        return (apart / sum(float((a - c).square().sum()) for a, _, c in trios)) ** 0.5


def testbed(options: argparse.Namespace) -> Iterator[list[str]]:
    """One row for each storage."""
    aligned = AlignedModel()
    scenario = CaseScenario(aligned, CASES[options.case], 0, options.questions, sort_task=False)  # whole, as stored
    exact = None
    for storage in options.storage:
        (profile, size), (task, _) = through(aligned.profile, storage), through(scenario.task, storage)
        anew = copy.deepcopy(scenario.tuned.restored())
        search = adjust_model(anew, base=aligned.model, profile=profile, task_profile=task, progress=False).search
        assert search is not None
        if exact is None:
            exact = (anew, search.strength, size)
        model = copy.deepcopy(scenario.tuned.restored())
        rule = TaskRidge(strength=exact[1])
        adjust_model(model, base=aligned.model, profile=profile, task_profile=task, rule=rule, progress=False)
        scores = [scenario.measure(found) for found in (model, anew)]
        behaviours = (
            " / ".join(f"{score[name].value:.1%}" if name in score else "-" for name in BEHAVIOURS) for score in scores
        )
        yield [
            storage,
            f"{size / exact[2]:.2f}",
            f"{error(aligned.profile, profile):.1e}",
            f"{difference(exact[0], model, aligned.model):.1e}",
            f"{loss(model, aligned.model, aligned.profile) / loss(exact[0], aligned.model, aligned.profile):.4f}",
            *behaviours,
            f"{search.strength / exact[1]:.3f}",
        ]


def synthetic(size: int, power: float, large: int, tokens: int) -> torch.Tensor:
    """`H` of inputs whose variances fall as a power law along random directions, with some large inputs."""
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    spread = torch.arange(1, size + 1).float() ** (-power / 2)
    inputs = torch.randn(tokens, size, generator=generator) * spread @ directions.T
    for number in range(large):
        noise = 1 + 0.3 * torch.randn(tokens, generator=generator)
        inputs[:, 7 * number] += 30 * inputs.std() * noise
    return inputs.T @ inputs * (2.0 / tokens)


def layers(options: argparse.Namespace) -> Iterator[list[str]]:
    """One row for each synthetic layer and storage."""
    for power, large in ((1.0, 0), (2.0, 0), (1.0, 2), (2.0, 2)):
        hessian = synthetic(options.size, power, large, 4 * options.size)
        delta = torch.randn(256, options.size, generator=torch.Generator().manual_seed(1))
        exact: list[tuple[torch.Tensor, float]] = []
        for storage in options.storage:
            encoding = encoding_for(tuple(hessian.shape), encoding_of(storage))
            stored = dense(encoding.decode(encoding.encode(hessian)))
            row = [
                f"{power:g}, {large}",
                storage,
                f"{encoding.bytes(tuple(hessian.shape)) / hessian.nbytes:.3f}",
                f"{float((stored - hessian).norm() / hessian.norm()):.1e}",
                f"{float(torch.linalg.eigvalsh(stored.double())[0] / hessian.diagonal().mean()):+.0e}",
            ]
            rules = (Ridge(strength=10 / float(hessian.diagonal().mean())), SafeDelta(strength=3e5))
            for number, rule in enumerate(rules):
                matrix = DenseMatrix(delta, Role.LINEAR.view(delta.shape))
                kept = rule.transform(rule.factorise(LayerMoments(safety=stored)), matrix)(delta)
                left = DenseMatrix(kept, Role.LINEAR.view(kept.shape)).inner(Dense(matrix=hessian))
                if len(exact) <= number:
                    exact.append((kept, left))
                reference, loss_of_reference = exact[number]
                row.append(f"{float((kept - reference).norm() / reference.norm()):.1e}")
                row.append(f"{left / loss_of_reference:.3f}")
            yield row


def table(head: list[str], rows: Iterator[list[str]]) -> None:
    """Print as Markdown, row by row as they come."""
    for row in (head, ["---"] * len(head)):
        print(f"| {' | '.join(row)} |")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=list(CASES), default="mixed")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--size", type=int, default=1024, help="inputs of the synthetic layers")
    parser.add_argument("--storage", nargs="*", default=["float32", "triangular", "bfloat16"])
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 32], help="of the eigenbasis, on the testbed")
    options = parser.parse_args()
    kinds = options.storage
    options.storage = [*kinds, *(f"eigenbasis:{rank}" for rank in options.ranks)]
    head = ["storage", "size", "error of H", "weights apart", "q", "attack / new / old, same strength", "own strength"]
    table([*head, "that strength"], testbed(options))
    print()
    options.storage = [*kinds, *(f"eigenbasis:{options.size // share}" for share in (32, 16, 8))]
    head = ["power, large inputs", "storage", "size", "error of H", "least eigenvalue / mean"]
    table([*head, "ridge: apart", "q", "safe_delta: apart", "q"], layers(options))


if __name__ == "__main__":
    main()
