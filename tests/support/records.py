"""Records as rounds and evaluations make them, with what a test changes."""

import math
from typing import Any

import numpy as np

from srfed.records import EvaluationRecord, RoundRecord


def round_record(number: int, **changes: Any) -> RoundRecord:
    values: dict[str, Any] = {
        "round": number,
        "loss": 1 / number,
        "loss_by_client": {"client-a": 0.25, "client-b": 0.75},
        "loss_by_quarter": [0.1, 0.2, 0.3, math.nan],
        "accepted": ["client-a", "client-b"],
        "refused": {},
        "missing": {},
        "images": 96,
        "images_per_second": 48.0,
        "bytes_up": 1_000_000,
        "bytes_down": 2_000_000,
        "learning_rate": 5e-4,
        "update_norm": 0.5,
        "disagreement": 0.25,
        "seconds": 2.0,
    }
    return RoundRecord(**{**values, **changes})


def evaluation_record(number: int, **changes: Any) -> EvaluationRecord:
    picture = np.zeros((3, 8, 8, 1), np.uint8)
    values: dict[str, Any] = {
        "round": number,
        "final": False,
        "score_name": "fd_embedded",
        "score": 12.3456,
        "score_by_client": {"client-b": 20.5},
        "floor": 1.25,
        "samples": 12,
        "references": 50,
        "ssim_timestep": 50,
        "ssim": {10: 0.99, 50: 0.875},
        "ssim_by_client": {"client-a": 0.8, "client-b": 0.95},
        "ssim_window": 7,
        "audits": {},
        "grids": {"client-a": picture, "client-b": picture},
        "strips": {"client-a": picture, "client-b": picture},
        "refused": {},
        "missing": {},
        "bytes_up": 500_000,
        "bytes_down": 250_000,
        "seconds": 3.0,
    }
    return EvaluationRecord(**{**values, **changes})
