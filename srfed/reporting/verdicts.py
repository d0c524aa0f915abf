"""What a run's numbers answer, in words: has it converged, does joining pay, does anybody copy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Any, Literal

from srfed.records import ResultRound, TaskInfo
from srfed.reporting.joining import VERDICTS, joining_in_words
from srfed.reporting.summary import comparisons_of

FEWEST_ROUNDS = 8
"""Of fewer nobody can tell a trend from noise."""
SETTLED = 0.02
"""A change of the loss by less, from the third quarter of the rounds to the last, is none."""
Tone = Literal["good", "open", "bad"]
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The answer to one question: in a word, and the sentences that it rests on."""

    question: str
    tone: Tone
    word: str
    sentences: tuple[str, ...]


def verdicts(
    tasks: Sequence[TaskInfo], rounds: Sequence[Line], evaluation: Line | None
) -> list[Verdict]:
    """All questions, answered as far as the lines of metrics.jsonl answer them.

    Args:
        tasks: the run's.
        rounds: a line each, in order.
        evaluation: the last one's line; None where there is none yet.
    """
    answers = [_convergence(rounds)]
    if evaluation is None:
        return answers
    answers.append(_joining(tasks, evaluation))
    if evaluation.get("recognised") is not None:
        answers.append(_recognised(tasks, evaluation))
    answers.append(_copying(tasks, evaluation))
    return answers


def _convergence(rounds: Sequence[Line]) -> Verdict:
    question = "Did it converge?"
    losses = [line["loss"] for line in rounds]
    if None in losses:
        number = rounds[losses.index(None)]["round"]
        return Verdict(
            question, "bad", "no", (f"The training loss is no number since round {number}.",)
        )
    quarter = len(losses) // 4
    if len(losses) < FEWEST_ROUNDS:
        return Verdict(
            question,
            "open",
            "too early to say",
            (f"{len(losses)} rounds are too few; {FEWEST_ROUNDS} or more can tell.",),
        )
    before, last = losses[-2 * quarter : -quarter], losses[-quarter:]
    change = fmean(last) / fmean(before) - 1
    noise = math.sqrt((pvariance(before) + pvariance(last)) / quarter) / fmean(before)
    told = (
        f"Mean training loss of the last {quarter} rounds: {fmean(last):.4f}, of the {quarter} "
        f"before: {fmean(before):.4f} ({change:+.1%})."
    )
    tone: Tone
    if abs(change) <= max(SETTLED, 2 * noise):
        tone, word = "good", "settled"
    elif change < 0:
        tone, word = "open", "still falling"
        told += " More rounds would help."
    else:
        tone, word = "bad", "rising"
        told += " A lower rate may help (training.learning_rate)."
    sentences = [told]
    overfits = _overfitting(rounds)
    if overfits:
        sentences.append(overfits)
    return Verdict(question, tone, word, tuple(sentences))


def _overfitting(rounds: Sequence[Line]) -> str:
    """What the validation images say of the rounds after the best; empty where nobody asked."""
    asked = [line["validation"] for line in rounds if (line.get("validation") or {}).get("result")]
    if not asked:
        return ""
    best = ResultRound(**asked[-1]["result"])
    number = rounds[-1]["round"]
    words = f"On validation images the {best.in_words(number)}."
    worse = best.round < number and best.last > best.loss * (1 + SETTLED)
    return words + (" After it the networks overfit." if worse else "")


def _joining(tasks: Sequence[TaskInfo], evaluation: Line) -> Verdict:
    question = "Did joining pay?"
    compared = comparisons_of(tasks, evaluation)
    if not compared:
        return Verdict(
            question,
            "open",
            "not asked",
            ("federation.compare = alone lets a run answer this for each owner.",),
        )
    worst = {one.verdict for one in compared.values()}
    tone: Tone = "bad" if "costs" in worst else "open" if "open" in worst else "good"
    word = {"good": "for everybody", "open": "not for certain", "bad": "not for everybody"}[tone]
    summary = joining_in_words(list(compared.values()))
    by_verdict = {
        words: [owner for owner, one in compared.items() if one.verdict == verdict]
        for verdict, words in VERDICTS.items()
    }
    return Verdict(
        question,
        tone,
        word,
        (
            f"{summary[0].upper()}{summary[1:]}.",
            *(
                f"{words[0].upper()}{words[1:]} for {', '.join(owners)}."
                for words, owners in by_verdict.items()
                if owners
            ),
        ),
    )


def _recognised(tasks: Sequence[TaskInfo], evaluation: Line) -> Verdict:
    share, real = evaluation["recognised"], evaluation.get("recognised_real")
    by_client = evaluation["recognised_by_client"]
    # One vote among n by chance, and what real images reach: half way is told apart.
    chance = 1 / max(2, len(by_client))
    enough = (chance + (1 if real is None else real)) / 2
    below = [task.task for task in tasks if by_client.get(task.client, 1.0) < enough]
    words = f"{share:.0%} of the samples are recognised as their own owner's"
    words += "." if real is None else f", and {real:.0%} of held-out real images."
    if below:
        words += f" Least told apart: {', '.join(below)}."
    return Verdict(
        "Are an owner's samples its own?",
        "bad" if share < enough else "open" if below else "good",
        "no" if share < enough else "not all" if below else "yes",
        (words,),
    )


def _copying(tasks: Sequence[TaskInfo], evaluation: Line) -> Verdict:
    question = "Does anybody copy?"
    audits = evaluation.get("audits", {})
    if not audits:
        return Verdict(
            question,
            "open",
            "not known",
            ("No memorisation audit was made; the last evaluation makes it.",),
        )
    fired = [task.task for task in tasks if audits.get(task.client, {}).get("fires")]
    unaudited = [task.task for task in tasks if task.client not in audits]
    sentences = [
        f"The memorisation audit fires for {', '.join(fired)}: look at the pairs in clients/."
        if fired
        else f"The memorisation audit fires for none of {len(audits)} owners."
    ]
    if unaudited:
        sentences.append(f"No audit of {', '.join(unaudited)}; a client's own log says why.")
    tone: Tone = "bad" if fired else "open" if unaudited else "good"
    return Verdict(
        question, tone, {"bad": "yes", "open": "not known", "good": "no"}[tone], tuple(sentences)
    )
