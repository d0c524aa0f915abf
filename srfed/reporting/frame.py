"""A run's rounds and scores as a tidy table: one number a row."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from srfed.records import ssim_tag

Row = dict[str, Any]
ALL = "all"
"""The owner of what is a mean, or of everybody together."""
OF_ROUNDS = (
    "images",
    "images_per_second",
    "bytes_up",
    "bytes_down",
    "learning_rate",
    "update_norm",
    "disagreement",
    "seconds",
)
OF_EVALUATIONS = ("samples", "references", "bytes_up", "bytes_down", "seconds")


def tidy(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows with "kind" (round, evaluation), "round", "final", "metric", "owner" and "value".

    Args:
        lines: of metrics.jsonl; those of another kind are passed over.

    >>> line = {"kind": "round", "round": 1, "loss": 0.5, "loss_by_client": {"a": 0.25, "b": 0.75}}
    >>> for row in tidy([line]):
    ...     print(row["round"], row["metric"], row["owner"], row["value"])
    1 loss all 0.5
    1 loss a 0.25
    1 loss b 0.75
    """
    readers = {"round": _of_round, "evaluation": _of_evaluation}
    return [
        {
            "kind": line["kind"],
            "round": line["round"],
            "final": bool(line.get("final", False)),
            "metric": metric,
            "owner": owner,
            "value": value,
        }
        for line in lines
        if line["kind"] in readers
        for metric, owner, value in readers[line["kind"]](line)
    ]


def _of_round(line: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    yield from _both("loss", line["loss"], line["loss_by_client"])
    for number, value in enumerate(line.get("loss_by_quarter", ()), 1):
        yield f"loss_quarter_{number}", ALL, value
    if validation := line.get("validation"):
        yield from _both("validation_loss", validation["loss"], validation["loss_by_client"])
    for name in OF_ROUNDS:
        if name in line:
            yield name, ALL, line[name]


def _of_evaluation(line: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    score = line["score_name"]
    yield from _both(score, line["score"], line["score_by_client"])
    if line["floor"] is not None:
        yield f"{score}_real_images", ALL, line["floor"]
    ssim = ssim_tag(line.get("ssim_steps"))
    for timestep, value in line["ssim"].items():
        yield f"{ssim}_t{timestep}", ALL, value
    for owner, value in line["ssim_by_client"].items():
        yield f"{ssim}_t{line['ssim_timestep']}", owner, value
    if line.get("recognised") is not None:
        yield from _both("recognised", line["recognised"], line["recognised_by_client"])
    if line.get("recognised_real") is not None:
        yield "recognised_real_images", ALL, line["recognised_real"]
    for owner, audit in line.get("audits", {}).items():
        for space in ("pixels", "features"):
            yield f"memorisation_{space}", owner, audit[f"{space}_share"]
    for owner, one in line.get("comparisons", {}).items():
        for name in ("alone", "together", "ratio", "low", "high"):
            yield f"joining_{name}", owner, one[name]
    for name, own in line.get("own", {}).items():
        yield from _both(name, own["all"], own["by_client"])
    for name in OF_EVALUATIONS:
        if name in line:
            yield name, ALL, line[name]


def _both(name: str, mean: Any, by_client: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    yield name, ALL, mean
    for owner, value in by_client.items():
        yield name, owner, value
