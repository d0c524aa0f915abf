"""One contract: what really travels is what it says, and a peer of another protocol is refused in
words.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from srfed.data import load_tasks
from srfed.deployment.agree import agree, agree_as_rehearsed, fits, in_words, propose
from srfed.deployment.check import check_site
from srfed.errors import UserError
from srfed.federation.agreement import LeastImages
from srfed.federation.contract import DESCRIBED, Contract
from srfed.federation.flower import client_app
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import read_layout, request_content, unpack, wire_bytes
from srfed.federation.messages import (
    DESCRIBE,
    EVALUATE,
    METRICS,
    PROTOCOL,
    REFUSED,
    REPLY,
    REQUEST,
    TRAIN,
    Failure,
    Reply,
    Request,
)
from srfed.federation.screening import RefusedError, screen_description
from srfed.model import build_model, build_partition
from support.tiny_run import CHEAP, begin, run_on_grid, tiny_config

INT4: dict[str, Any] = {"updates.steps": ["clip", "quantise"], "updates.quantise_bits": 4}
CONTROLLED: dict[str, Any] = {"training.control_variates": True}
DOWN: dict[str, Any] = {"updates.shared_bits": 8}
SITE: dict[str, Any] = {
    "evaluation.mode": "statistics",
    "evaluation.samples": 60,
    "evaluation.samples_between": 60,
}


def contract_of(overrides: dict[str, Any]) -> Contract:
    config = tiny_config(overrides)
    model = build_model(config, 1)
    return Contract.of(config, build_partition(config, model).take_shared(model.state_dict()))


class RecordingGrid(InlineGrid):
    """Keeps what travels."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[tuple[str, RecordDict, RecordDict]] = []

    def _run_client(self, message: Message) -> Message:
        reply = super()._run_client(message)
        self.seen.append((message.metadata.message_type, message.content, reply.content))
        return reply


@pytest.mark.parametrize(
    "overrides",
    [{}, {"updates.steps": ["clip"]}, INT4, CONTROLLED, INT4 | CONTROLLED | DOWN],
    ids=str,
)
def test_what_travels_is_what_the_contract_says(tmp_path: Path, overrides: dict[str, Any]) -> None:
    settings = {"federation.rounds": 1, **overrides}
    run = begin(tmp_path / "run", settings)
    grid = run_on_grid(run, RecordingGrid)
    assert isinstance(grid, RecordingGrid)
    contract = contract_of(settings)
    for kind, request, reply in grid.seen:
        down = {name: read_layout(record) for name, record in request.array_records.items()}
        up = {name: read_layout(record) for name, record in reply.array_records.items()}
        if kind == DESCRIBE:
            assert (down, up) == ({}, {})
            assert set(reply.config_records[REPLY]) == DESCRIBED.header
        if kind == EVALUATE:
            assert down == contract.request
        if kind == TRAIN:
            assert down == contract.training_request
            assert up == {**contract.update, **contract.control}
            for name, layout in up.items():
                assert reply.array_records[name].count_bytes() == wire_bytes(layout)
        assert (kind == DESCRIBE) == (METRICS not in reply)
    assert {kind for kind, _, _ in grid.seen} == {DESCRIBE, TRAIN, EVALUATE}


# --- Another protocol ----------------------------------------------------------------------------


def greeting(**fields: Any) -> Message:
    content = request_content(Request(tiny_config().to_json(), "lineage"))
    record = content.config_records[REQUEST]
    for name, value in fields.items():
        if value is None:
            del record[name]
        else:
            record[name] = value
    return Message(content, 1, DESCRIBE)


@pytest.mark.parametrize(
    ("said", "words"), [(None, "protocol 1"), (1, "protocol 1"), (9, "protocol 9")], ids=str
)
def test_a_site_refuses_a_server_of_another_protocol_in_words(
    tmp_path: Path, said: int | None, words: str
) -> None:
    grid = InlineGrid(client_app.app, 1, tmp_path)
    reply = grid.send_and_receive([greeting(protocol=said)])[0]
    assert reply.error.code == REFUSED
    assert reply.error.reason == (
        f"the server speaks {words} of srfed, this site {PROTOCOL}; install the same srfed at both"
    )


def test_a_site_that_hears_of_fields_to_come_says_the_protocol_first(tmp_path: Path) -> None:
    grid = InlineGrid(client_app.app, 1, tmp_path)
    reply = grid.send_and_receive([greeting(protocol=9, client=None, wish="everything")])[0]
    assert "speaks protocol 9" in (reply.error.reason or "")


def test_a_server_of_protocol_3_is_refused_though_its_request_has_another_name(
    tmp_path: Path,
) -> None:
    message = greeting(protocol=3)
    message.content["request"] = message.content.config_records[REQUEST]
    del message.content[REQUEST]
    (reply,) = InlineGrid(client_app.app, 1, tmp_path).send_and_receive([message])
    assert "the server speaks protocol 3 of srfed" in (reply.error.reason or "")


def test_a_site_of_protocol_3_that_finds_no_request_is_refused_with_what_mends_it() -> None:
    # What it answers, read in its source: it takes a message without a request for one of its own.
    reply = Reply(Failure(REFUSED, "the request is of another protocol"))
    with pytest.raises(RefusedError, match=f"than {PROTOCOL}; install the same srfed at both"):
        screen_description(reply)


def test_the_records_of_a_round_have_the_names_of_flowers_own_apps(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {**CHEAP, "federation.rounds": 1})
    grid = run_on_grid(run, RecordingGrid)
    assert isinstance(grid, RecordingGrid)
    # Of Flower, as its strategies write and read them.
    flowers = FedAvg()
    names = {flowers.arrayrecord_key, flowers.configrecord_key}
    for kind, request, reply in grid.seen:
        assert set(request) == ({flowers.configrecord_key} if kind == DESCRIBE else names)
        if kind == TRAIN:
            assert set(reply) == {flowers.arrayrecord_key, "metrics", REPLY}
            assert flowers.weighted_by_key in reply.metric_records["metrics"]
        for record in [*request.values(), *reply.values()]:
            assert record.count_bytes() > 0, "as Flower's mods count"
    assert [kind for kind, _, _ in grid.seen].count(TRAIN) == 3


def app_describing(said: int | None, **more: Any) -> ClientApp:
    """A client that says another protocol, or none, as those before it did."""
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        reply = client_app.describe(message, context)
        record = reply.content.config_records[REPLY]
        if said is None:
            del record["protocol"]
        else:
            record["protocol"] = said
        for name, value in more.items():
            record[name] = value
        return reply

    return app


@pytest.mark.parametrize(
    ("said", "words"), [(None, "protocol 1"), (1, "protocol 1"), (7, "protocol 7")], ids=str
)
def test_a_server_refuses_sites_of_another_protocol_in_words(
    tmp_path: Path, said: int | None, words: str
) -> None:
    run = begin(tmp_path / "run", {"federation.join_timeout": 5.0})
    expected = f"the site speaks {words} of srfed, this server {PROTOCOL}; install the same srfed"
    with pytest.raises(UserError, match=expected):
        run_on_grid(run, InlineGrid, app_describing(said, **({"new": 1} if said == 7 else {})))


def test_a_site_that_cannot_read_new_settings_is_refused_with_what_mends_it(
    tmp_path: Path,
) -> None:
    """A site from before there was a protocol reads the settings first, and knows no `updates`."""
    text = tiny_config().to_json().replace('"updates"', '"updates_to_come"')
    grid = InlineGrid(client_app.app, 0)
    node_config = {"client-id": "a", "data": str(tmp_path / "i.npz"), "state-dir": str(tmp_path)}
    grid._contexts[1] = Context(0, 1, node_config, RecordDict(), {})
    agreed_site(tmp_path, tiny_config(SITE))
    message = Message(request_content(Request(text, "lineage")), 1, DESCRIBE)
    (reply,) = grid.send_and_receive([message])
    with pytest.raises(RefusedError, match=f"the same srfed at both if .* protocol {PROTOCOL}"):
        screen_description(unpack(reply))


# --- In words ------------------------------------------------------------------------------------


def agreed_site(folder: Path, config: Any, *, agreed: bool = True) -> Path:
    data = folder / "i.npz"
    (task,) = load_tasks(config.data, 1)
    np.savez(data, train_images=task.train, test_images=task.test)
    if agreed:
        agree_as_rehearsed(config, data, folder, "a")
    return data


def test_the_check_says_what_comes_and_goes_in_bytes_as_measured(tmp_path: Path) -> None:
    for overrides in ({}, INT4):
        config, contract = tiny_config({**SITE, **overrides}), contract_of(overrides)
        data = agreed_site(tmp_path, config, agreed=False)
        text = check_site(config, data, tmp_path, "a")
        (down,), (up,) = contract.request.values(), contract.update.values()
        assert f"with names, shapes and headers {wire_bytes(down):,} and {wire_bytes(up):,}" in text
        assert "each round: 198,528 bytes" in text
        said = (
            "25,176 bytes (25.2 kB) go: its change, shortened to norm 1, in 4 bits a value" in text
        )
        assert said == bool(overrides)


def test_an_agreement_holds_a_site_to_the_steps_and_says_what_leaves(tmp_path: Path) -> None:
    config = tiny_config({**SITE, **INT4})
    data = agreed_site(tmp_path, config, agreed=False)
    agreement = propose(config, data, tmp_path, "a", least=LeastImages(statistics=2, mean=1))
    agree(agreement, config, data, tmp_path)
    assert (agreement.shared.bytes, agreement.shared.bytes_up) == (198_528, 25_176)
    assert "25,176 bytes (25.2 kB): the change, shortened to norm 1" in in_words(agreement, config)
    assert agreement.exactly["updates.steps"] == ["clip", "quantise"]
    assert fits(agreement, config) == "fits"
    for name, value in (
        ("updates.steps", []),
        ("updates.steps", ["quantise"]),
        ("updates.clip_norm", 1.5),
        ("updates.quantise_bits", 8),
    ):
        asked = tiny_config({**SITE, **INT4, name: value})
        assert fits(agreement, asked).startswith(f"does NOT fit: not agreed: {name}")
    assert "the tensors of φ" in fits(agreement, config, "0" * 64)
