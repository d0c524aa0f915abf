"""A record's numbers by tag, as TensorBoard and others of its kind show them."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from statistics import fmean, median
from typing import Any

from srfed.config import RunConfig
from srfed.evaluation.metrics.memorisation import Audit
from srfed.records import (
    Colour,
    Comparison,
    EvaluationRecord,
    OwnScore,
    ResultRound,
    RoundRecord,
    ValidationRecord,
    ssim_tag,
)


def round_values(record: RoundRecord) -> dict[str, float]:
    """The numbers of a round."""
    values: dict[str, float] = {
        "loss/mean": record.loss,
        **{f"loss_by_client/{client}": loss for client, loss in record.loss_by_client.items()},
        **{
            f"loss_by_timestep/quarter_{n}": loss
            for n, loss in enumerate(record.loss_by_quarter, 1)
        },
        "speed/images_per_second": record.images_per_second,
        "speed/seconds_per_round": record.seconds,
        "traffic/bytes_up": record.bytes_up,
        "traffic/bytes_down": record.bytes_down,
        "optimisation/learning_rate": record.learning_rate,
        "optimisation/shared_update_norm": record.update_norm,
        "optimisation/client_disagreement": record.disagreement,
        "clients/accepted": len(record.accepted),
        "clients/refused": len(record.refused),
        "clients/missing": len(record.missing),
        **{f"took_part/{client}": 1 for client in record.accepted},
        **{f"took_part/{client}": 0 for client in (*record.refused, *record.missing)},
    }
    if (validation := record.validation) is not None:
        values |= {
            f"validation_by_client/{c}": loss for c, loss in validation.loss_by_client.items()
        }
        if validation.loss is not None:
            values["validation/mean"] = validation.loss
        if validation.result is not None:
            values["validation/best_round"] = validation.result.round
    return values


def evaluation_values(record: EvaluationRecord) -> dict[str, float]:
    """The numbers of an evaluation."""
    ssim = ssim_tag(record.ssim_steps)
    values: dict[str, float] = {
        f"{record.score_name}/all": record.score,
        **{
            f"{record.score_name}_by_client/{c}": score
            for c, score in record.score_by_client.items()
        },
        **_spread(f"{record.score_name}_over_owners", record.score_by_client),
        **{f"{ssim}/t={timestep}": value for timestep, value in record.ssim.items()},
        **_spread(f"{ssim}_over_owners", record.ssim_by_client),
        **{f"{ssim}_by_client/{client}": value for client, value in record.ssim_by_client.items()},
        **{
            f"memorisation_pixels/{client}": audit.pixels.share
            for client, audit in record.audits.items()
        },
        **{
            f"memorisation_features/{client}": audit.features.share
            for client, audit in record.audits.items()
        },
        **{
            f"joining_{name}/{client}": getattr(one, name)
            for client, one in record.comparisons.items()
            for name in ("alone", "together", "ratio")
        },
        "traffic/evaluation_bytes_up": record.bytes_up,
        "traffic/evaluation_bytes_down": record.bytes_down,
        "speed/seconds_per_evaluation": record.seconds,
    }
    values |= {f"recognised_by_client/{c}": s for c, s in record.recognised_by_client.items()}
    for name, share in (("all", record.recognised), ("real_images", record.recognised_real)):
        if share is not None:
            values[f"recognised/{name}"] = share
    for client, colour in record.colours.items():
        for side in ("samples", "real"):
            values[f"colour_{side}/{client}"] = fmean(getattr(colour, side))
            values[f"colour_spread_{side}/{client}"] = getattr(colour, f"{side}_spread")
    if record.floor is not None:
        values[f"{record.score_name}/real_images"] = record.floor
    for name, own in record.own.items():
        if own.all is not None:
            values[f"own/{name}"] = own.all
        values |= {f"own_{name}_by_client/{c}": value for c, value in own.by_client.items()}
    return values


def _spread(name: str, by_client: Mapping[str, float]) -> dict[str, float]:
    """Least, median and greatest over the owners that were judged; nothing of one owner."""
    values = list(by_client.values())
    if len(values) < 2:
        return {}
    found = {"least": min(values), "median": median(values), "greatest": max(values)}
    return {f"{name}/{which}": value for which, value in found.items()}


def hyperparameters(config: RunConfig) -> dict[str, bool | float | str]:
    """The settings that decide the result, each as a number, a truth value or a text."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in config.decisive_settings().items()
    }


def record_of(line: Mapping[str, Any]) -> RoundRecord | EvaluationRecord | None:
    """The record that a line of metrics.jsonl was made of, but for its pictures; None for a line
    that is of none, or of before it had all that is shown.
    """
    said = dict(line)
    try:
        if said["kind"] == "round":
            said["loss_by_quarter"] = [_number(loss) for loss in said["loss_by_quarter"]]
            if said.get("validation"):
                validation = dict(said["validation"])
                result = validation["result"]
                validation["result"] = None if result is None else ResultRound(**result)
                said["validation"] = ValidationRecord(**validation)
            return RoundRecord(**_known(RoundRecord, said))
        if said["kind"] != "evaluation":
            return None
        said["audits"] = {
            client: Audit.from_numbers({k: float(v) for k, v in audit.items() if k != "fires"})
            for client, audit in said.get("audits", {}).items()
        }
        said["comparisons"] = {
            client: Comparison(**_known(Comparison, one))
            for client, one in said.get("comparisons", {}).items()
        }
        said["colours"] = {
            client: Colour(**_known(Colour, one)) for client, one in said.get("colours", {}).items()
        }
        said["own"] = {name: OwnScore(**own) for name, own in said.get("own", {}).items()}
        said["result"] = None if said.get("result") is None else ResultRound(**said["result"])
        return EvaluationRecord(**_known(EvaluationRecord, {**said, "grids": {}, "strips": {}}))
    except (TypeError, KeyError, ValueError):
        return None


def _known(kind: type[Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record among what a line says; null, which stands for no number, is NaN where
    there has to be one.
    """
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.name != "floor"}
    return {
        f.name: _number(said[f.name]) if f.name in needed else said[f.name]
        for f in fields(kind)
        if f.name in said
    }


def _number(value: Any) -> Any:
    return math.nan if value is None else value
