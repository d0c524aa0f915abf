"""``--seeds`` and ``--sweep``: several runs one after the other, and a table of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from srfed.config import RunConfig
from srfed.files import exists, write_bytes
from srfed.paths import relative
from srfed.runs.checks import finished
from srfed.runs.sweep import Variant, check_root
from srfed.storage.run_folder import RunFolder, usual_folder


def train_many(
    config: RunConfig,
    found: Sequence[Variant],
    folder: Path | None,
    begin: Callable[[Path, RunConfig], RunFolder],
    go_on: Callable[[RunFolder, RunConfig], RunFolder],
    check: Callable[[RunConfig], object],
    train: Callable[[RunFolder, str], None],
) -> None:
    """Train all runs, or those that are not finished yet, and print their table.

    Args:
        config: what they have in common.
        found: the runs.
        folder: of all of them; None takes runs/<name>-<time>.
        begin: makes the folder of one.
        go_on: opens the folder of one that was begun, under its configuration.
        check: raises UserError where one cannot work.
        train: trains one; told how to go on where it is stopped.

    Raises:
        UserError: one cannot work, which is said before any has begun; or as ``train``.
    """
    # Scipy, which nobody waits for that has typed something wrong.
    from srfed.reporting.spread import Trained, spread_csv, spread_table

    if folder is not None:
        check_root(folder.absolute(), found)
    configs = [one.applied(config) for one in found]
    for each in configs:
        check(each)
    root = usual_folder(config).absolute() if folder is None else folder.absolute()
    how = f"the same command with --run-dir {relative(root)} goes on"
    trained = []
    for number, (one, each) in enumerate(zip(found, configs, strict=True), 1):
        path = root / one.folder
        print(f"\nrun {number} of {len(found)}: {', '.join(one.settings)}", flush=True)
        run = go_on(RunFolder.open(path), each) if exists(path / "run.json") else begin(path, each)
        if finished(run):
            print(f"{relative(path)} is finished already", flush=True)
        else:
            train(run, how)
        trained.append(Trained(path, one.value, each.seed))
    key = found[0].settings[0].partition("=")[0] if found[0].value else ""
    table = "\n".join(spread_table(key, trained))
    write_bytes(root / "summary.txt", f"{table}\n".encode())
    write_bytes(root / "scores.csv", spread_csv(key, trained).encode())
    print(f"\n{table}\n\nruns:       {relative(root)}\nscores:     {relative(root / 'scores.csv')}")
