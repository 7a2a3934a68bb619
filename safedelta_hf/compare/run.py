"""The comparison itself: make each model, measure it, keep the point."""

from collections.abc import Sequence

from tqdm.auto import tqdm

from safedelta_hf.compare.candidates import Contender, Entrants, Subject
from safedelta_hf.compare.points import ComparisonFile, Point, key_of
from safedelta_hf.errors import NumericalError


def compare(subjects: Sequence[Subject], entrants: Entrants, file: ComparisonFile, *, progress: bool = True) -> None:
    """Measure every baseline and every rule on every subject, but for the points that are in the file already.

    A contender whose matrices cannot be factorised is named among those left out, and tried again by the next run.

    Args:
        subjects: What is compared on.
        entrants: The rules.
        file: Where the points are kept; each is on disk before the next is made.
        progress: Whether to show a progress bar.
    """
    file.left_out = dict(entrants.left_out)
    contenders = [
        (subject, contender)
        for subject in subjects
        for contender in (*subject.baselines, *entrants.contenders(subject))
    ]
    with tqdm(total=len(contenders), desc="Comparing", unit="model", disable=not progress) as bar:
        for subject, contender in contenders:
            bar.set_postfix_str(f"{subject.name}, {contender.method}")
            key = key_of(subject.name, subject.seed, contender.method, contender.settings)
            if key not in file:
                try:
                    file.add(_measured(subject, contender))
                except NumericalError as error:
                    # Of one strength, say: the others still tell something, and the table says that it is missing.
                    file.left_out[" ".join(map(str, key))] = str(error)
            bar.update()


def _measured(subject: Subject, contender: Contender) -> Point:
    made = contender.make()
    return Point(
        subject=subject.name,
        seed=subject.seed,
        method=contender.method,
        settings=contender.settings,
        scores=subject.measure(made.model),
        seconds=made.seconds,
        search=made.search,
    )
