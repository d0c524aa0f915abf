"""Asking twice: of two answers to nearly the same question the difference says more than either."""

import json
from pathlib import Path

import pytest
import torch

from srfed.federation.agreement import Agreement, RequestRefusedError
from srfed.federation.asked import (
    ASKED_FILE,
    LOCK,
    MOST_ANSWERED,
    MOST_QUESTIONS,
    Question,
    check_asked,
)
from srfed.federation.flower.packing import read_tensors
from srfed.federation.messages import DESCRIBE, EVALUATE, STATISTICS, TRAIN
from support.agreed_site import CLIENT, AgreedSite, refusal
from support.tiny_run import files_of_at_most
from support.wire import is_bare_error

TOO_OFTEN = f"not agreed: more than {MOST_ANSWERED} answers about one round"


def moved(site: AgreedSite, by: float) -> None:
    """Another φ."""
    name = "bottleneck.attention.norm.bias"
    site.shared[name] = torch.full_like(site.shared[name], by)


def files(site: AgreedSite) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in site.state.rglob("*")
        if path.is_file() and path.name not in ("client.log", "lock", LOCK)
    }


def test_about_one_round_three_phis_are_answered_and_the_same_one_again(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    answers = []
    for by in (0.0, 0.25, 0.5):
        moved(site, by)
        answers.append(read_tensors(site.ask(EVALUATE, attempt=f"a-{by}").content, STATISTICS))
    before = files(site)
    moved(site, 0.75)
    assert refusal(site.ask(EVALUATE, attempt="a-4")) == TOO_OFTEN
    # Neither another name nor what of the request is not φ makes another question of it.
    assert refusal(site.ask(EVALUATE, attempt="a-5", best="a-0.0", best_round=1)) == TOO_OFTEN
    assert files(site) == before
    moved(site, 0.0)
    again = read_tensors(site.ask(EVALUATE, attempt="a-6").content, STATISTICS)
    assert all(torch.equal(again[name], answers[0][name]) for name in again)
    assert (site.state / CLIENT / ASKED_FILE).read_bytes() == before[
        site.state / CLIENT / ASKED_FILE
    ]


def test_what_was_refused_is_not_counted_and_training_is_counted_by_itself(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    for attempt in range(MOST_ANSWERED + 1):
        moved(site, float(attempt))
        assert refusal(site.ask(EVALUATE, samples=19, attempt=f"e-{attempt}"))
    assert not (site.state / CLIENT / ASKED_FILE).exists()
    for attempt in range(MOST_ANSWERED):
        moved(site, float(attempt))
        assert site.ask(TRAIN, attempt=f"t-{attempt}").has_content()
    moved(site, -1.0)
    assert refusal(site.ask(TRAIN, attempt="t-4")) == TOO_OFTEN
    assert site.ask(EVALUATE, attempt="e-5").has_content()


def test_a_run_of_more_rounds_than_questions_are_kept_in_mind_is_answered_to_its_end(
    tmp_path: Path,
) -> None:
    site = AgreedSite(tmp_path)
    agreement = Agreement.load(site.state / CLIENT)
    rounds = MOST_QUESTIONS
    long = agreement.model_copy(update={"at_most": {"federation.rounds": rounds}})
    asked = {f"{kind} {k} none": ["digest"] for kind in (TRAIN, EVALUATE) for k in range(rounds)}
    answered = {"agreed": agreement.agreed, "answered": {"lineage": asked}}
    (site.state / CLIENT / ASKED_FILE).write_text(json.dumps(answered))
    question = Question("lineage", f"{EVALUATE} {rounds} none", "digest")
    check_asked(site.state / CLIENT, long, EVALUATE, question)
    with pytest.raises(RequestRefusedError):
        check_asked(site.state / CLIENT, agreement, EVALUATE, question)


def test_an_attempt_for_which_there_is_no_room_leaves_each_file_as_it_was(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    before = files(site)
    # The images and what was asked have room, the attempt has none.
    with files_of_at_most(32_000):
        assert is_bare_error(site.ask(TRAIN))
    assert "cannot write" in site.log
    assert files(site) == before
    assert site.ask(TRAIN).has_content()
    after = files(site)
    added = {path.name: len(after[path]) for path in after.keys() - before.keys()}
    assert added.pop("state.safetensors") > 32_000
    assert max(added.values()) < 32_000
    assert ASKED_FILE in added
    assert any(name.startswith("images-") for name in added)


def test_an_agreement_is_for_as_many_runs_as_its_owner_says(tmp_path: Path) -> None:
    site = AgreedSite(tmp_path)
    folder = site.state / CLIENT
    Agreement.load(folder).model_copy(update={"runs": 1}).save(folder)
    assert site.ask(TRAIN).has_content()
    for kind in (DESCRIBE, TRAIN, EVALUATE):
        reply = site.ask(kind, lineage="another", attempt="attempt-9")
        assert refusal(reply) == "not agreed: another run"
    assert "agreed was to 1; if it is meant, agree again" in site.log
    assert site.ask(DESCRIBE).has_content()
    assert list(json.loads((folder / ASKED_FILE).read_text())["answered"]) == ["lineage"]
    # The owner agrees again.
    later = {"agreed": "2030-01-01T00:00:00+00:00", "runs": 1}
    Agreement.load(folder).model_copy(update=later).save(folder)
    assert site.ask(TRAIN, lineage="another").has_content()
    assert refusal(site.ask(TRAIN, attempt="attempt-9")) == "not agreed: another run"
