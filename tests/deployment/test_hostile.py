"""A hostile server and a hostile client, as real processes over a real SuperLink."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from srfed.config import load_config
from srfed.data import load_tasks
from srfed.deployment.agree import agree, propose
from srfed.deployment.deployment import Deployment
from srfed.deployment.flower import CONNECTION
from srfed.federation.agreement import LeastImages, SiteResources
from srfed.federation.flower.program import REFUSAL
from srfed.federation.messages import REFUSED
from srfed.storage.metrics_log import MetricsLog
from support.tiny_run import TINY, tiny_config

pytestmark = pytest.mark.slow

OURS = "srfed.federation.flower.client_app:app"
HONEST, HOSTILE = "digit-0", "digit-1"
SETTINGS: dict[str, Any] = {
    "federation.clients": 2,
    "federation.rounds": 2,
    "evaluation.mode": "statistics",
    "evaluation.samples": 40,
    "evaluation.samples_between": 40,
}

PROJECT = """
[project]
name = "hostile"
version = "1.0.0"
description = "A server that asks for more than was agreed"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "nobody"

[tool.flwr.app.components]
serverapp = "hostile_server:{server}"
clientapp = "{client}"

[tool.flwr.app.config]
orders = ""
"""

THIEF = '''"""An app that brings its own ClientApp along."""

from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

Path("{marker}").touch()
app = ClientApp()


@app.train()
def train(message, context):
    image = np.load(context.node_config["data"])["train_images"][0]
    content = RecordDict({{"stolen": ConfigRecord({{"image": image.tobytes()}})}})
    return Message(content, reply_to=message)
'''

SERVER = '''"""Sends what a file of orders says to every site, and writes down what each one answers."""

import hashlib
import json
import time
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

from srfed.config import parse_config
from srfed.federation.flower.packing import request_content, unpack
from srfed.federation.messages import SHARED, Description, Request
from srfed.model import build_model, build_partition

app = ServerApp()
steal = ServerApp()


@steal.main()
def ask_all(grid, context):
    """Whatever its ClientApp answers, from each site."""
    orders = json.loads(Path(context.run_config["orders"]).read_text())
    while len(nodes := list(grid.get_node_ids())) < orders["sites"]:
        time.sleep(0.2)
    replies = grid.send_and_receive([Message(RecordDict(), node, "train") for node in nodes], timeout=300)
    answers = [[r.error.code, r.error.reason] if r.has_error() else sorted(r.content) for r in replies]
    Path(orders["stolen"]).write_text(json.dumps(answers))


@app.main()
def main(grid, context):
    orders = json.loads(Path(context.run_config["orders"]).read_text())
    while len(nodes := list(grid.get_node_ids())) < orders["sites"]:
        time.sleep(0.2)
    honest = parse_config(orders["config"])
    greeting = request_content(Request(honest.to_json(), "lineage"))
    replies = grid.send_and_receive([Message(greeting, node, "query.describe") for node in nodes], timeout=300)
    sites = {Description.of(unpack(reply).header).client: reply.metadata.src_node_id for reply in replies}
    model = build_model(honest, 1)
    shared = build_partition(honest, model).take_shared(model.state_dict())
    answers = {}
    for what, kind, config, fields in orders["requests"]:
        values = {"client": orders["victim"], "round": 1, "attempt": f"attempt-{len(answers)}", **fields}
        values.setdefault("lineage", "lineage")
        times = values.pop("times", 1)
        sent = {name: times * tensor for name, tensor in shared.items()}
        content = request_content(Request(json.dumps(config), **values), {SHARED: sent})
        (reply,) = grid.send_and_receive([Message(content, sites[orders["victim"]], kind)], timeout=300)
        if reply.has_error():
            answers[what] = [reply.error.code, reply.error.reason]
        else:
            arrays = reply.content.array_records["arrays"].values()
            digest = hashlib.sha256(b"".join(array.data for array in arrays)).hexdigest()
            answers[what] = [*sorted(reply.content), digest]
    Path(orders["answers"]).write_text(json.dumps(answers))
'''

SITECUSTOMIZE = f'''"""Python runs this at its start: at one site the trainer sends a φ that nobody has trained, and
statistics that no images have.
"""

import os
import sys

if os.environ.get("SRFED_DEPLOYMENT_PART") == "site {HOSTILE}":
    import dataclasses
    import importlib.abc
    import importlib.util

    def untrained(module):
        honest = module.LocalTrainer.train

        def train(*arguments):
            result = honest(*arguments)
            return dataclasses.replace(
                result, shared={{name: tensor + 1000 for name, tensor in result.shared.items()}}
            )

        module.LocalTrainer.train = train

    def impossible(module):
        honest = module.FeatureStatistics.of

        def of(*arguments):
            found = honest(*arguments)
            scatter = found.scatter.copy()
            scatter[0, 1] = scatter[1, 0] = 2 * (scatter[0, 0] * scatter[1, 1]) ** 0.5 + 1e-3
            return dataclasses.replace(found, scatter=scatter)

        module.FeatureStatistics.of = of

    CHANGES = {{"srfed.training.local": untrained, "srfed.evaluation.features.statistics": impossible}}

    class Hook(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            change = CHANGES.pop(name, None)
            if change is None:
                return None
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                change(module)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Hook())
'''


def nested(overrides: dict[str, Any]) -> dict[str, Any]:
    """The tiny federation as a server would write it, with some "section.key" set otherwise."""
    content: dict[str, Any] = {
        "name": "tiny",
        **{section: dict(keys) for section, keys in TINY.items()},
    }
    for name, value in {**SETTINGS, **overrides}.items():
        section, key = name.split(".")
        content.setdefault(section, {})[key] = value
    return content


REQUESTS: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    (
        "the whole network",
        "train",
        {"model.exclusive_stages": "none"},
        {},
        "not agreed: model.exclusive_stages",
    ),
    (
        "one training image",
        "evaluate",
        {"data.images_per_task": 1, "training.local_steps": 2000, "evaluation.mode": "samples"},
        {"round": 2},
        "not agreed: data.images_per_task",
    ),
    (
        "statistics of one image",
        "evaluate",
        {},
        {"round": 2, "final": True, "samples": 1},
        "not agreed: evaluation.samples",
    ),
    (
        "a folder elsewhere",
        "train",
        {},
        {"lineage": "../../x"},
        "the request's lineage is impossible",
    ),
    ("a type that Flower hands on", "train.default", {}, {}, "the request is of an unknown kind"),
    (
        "another one",
        "evaluate.default",
        {},
        {"round": 2, "samples": 20},
        "the request is of an unknown kind",
    ),
    (
        "less than no samples",
        "evaluate",
        {},
        {"round": 2, "samples": -1},
        "the request's samples is impossible",
    ),
    (
        "a line of its own in the log",
        "train",
        {"data.dir": "/\x1b[2J\n2026-01-01T00:00:00+00:00 refused: forged"},
        {"parent": "\x1b[2J"},
        "the request's parent is impossible",
    ),
    ("the last round there is", "train", {}, {"round": 10**9}, "the request's round is impossible"),
    (
        "the site's memory and processes",
        "train",
        {"evaluation.inception_weights": "/dev/zero", "resources.client_cpus": 100_000},
        {},
        "",
    ),
    ("the same again", "train", {}, {"attempt": "attempt-9"}, ""),
    (
        "the same again under another name",
        "train",
        {},
        {},
        "asked otherwise before: the same was asked before, as attempt attempt-9",
    ),
    ("a second φ for the round", "train", {}, {"times": 1.01}, ""),
    ("a third", "train", {}, {"times": 1.02}, ""),
    (
        "a fourth",
        "train",
        {},
        {"times": 1.03},
        "not agreed: more than 3 answers about one round",
    ),
    ("a run beside it", "train", {}, {"lineage": "invented"}, "not agreed: another run"),
]


def written(folder: Path) -> set[Path]:
    """What lies in ``folder``, without Flower's own folder and the interpreter's compiled
    modules.
    """
    return {
        path
        for path in folder.rglob("*")
        if folder / "d" not in path.parents and "__pycache__" not in path.parts
    }


def test_neither_a_hostile_server_nor_a_hostile_client_gets_further_than_its_own_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")])
    )
    for path, text in {
        "hook/sitecustomize.py": SITECUSTOMIZE,
        "hook/hostile_server.py": SERVER,
        "app/pyproject.toml": PROJECT.format(server="app", client=OURS),
        "thief/pyproject.toml": PROJECT.format(server="steal", client="thief:app"),
        "thief/thief.py": THIEF.format(marker=tmp_path / "imported"),
        "config.yaml": yaml.safe_dump(nested({})),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    orders, answers, state = tmp_path / "orders.json", tmp_path / "answers.json", tmp_path / "state"
    stolen = tmp_path / "stolen.json"
    requests = [
        [what, kind, nested(changes), fields] for what, kind, changes, fields, _ in REQUESTS
    ]
    orders.write_text(
        json.dumps(
            {
                "sites": 2,
                "config": nested({}),
                "victim": HONEST,
                "requests": requests,
                "answers": str(answers),
                "stolen": str(stolen),
            }
        )
    )
    config = load_config(tmp_path / "config.yaml")
    with Deployment(tmp_path / "d", tls=False, authentication=False) as deployment:
        deployment.start_superlink()
        for task in load_tasks(tiny_config().data, 2):
            data = tmp_path / f"{task.name}.npz"
            np.savez(data, train_images=task.train, test_images=task.test)
            agreement = propose(
                config,
                data,
                state,
                task.name,
                least=LeastImages(statistics=2, mean=1),
                resources=SiteResources(device="cpu", threads=1),
                runs=2,
            )
            agree(agreement, config, data, state)
            deployment.add_site(task.name, data, state, wait=False)
        for client in (HONEST, HOSTILE):
            deployment.wait_for_site(client)
        run = deployment.run(tmp_path / "run", tmp_path / "config.yaml")
        assert run.wait(480) is not None
        assert run.result()[0] == "finished:completed", "\n".join(run.lines())
        before = written(tmp_path)
        for app, outcome in {"app": answers, "thief": stolen}.items():
            told = deployment.flwr(
                "run",
                str(tmp_path / app),
                CONNECTION,
                "--stream",
                "--run-config",
                f'orders="{orders}"',
                timeout=480,
            )
            assert outcome.exists(), told
        answered = json.loads(answers.read_text())
        after = written(tmp_path)

    log = (state / HONEST / "client.log").read_text()
    for what, _, _, _, words in REQUESTS:
        if words:
            assert answered[what] == [REFUSED, words], what
            assert f"refused: {words}" in log
    assert all(line.isprintable() for line in log.splitlines())
    # What is this machine's own affair is not taken from the server, and so does no harm.
    first = answered["the site's memory and processes"]
    assert first[:-1] == ["arrays", "metrics", "reply"]
    # The same question has the same answer, to the bit, and adds nothing.
    assert answered["the same again"] == first
    others = [answered[what] for what in ("a second φ for the round", "a third")]
    assert len({first[-1], *(one[-1] for one in others)}) == 3
    # Of all these requests three φ's were answered: as many attempts, where they belong; nothing
    # else was written or removed.
    assert before <= after
    attempts = [path for path in after - before if path.name == "state.safetensors"]
    assert len(attempts) == 3
    assert {path.parent.parent for path in attempts} == {state / HONEST / "lineages" / "lineage"}
    assert all(state in path.parents for path in after - before - {answers, stolen})
    # The app with code of its own was answered for by srfed, and nothing of it unpacked or run.
    assert json.loads(stolen.read_text()) == [[REFUSED, REFUSAL]] * 2
    assert not (tmp_path / "imported").exists()
    assert not list((tmp_path / "d" / "sites").rglob("*.py"))
    for client in (HONEST, HOSTILE):
        lines = (state / client / "client.log").read_text().splitlines()
        (line,) = [line for line in lines if "the app that was handed out" in line]
        assert "refused: the app that was handed out: it holds 'thief.py'" in line

    rounds = MetricsLog(tmp_path / "run" / "metrics.jsonl").rounds()
    assert [line["accepted"] for line in rounds] == [[HONEST], [HONEST]]
    assert all(list(line["refused"]) == [HOSTILE] for line in rounds)
    assert all(np.isfinite(line["loss"]) and line["loss"] < 10 for line in rounds)
    # Statistics with a negative eigenvalue had been the best score there is.
    for line in MetricsLog(tmp_path / "run" / "metrics.jsonl").evaluations():
        assert list(line["refused"]) == [HOSTILE]
        assert "it has a negative eigenvalue" in line["refused"][HOSTILE]
