"""What a round under Ray costs beside its clients: ``python -m benchmarks.ray_rounds``.

Of each round: seconds, seconds that all clients together were at work (from the message to the
reply, stores and all), the server's CPU seconds, and the ratio of the round to the clients' work
shared among as many as are at work at once: 1.00 where they are never kept waiting. The first round
is warm-up.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import Message

from srfed.commands.options import Parser
from srfed.federation.flower import ray as on_ray
from srfed.federation.flower.ray_grid import RayGrid
from srfed.federation.messages import TRAIN
from srfed.observer import Observer
from srfed.records import RoundRecord
from srfed.runs.requested import requested_config
from srfed.storage.run_folder import RunFolder


class TimedGrid(RayGrid):
    """Knows how long each client was at work."""

    seconds = 0.0
    size = 1

    def __init__(self, *arguments: Any) -> None:
        self._begun: dict[int, float] = {}
        super().__init__(*arguments)

    def _start(self, actor: Any, message: Message) -> None:
        self._begun[id(message)] = time.perf_counter()
        TimedGrid.size = self.at_once + 1
        super()._start(actor, message)

    def _hear_reply(self, task: Any, actor: Any, message: Message) -> None:
        begun = self._begun.pop(id(message))
        if message.metadata.message_type == TRAIN:
            TimedGrid.seconds += time.perf_counter() - begun
        super()._hear_reply(task, actor, message)


class Table(Observer):
    """A line a round."""

    def on_begin(self, *_: Any) -> None:
        print(f"{'round':>5} {'seconds':>8} {'at work':>8} {'server CPU':>11} {'ratio':>6}")
        self._last = self._now()

    def on_round(self, record: RoundRecord) -> None:
        now = self._now()
        seconds, work, cpu = (b - a for a, b in zip(self._last, now, strict=True))
        ratio = TimedGrid.size * seconds / work
        print(f"{record.round:>5} {seconds:>8.2f} {work:>8.2f} {cpu:>11.2f} {ratio:>6.3f}")
        self._last = now

    def _now(self) -> tuple[float, float, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), TimedGrid.seconds, used.ru_utime + used.ru_stime


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10, help="clients (default 10)")
    parser.add_argument("--rounds", type=int, default=4, help="counted rounds (default 4)")
    options = parser.parse_args()
    overrides = [
        f"federation.clients={options.clients}",
        f"federation.rounds={options.rounds + 1}",
        "evaluation={every: 0, samples: 20, ssim_images: 0}",
    ]
    config = requested_config(None, overrides, {})
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(on_ray, "RayGrid", TimedGrid),
    ):
        on_ray.run_on_ray(RunFolder.create(Path(folder) / "run", config), [Table()])


if __name__ == "__main__":
    main()
