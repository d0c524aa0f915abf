"""The owner decides: a site serves what its agreement allows, and nothing that a server merely asks
for.
"""

import json
import math
import stat
import subprocess
from collections.abc import Callable, Mapping
from functools import partialmethod
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Message

from srfed.config import RunConfig, load_config
from srfed.data import RECORD_FILE, load_tasks
from srfed.deployment.agree import agree_as_rehearsed, fits, in_words, propose, standing
from srfed.deployment.certificates import make_certificates
from srfed.errors import UserError
from srfed.federation.agreement import (
    AGREEMENT_FILE,
    Agreement,
    LeastImages,
    SiteResources,
    not_agreed,
    rules_of,
    samples_of,
    weak_numbers,
)
from srfed.federation.asked import ASKED_FILE
from srfed.federation.flower.packing import read_metrics, reply_content, request_content
from srfed.federation.messages import (
    DESCRIBE,
    EVALUATE,
    FAILED,
    SHARED,
    TRAIN,
    VALIDATE,
    Request,
)
from srfed.federation.site import _tasks_of
from srfed.model import build_model, build_partition
from srfed.networks.partition import Shared
from srfed.storage.client_store import ClientStore, StoreBounds
from srfed.storage.site_model import SiteModel
from srfed.training.local import LocalTrainer
from support.agreed_site import CLIENT, MOMENTS, AgreedSite, refusal
from support.commands import run_here
from support.tiny_run import TINY, tiny_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> AgreedSite:
    return AgreedSite(tmp_path_factory.mktemp("site"))


def test_a_site_serves_what_its_owner_has_agreed_to(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    assert site.ask(DESCRIBE, client="", attempt="none").has_content()
    assert site.ask(TRAIN).has_content()
    assert site.ask(EVALUATE).has_content()
    assert len(site.stored) == 2, "an attempt and a model"


BEST = {
    **MOMENTS,
    "data.validation_images": 4,
    "federation.result": "best",
    "federation.validate_every": 2,
}


def test_guidance_is_as_agreed(tmp_path: Path) -> None:
    own = {**MOMENTS, "model.exclusive_stages": "none", "model.owned": ("vector",)}
    site = AgreedSite(tmp_path, {**own, "sampling.guidance": 0.5})
    assert site.ask(EVALUATE).has_content()
    for weight in (0.0, 0.4, 0.6):
        asked = tiny_config({**own, "sampling.guidance": weight})
        for kind in (TRAIN, EVALUATE):
            assert refusal(site.ask(kind, asked)) == "not agreed: sampling.guidance"


def test_a_site_tells_its_validation_loss_as_often_as_was_agreed(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path, BEST)
    numbers = read_metrics(site.ask(VALIDATE).content)
    assert set(numbers) == {"loss", "num-examples"}
    assert numbers["num-examples"] == 4
    assert isinstance(numbers["loss"], float)
    assert 0 < numbers["loss"] < 10
    assert site.ask(VALIDATE, round=3).has_content(), "the last"
    assert refusal(site.ask(VALIDATE, round=1)) == "not agreed: federation.validate_every"
    for changes in (
        {"federation.validate_every": 1},
        {"federation.validate_every": 3},
        {"federation.result": "last"},
        {"data.validation_images": 2},
    ):
        (name,) = changes
        for kind in (TRAIN, VALIDATE):
            asked = tiny_config({**BEST, **changes})
            assert refusal(site.ask(kind, asked, round=1)) == f"not agreed: {name}"
    assert site.stored == []


def test_a_loss_that_too_few_images_stand_behind_is_withheld(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path, BEST)
    for least, told in ((4, True), (5, False)):
        agreement = Agreement.load(site.state / CLIENT)
        careful = agreement.least_images.model_copy(update={"mean": least})
        agreement.model_copy(update={"least_images": careful}).save(site.state / CLIENT)
        loss = read_metrics(site.ask(VALIDATE).content)["loss"]
        assert isinstance(loss, float)
        assert math.isfinite(loss) == told
        said = in_words(Agreement.load(site.state / CLIENT), site.config)
        assert "mean loss on your 4 validation images" in said
        assert ("withheld unless 5 stand behind it" in said) != told


def test_a_sites_own_model_at_the_end_is_that_of_the_best_round(tmp_path: Path) -> None:
    """θ_i of the attempt that the server names, whatever the site has trained since."""
    site = AgreedSite(tmp_path, {**BEST, "evaluation.every": 1})
    for number in (1, 2, 3):
        parent = f"attempt-{number - 1}" if number > 1 else "none"
        best = {"best": "attempt-1", "best_round": 1} if number > 1 else {}
        asked = site.ask(TRAIN, round=number, attempt=f"attempt-{number}", parent=parent, **best)
        assert asked.has_content()
    store = ClientStore(site.state, CLIENT, "lineage", 3)

    def model_after(**fields: Any) -> int:
        named = {"parent": "attempt-3", "best": "attempt-1", "best_round": 1, **fields}
        named |= {"round": 3, "attempt": "e", "samples": 20, "final": True}
        assert site.ask(EVALUATE, **named).has_content()
        model = SiteModel(site.state / CLIENT)
        attempt = "attempt-1" if model.round == 1 else "attempt-3"
        expected = store.load(attempt).exclusive.average
        assert all(torch.equal(model.tensors[1][name], expected[name]) for name in expected)
        return model.round

    assert model_after() == 1
    assert model_after(best="none", best_round=0) == 3


# What was seen to work against a site whose owner had agreed to statistics of twenty images a
# round: whole networks, single images, the site's memory and processes. Written out, so that a rule
# that is lost is missed.
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "all tensors of the network": ({"model.exclusive_stages": "none"}, "model.exclusive_stages"),
    "the tensors of θ but for the head": (
        {"model.exclusive_stages": "io"},
        "model.exclusive_stages",
    ),
    "the tensors that do not match a pattern": (
        {"model.exclusive_stages": ["head.*"]},
        "model.exclusive_stages",
    ),
    "another network": ({"model.channels": [8, 16, 16, 32]}, "model.channels"),
    "a network that knows its task": (
        {"model.task_embedding": "shared"},
        "model.task_embedding",
    ),
    "a task's vector of its own": ({"model.owned": ["vector"]}, "model.owned"),
    "one training image alone": (
        {"data.images_per_task": 1, "training.minibatches": "ragged"},
        "data.images_per_task",
    ),
    "one image less": ({"data.images_per_task": 141}, "data.images_per_task"),
    "another split": ({"data.test_fraction": 0.21}, "data.test_fraction"),
    "two training images less": ({"data.validation_images": 2}, "data.validation_images"),
    "images of another size": ({"data.image_size": 9}, "data.image_size"),
    "mirrored images": ({"data.horizontal_flip": True}, "data.horizontal_flip"),
    "minibatches of one image": ({"training.batch_size": 1}, "training.batch_size"),
    "minibatches of one image more": ({"training.batch_size": 17}, "training.batch_size"),
    "a last minibatch of a few images": (
        {"training.minibatches": "ragged"},
        "training.minibatches",
    ),
    "minibatches in another order": ({"seed": 1}, "seed"),
    "more steps": ({"training.local_steps": 2000}, "training.local_steps"),
    "passes in place of steps": (
        {"training.local_steps": None, "training.local_epochs": 1},
        "training.local_steps",
    ),
    "gradients as they are": ({"training.optimizer": "sgd"}, "training.optimizer"),
    "gradients without a bound": ({"training.gradient_clip": None}, "training.gradient_clip"),
    "gradients beside φ": ({"training.control_variates": True}, "training.control_variates"),
    "another rate": ({"training.learning_rate": 1.0}, "training.learning_rate"),
    "φ's moments": ({"training.shared_moments": "reset"}, "training.shared_moments"),
    "more rounds": ({"federation.rounds": 4}, "federation.rounds"),
    "twice the work": ({"federation.compare": "alone"}, "federation.compare"),
    "another word on figures": ({"federation.compare_told": False}, "federation.compare_told"),
    "images in place of statistics": ({"evaluation.mode": "samples"}, "evaluation.mode"),
    "statistics in every round": ({"evaluation.every": 1}, "evaluation.every"),
    "features of another network": (
        {"evaluation.feature_network": "inception"},
        "evaluation.feature_network",
    ),
    "SSIM of one test image": ({"evaluation.ssim_images": 1}, "evaluation.ssim_images"),
    "SSIM at another timestep": ({"evaluation.ssim_timestep": 6}, "evaluation.ssim_timestep"),
    "a picture of the reverse process in many steps": (
        {"evaluation.strip_steps": 101},
        "evaluation.strip_steps",
    ),
    "samples without noise": ({"sampling.eta": 0.0}, "sampling.eta"),
    "samples in giant batches": ({"sampling.batch_size": 10**6}, "sampling.batch_size"),
    "another precision": (
        {"resources.precision": "bfloat16", "resources.device": "auto"},
        "resources.precision",
    ),
    "a store without end": ({"federation.keep_attempts": 10**6}, "federation.keep_attempts"),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("kind", [DESCRIBE, TRAIN, EVALUATE])
def test_a_request_that_was_not_agreed_is_refused_by_name_before_any_work(
    site: AgreedSite, what: str, kind: str
) -> None:
    changes, name = HOSTILE[what]
    plain = {key: value for key, value in changes.items() if "." in key}
    asked = tiny_config({**MOMENTS, **plain}).model_copy(update={"seed": changes.get("seed", 0)})
    assert refusal(site.ask(kind, asked)) == f"not agreed: {name}"
    assert (
        site.log.rstrip().splitlines()[-1].startswith(f"  refused: not agreed: {name} (asked for ")
    )
    assert site.stored == []


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (TRAIN, {"round": 4}, "not agreed: federation.rounds"),
        (EVALUATE, {"round": 1}, "not agreed: evaluation.every"),
        (EVALUATE, {"final": True}, "not agreed: evaluation.every"),
        (EVALUATE, {"round": 3, "final": False}, "not agreed: evaluation.every"),
        (EVALUATE, {"samples": 1}, "not agreed: evaluation.samples_between"),
        (EVALUATE, {"samples": 19}, "not agreed: evaluation.samples_between"),
        (EVALUATE, {"samples": 21}, "not agreed: evaluation.samples_between"),
        (EVALUATE, {"round": 3, "final": True, "samples": 1}, "not agreed: evaluation.samples"),
        (TRAIN, {"client": "clinic-b"}, "the request is for another client"),
        (TRAIN, {"client": ""}, "the request is for another client"),
        (TRAIN, {"round": 0}, "the request's round is impossible"),
        (TRAIN, {"round": -1}, "the request's round is impossible"),
        (TRAIN, {"round": 10**9}, "the request's round is impossible"),
        (TRAIN, {"round": 2**63 - 1}, "the request's round is impossible"),
        (TRAIN, {"attempt": "none"}, "the request's round is impossible"),
        (VALIDATE, {}, "not agreed: federation.validate_every"),
        (TRAIN, {"best_round": -1}, "the request's best_round is impossible"),
        (TRAIN, {"best_round": 10**9}, "the request's best_round is impossible"),
        (EVALUATE, {"samples": -1}, "the request's samples is impossible"),
        (EVALUATE, {"samples": 2**62}, "the request's samples is impossible"),
        *[
            (TRAIN, {field: name}, f"the request's {field} is impossible")
            for field in ("lineage", "attempt", "parent", "best", "client")
            for name in (
                "../../x",
                "/etc",
                "a/b",
                "..",
                ".hidden",
                "a\0b",
                "a\nb",
                "\x1b[31m",
                "x" * 300,
                "é",
            )
        ],
        *[
            (TRAIN, {field: ""}, f"the request's {field} is impossible")
            for field in ("lineage", "attempt", "parent", "best")
        ],
    ],
)
def test_an_impossible_request_is_refused_at_the_door(
    site: AgreedSite, kind: str, fields: dict[str, Any], words: str
) -> None:
    before = set(site.state.parent.parent.rglob("*"))
    assert refusal(site.ask(kind, **fields)) == words
    assert f"refused: {words}" in site.log
    assert all(text.isprintable() for text in site.log.splitlines()), (
        "what it said cannot disturb a terminal"
    )
    assert site.stored == []
    assert [
        path
        for path in sorted(site.state.parent.parent.rglob("*"))
        if path not in before and path.name != "client.log"
    ] == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"seed": -1}', '{"unknown": {}}', "x" * 10**6], ids=range(6)
)
def test_an_impossible_configuration_is_refused_at_the_door(site: AgreedSite, text: str) -> None:
    assert refusal(site.ask(TRAIN, text)) == "the request's config is impossible"


def test_what_is_this_machines_affair_is_not_the_servers(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    threads = torch.get_num_threads()
    try:
        changes = {
            "resources.client_cpus": 100_000,
            "resources.client_gpus": 1.0,
            "resources.device": "auto",
            "evaluation.inception_weights": "/dev/zero",
            "data.dir": "/etc",
        }
        assert site.ask(TRAIN, tiny_config({**MOMENTS, **changes})).has_content()
        assert torch.get_num_threads() == 1, "as the owner has it"
    finally:
        torch.set_num_threads(threads)


def test_the_sites_own_weights_are_read_not_the_servers(tmp_path: Path) -> None:
    agreement = _proposed(
        tmp_path, resources=SiteResources(inception_weights="/srv/own.pth", threads=3)
    )
    asked = tiny_config(
        {**MOMENTS, "evaluation.inception_weights": "/dev/zero", "resources.client_cpus": 100_000}
    )
    admitted = agreement.admit(asked)
    assert admitted.evaluation.inception_weights == "/srv/own.pth"
    assert admitted.resources.client_cpus == 3


def test_a_site_without_an_agreement_answers_nothing(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path, agreed=False)
    for kind in (DESCRIBE, TRAIN, EVALUATE):
        assert "python -m srfed.deploy agree" in refusal(site.ask(kind))
    assert "python -m srfed.deploy agree" in site.log
    assert site.stored == []


def test_a_server_that_is_refused_again_and_again_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = AgreedSite(tmp_path)
    monkeypatch.setattr("srfed.files.LONGEST_LOG", 2000)
    for _ in range(60):
        site.ask(TRAIN, round=4)
    logs = sorted((site.state / CLIENT).glob("client.log*"))
    assert [path.name for path in logs] == ["client.log", "client.log.1"]
    assert all(path.stat().st_size < 2400 for path in logs)


def test_another_sites_agreement_is_none(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    path = site.state / CLIENT / AGREEMENT_FILE
    path.write_text(path.read_text().replace(CLIENT, "clinic-b"))
    assert site.ask(TRAIN).has_error()
    assert "agreement of 'clinic-b'" in site.log


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "is damaged"),
        (
            lambda text: text.replace('"format": 1', '"format": 2'),
            "has format 2, which a newer srfed wrote",
        ),
        (
            lambda text: text.replace('"tensors"', '"tensor"'),
            "is damaged: shared.tensors: Field required",
        ),
        (
            lambda text: text.replace('"statistics": 2', '"statistics": "2"'),
            "least_images.statistics",
        ),
    ],
)
def test_a_damaged_agreement_is_a_sentence_and_nothing_is_served(
    tmp_path: Path, change: Callable[[str], str], words: str
) -> None:
    site = AgreedSite(tmp_path)
    path = site.state / CLIENT / AGREEMENT_FILE
    path.write_text(change(path.read_text()))
    assert site.ask(TRAIN).has_error()
    assert words in site.log
    assert "Traceback" not in site.log
    assert site.stored == []


def test_a_forgotten_setting_is_not_agreed(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    agreement = Agreement.load(site.state / CLIENT)
    exactly = {name: value for name, value in agreement.exactly.items() if name != "model.dropout"}
    agreement.model_copy(update={"exactly": exactly}).save(site.state / CLIENT)
    assert refusal(site.ask(TRAIN)) == "not agreed: model.dropout"


def test_less_than_agreed_may_be_asked(site: AgreedSite) -> None:
    fewer = {
        "training.local_steps": 1,
        "federation.rounds": 2,
        "federation.keep_attempts": 2,
        "evaluation.every": 0,
    }
    agreement = Agreement.load(site.state / CLIENT)
    assert agreement.admit(tiny_config({**MOMENTS, **fewer})).training.local_steps == 1


@pytest.mark.parametrize("forgotten", [False, True], ids=["", "with the record of images removed"])
def test_changed_images_are_not_the_agreed_ones_until_the_owner_agrees_again(
    tmp_path: Path, forgotten: bool
) -> None:
    site = AgreedSite(tmp_path)
    (task,) = load_tasks(site.config.data, 1)
    np.savez(
        site.data,
        train_images=np.concatenate([task.train[1:], task.test[:1]]),
        test_images=task.test[1:],
    )
    if forgotten:
        (site.state / CLIENT / RECORD_FILE).unlink()
    assert site.ask(TRAIN).has_error()
    words = (
        "refused: not agreed: the site's images" if forgotten else "moved from tests to training"
    )
    assert words in site.log
    assert "agree" in site.log
    assert site.stored == []
    agree_as_rehearsed(site.config, site.data, site.state, CLIENT)
    _tasks_of.cache_clear()
    assert site.ask(TRAIN).has_content()


def test_a_phi_that_this_version_makes_otherwise_is_refused(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    agreement = Agreement.load(site.state / CLIENT)
    shared = agreement.shared.model_copy(update={"fingerprint": "0" * 64})
    agreement.model_copy(update={"shared": shared}).save(site.state / CLIENT)
    assert refusal(site.ask(TRAIN)) == "not agreed: the tensors of φ"
    assert site.stored == []


def test_features_of_other_weights_are_refused(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    agreement = Agreement.load(site.state / CLIENT)
    assert agreement.features is not None
    features = agreement.features.model_copy(update={"fingerprint": "0" * 64})
    agreement.model_copy(update={"features": features}).save(site.state / CLIENT)
    assert refusal(site.ask(EVALUATE)) == "not agreed: the feature network"


def test_a_mean_loss_of_too_few_images_is_withheld(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    # 32 images a round, about 8 in each quarter of the timesteps; not all four can have 9 of them.
    told = read_metrics(site.ask(TRAIN).content)["loss_by_quarter"]
    assert isinstance(told, list)
    assert not any(math.isnan(loss) for loss in told)
    agreement = Agreement.load(site.state / CLIENT)
    agreement.model_copy(update={"least_images": LeastImages(mean=9)}).save(site.state / CLIENT)
    withheld = read_metrics(site.ask(TRAIN).content)["loss_by_quarter"]
    assert isinstance(withheld, list)
    assert any(math.isnan(loss) for loss in withheld)
    assert all(
        math.isnan(loss) or loss == before for loss, before in zip(withheld, told, strict=True)
    )


# --- What an owner can agree to ------------------------------------------------------------------


def _proposed(folder: Path, overrides: Mapping[str, Any] = MOMENTS, **options: Any) -> Agreement:
    (task,) = load_tasks(tiny_config().data, 1)
    data = folder / "images.npz"
    np.savez(data, train_images=task.train, test_images=task.test)
    options.setdefault("least", LeastImages(statistics=20, mean=3))
    return propose(tiny_config(overrides), data, folder / "state", CLIENT, **options)


def test_every_setting_has_a_rule_and_what_nobody_thought_of_is_exact() -> None:
    rules = rules_of(RunConfig())
    assert sorted(name for names in rules.values() for name in names) == sorted(
        RunConfig().settings()
    )
    assert set(rules["at_most"]) == {
        "training.local_steps",
        "federation.rounds",
        "federation.keep_attempts",
    }
    assert set(rules["at_least"]) == {"evaluation.every"}
    assert {"federation.compare", "federation.compare_told"} <= set(rules["exactly"])
    loose = {name for name in rules["free"] if not name.startswith("federation.")}
    assert loose == {
        "name",
        "data.dataset",
        "data.dir",
        "evaluation.samples",
        "evaluation.samples_between",
        "evaluation.inception_weights",
        "evaluation.grid_columns",
        "resources.backend",
        "resources.device",
        "resources.cpus",
        "resources.ray_address",
        "resources.client_cpus",
        "resources.client_gpus",
    }


def test_an_owner_reads_what_of_the_network_is_its_own(tmp_path: Path) -> None:
    changes = {**MOMENTS, "model.exclusive_stages": "none", "model.owned": ["vector", "film"]}
    agreement = _proposed(tmp_path, changes)
    said = in_words(agreement, tiny_config(changes))
    assert "; exclusive stages none, own vector and film\n" in said
    model = build_model(tiny_config(changes), 1)
    shared = build_partition(tiny_config(changes), model).shared
    assert agreement.shared.tensors == len(shared) == len(model.state_dict()) - 11


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"evaluation.samples": 57},
            "evaluation.samples: feature statistics of 19 generated images, 20 is the least",
        ),
        (
            {"evaluation.samples_between": 57},
            "evaluation.samples_between: feature statistics of 19 generated images",
        ),
        (
            {"evaluation.samples_between": 63},
            "evaluation.samples_between: two answers would differ by 1 images",
        ),
        (
            {"data.images_per_task": 19},
            "data.images_per_task: feature statistics of 19 training images",
        ),
        (
            {"evaluation.ssim_images": 2},
            "evaluation.ssim_images: SSIM over 2 test images, 3 is the least",
        ),
        (
            {"training.batch_size": 2},
            "training.batch_size: a minibatch of 2 images, 3 is the least",
        ),
        (
            {"training.batch_size": 20, "training.minibatches": "ragged"},
            "training.batch_size: a minibatch of 2 images",
        ),
        (
            {"evaluation.samples": 6, "evaluation.samples_between": 6, "evaluation.every": 0},
            "evaluation.memorisation_quantile: an audit of 2 images, 3 is the least",
        ),
    ],
)
def test_numbers_with_too_few_images_behind_them_cannot_be_agreed_to(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as error:
        _proposed(tmp_path, {**MOMENTS, **changes})
    assert words in str(error.value)
    assert not (tmp_path / "state" / CLIENT / AGREEMENT_FILE).exists()


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_our_own_configurations_protect_an_owner_of_a_few_hundred_images(path: Path) -> None:
    config = load_config(path)
    assert list(weak_numbers(config, LeastImages(), (142, 36), samples_of(config))) == []


def test_the_number_of_samples_depends_on_nobodys_presence(tmp_path: Path) -> None:
    agreement = _proposed(tmp_path)
    more = tiny_config({**MOMENTS, "federation.clients": 4})
    assert fits(agreement, more).startswith("does NOT fit: not agreed: evaluation.samples ")
    assert (
        fits(
            agreement,
            more.model_copy(
                update={
                    "evaluation": more.evaluation.model_copy(
                        update={"samples": 80, "samples_between": 80}
                    )
                }
            ),
        )
        == "fits"
    )


# --- The command ---------------------------------------------------------------------------------


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return run_here("deploy", *arguments)


def test_an_owner_agrees_sees_what_changes_and_check_says_whether_it_fits(tmp_path: Path) -> None:
    (task,) = load_tasks(tiny_config().data, 1)
    data, state, config = tmp_path / "images.npz", tmp_path / "state", tmp_path / "config.yaml"
    np.savez(data, train_images=task.train, test_images=task.test)
    config.write_text(json.dumps({"name": "tiny", **TINY}))
    make_certificates(tmp_path / "certificates", ["127.0.0.1"])
    where = ["--data", data, "--state-dir", state, "--client-id", CLIENT]
    options = [*where, "--config", config, "--set", "evaluation.mode=statistics"]
    options += ["--set", "evaluation.samples=60", "--set", "evaluation.samples_between=60"]

    weak = command("agree", *options)
    assert weak.returncode == 2
    assert weak.stderr.count("\n") == 1
    assert "evaluation.ssim_images: SSIM over 3 test images, 8 is the least" in weak.stderr

    options += ["--least-mean", 3, "--root-certificates", tmp_path / "certificates" / "ca.crt"]
    unasked = command("agree", *options)
    assert (unasked.returncode, unasked.stderr) == (
        2,
        "error: nobody is there to be asked; agree with --yes\n",
    )
    assert standing(state, CLIENT) is None

    agreed = command("agree", *options, "--yes")
    assert agreed.returncode == 0, agreed.stderr
    agreement = standing(state, CLIENT)
    assert agreement is not None
    model = build_model(tiny_config(), 1)
    shared = build_partition(tiny_config(), model).take_shared(model.state_dict())
    size = sum(tensor.nbytes for tensor in shared.values())
    for words in (
        f"φ, {len(shared)} tensors, {size:,} bytes",
        "exclusive stages 2",
        "(20 at the end, 20 before)",
        f"of your {len(task.train)} training and {len(task.test)} test images; no image",
        "SSIM of 3",
        "up to 3 rounds, each of up to 2 steps in minibatches of 16",
        f"SHA-256 {agreement.coordinator}",
    ):
        assert words in agreed.stdout, words
    fingerprint = subprocess.run(
        [
            "openssl",
            "x509",
            "-in",
            tmp_path / "certificates" / "ca.crt",
            "-noout",
            "-fingerprint",
            "-sha256",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert agreement.coordinator == fingerprint.partition("=")[2].strip().replace(":", "").lower()
    path = state / CLIENT / AGREEMENT_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["exactly"]["model.exclusive_stages"] == 2, (
        "to be read by people"
    )

    again = command("agree", *options, "--yes")
    assert again.returncode == 0
    assert "says so already" in again.stdout
    # As a run leaves it.
    (state / CLIENT / ASKED_FILE).write_text("{}")
    renewed = command("agree", *options)
    assert "  what was asked under it counts no more, so another run may begin\n" in renewed.stdout
    assert "  runs:        1 (more of them with --runs)" in renewed.stdout

    assert "\nagreement:  fits\n" in command("check", *options[:-4]).stdout
    wider = [*options, "--set", "training.local_steps=9"]
    checked = command("check", *wider[:-6], *wider[-2:])
    assert "agreement:  does NOT fit: not agreed: training.local_steps" in checked.stdout

    before = path.read_text()
    shown = command("agree", *wider)
    assert shown.returncode == 2
    assert "would change:\n  training.local_steps: at most 2 -> at most 9\n" in shown.stdout
    assert path.read_text() == before
    assert command("agree", *wider, "--yes").returncode == 0
    changed = standing(state, CLIENT)
    assert changed is not None
    assert changed.at_most["training.local_steps"] == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--least-statistics", 1], "statistics = 1 is impossible"),
        (["--least-mean", 0], "mean = 0 is impossible"),
        (["--threads", 0], "threads = 0 is impossible"),
        (["--runs", 0], "--runs 0 is impossible; allowed: 1 to 1000"),
        (["--root-certificates", "/nowhere"], "cannot read /nowhere"),
        (["--set", "model.exclusive_stages=9"], "model.exclusive_stages = 9 is not allowed"),
        (["--client-id", "../x"], "is no name for a store"),
    ],
)
def test_what_cannot_be_agreed_to_takes_one_line(
    tmp_path: Path, options: list[Any], words: str
) -> None:
    (task,) = load_tasks(tiny_config().data, 1)
    data = tmp_path / "images.npz"
    np.savez(data, train_images=task.train, test_images=task.test)
    done = command(
        "agree",
        "--data",
        data,
        "--state-dir",
        tmp_path / "state",
        "--client-id",
        CLIENT,
        "--yes",
        *options,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not list(tmp_path.rglob(AGREEMENT_FILE))


# --- Once, and in this order ---------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path) -> AgreedSite:
    return AgreedSite(tmp_path)


def kept(site: AgreedSite) -> dict[str, str]:
    """Each of the owner's files but the log, by its hash."""
    return {
        str(path.relative_to(site.state)): sha256(path.read_bytes()).hexdigest()
        for path in site.state.rglob("*")
        if path.is_file() and path.name not in ("client.log", "lock")
    }


def bits(reply: Message) -> bytes:
    record = reply.content.array_records["arrays"]
    return b"".join(record[key].data for key in sorted(record))


def test_a_question_leaves_one_attempt_however_often_it_is_asked(fresh: AgreedSite) -> None:
    first = bits(fresh.ask(TRAIN, attempt="a"))
    before = kept(fresh)
    assert bits(fresh.ask(TRAIN, attempt="a")) == first, "the same question, the same answer"
    for number in range(3):
        words = refusal(fresh.ask(TRAIN, attempt=f"fresh-{number}"))
        assert words == "asked otherwise before: the same was asked before, as attempt a"
    assert kept(fresh) == before


def test_a_name_stands_for_one_question_and_others_may_follow(fresh: AgreedSite) -> None:
    honest = fresh.shared
    assert fresh.ask(TRAIN, attempt="a").has_content()
    fresh.shared = Shared({name: tensor + 0.01 for name, tensor in honest.items()})
    before = kept(fresh)
    assert "another question was answered" in refusal(fresh.ask(TRAIN, attempt="a"))
    assert kept(fresh) == before
    assert fresh.ask(TRAIN, attempt="b").has_content()
    assert fresh.ask(TRAIN, attempt="c", round=2, parent="a").has_content()


def test_a_full_store_refuses_before_any_work_and_nothing_older_goes(
    fresh: AgreedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fresh.ask(TRAIN, attempt="a").has_content()
    before = kept(fresh)
    monkeypatch.setattr(StoreBounds, "__init__", partialmethod(StoreBounds.__init__, attempts=1))
    monkeypatch.setattr(LocalTrainer, "train", None)
    words = refusal(fresh.ask(TRAIN, attempt="b", round=2, parent="a"))
    assert words == "the site's store is full"
    assert "holds 1 attempts, and 1 are the most" in fresh.log
    monkeypatch.setattr(StoreBounds, "__init__", partialmethod(StoreBounds.__init__, lineages=1))
    assert refusal(fresh.ask(TRAIN, attempt="a", lineage="b")) == "the site's store is full"
    assert kept(fresh) == before


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_reply_that_the_guard_refuses_leaves_every_file_as_it_was(
    fresh: AgreedSite, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.ask(TRAIN, attempt="a")
    before = kept(fresh)

    def mistaken(header: Any, metrics: Any, arrays: Any = None) -> Any:
        return reply_content(header, {**metrics, "more": 1.0}, arrays)

    fields = {"parent": "a", "round": 2, "attempt": "b"}
    with monkeypatch.context() as patched:
        patched.setattr("srfed.federation.flower.client_app.reply_content", mistaken)
        assert fresh.ask(kind, **fields).error.code == FAILED
    assert "['more']" in fresh.log
    assert kept(fresh) == before
    assert fresh.ask(kind, **fields).has_content()
    assert kept(fresh) != before


def test_images_are_kept_with_the_first_message_that_is_answered(
    fresh: AgreedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for one that the agreement, the handler or the guard refuses, though they were read."""
    record = fresh.state / CLIENT / RECORD_FILE
    record.unlink()
    before = kept(fresh)
    with monkeypatch.context() as patched:
        patched.setattr(Agreement, "admit_images", partialmethod(admit_none))
        assert refusal(fresh.ask(DESCRIBE)) == "not agreed: the images"
    assert kept(fresh) == before
    assert "impossible" in refusal(fresh.ask(TRAIN, round=0))
    with monkeypatch.context() as patched:
        patched.setattr("srfed.federation.flower.client_app.description_of", lambda _: 7)
        assert fresh.ask(DESCRIBE).error.code == FAILED
    assert kept(fresh) == before
    assert fresh.ask(DESCRIBE).has_content()
    (copy,) = (fresh.state / CLIENT).glob("images-*.safetensors")
    assert kept(fresh).keys() - before.keys() == {
        str(path.relative_to(fresh.state)) for path in (copy, record)
    }
    after = kept(fresh)
    assert fresh.ask(DESCRIBE).has_content()
    assert kept(fresh) == after


def admit_none(*_: Any) -> None:
    raise not_agreed("the images")


def test_a_type_that_flower_would_hand_on_is_refused_before_any_work(site: AgreedSite) -> None:
    before = kept(site)
    for kind in ("train.default", "evaluate.default"):
        request = Request(site.config.to_json(), "lineage", CLIENT, 1, "a")
        content = request_content(request, {SHARED: site.shared})
        (reply,) = site.grid.send_and_receive([Message(content, 1, kind)])
        assert refusal(reply) == "the request is of an unknown kind"
    assert kept(site) == before


@pytest.mark.parametrize("layout", [b"[" * 100_000, b"{", b"", b"\x1b[2J"])
def test_arrays_that_are_none_are_refused_without_a_traceback(
    fresh: AgreedSite, layout: bytes
) -> None:
    before = kept(fresh)
    request = Request(fresh.config.to_json(), "lineage", CLIENT, 1, "a")
    content = request_content(request, {SHARED: fresh.shared})
    content[SHARED]["layout"] = Array(np.frombuffer(layout, np.uint8))
    (reply,) = fresh.grid.send_and_receive([Message(content, 1, TRAIN)])
    assert refusal(reply) == "the request's arrays cannot be read"
    assert "Traceback" not in fresh.log
    assert "\x1b" not in fresh.log
    assert kept(fresh) == before


def test_halves_of_files_of_killed_processes_go_with_the_next_attempt(fresh: AgreedSite) -> None:
    folder = fresh.state / CLIENT
    for old in folder.glob("images-*.safetensors"):
        old.unlink()
    halves = [
        folder / ".images-0.safetensors.0123abcd.tmp",
        folder / ".comparison.json.0123abcd.tmp",
        folder / "samples" / ".round-00001.png.0123abcd.tmp",
    ]
    for half in halves:
        half.parent.mkdir(exist_ok=True)
        half.write_text("half")
    _tasks_of.cache_clear()
    assert fresh.ask(TRAIN, attempt="a").has_content()
    assert [half for half in halves if half.exists()] == []
