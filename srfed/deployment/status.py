"""How a run stands, as the coordinator can see it: the run's folder, and what its SuperLink
says.
"""

import json
import os
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

from srfed.deployment.connection import check_superlink
from srfed.deployment.flower import QUIET, plain, program
from srfed.errors import UserError
from srfed.files import is_held
from srfed.paths import flower_home, user_path
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import LOCK, RunFolder
from srfed.units import printable, seconds_in_words

LATEST_RUNS = 5
"""Of Flower's runs so many are listed."""
FLWR_SECONDS = 120.0


def status(run_dir: Path, connection: str | None) -> str:
    """Where a run stands, who has answered last, what Flower knows of it, and what to do.

    Args:
        run_dir: the run's folder.
        connection: name of the SuperLink in Flower's configuration; None leaves it out.

    Raises:
        UserError: it is no run's folder or cannot be read; the SuperLink's certificate is wrong, or
            it does not answer.
    """
    run = RunFolder.open(run_dir)
    log = MetricsLog(run.metrics)
    rounds, evaluations = log.rounds(), log.evaluations()
    at_work = is_held(run.path / LOCK)
    done, wanted = (rounds[-1]["round"] if rounds else 0), run.config.federation.rounds
    ago = f", {seconds_in_words(time.time() - run.metrics.stat().st_mtime)} ago" if rounds else ""
    finished = done >= wanted and any(line["final"] for line in evaluations)
    lines = [
        f"run:        {run.path} ({run.config.name}, lineage {run.lineage})",
        f"round:      {done} of {wanted}{ago}",
        *(_evaluation(line) for line in evaluations[-1:]),
        "sites:",
        *(f"  {line}" for line in _sites(log, rounds) or ["none has taken part yet"]),
    ]
    runs: list[dict[str, Any]] = []
    if connection is not None:
        runs, told = _of_flower(connection)
        lines += told
    return "\n".join([*lines, f"so:         {_advice(run, at_work, finished, runs)}"])


def _evaluation(line: dict[str, Any]) -> str:
    score = "none" if line["score"] is None else f"{line['score']:.3f}"
    return f"evaluation: after round {line['round']}, {line['score_name']} {score}"


def _sites(log: MetricsLog, rounds: list[dict[str, Any]]) -> list[str]:
    """Each site's last accepted answer, and what has been wrong since."""
    told = []
    clients = [task.client for task in log.tasks()]
    width = max(map(len, clients), default=0)
    for client in clients:
        answered = next(
            (line["round"] for line in reversed(rounds) if client in line["accepted"]), None
        )
        text = "no answer yet" if answered is None else f"last answer in round {answered}"
        last = rounds[-1] if rounds else {"missing": {}, "refused": {}}
        for what in ("missing", "refused"):
            if client in last[what]:
                text += f"; {what} in round {last['round']}: {printable(last[what][client])}"
        told.append(f"{client:<{width}}  {text}")
    return told


def _of_flower(connection: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The SuperLink's runs, latest first, and lines that tell of them and of its SuperNodes."""
    address, authority = _connection(connection)
    if authority is not None and (unreachable := check_superlink(address, authority)):
        raise UserError(f"the SuperLink at {address} cannot be reached: {unreachable}")
    runs = sorted(
        _flwr("ls", connection)["runs"], key=lambda run: str(run["pending-at"]), reverse=True
    )
    nodes = _flwr("supernode", "list", connection)["nodes"]
    online = sum(node["status"] == "online" for node in nodes)
    lines = [
        f"SuperLink:  {address}; {online} of {len(nodes)} registered SuperNodes are online",
        "Flower's runs:",
    ]
    for run in runs[:LATEST_RUNS]:
        details = printable(" ".join(str(run["status-details"]).removeprefix("N/A").split()))
        lines.append(
            f"  {run['run-id']}  {run['status']}, since {run['pending-at']}  {details}".rstrip()
        )
    return runs, lines if runs else [*lines[:-1], "Flower's runs: none"]


def _advice(run: RunFolder, at_work: bool, finished: bool, runs: list[dict[str, Any]]) -> str:
    if at_work:
        return "a ServerApp is at work on it"
    if finished:
        return f"it is finished; its table is in {run.summary}"
    resume = f"flwr run . CONNECTION --stream --run-config 'run-dir=\"{run.path}\"'"
    if runs and not str(runs[0]["status"]).startswith("finished"):
        return (
            "its ServerApp has ended without a word (killed, or out of memory), which Flower "
            f"takes a minute to notice; then go on with: {resume}"
        )
    return f"nobody is at work on it; go on with: {resume}"


def _connection(name: str) -> tuple[str, Path | None]:
    """Address of a connection in Flower's configuration, and the certificate of the authority that
    it trusts.
    """
    file = flower_home() / "config.toml"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {file}, where `flwr` finds its SuperLinks: {error.strerror or error}"
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    known = {
        key: value for key, value in content.get("superlink", {}).items() if isinstance(value, dict)
    }
    if name not in known or "address" not in known[name]:
        raise UserError(
            f"{file} has no SuperLink {name!r}; there are: {', '.join(known) or 'none'}"
        )
    authority = known[name].get("root-certificates")
    return str(known[name]["address"]), None if authority is None else user_path(str(authority))


def _flwr(*arguments: str) -> dict[str, Any]:
    """What a command of ``flwr`` says, as JSON."""
    command = [str(program("flwr")), *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=FLWR_SECONDS,
            env={**os.environ, **QUIET},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"flwr {' '.join(arguments)} has not answered in {FLWR_SECONDS:g} s"
        ) from None
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {"success": False}
    if not answer.get("success"):
        words = [line for line in map(plain, (done.stdout + done.stderr).splitlines()) if line] or [
            "no output"
        ]
        said = str(answer.get("error-message") or words[-1])
        raise UserError(
            f"flwr {' '.join(arguments)} failed; is the SuperLink up? It says: {printable(said)}"
        )
    return dict(answer)
