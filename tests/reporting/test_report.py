"""report.html says what the run's folder says, shows to nobody what is not theirs, and opens
anywhere.
"""

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from markupsafe import escape
from PIL import Image

import srfed.reporting.report as report
from srfed.data import load_tasks
from srfed.federation.flower import server_app
from srfed.federation.flower.client_app import app as client_app
from srfed.federation.flower.in_process import InlineGrid
from srfed.records import Colour, Comparison, ResultRound, TaskInfo
from srfed.reporting.pictures import draw_grid
from srfed.reporting.report import write_report
from srfed.reporting.verdicts import verdicts
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.browser import look_at, needs_chromium, screenshot
from support.commands import run_here
from support.records import evaluation_record, round_record
from support.tiny_run import begin

HOSTILE = '<script>alert("1")</script>$\\frac{'


class Seen(HTMLParser):
    """What a browser would make of a page: elements, what they load, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.loads.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "

    def pictures(self) -> list[np.ndarray]:
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(load.partition(",")[2]))))
            for load in self.loads
            if load.startswith("data:image/png;base64,")
        ]


@pytest.fixture
def run(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(finished_run.path, tmp_path / "run")))


def words(page: str) -> str:
    return " ".join(Seen(page).text.split())


def logged(run: RunFolder, tasks: list[TaskInfo], **evaluation: Any) -> str:
    """The page of a run with one round and one evaluation."""
    log = MetricsLog(run.metrics)
    log.begin(0, tasks)
    log.add_round(round_record(1))
    log.add_evaluation(evaluation_record(1, **evaluation))
    return write_report(run).read_text()


# --- What it says --------------------------------------------------------------------------------


def test_the_page_has_the_scores_samples_settings_and_commands_of_its_run(run: RunFolder) -> None:
    done = run_here("report", run.path.name, folder=run.path.parent)
    assert (done.returncode, done.stdout) == (0, "run/report.html\n"), done.stderr
    seen = Seen(run.report.read_text())
    said = " ".join(seen.text.split())
    (*_, last) = MetricsLog(run.metrics).evaluations()
    for client, score in last["score_by_client"].items():
        assert client in said
        assert f"{score:.3f}" in said
    assert f"{last['score']:.3f}" in said
    assert "at timesteps 500, 250, 0" in said
    assert "training.local_steps 2 12" in said, "a setting that is not the default"
    assert f"lineage {run.lineage}" in said
    assert "device cpu precision float32" in said
    assert "srfed sample --run run --n 64" in said
    assert "finished: round 3 of 3; 3 owners, a federation, simulated" in said
    assert seen.elements.count("svg") == 6
    assert run.report.stat().st_mode & 0o777 == 0o600
    assert not list(run.path.glob(".*.tmp"))


def test_samples_stand_beside_real_images_of_the_same_owners(run: RunFolder) -> None:
    generated, real, reverse = Seen(write_report(run).read_text()).pictures()
    tasks = load_tasks(run.config.data, 3)
    assert (real == draw_grid({task.name: task.train[:4] for task in tasks})).all()
    assert (generated == np.asarray(Image.open(run.samples / "round-00003.png"))).all()
    assert (reverse == np.asarray(Image.open(run.samples / "reverse-process-00003.png"))).all()
    assert generated.shape == real.shape, "row stands by row"
    assert "This page shows real training images" in words(run.report.read_text())


def test_a_deployed_run_shows_no_real_image_and_looks_for_none(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run.clients)

    def look(*_: object) -> None:
        raise AssertionError("the sites' images are nobody else's")

    monkeypatch.setattr(report, "load_recorded_tasks", look)
    page = write_report(run).read_text()
    assert len(Seen(page).pictures()) == 2
    assert "they are their owners' alone" in words(page)
    assert "This page shows real training images" not in words(page)
    assert "srfed sample --store" in words(page)


def test_a_serverapp_ends_with_a_page_of_its_run_without_a_real_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under a SuperLink: clients keep what is theirs elsewhere."""
    config = {"federation.rounds": 1, "evaluation.samples": 6, "evaluation.ssim_images": 0}
    run = begin(tmp_path / "run", config)
    grid = InlineGrid(client_app, 3, tmp_path / "sites")
    server_app.main(grid, Context(0, 0, {}, RecordDict(), {"run-dir": str(run.path)}))
    assert "Fréchet distance of 6 samples" in capsys.readouterr().out
    page = run.report.read_text()
    assert "finished: round 1 of 1; 3 owners, a federation, deployed" in page
    assert "Real training images" not in page
    assert len(Seen(page).pictures()) == 2


def test_images_that_have_changed_are_not_shown_as_the_runs(run: RunFolder) -> None:
    text = run.images.read_text()
    run.images.write_text(re.sub(r"[0-9a-f]{16}", "0" * 16, text))
    page = write_report(run).read_text()
    assert len(Seen(page).pictures()) == 2
    assert "Real images are not shown: the images are not those" in words(page)


def test_names_are_words_and_no_markup(tmp_path: Path) -> None:
    run = begin(tmp_path / "<script>b<")
    tasks = [TaskInfo("client-b", HOSTILE, 1200, 40), TaskInfo("client-a", "_蚂蚁", 30, 10)]
    compared = {"client-b": Comparison(0.3, 0.2, 1.2, 1.8, 1)}
    page = logged(run, tasks, comparisons=compared)
    seen = Seen(page)
    assert "script" not in seen.elements
    assert seen.handlers == []
    assert HOSTILE in seen.text
    assert "_蚂蚁" in seen.text
    assert "<script>b<" in seen.text
    assert "srfed report '<script>b<'" in seen.text


def test_nothing_is_loaded_from_elsewhere(run: RunFolder) -> None:
    page = write_report(run).read_text()
    seen = Seen(page)
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in seen.loads)
    assert {"script", "link", "iframe", "object", "embed"}.isdisjoint(seen.elements)
    assert f'content="{escape(report.POLICY)}"' in page
    assert "default-src 'none'" in report.POLICY
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page)


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    MetricsLog(run.metrics).begin(0, [TaskInfo("client-a", "ant", 30, 10)])
    said = words(write_report(run).read_text())
    assert "not finished: round 0 of 3; 1 owner" in said
    assert "too early to say" in said


def test_what_is_no_number_is_a_dash(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    tasks = [TaskInfo("client-b", "zebra", 12, 4), TaskInfo("client-a", "ant", 3, 1)]
    page = logged(run, tasks, ssim={}, ssim_by_client={}, floor=None)
    assert "ant 3 0.2500 – –" in words(page)


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    done = run_here("report", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} is not the folder of a run: it has no run.json\n"


def test_many_owners_are_one_page(tmp_path: Path) -> None:
    tasks = [TaskInfo(f"client-{n}", f"owner-{n}", 10, 4) for n in range(40)]
    losses = {task.client: 0.5 for task in tasks}
    log = MetricsLog(begin(tmp_path / "run").metrics)
    log.begin(0, tasks)
    log.add_round(round_record(1, loss_by_client=losses))
    page = write_report(RunFolder.open(tmp_path / "run")).read_text()
    assert "the other 40" in words(page)


# --- Verdicts ------------------------------------------------------------------------------------


def rounds_of(*losses: float | None) -> list[dict[str, Any]]:
    return [vars(round_record(number, loss=loss)) for number, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "tone", "word"),
    [
        ([1.0, 0.5], "open", "too early to say"),
        ([1.0, 0.5, 0.3, 0.2, 0.2, 0.2, 0.2, 0.199], "good", "settled"),
        ([0.8, 0.7, 0.6, 0.5, 0.4, 0.39, 0.3, 0.29], "open", "still falling"),
        ([0.4, 0.3, 0.2, 0.2, 0.2, 0.21, 0.4, 0.41], "bad", "rising"),
        ([0.9, 0.9, 0.9, 0.9, 0.2, 0.6, 0.55, 0.2], "good", "settled"),
        ([1.0, None, 0.3], "bad", "no"),
    ],
    ids=["few", "flat", "falls", "rises", "noise", "nan"],
)
def test_convergence_is_told_from_the_last_rounds(
    losses: list[float | None], tone: str, word: str
) -> None:
    (verdict,) = verdicts([], rounds_of(*losses), None)
    assert (verdict.tone, verdict.word) == (tone, word)


def test_a_run_that_overfits_is_told_its_best_round() -> None:
    rounds = rounds_of(*[0.2] * 8)
    rounds[-1]["validation"] = {"result": vars(ResultRound(5, 0.3, 0.4)), "loss": 0.4}
    (verdict,) = verdicts([], rounds, None)
    assert verdict.sentences[1] == (
        "On validation images the best round by validation: 5 of 8, loss 0.3000; last 0.4000. "
        "After it the networks overfit."
    )


def test_every_owner_is_told_whether_joining_paid_and_who_copies(tmp_path: Path) -> None:
    tasks = [TaskInfo("client-b", "zebra", 12, 4), TaskInfo("client-a", "ant", 3, 1)]
    line = {
        "recognised": None,
        "comparisons": {
            "client-b": vars(Comparison(0.3, 0.2, 1.2, 1.8, 1)),
            "client-a": vars(Comparison(0.2, 0.3, 0.5, 0.9, 1)),
        },
        "audits": {"client-b": {"fires": True}},
    }
    _, joining, copying = verdicts(tasks, [], line)
    assert (joining.tone, joining.word) == ("bad", "not for everybody")
    assert joining.sentences[1:] == ("It pays for zebra.", "It costs for ant.")
    assert (copying.tone, copying.word) == ("bad", "yes")
    assert "fires for zebra" in copying.sentences[0]
    assert "No audit of ant" in copying.sentences[1]


def test_the_colour_of_samples_stands_beside_that_of_held_out_images(tmp_path: Path) -> None:
    tasks = [TaskInfo("a", "ant", 9, 9), TaskInfo("b", "bee", 9, 9)]
    dark, same = (Colour((mean,), (195.0,), 4.0, 4.0, 50, 50) for mean in (165.0, 195.0))
    said = words(logged(begin(tmp_path / "run"), tasks, colours={"a": dark, "b": same}))
    assert said.count("165 ± 4, held-out 195 ± 4: 30 levels too dark") == 1
    assert "not compared" not in said
    said = words(logged(begin(tmp_path / "statistics"), tasks))
    assert "colour: not compared, as the server has not both samples and held-out images" in said
    assert "colour ± spread" not in said


# --- In a browser --------------------------------------------------------------------------------


@needs_chromium
def test_a_browser_shows_it_light_and_dark_wide_and_on_a_telephone(
    run: RunFolder, tmp_path: Path
) -> None:
    page = write_report(run)
    wide, heard = look_at(page, tmp_path, width=1000)
    assert heard == [], "nothing is said on the console"
    assert len(wide["drawings"]) == 6
    assert len(wide["spreads"]) == 3
    assert min(wide["spreads"]) > 200, "no picture is blank"
    telephone, heard = look_at(page, tmp_path, width=390)
    assert heard == []
    assert telephone["needed"] <= telephone["width"] == 390, "nobody scrolls sideways"
    assert telephone["smallest"] >= 12
    assert min(width for _, _, width, _ in telephone["drawings"]) > 300
    for dark in (False, True):
        shot = screenshot(page.as_uri(), tmp_path, width=1000, height=wide["height"], dark=dark)
        pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
        ground = np.median(pixels)
        assert ground < 60 if dark else ground > 220
        for x, y, width, height in wide["drawings"]:
            drawn = pixels[round(y) : round(y + height), round(x) : round(x + width)]
            assert np.ptp(drawn) > 120, "curves and their numbers stand out from the ground"
