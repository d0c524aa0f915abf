"""A run's folder: whose it is, and what is in it."""

from pathlib import Path

import pytest

from srfed.errors import UserError
from srfed.storage.run_folder import RunFolder
from support.tiny_run import begin, run_in_process, tiny_config


def test_a_runs_folder_is_its_owners_alone_and_says_what_is_in_it(
    finished_run: RunFolder,
) -> None:
    paths = [finished_run.path, *finished_run.path.rglob("*")]
    assert {path.parent.name for path in paths} >= {
        "tensorboard",
        "memorisation",
        "lineages",
        "server",
        "samples",
    }
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    readme = (finished_run.path / "README.txt").read_text()
    assert "memorisation/ crops of real training images" in " ".join(readme.split())


def test_a_client_whose_folder_others_can_read_says_so_in_its_own_log(tmp_path: Path) -> None:
    run = begin(
        tmp_path / "run",
        {"federation.rounds": 1, "evaluation.samples": 6, "evaluation.ssim_images": 0},
    )
    (run.clients / "digit-1").mkdir(parents=True)
    run.clients.chmod(0o700)
    (run.clients / "digit-1").chmod(0o755)
    run_in_process(run)
    log = (run.clients / "digit-1" / "client.log").read_text()
    assert (
        f"{run.clients / 'digit-1'} can be read by others on this machine (mode 0755); close it: "
        "chmod" in log
    )
    assert log.count("can be read by others") == 1
    assert not (run.clients / "digit-0" / "client.log").exists()


# --- What killed processes leave ---------------------------------------------------------------


def test_halves_of_files_that_killed_processes_left_go_when_the_run_goes_on(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    places = [run.path, run.samples, run.clients / "digit-0", run.clients / "digit-0" / "samples"]
    left = []
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for name in (".metrics.jsonl.0123abcd.tmp", "notes.tmp", ".mine.tmp"):
            (place / name).write_text("half")
        left.append(place / ".metrics.jsonl.0123abcd.tmp")
    with run.in_use():
        assert [path for path in left if path.exists()] == []
    assert all((place / name).exists() for place in places for name in ("notes.tmp", ".mine.tmp"))


@pytest.mark.parametrize("written", [1, 2])
def test_a_run_that_was_killed_before_it_had_an_identity_is_begun_anew(
    tmp_path: Path, written: int
) -> None:
    done = RunFolder.create(tmp_path / "other", tiny_config())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lock").touch()
    for name in ("README.txt", "config.yaml")[:written]:
        (folder / name).write_bytes((done.path / name).read_bytes())
    (folder / ".run.json.0123abcd.tmp").write_text("{")
    run = RunFolder.create(folder, tiny_config({"federation.rounds": 2}))
    assert RunFolder.open(folder).config == run.config
    assert not list(folder.glob(".*.tmp"))


def test_a_folder_of_somebody_s_own_is_no_such_remainder(tmp_path: Path) -> None:
    for name in ("README.txt", "config.yaml"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        RunFolder.create(tmp_path, tiny_config())
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_paths_are_absolute_in_every_run_whoever_begins_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = {"data.dataset": "npz", "data.dir": "a.npz"}
    relative["evaluation.inception_weights"] = "w.pth"
    run = RunFolder.create(Path("run"), tiny_config(relative))
    for config in (run.config, RunFolder.open(run.path).config):
        assert config.data.dir == str(tmp_path / "a.npz")
        assert config.evaluation.inception_weights == str(tmp_path / "w.pth")
    other = tiny_config({**relative, "evaluation.inception_weights": "v.pth"})
    found = run.reconfigure(other).config
    assert found.evaluation.inception_weights == str(tmp_path / "v.pth")
