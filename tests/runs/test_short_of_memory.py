"""Too little memory, and a GPU that fails: one sentence, and whatever was stored is as it was."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from srfed import device
from srfed.config import RunConfig, parse_config
from srfed.federation.flower.client_app import guarded_app
from srfed.federation.messages import FAILED, TRAIN
from srfed.federation.site import Site
from srfed.federation.worker import Drawing, Worker
from srfed.flat import copies
from srfed.interrupts import run_command
from srfed.memory import failure_of_gpu, is_short_of_memory
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.network import Network
from srfed.networks.partition import Shared
from srfed.networks.unet import UNet
from srfed.room import largest_that_fits
from srfed.runs.centralised import Centralised
from srfed.runs.checks import check_training
from srfed.runs.loop import run_rounds
from srfed.storage.run_folder import RunFolder
from srfed.training import one_step
from srfed.training.local import Job, LocalTrainer
from srfed.training.part import ClientState, initial_state
from srfed.training.step import LocalStep
from support import faked_card
from support.agreed_site import CLIENT, AgreedSite
from support.commands import run_here
from support.errors import message_of
from support.local_training import same_bits, some_images
from support.short_memory import BATCH, in_a_process_of_its_own
from support.tiny_run import CHEAP, all_bits, begin, round_lines, run_in_process, tiny_config

SAID = (
    rf"there is not enough memory \(cpu\) for a local step of {BATCH} images "
    rf"\(training\.batch_size = {BATCH}\); (\d+) images fit; allowed: training\.batch_size up to "
    r"(\d+), smaller images, or a smaller network"
)


def files_of(folder: Path) -> dict[str, bytes]:
    """What lasts there: not the logs of what has failed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def fitting(said: str) -> int:
    """How many images fit, as is said; half of what is too much, or half of that, and so on."""
    (found,) = re.findall(SAID, said)
    assert found[0] == found[1]
    fits = int(found[0])
    assert 1 <= fits < BATCH
    assert BATCH % fits == 0
    return fits


def test_a_round_that_does_not_fit_is_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    """What is said to fit goes through in the same room, in a simulation; a deployed site says the
    same in its own log, and the server learns only that it failed.
    """
    found = in_a_process_of_its_own("resumed", tmp_path / "run")
    assert found["code"] == 2, found
    (line,) = [line for line in found["said"].splitlines() if line.startswith("error: ")]
    assert "task digit-0: there is not enough memory" in line
    assert "Traceback" not in found["said"]
    assert found["as it was"]
    assert found["rounds"] == [1]
    there = in_a_process_of_its_own("fits", tmp_path / "fits", fitting(line))
    assert there["accepted"] == ["digit-0"]
    assert (there["code"], there["stored"]) == (FAILED, [])
    assert there["reason"] == "failed; the reason is in the client's own log"
    assert f"failed: task {CLIENT}: there is not enough memory" in there["log"]
    fitting(there["log"])
    assert "Traceback" not in there["log"]


class Hungry(Network):
    """Has memory for so many images at once: on a GPU nothing else would say so here."""

    most = 5

    def __init__(self, image_channels: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(image_channels, 2, 1)
        self.core = nn.Conv2d(2, 2, 1)
        self.leave = nn.Conv2d(2, image_channels, 1)

    def shells(self) -> list[tuple[str, ...]]:
        return [("enter", "leave")]

    def forward(self, x: Tensor, time: Tensor, tasks: Tensor | None = None) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        predicted: Tensor = self.leave(self.core(self.enter(x)))
        return predicted


class Failing(Hungry):
    """A GPU that fails over a client's images, whatever is done."""

    most = BATCH
    lost = False

    def forward(self, x: Tensor, time: Tensor, tasks: Tensor | None = None) -> Tensor:
        if Failing.lost:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nand advice.")
        return super().forward(x, time, tasks)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's import mode gives a test no place among the modules."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Hungry.__module__])
    monkeypatch.setattr(Failing, "lost", False)


def of_own(name: str, training: dict[str, Any], **federation: Any) -> RunConfig:
    """A tiny run of one of these networks."""
    content = tiny_config(CHEAP).model_dump(mode="json")
    content["model"] = {"network": f"{__name__}:{name}", "exclusive_stages": "io"}
    content["federation"] |= {"rounds": 2, "clients": 2, **federation}
    content["training"] |= training
    return parse_config(content)


def test_a_gpus_memory_is_spoken_of_likewise_and_a_store_is_as_it_was(tmp_path: Path) -> None:
    config = of_own("Hungry", {"batch_size": 12}, clients=1, min_clients=1)
    run = RunFolder.create(tmp_path / "run", config)
    text = message_of(lambda: run_in_process(run))
    assert "round 1 has 0 accepted updates" in text
    log = (run.clients / "digit-0" / "client.log").read_text()
    assert "for a local step of 12 images (training.batch_size = 12); 3 images fit; " in log
    assert not list(run.clients.rglob("*.safetensors"))


def test_nothing_is_promised_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hungry, "most", 0)
    trainer, shared, state = trainer_of(of_own("Hungry", {"batch_size": 3}))
    text = message_of(lambda: trainer.train(1, shared, state))
    assert text == (
        "task digit-0: there is not enough memory (cpu) for a local step of 3 images "
        "(training.batch_size = 3); not even 1 of the images fits; allowed: smaller images, or a "
        "smaller network"
    )


def test_after_it_the_same_trainer_has_the_bits_of_one_that_never_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = of_own("Hungry", {"batch_size": 6, "control_variates": True})
    trainer, shared, state = trainer_of(config)
    generator = torch.get_rng_state()
    assert "; 3 images fit; " in message_of(lambda: trainer.train(1, shared, state))
    assert torch.equal(torch.get_rng_state(), generator)
    monkeypatch.setattr(Hungry, "most", 6)
    found = trainer.train(1, shared, state)
    fresh, _, _ = trainer_of(config)
    expected = fresh.train(1, shared, state)
    for one, other in (
        (found.shared, expected.shared),
        (found.gradient, expected.gradient),
        (found.state.exclusive.weights, expected.state.exclusive.weights),
        (found.state.exclusive.moments, expected.state.exclusive.moments),
        (found.state.shared_moments, expected.state.shared_moments),
    ):
        assert one
        assert same_bits(dict(one), dict(other))
    assert found.loss == expected.loss


def trainer_of(config: RunConfig) -> tuple[LocalTrainer, Shared, ClientState]:
    model = build_model(config, 1)
    partition = build_partition(config, model)
    shared = Shared(copies(partition.take_shared(model.state_dict())))
    objective = build_objective(config, torch.device("cpu"))
    trainer = LocalTrainer(config, model, partition, objective, "digit-0", some_images(20))
    return trainer, shared, initial_state(model, partition)


def test_of_a_stack_it_is_said_how_many_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the worker goes on with stacks that do."""
    config = tiny_config({**CHEAP, "federation.clients": 3, "resources.stack": 3})
    worker, step_together = Worker(config, 1), LocalStep._step_together

    def of_two_at_most(step: LocalStep, *arguments: Any) -> Tensor:
        if len(step.owners) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step_together(step, *arguments)

    monkeypatch.setattr(LocalStep, "_step_together", of_two_at_most)
    shared, state = worker.beginning
    model, partition, objective = worker.model, worker.partition, worker.objective
    jobs = [
        Job(
            LocalTrainer(config, model, partition, objective, f"site-{k}", some_images(9), k),
            1,
            shared,
            state,
        )
        for k in range(4)
    ]
    text = message_of(lambda: worker.run_together(jobs))
    assert text == (
        "tasks site-0, site-1, site-2 and 1 more: there is not enough memory (cpu) for a local "
        "step of 4 tasks at once (resources.stack = 3), each 4 images (training.batch_size = 4); "
        "2 at once fit; allowed: resources.stack up to 2, smaller images, or a smaller network"
    )
    assert len(worker.run_together(jobs[:2])) == 2
    monkeypatch.setattr(LocalStep, "_step_together", step_together)
    assert len(worker.run_together(jobs)) == 4


def test_sampling_has_what_training_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before fewer images are sampled at once."""
    config = tiny_config({**CHEAP, "sampling.steps": 2})
    worker, forward, sizes = Worker(config, 1), UNet.forward, list[int]()
    site = Site(client="digit-0", index=0, state_dir=Path())
    drawing = Drawing(
        site, worker.beginning[0], worker.beginning[1].exclusive.weights, 6, (8, 8, 1)
    )
    whole = worker.generate(drawing)
    released = list[bool]()

    def short(network: UNet, x: Tensor, times: Tensor) -> Tensor:
        sizes.append(len(x))
        if not released:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(network, x, times)

    monkeypatch.setattr(UNet, "forward", short)
    monkeypatch.setattr(LocalStep, "release", lambda step: released.append(True))
    assert np.array_equal(worker.generate(drawing).images, whole.images)
    assert released == [True]
    assert set(sizes) == {6}


def test_a_stack_that_a_gpu_has_no_memory_for_is_refused_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card is made up; one step of the run's own is taken on the CPU instead."""
    step_together, taken = LocalStep._step_together, list[int]()

    def of_two_at_most(step: LocalStep, *arguments: Any) -> Tensor:
        taken.append(len(step.owners))
        if len(step.owners) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step_together(step, *arguments)

    card = torch.device("cuda", 0)
    monkeypatch.setattr(LocalStep, "_step_together", of_two_at_most)
    monkeypatch.setattr(device, "resolve_device", lambda resources: card)
    monkeypatch.setattr(one_step, "take_one_step", faked_card.on_the_cpu)
    run = begin(tmp_path / "of two", {**CHEAP, "resources.stack": 2, "training.local_steps": 5})
    check_training(run.config)
    assert taken == [2], "one step"
    settings = tmp_path / "run.yaml"
    settings.write_text(tiny_config({**CHEAP, "resources.stack": 3}).to_yaml())
    said = run_here("simulate", "--config", settings, "--run-dir", tmp_path / "run")
    assert said.returncode == 2
    (line,) = said.stderr.splitlines()
    assert "local step of 3 tasks at once (resources.stack = 3)" in line
    assert "; 1 at once fit; allowed: resources.stack 1, " in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["balanced", "one_task"])
def test_centralised_training_says_it_too(tmp_path: Path, method: str) -> None:
    config = of_own("Hungry", {"batch_size": 12, "method": method, "local_steps": 1})
    run = RunFolder.create(tmp_path / "run", config)
    text = message_of(lambda: run_rounds(run, Centralised(run)))
    fits, most = (3, 6) if method == "balanced" else (3, 3)
    assert f"; {fits} images fit; allowed: training.batch_size up to {most}, " in text
    assert ("digit-0, digit-1, balanced: " in text) == (method == "balanced")
    assert not list(run.clients.rglob("*.safetensors"))


def test_a_gpu_that_fails_ends_the_round_and_the_run_goes_on_from_the_last(tmp_path: Path) -> None:
    """The first client's update of the round is there already, and is not taken for the round."""

    def fails_at_the_second(message: Message, context: Context, call_next: Any) -> Message:
        second = context.node_config["partition-id"] == 1
        if message.metadata.message_type == TRAIN and message.metadata.group_id == "2" and second:
            Failing.lost = True
        return call_next(message, context)  # type: ignore[no-any-return]

    config = of_own("Failing", {"batch_size": 4})
    whole = run_in_process(RunFolder.create(tmp_path / "whole", config))
    run = RunFolder.create(tmp_path / "run", config)
    text = message_of(lambda: run_in_process(run, guarded_app([fails_at_the_second])))
    assert text == (
        "round 2: digit-1: the GPU has failed; nothing of this is kept, and all that was stored "
        "before is as it was"
    )
    log = (run.clients / "digit-1" / "client.log").read_text()
    assert "AcceleratorError: CUDA error: unspecified launch failure" in log
    assert [line["round"] for line in round_lines(run)] == [1]
    kept = files_of(run.server)
    ended = run_here("simulate", "--resume", run.path)
    assert ended.returncode == 2
    assert "the GPU has failed" in ended.stderr
    assert files_of(run.server) == kept
    Failing.lost = False
    ended = run_here("simulate", "--resume", run.path)
    assert ended.returncode == 0, ended.stderr
    assert all_bits(run) == all_bits(whole)


def test_a_deployed_sites_gpu_is_its_owners_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server learns that the client failed, and not of what; its next message has another
    process.
    """

    def fails(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(LocalStep, "run", fails)
    site = AgreedSite(tmp_path, CHEAP)
    reply = site.ask(TRAIN)
    assert reply.has_error()
    assert reply.error.code == FAILED


def test_a_command_over_a_failed_gpu_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nadvice")

    assert run_command(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the GPU has failed (CUDA error: an illegal memory access); ")


def test_what_is_short_of_memory_and_what_is_a_failed_gpu() -> None:
    after = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    after.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    short = [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        torch.AcceleratorError("CUDA error: out of memory"),
        after,
    ]
    assert all(is_short_of_memory(error) and not failure_of_gpu(error) for error in short)
    gone = [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    ]
    assert all(failure_of_gpu(error) and not is_short_of_memory(error) for error in gone)
    impossible = RuntimeError("could not create a primitive descriptor for a convolution")
    for error in (impossible, RuntimeError("shape mismatch"), ValueError("CUDA is not here")):
        assert not is_short_of_memory(error)
        assert not failure_of_gpu(error)


def test_what_fits_is_sought_by_halving_and_another_failure_is_not_taken_for_it() -> None:
    tried: list[int] = []

    def trial(size: int) -> None:
        tried.append(size)
        if size > 5:
            raise MemoryError

    assert largest_that_fits(100, trial) == 3
    assert tried == [50, 25, 12, 6, 3]
    with pytest.raises(ZeroDivisionError):
        largest_that_fits(2, lambda size: size // 0)
