"""What joining is worth, in words and as a table."""

import math
from collections.abc import Mapping, Sequence

from srfed.records import Comparison

VERDICTS: Mapping[str, str] = {"pays": "it pays", "open": "it is open", "costs": "it costs"}
"""By :attr:`Comparison.verdict`."""


def joining_in_words(comparisons: Sequence[Comparison]) -> str:
    """Of all owners in one sentence; the mean is geometric, as it is one of ratios."""
    mean = math.exp(math.fsum(math.log(one.ratio) for one in comparisons) / len(comparisons))
    counts = {word: sum(one.verdict == word for one in comparisons) for word in VERDICTS}
    said = ", ".join(
        f"{VERDICTS[word]} for {count} of {len(comparisons)}"
        for word, count in counts.items()
        if count
    )
    return f"joining: the loss alone is {mean:.3f} times that together; {said}"


def joining_table(comparisons: Mapping[str, Comparison]) -> list[str]:
    """Lines: each owner's two losses, their ratio with its interval, and the verdict."""
    width = max([len("owner"), *map(len, comparisons)])
    lines = [f"{'owner':<{width}}  {'alone':>8}  {'together':>8}  alone / together (95%)"]
    for owner, one in comparisons.items():
        lines.append(
            f"{owner:<{width}}  {one.alone:>8.4f}  {one.together:>8.4f}  {one.ratio:.3f} "
            f"({one.low:.3f} to {one.high:.3f}): {VERDICTS[one.verdict]}"
        )
    return [
        *lines,
        joining_in_words(list(comparisons.values())),
        "loss: eq. (7) on held-out images, with noise that is the same for both models; the "
        "interval is over the images, not over trainings",
    ]
