"""What a deployed site has been asked under its owner's agreement, and so what it answers no more.

    <state-dir>/<client>/asked.json

Of two answers to nearly the same question the difference says more than either. So an agreement is
for as many runs as its owner says, one as a rule; and about one round and parent so many different
φ's are answered: an honest roll-back may change φ. The same question again is no other one. What
was refused is not counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from srfed.errors import DamagedError
from srfed.federation.agreement import COMMAND, Agreement, not_agreed
from srfed.federation.messages import DESCRIBE, Request
from srfed.files import exists, held, read_json, write_json

ASKED_FILE = "asked.json"
LOCK = "asked.lock"
MOST_ANSWERED = 3
"""Different φ's for one round and parent."""
MOST_QUESTIONS = 10_000
QUESTIONS_A_ROUND = 4
"""Rounds, evaluations and validations of one run that are kept in mind, in all or for each round
that was agreed to, whichever is more; more of them are refused.
"""
Answered = dict[str, dict[str, list[str]]]
"""Digests of what came with a question, by question, by lineage."""


@dataclass(frozen=True)
class Question:
    """One request, as far as it decides what the answer says of the images.

    Attributes:
        lineage: the run.
        about: kind, round and parent.
        digest: of φ, and of whatever else the request has; not of the attempt's name.
    """

    lineage: str
    about: str
    digest: str

    @classmethod
    def of(cls, kind: str, request: Request, settings: str, carried: str) -> Self:
        """The question of a request.

        Args:
            kind: of the message.
            request: what it says.
            settings: fingerprint of the settings that decide a result.
            carried: digest of its tensors.
        """
        rest = f"{request.best} {request.best_round} {request.samples} {request.final}"
        return cls(
            request.lineage,
            f"{kind} {request.round} {request.parent}",
            f"{carried[:32]} {settings[:16]} {rest}",
        )


def check_asked(folder: Path, agreement: Agreement, kind: str, question: Question) -> None:
    """Find out before any work whether a question may be answered.

    Args:
        folder: the site's own.
        agreement: the owner's.
        kind: of the message; a description is of no round, and opens no run.
        question: what is asked.

    Raises:
        RequestRefusedError: it may not.
        UserError: what was asked cannot be read.
    """
    answered = _read(folder, agreement)
    if question.lineage not in answered and len(answered) >= agreement.runs:
        raise not_agreed(
            "another run",
            f"lineage {question.lineage!a}; agreed was to {agreement.runs}; if it is meant, agree "
            f"again with: {COMMAND}",
        )
    if kind == DESCRIBE:
        return
    asked = answered.get(question.lineage, {})
    digests = asked.get(question.about, [])
    if question.digest in digests:
        return
    most = max(MOST_QUESTIONS, QUESTIONS_A_ROUND * agreement.at_most.get("federation.rounds", 0))
    if len(digests) >= MOST_ANSWERED or len(asked) >= most:
        raise not_agreed(
            f"more than {MOST_ANSWERED} answers about one round",
            f"{question.about}: {len(digests)} others were answered",
        )


@contextmanager
def noted_asked(
    folder: Path, agreement: Agreement, kind: str, question: Question
) -> Iterator[None]:
    """Store in the block what lasts of a question, and then keep in mind that it is answered; the
    answer leaves afterwards.

    After the block, so that a question whose attempt has found no room is not counted. A process
    that is killed between the two leaves an attempt that nobody refers to, and no answer.

    Raises:
        RequestRefusedError: others were answered meanwhile, and it may not be any more; the block
            is not entered.
        UserError: it cannot be written.
    """
    # The store has a lock of its own, which what is in the block takes.
    with held(folder / LOCK, wait=True):
        check_asked(folder, agreement, kind, question)
        yield
        answered = _read(folder, agreement)
        digests = answered.setdefault(question.lineage, {}).setdefault(question.about, [])
        if question.digest not in digests:
            digests.append(question.digest)
            write_json(folder / ASKED_FILE, {"agreed": agreement.agreed, "answered": answered})


def _read(folder: Path, agreement: Agreement) -> Answered:
    """What was answered under this agreement; an owner who agrees again begins anew."""
    file = folder / ASKED_FILE
    if not exists(file):
        return {}
    content = read_json(file, "agreed", "answered", kinds={"agreed": str, "answered": dict})
    answered = content["answered"]
    sound = all(
        isinstance(digests, list) and all(isinstance(digest, str) for digest in digests)
        for asked in answered.values()
        for digests in (asked.values() if isinstance(asked, dict) else [None])
    )
    if not sound:
        raise DamagedError(f"{file} is damaged: answered is no mapping of lists")
    return answered if content["agreed"] == agreement.agreed else {}
