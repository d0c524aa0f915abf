"""Mean colour and spread of samples beside those of held-out images, from images made by hand."""

import numpy as np
import pytest

from srfed.evaluation.metrics.colour import colours
from srfed.records import Colour, TaskInfo
from srfed.reporting.summary import scores_in_words


def images(count: int, mean: float, spread: float, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Images of one colour each, whose means lie about ``mean``."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(mean, spread, (count, 1, 1, 1)).clip(0, 255)
    return np.broadcast_to(np.rint(levels), (count, 6, 6, channels)).astype(np.uint8)


def test_mean_and_spread_are_those_of_the_images_own_means() -> None:
    rng = np.random.default_rng(0)
    real, made = (rng.integers(0, 256, (n, 6, 5, 3), np.uint8) for n in (300, 7))
    found = colours({"a": real, "b": real[..., :1]}, {"a": made, "b": made, "c": made})
    assert set(found) == {"a"}
    colour = found["a"]
    assert colour.samples == pytest.approx(made.reshape(-1, 3).mean(0))
    assert colour.real == pytest.approx(real.reshape(-1, 3).mean(0))
    own = np.array([image.reshape(-1, 3).mean(0) for image in real])
    expected = np.sqrt(((own - own.mean(0)) ** 2).sum(0).mean() / 299)
    assert colour.real_spread == pytest.approx(expected)


def said(real: np.ndarray, samples: np.ndarray) -> str:
    return colours({"a": real}, {"a": samples})["a"].differences


def test_what_real_images_do_among_themselves_is_no_difference() -> None:
    for seed in range(40):
        first, second = (images(20, 150, 20, seed=seed + k) for k in (0, 1000))
        assert said(first, second) == ""


def test_samples_too_dark_too_varied_or_tinted_are_named() -> None:
    cells = images(50, 195, 4)
    assert said(cells, images(50, 165, 4, seed=1)).endswith("levels too dark")
    assert 28 <= float(said(cells, images(50, 165, 4, seed=1)).split()[0]) <= 32
    assert "times the spread" in said(cells, images(200, 195, 20, seed=1))
    white = np.full((10, 6, 6, 1), 255, np.uint8)
    assert said(white, np.full((10, 6, 6, 1), 165, np.uint8)) == "90 levels too dark"
    tinted = cells.copy()
    tinted[..., 0] += 30
    tinted[..., 2] -= 30
    assert said(cells, tinted) == "of another colour"
    assert said(cells[:4], tinted) == "", "of four images nobody can tell"


def test_the_table_tells_the_colours_and_which_tasks_are_missing() -> None:
    dark = Colour((165.0,), (195.0,), 22.0, 4.0, 50, 50)
    evaluation = {
        "round": 3,
        "score_name": "FD",
        "floor": None,
        "samples": 100,
        "references": 100,
        "ssim": {},
        "refused": {"b": "it has diverged"},
        "missing": {},
        "colours": {"a": vars(dark)},
    }
    text = "\n".join(scores_in_words([TaskInfo("a", "cells", 9, 9)], evaluation))
    assert "cells 165 ± 22, held-out 195 ± 4" in text
    assert "those of cells are 30 levels too dark and with 5.5 times the spread" in text
    assert "the scores are without b" in text
