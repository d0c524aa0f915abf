"""metrics.jsonl: every round and every evaluation as one line of JSON."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from srfed.errors import DamagedError
from srfed.files import FORMAT, append_text, check_format, exists, read_bytes, write_bytes
from srfed.records import EvaluationRecord, RoundRecord, TaskInfo

Line = dict[str, Any]
PICTURES = ("grids", "strips")
_KINDS: dict[str, dict[str, type]] = {
    "tasks": {"tasks": list},
    "round": {"round": int},
    "evaluation": {"round": int, "final": bool},
}
"""What the lines are, and what each must have."""


class MetricsLog:
    """The lines of one run; a line is appended whole or, after a crash, dropped when read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(
        self, last_round: int, tasks: Sequence[TaskInfo]
    ) -> tuple[list[TaskInfo], str | None]:
        """Keep the lines up to a round, drop later ones: a resumed run writes those again.

        Returns:
            The tasks, before those of earlier rounds that are away; and a sentence where the log
            has nothing of the rounds before.
        """
        here = {task.client for task in tasks}
        away = [task for task in self.tasks() if last_round and task.client not in here]
        lost = None
        if last_round and not self.rounds():
            lost = f"{self.path} has nothing of rounds 1 to {last_round}; it begins anew"
        everybody = [*tasks, *away]
        kept = [
            line for line in self.lines() if line["kind"] != "tasks" and line["round"] <= last_round
        ]
        write_bytes(
            self.path,
            "".join(json.dumps(line) + "\n" for line in [_head(everybody), *kept]).encode(),
        )
        return everybody, lost

    def has_evaluation(self, number: int, *, final: bool) -> bool:
        """Whether the evaluation after this round is on record, as the one it has to be."""
        return any(
            line["round"] == number and line["final"] >= final for line in self.evaluations()
        )

    def add_task(self, task: TaskInfo) -> None:
        """A client that joins later."""
        self._append(_head([*self.tasks(), task]))

    def add_round(self, record: RoundRecord) -> None:
        fields = asdict(record)
        if not record.lowered:
            del fields["lowered"]
        self._append({"kind": "round", **fields})

    def add_evaluation(self, record: EvaluationRecord) -> None:
        fields = {
            name: value for name, value in vars(record).items() if name not in (*PICTURES, "audits")
        }
        fields["comparisons"] = {
            c: {**asdict(one), "ratio": one.ratio, "verdict": one.verdict}
            for c, one in record.comparisons.items()
        }
        fields["result"] = None if record.result is None else asdict(record.result)
        fields["colours"] = {c: asdict(colour) for c, colour in record.colours.items()}
        fields["own"] = {name: asdict(own) for name, own in record.own.items()}
        fields["audits"] = {
            c: {**audit.to_numbers(), "fires": audit.fires} for c, audit in record.audits.items()
        }
        self._append({"kind": "evaluation", **fields})

    def lines(self) -> Iterator[Line]:
        """The lines of the file; none where there is no file yet.

        Raises:
            DamagedError: a line before the last is no line of ours; the text says which.
            UserError: the file cannot be read, or is of a newer srfed.
        """
        if not exists(self.path):
            return
        *whole, rest = read_bytes(self.path).split(b"\n")
        for number, text in enumerate(whole, 1):
            try:
                yield self._line(json.loads(text.decode()))
            except ValueError as error:
                raise DamagedError(
                    f"{self.path} is damaged in line {number}; remove that line"
                ) from error
        # What a crash in the middle of an append has left is no line yet; the run writes it again.
        with suppress(ValueError):
            yield self._line(json.loads(rest.decode()))

    def rounds(self) -> list[Line]:
        return [line for line in self.lines() if line["kind"] == "round"]

    def evaluations(self) -> list[Line]:
        return [line for line in self.lines() if line["kind"] == "evaluation"]

    def tasks(self) -> list[TaskInfo]:
        """The clients of the run, as the last of their lines has them."""
        last = [line for line in self.lines() if line["kind"] == "tasks"][-1:]
        try:
            return [TaskInfo(**task) for line in last for task in line["tasks"]]
        except TypeError as error:
            raise DamagedError(f"{self.path} is damaged: {error}") from error

    def _line(self, line: Any) -> Line:
        """What was read, if it is a line of ours; raises ValueError for anything else, UserError
        for a newer one.
        """
        kinds = _KINDS.get(str(line.get("kind"))) if isinstance(line, dict) else None
        if kinds is None or not all(isinstance(line.get(key), kind) for key, kind in kinds.items()):
            raise ValueError("no line of a run")
        check_format(self.path, line)
        return dict(line)

    def _append(self, line: Line) -> None:
        append_text(self.path, json.dumps(_finite(line), allow_nan=False) + "\n")


def _head(tasks: list[TaskInfo]) -> Line:
    return {"kind": "tasks", FORMAT: 1, "tasks": [asdict(task) for task in tasks]}


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _finite(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
