"""Images are remembered: which ones, on which side; a change is said and refused, and nobody
changes sides.
"""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from srfed import simulate
from srfed.api import train_run
from srfed.commands import evaluate
from srfed.commands.train import centralise
from srfed.config import DataConfig
from srfed.data import (
    ImageRecord,
    Task,
    accept_images,
    load_own_task,
    load_recorded_task,
    load_recorded_tasks,
    load_task,
    load_tasks,
    record_tasks,
    recorded_images,
)
from srfed.data.npz import read_arrays
from srfed.data.record import read_records, write_records
from srfed.data.source import split_by_content
from srfed.deployment.agree import agree_as_rehearsed
from srfed.federation.flower.client_app import app as client_app
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.server_app import run_federation
from srfed.federation.messages import TRAIN
from srfed.federation.site import STATE_DIR_VARIABLE, Site, _tasks_of, own_task
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.errors import message_of
from support.images import folder, held_out, random_images, save
from support.tiny_run import all_bits, begin, run_in_process

NAME = "clinic-7"
FRACTION = DataConfig().test_fraction


def divided(
    images: np.ndarray, known: ImageRecord | None = None, fraction: float = FRACTION
) -> tuple[set[bytes], set[bytes]]:
    """The contents of training and held-out images."""
    train, test = split_by_content(DataConfig(test_fraction=fraction), NAME, images, known)
    assert len(train) + len(test) == len(images)
    return {bytes(image) for image in train}, {bytes(image) for image in test}


def record_of(train: np.ndarray, test: np.ndarray) -> ImageRecord:
    return ImageRecord.of(Task(NAME, train, test))


# --- The split ---

MANY = random_images(400, 8, 8, 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 399), min_size=60, max_size=200, unique=True), st.floats(0.15, 0.85))
def test_no_image_changes_its_side_when_others_come_or_go(
    chosen: list[int], fraction: float
) -> None:
    train, test = divided(MANY[chosen], fraction=fraction)
    all_train, all_test = divided(MANY, fraction=fraction)
    assert train <= all_train
    assert test <= all_test


def test_about_the_fraction_asked_for_is_held_out() -> None:
    images = random_images(4000, 5, 5, 1, seed=5)
    for fraction in (0.05, 0.2, 0.5):
        _, test = divided(images, fraction=fraction)
        # Five standard deviations of 4,000 independent draws.
        assert abs(len(test) / 4000 - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / 4000)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 24), st.integers(0, 10**6), st.sampled_from([0.01, 0.2, 0.5, 0.99]))
def test_few_images_are_enough_on_both_sides(count: int, seed: int, fraction: float) -> None:
    images = random_images(count, 5, 5, 1, seed=seed)
    train, test = divided(images, fraction=fraction)
    assert min(len(train), len(test)) >= min(2, count // 2)
    # Only as many cross the limit as have to.
    ideal = held_out(images, fraction)
    crossed = sum((bytes(image) in test) != out for image, out in zip(images, ideal, strict=True))
    least = min(2, count // 2)
    assert crossed == max(0, least - ideal.sum()) + max(0, least - (~ideal).sum())


def test_equal_images_are_on_one_side_and_the_order_of_the_images_stays() -> None:
    some = random_images(30, 5, 5, 1)
    images = np.concatenate([some, some[::-1], some])
    train, test = split_by_content(DataConfig(), NAME, images)
    out = held_out(images, FRACTION)
    np.testing.assert_array_equal(train, images[~out])
    np.testing.assert_array_equal(test, images[out])
    alike = np.repeat(some[:1], 9, axis=0)
    assert "more images that differ" in message_of(split_by_content, DataConfig(), NAME, alike)


@pytest.mark.parametrize("seed", range(12))
def test_an_image_that_is_known_stays_where_it_was_however_few_there_are(seed: int) -> None:
    images = random_images(40, 5, 5, 1, seed=seed)
    train, test = split_by_content(DataConfig(test_fraction=0.02), NAME, images[:6])
    assert len(test) == 2
    known = record_of(train, test)
    now_train, now_test = divided(images, known, fraction=0.02)
    assert {bytes(image) for image in train} <= now_train
    assert {bytes(image) for image in test} <= now_test
    # Those that were held out to have two stay so, though others would now be nearer to the limit.
    assert divided(images[:6], known, fraction=0.9) == ({*map(bytes, train)}, {*map(bytes, test)})


# --- The record ---


def test_a_fingerprint_is_of_shape_and_pixels() -> None:
    image = random_images(1, 6, 4, 1)
    (name,) = record_of(image, image[:0]).train
    assert name == hashlib.sha256(b"(6, 4, 1)" + image.tobytes()).hexdigest()[:32]
    for other in (image.reshape(1, 4, 6, 1), image.reshape(1, 6, 2, 2), image ^ np.uint8(1)):
        assert record_of(other, other[:0]).train != (name,)
    mirrored = image[:, :, ::-1]
    assert record_of(mirrored, mirrored[:0]) == record_of(
        np.ascontiguousarray(mirrored), mirrored[:0]
    )


def test_differences_are_counted_in_words() -> None:
    images = random_images(20, 5, 5, 1)
    before = record_of(images[:10], images[10:14])
    assert before.differences(before) == ""
    assert (
        before.differences(record_of(images[[*range(10), 15, 16]], images[10:14]))
        == "2 new for training"
    )
    assert (
        before.differences(record_of(images[:9], images[11:14]))
        == "1 gone from training, 1 gone from tests"
    )
    moved = record_of(images[[*range(8), 10]], images[[8, 9, 11, 12, 13, 17]])
    assert (
        before.differences(moved)
        == "2 moved from training to tests, 1 moved from tests to training, 1 new for tests"
    )
    assert (
        before.differences(record_of(images[9::-1], images[10:14]))
        == "the same ones in another order"
    )
    twice = record_of(images[[*range(10), 0]], images[10:14])
    assert before.differences(twice) == "1 new for training"
    assert twice.differences(before) == "1 gone from training"


def test_records_survive_their_file(tmp_path: Path) -> None:
    assert read_records(tmp_path / "images.json") == {}
    records = {"a": record_of(MANY[:3], MANY[3:5]), "b": record_of(MANY[5:6], MANY[:0])}
    write_records(tmp_path / "images.json", records)
    assert read_records(tmp_path / "images.json") == records


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"format": 2, "records": {}}', "has format 2, which a newer srfed wrote"),
        ('{"format": 1}', "has no 'records'"),
        ('{"format": 1, "records": {"a": {"train": []}}}', "is no record of images"),
        ('{"format": 1, "records": {"a": {"train": 3, "test": []}}}', "is no record of images"),
        ('{"format": 1, "records": [1]}', "is no record of images"),
        ('{"format": 1, "rec', "is damaged"),
    ],
)
def test_a_record_that_is_none_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "images.json").write_text(content)
    text = message_of(read_records, tmp_path / "images.json")
    assert words in text
    assert str(tmp_path / "images.json") in text


# --- A run's images ---


SETTINGS = {
    "data.dataset": "folder",
    "training.batch_size": 4,
    "training.local_steps": 1,
    "federation.rounds": 1,
    "evaluation.every": 0,
    "evaluation.samples": 6,
    "evaluation.samples_between": 6,
    "evaluation.ssim_images": 0,
}


def make_pictures(root: Path) -> Path:
    """Three tasks of 20 pictures, without a split."""
    for task in range(3):
        for number in range(20):
            pixels = random_images(8, 8, seed=100 * task + number)
            save(root / f"task-{task}" / f"{number:02d}.png", pixels)
    return root


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, the run that was trained on them, and its evaluation."""
    root = tmp_path_factory.mktemp("original")
    pictures = make_pictures(root / "pictures")
    run = run_in_process(begin(root / "run", {**SETTINGS, "data.dir": str(pictures)}))
    assert evaluate.main(["--run", str(run.path), "--samples", "6"]) == 0
    return root


@pytest.fixture
def pictures(original: Path, tmp_path: Path) -> Path:
    """A copy of the pictures, which the copied run is told of."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(original), str(tmp_path)))
    return tmp_path / "pictures"


@pytest.fixture
def run(pictures: Path) -> RunFolder:
    """The copied run."""
    return RunFolder.open(pictures.parent / "run")


def test_a_process_reads_a_file_of_all_tasks_once_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = random_images(40, 8, 8, 1), np.repeat(np.arange(8), 5)
    np.savez(tmp_path / "all.npz", train_images=images, train_labels=labels)
    config, record = DataConfig(dataset="npz", dir=str(tmp_path / "all.npz")), tmp_path / "r.json"
    reads, real = [], read_arrays

    def counting(path: Path, required: list[str], **rest: list[str]) -> dict[str, np.ndarray]:
        reads.append(required)
        return real(path, required, **rest)

    monkeypatch.setattr("srfed.data.npz.read_arrays", counting)
    # What is looked at before a run, what the server judges by, and what each client loads.
    tasks = load_tasks(config, 8)
    record_tasks(record, tasks)
    for index in [*range(8), *range(8)]:
        found = load_recorded_task(config, index, record)
        assert np.array_equal(found.train, tasks[index].train)
        assert np.array_equal(found.test, tasks[index].test)
    assert reads.count(["train_images", "train_labels"]) == 1
    # Another record is another state of the images.
    np.savez(tmp_path / "all.npz", train_images=255 - images, train_labels=labels)
    changed = load_tasks(config, 8)
    record_tasks(record, changed)
    assert np.array_equal(load_recorded_task(config, 3, record).train, changed[3].train)


def test_a_site_s_images_are_read_once_a_process_however_many_sites_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []

    def counting(config: DataConfig, index: int, record: Path) -> Task:
        reads.append(index)
        images = np.zeros((2, 5, 5, 1), np.uint8)
        return Task(f"task-{index}", images, images, index)

    monkeypatch.setattr("srfed.federation.site.load_recorded_task", counting)
    sites = [Site(f"task-{index}", tmp_path / "clients", index=index) for index in range(600)]
    for site in sites * 2:
        assert own_task(DataConfig(), site).index == site.index
    assert reads == list(range(600))


def test_a_run_remembers_its_images_and_the_digits_too(finished_run: RunFolder) -> None:
    tasks = {
        f"digit-{index}": ImageRecord.of(load_task(finished_run.config.data, index))
        for index in range(3)
    }
    assert read_records(finished_run.images) == tasks


def changed(pictures: Path, what: str) -> str:
    """Change a data set; what should be said of it."""
    match what:
        case "replaced":
            old = load_task(folder(pictures), 1)
            for number in range(20):
                save(
                    pictures / "task-1" / f"{number:02d}.png",
                    random_images(8, 8, seed=5000 + number),
                )
            new = load_task(folder(pictures), 1)
            sides = {
                "training": (len(new.train), len(old.train)),
                "tests": (len(new.test), len(old.test)),
            }
            told = [f"{both[0]} new for {side}" for side, both in sides.items()]
            told += [f"{both[1]} gone from {side}" for side, both in sides.items()]
            return f"task-1: {', '.join(told)}"
        case "five more":
            before = load_task(folder(pictures), 2)
            for number in range(5):
                save(
                    pictures / "task-2" / f"0{number}-more.png",
                    random_images(8, 8, seed=7000 + number),
                )
            after = load_task(folder(pictures), 2)
            assert {*map(bytes, before.test)} <= {*map(bytes, after.test)}, (
                "no held-out image is trained on"
            )
            return "task-2: "
        case "one less":
            (pictures / "task-0" / "07.png").unlink()
            return "task-0: 1 gone from "
        case "another split":
            task = load_task(folder(pictures), 0)
            shutil.rmtree(pictures / "task-0")
            moved = [*task.test, *task.train]
            for number, image in enumerate(moved):
                part = "train" if number < len(task.train) else "test"
                save(pictures / "task-0" / part / f"{number}.png", image[..., 0])
            return (
                f"task-0: {len(task.test)} moved from training to tests, {len(task.test)} moved "
                "from tests to training"
            )
    raise AssertionError(what)


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of a refusal."""
    assert code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize("what", ["replaced", "five more", "one less", "another split"])
def test_changed_images_are_said_and_refused_and_nothing_goes_on(
    pictures: Path, run: RunFolder, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    bits, record = all_bits(run), run.images.read_bytes()
    arguments = ["--run", str(run.path), "--samples", "6"]
    told = changed(pictures, what)

    resume = ["--resume", str(run.path), "--set", "federation.rounds=2"]
    for text in (
        refused(capsys, evaluate.main(arguments)),
        refused(capsys, evaluate.main([*arguments, "--seed", "9"])),
        refused(capsys, simulate.main(resume)),
        message_of(run_in_process, RunFolder.open(run.path)),
    ):
        assert told in text
        assert "--allow-changed-images" in text
    assert (all_bits(run), run.images.read_bytes()) == (bits, record)
    assert len(list(run.path.glob("evaluations/*/scores.json"))) == 1


def test_changed_images_that_are_allowed_are_said_and_measured_anew(
    pictures: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--run", str(run.path), "--samples", "6"]
    assert evaluate.main(arguments) == 0
    first = capsys.readouterr().out
    before = {task.name: task for task in load_recorded_tasks(run.config.data, 3, run.images)}
    told = changed(pictures, "replaced")
    changed(pictures, "five more")

    record = run.images.read_bytes()
    assert evaluate.main([*arguments, "--allow-changed-images"]) == 0
    second = capsys.readouterr()
    assert told in second.err
    assert second.out != first, "other images, other scores"
    assert run.images.read_bytes() == record, "what the run was trained on stays on record"
    assert len(list(run.path.glob("evaluations/*/scores.json"))) == 2

    assert (
        simulate.main(
            ["--resume", str(run.path), "--set", "federation.rounds=2", "--allow-changed-images"]
        )
        == 0
    )
    assert told in capsys.readouterr().err
    after = {task.name: task for task in load_recorded_tasks(run.config.data, 3, run.images)}
    assert {*map(bytes, before["task-2"].test)} <= {*map(bytes, after["task-2"].test)}
    assert len(after["task-2"].train) + len(after["task-2"].test) == 25
    assert [line["round"] for line in MetricsLog(run.metrics).rounds()] == [1, 2]
    assert simulate.main(["--resume", str(run.path), "--set", "federation.rounds=3"]) == 0, (
        "on record now"
    )
    assert "note" not in capsys.readouterr().err


def test_a_record_that_was_lost_is_said(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    record = run.images.read_bytes()
    run.images.unlink()
    assert evaluate.main(["--run", str(run.path), "--samples", "6"]) == 0
    assert "no record of its images" in capsys.readouterr().err
    assert not run.images.exists()
    assert simulate.main(["--resume", str(run.path)]) == 0
    assert "no record of its images" in capsys.readouterr().err
    assert run.images.read_bytes() == record


def test_a_run_that_never_started_has_no_record_to_miss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    run = begin(tmp_path / "run", {**SETTINGS, "data.dir": str(pictures)})
    assert simulate.main(["--resume", str(run.path)]) == 0
    assert capsys.readouterr().err == ""
    assert sorted(read_records(run.images)) == ["task-0", "task-1", "task-2"]


def test_a_centralised_run_remembers_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    central = {"training.method": "balanced", "training.centralised_batch_size": 12}
    run = begin(tmp_path / "run", {**SETTINGS, **central, "data.dir": str(pictures)})
    train_run(run)
    assert sorted(read_records(run.images)) == ["task-0", "task-1", "task-2"]
    told = changed(pictures, "one less")
    for text in (
        refused(capsys, centralise(["--resume", str(run.path), "--set", "federation.rounds=2"])),
        message_of(train_run, RunFolder.open(run.path)),
    ):
        assert told in text


def test_a_new_run_has_nothing_to_allow(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(tiny_yaml),
        "--run-dir",
        str(tmp_path / "run"),
        "--allow-changed-images",
    ]
    assert "--allow-changed-images is for --resume" in refused(capsys, simulate.main(arguments))
    assert not (tmp_path / "run").exists()


# --- A site's images ---


def site_pictures(path: Path, count: int = 30) -> Path:
    for number in range(count):
        save(path / f"{number:02d}.png", random_images(8, 8, seed=number))
    return path


def test_a_sites_images_are_put_on_record_once_and_compared_ever_after(tmp_path: Path) -> None:
    own, store = site_pictures(tmp_path / "own"), tmp_path / "store"
    assert recorded_images(DataConfig(), NAME, store) is None
    first = load_own_task(DataConfig(), own, NAME, store)
    assert recorded_images(DataConfig(), NAME, store) == ImageRecord.of(first)
    content = (store / "images.json").read_bytes()
    for number in range(3):
        save(own / f"a{number}.png", random_images(8, 8, seed=900 + number))
    (own / "05.png").unlink()
    for keep in (True, False):
        text = message_of(
            lambda keep=keep: load_own_task(DataConfig(), own, NAME, store, keep=keep)
        )
        assert "3 new for " in text or "new for training" in text
        assert "1 gone from " in text
        assert "python -m srfed.deploy agree" in text
    assert (store / "images.json").read_bytes() == content
    load_own_task(DataConfig(), own, NAME)  # Nobody's store, nobody's record.

    words = accept_images(DataConfig(), own, NAME, store)
    assert "1 gone from " in words
    second = load_own_task(DataConfig(), own, NAME, store)
    assert {*map(bytes, first.train)} & {*map(bytes, second.test)} == set()
    assert {*map(bytes, first.test)} & {*map(bytes, second.train)} == set()
    assert accept_images(DataConfig(), own, NAME, store) == ""


def test_a_record_is_of_the_settings_too(tmp_path: Path) -> None:
    own, store = site_pictures(tmp_path / "own"), tmp_path / "store"
    small = DataConfig(image_size=5)
    for config in (DataConfig(), small):
        load_own_task(config, own, NAME, store)
    assert recorded_images(DataConfig(), NAME, store) != recorded_images(small, NAME, store)
    (own / "05.png").unlink()
    for config in (DataConfig(), small):
        assert "1 gone from " in message_of(load_own_task, config, own, NAME, store)
    accept_images(small, own, NAME, store)
    load_own_task(small, own, NAME, store)
    assert "1 gone from " in message_of(load_own_task, DataConfig(), own, NAME, store)


def test_a_look_that_keeps_nothing_leaves_no_file(tmp_path: Path) -> None:
    own = site_pictures(tmp_path / "own")
    load_own_task(DataConfig(), own, NAME, tmp_path / "store", keep=False)
    assert not (tmp_path / "store").exists()


class ChangingSites(InlineGrid):
    """Deployed sites; a picture more is at the last of them before round 2, in a process that
    begins anew.
    """

    def __init__(self, run: RunFolder, data: dict[str, Path], changes: Path) -> None:
        super().__init__(client_app, 0)
        self._changes = changes
        for node, (client, path) in enumerate(data.items(), 1):
            agree_as_rehearsed(run.config, path, run.path / "sites", client)
            config = {"client-id": client, "data": str(path), "state-dir": str(run.path / "sites")}
            self._contexts[node] = Context(0, node, config, RecordDict(), {})

    def _run_client(self, message: Message) -> Message:
        if message.metadata.message_type == TRAIN and message.metadata.group_id == "2":
            save(self._changes / "zz.png", random_images(8, 8, seed=12345))
        _tasks_of.cache_clear()
        return super()._run_client(message)


def test_a_site_whose_images_change_in_the_middle_of_a_run_refuses_in_words(tmp_path: Path) -> None:
    own = {
        f"site-{number}": site_pictures(tmp_path / f"own-{number}", 20 + number)
        for number in range(2)
    }
    sites = {
        "data.dataset": "sites",
        "data.image_size": 8,
        "data.channels": 1,
        "evaluation.mode": "statistics",
        "federation.clients": 2,
        "federation.rounds": 2,
        "evaluation.every": 0,
        "training.batch_size": 4,
    }
    run = begin(tmp_path / "run", sites)
    os.environ.pop(STATE_DIR_VARIABLE, None)
    run_federation(ChangingSites(run, own, own["site-1"]), run)
    first, second = MetricsLog(run.metrics).rounds()
    assert sorted(first["accepted"]) == ["site-0", "site-1"]
    assert second["accepted"] == ["site-0"]
    log = (run.path / "sites" / "site-1" / "client.log").read_text()
    assert "are not those on record for site-1 (1 new for " in log
    assert "python -m srfed.deploy agree" in log
    assert not (run.path / "sites" / "site-0" / "client.log").exists()
