"""Which site is which: names noted when keys are registered, and what a run knows of its
clients.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srfed.deployment.flower import QUIET
from srfed.errors import UserError
from srfed.files import held, read_json, write_json
from srfed.keys import read_key
from srfed.storage.manifest import read_manifest, rewrite_manifest

NOTES = "registered.json"
"""Where it is noted whose keys were registered, beside the keys unless another place is named."""
REGISTERED = re.compile(r"SuperNode (\d+) registered")
"""How ``flwr supernode register`` names the node."""
SECONDS = 120.0
"""How long the SuperLink may take to register a key."""


def register_site(site: str, key: Path, connection: str = "", notes: Path | None = None) -> str:
    """Register a site's public key with the SuperLink under the site's name, and note which node it
    is.

    Args:
        site: its name.
        key: its public key, ``site-<name>.pub``.
        connection: the SuperLink, by its name in Flower's configuration; empty: the default one.
        notes: the file of notes; None takes the one beside the key.

    Returns:
        What was done, in one line.

    Raises:
        UserError: the name or the key is none, the SuperLink does not take it, the note cannot be
            written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", site):
        raise UserError(
            f"--site {site!r:.120} is no name for a site; allowed: letters, digits, and . _ - "
            "inside"
        )
    fingerprint = read_key(key)
    command = [str(Path(sys.executable).parent / "flwr"), "supernode", "register", str(key)]
    command += [connection] if connection else []
    try:
        done = subprocess.run(
            [*command, "--name", site],
            env={**QUIET, **os.environ},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except OSError as error:
        raise UserError(f"cannot start {command[0]}: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the SuperLink has not answered in {SECONDS:g} s") from error
    node = REGISTERED.search(done.stdout)
    if done.returncode != 0 or node is None:
        said = " ".join((done.stderr or done.stdout).split()) or "no reason given"
        raise UserError(f"the SuperLink does not take {key}: {said}")
    notes = notes or key.absolute().parent / NOTES
    note_site(notes, site, int(node[1]), fingerprint)
    return f"{site} is node {node[1]} with the key {fingerprint}, noted in {notes}"


def note_site(notes: Path, site: str, node: int, fingerprint: str) -> None:
    """Note a registered key; of an earlier one of this site the note goes. Raises UserError where
    it cannot.
    """
    at = datetime.now(UTC).isoformat(timespec="seconds")
    with held(notes.with_name(f".{notes.name}.lock"), wait=True):
        sites = read_notes(notes) if notes.exists() else {}
        sites[site] = {"node": str(node), "key": fingerprint, "registered": at}
        write_json(notes, {"sites": sites})


def read_notes(notes: Path) -> dict[str, dict[str, str]]:
    """The notes by site; raises UserError where the file is none of ours."""
    return dict(read_json(notes, "sites")["sites"])


def sites_in_words(run: Path | None, notes: Path | None) -> str:
    """A table of the sites: name, client id, node, key, and the last answer that a run had of it.

    Args:
        run: the run's folder; None shows the notes alone.
        notes: a file of notes; None shows what the run itself knows.

    Raises:
        UserError: a file cannot be read or is damaged.
    """
    rows: list[dict[str, str]] = []
    noted = dict(read_notes(notes)) if notes is not None else {}
    for client, known in _known(run).items() if run is not None else ():
        key = str(known["key"])
        site = next(
            (name for name, note in noted.items() if key and note["key"] == key), known["name"]
        )
        noted.pop(site, None)
        rows.append(
            {
                "client": client,
                "site": site or "-",
                "node": str(known["node"]),
                "key": key or "-",
                "images": f"{known['images']} + {known['test_images']}",
                "last answer": _last_answer(run, client) if run is not None else "-",
            }
        )
    for site, note in noted.items():
        row = {
            "client": "-",
            "site": site,
            "node": note["node"],
            "key": note["key"],
            "images": "-",
            "last answer": "-",
        }
        rows.append(row)
    if not rows:
        return "no site yet"
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    return "\n".join(
        "  ".join(f"{line[name]:<{width}}" for name, width in widths.items()).rstrip()
        for line in lines
    )


def rebind(run: Path, client: str) -> str:
    """Let a run forget to which key a client id belongs, and how many images it had: the next one
    to come has it.

    Args:
        run: the run's folder; nobody may be using it.
        client: the client's id.

    Returns:
        What was done, in one line.

    Raises:
        UserError: the folder is no run's or in use, there is no such client, the roster file
            decides instead, or the checkpoint cannot be written.
    """
    from srfed.federation.flower.identity import kept_roster

    run = run.absolute()
    with held(run / "lock", wait=False):
        listed = kept_roster(run)
        if listed is not None and client in listed:
            raise UserError(
                f"the run's roster says whose {client!r} is; name a new one: --run-config "
                "'roster=\"FILE\"'"
            )
        known = _known(run)
        if client not in known:
            raise UserError(
                f"{run} knows no client {client!r}; it has {', '.join(sorted(known)) or 'none'}"
            )
        checkpoint = _last_checkpoint(run)
        content = read_manifest(checkpoint)
        for group in ("known", "shapes"):
            content[group] = {
                other: values for other, values in content.get(group, {}).items() if other != client
            }
        rewrite_manifest(checkpoint, content)
    return (
        f"{client} was bound to {known[client]['key'] or 'no key'}; the next SuperNode to come "
        "with this id has it"
    )


def _last_checkpoint(run: Path) -> Path:
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not the folder of a run: it has no run.json")
    checkpoints = {
        int(path.name[6:]): path
        for path in (run / "server").glob("round-*")
        if path.name[6:].isdecimal()
    }
    if not checkpoints:
        raise UserError(f"{run} has no checkpoint yet")
    return checkpoints[max(checkpoints)]


def _known(run: Path) -> dict[str, dict[str, Any]]:
    """What the last checkpoint holds each client to; nothing in one of an earlier version."""
    return dict(read_manifest(_last_checkpoint(run.absolute())).get("known", {}))


def _last_answer(run: Path, client: str) -> str:
    """What became of the last request to a client, by metrics.jsonl."""
    answered, since = "-", ""
    for line in _lines(run / "metrics.jsonl"):
        what = f"{line['kind']} {line['round']}"
        for word in ("refused", "missing"):
            if client in line.get(word, {}):
                since = f"; {word} in {what}: {line[word][client]}"
        if client in line.get("accepted", line.get("score_by_client", ())):
            answered, since = what, ""
    return answered + since


def _lines(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        texts = (
            path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the end of a line that is being written
        if line.get("kind") in ("round", "evaluation"):
            lines.append(line)
    return lines
