"""metrics.jsonl: every round and every evaluation as one line of JSON."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from srfed.errors import UserError
from srfed.files import write_bytes
from srfed.reporting.records import EvaluationRecord, RoundRecord, TaskInfo

Line = dict[str, Any]
PICTURES = ("grids", "strips")


class MetricsLog:
    """The lines of one run; a line is appended whole or, after a crash, dropped when read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, last_round: int, tasks: list[TaskInfo]) -> None:
        """Keep the lines up to a round, drop later ones: a resumed run writes those again."""
        kept = [line for line in self.lines() if line["kind"] != "tasks" and line["round"] <= last_round]
        head = {"kind": "tasks", "tasks": [asdict(task) for task in tasks]}
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in [head, *kept]).encode())

    def add_task(self, task: TaskInfo) -> None:
        """A client that joins later."""
        self._append({"kind": "tasks", "tasks": [asdict(known) for known in (*self.tasks(), task)]})

    def add_round(self, record: RoundRecord) -> None:
        self._append({"kind": "round", **asdict(record)})

    def add_evaluation(self, record: EvaluationRecord) -> None:
        fields = {name: value for name, value in vars(record).items() if name not in (*PICTURES, "audits")}
        fields["audits"] = {c: {**audit.to_numbers(), "fires": audit.fires} for c, audit in record.audits.items()}
        self._append({"kind": "evaluation", **fields})

    def lines(self) -> Iterator[Line]:
        """The lines of the file; none where there is no file yet."""
        if not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                # A crash in the middle of an append; the run writes this line again.
                continue
            yield line

    def rounds(self) -> list[Line]:
        return [line for line in self.lines() if line["kind"] == "round"]

    def evaluations(self) -> list[Line]:
        return [line for line in self.lines() if line["kind"] == "evaluation"]

    def tasks(self) -> list[TaskInfo]:
        """The clients of the run, as the last of their lines has them."""
        last = [line for line in self.lines() if line["kind"] == "tasks"][-1:]
        return [TaskInfo(**task) for line in last for task in line["tasks"]]

    def _append(self, line: Line) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _finite(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
