"""A run's folder: whose it is, and what is in it."""

from pathlib import Path

from srfed.storage.run_folder import RunFolder
from support.tiny_run import begin, run_in_process


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
