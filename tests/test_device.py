"""Device, arithmetic, captured work: what holds on every machine, and on one with CUDA what was
captured.
"""

import json
import re
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfed import simulate
from srfed.config import ResourcesConfig, load_config, parse_config
from srfed.cores import check_resources
from srfed.data import load_tasks, to_model_range
from srfed.device import (
    Captured,
    arithmetic,
    device_of_clients,
    place_of,
    resolve_device,
)
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.generation import generate
from srfed.federation import measured
from srfed.federation.flower import ray_node, ray_start
from srfed.federation.flower.ray import run_on_ray
from srfed.federation.flower.ray_start import client_share
from srfed.federation.measured import CONTEXT, processes_that_fit
from srfed.flat import copies
from srfed.model import (
    build_model,
    build_objective,
    build_partition,
    captured_forwards,
    denoiser_of_task,
)
from srfed.networks.blocks import ATTENTION_BLOCK, SelfAttention, repeatable_attention
from srfed.networks.partition import Shared
from srfed.plan import plan_run
from srfed.reporting.console import Console
from srfed.runs.checks import check_simulation
from srfed.training.centralised import CentralisedState, CentralisedTrainer
from srfed.training.local import Job, LocalResult, LocalTrainer, train_owners
from srfed.training.minibatches import draw_minibatch
from srfed.training.optimizer import PartOptimizer
from srfed.training.part import Part, initial_state, load_tensors
from srfed.training.step import LocalStep
from support import faked_card, short_memory
from support.errors import message_of
from support.local_training import run_config, some_images
from support.short_memory import LARGE
from support.tiny_run import begin, run_in_process, store_of, tiny_config

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def test_apples_gpus_are_refused_with_the_reason() -> None:
    """What it says is so: the coefficients on the device are of 64 bits."""
    text = message_of(lambda: load_config(None, ["resources.device=mps"]))
    assert 'resources.device: "mps" is not allowed, as coefficients of the process' in text
    assert text.endswith("allowed: auto | cpu | cuda")
    process = build_objective(tiny_config(), torch.device("cpu")).process
    kept = [value for value in vars(process).values() if isinstance(value, Tensor)]
    assert any(value.dtype == torch.float64 for value in kept)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [1, 2, 7])
def test_attention_gives_cudas_fused_kernels_the_strides_they_take(
    side: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them fails at a single pixel where the stride of the one token is not a multiple of 16
    bytes.
    """
    seen: list[Tensor] = []

    def recorded(*tensors: Tensor) -> Tensor:
        seen.extend(tensors)
        return F.softmax(tensors[0] @ tensors[1].mT / 4, dim=-1) @ tensors[2]

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    SelfAttention(32, 16, 8)(torch.randn(3, 32, side, side).contiguous(memory_format=layout))
    assert len(seen) == 3
    assert {tensor.stride()[1:] for tensor in seen} == {(16 * side * side, 16, 1)}


def test_arithmetic_is_set_for_a_while_and_as_asked() -> None:
    cudnn: Any = torch.backends.cudnn

    def switches() -> tuple[str, str, bool]:
        return (
            cudnn.conv.fp32_precision,
            torch.backends.cuda.matmul.fp32_precision,
            cudnn.deterministic,
        )

    before, seen = switches(), {}
    for precision, deterministic in product(("float32", "tf32", "bfloat16"), (True, False)):
        resources = ResourcesConfig(precision=precision, deterministic=deterministic)
        with arithmetic(resources, torch.device("cuda")):
            seen[precision, deterministic] = switches()
        assert switches() == before
    assert seen == {
        (precision, deterministic): (*([multiplied] * 2), deterministic)
        for precision, multiplied in (("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "tf32"))
        for deterministic in (True, False)
    }
    with arithmetic(ResourcesConfig(precision="tf32"), torch.device("cpu")):
        assert switches() == before, "a CPU's run leaves the GPU's switches alone"
    with pytest.raises(ZeroDivisionError), arithmetic(ResourcesConfig(), torch.device("cuda")):
        raise ZeroDivisionError
    assert switches() == before


def test_a_precision_that_a_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for precision in ("tf32", "bfloat16"):
        with pytest.raises(
            UserError, match=f"precision = {precision} needs CUDA.*allowed: float32"
        ):
            resolve_device(ResourcesConfig(precision=precision))


def test_an_optimizer_that_begins_again_is_as_a_new_one() -> None:
    """Its buffers stay in place, and nothing of what they held before is left."""
    config = tiny_config().training
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4) for _ in range(3)]

    def steps(optimizer: PartOptimizer, parameter: nn.Parameter) -> None:
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()

    def zeros() -> nn.Parameter:
        return nn.Parameter(torch.zeros(3, 4))

    first = zeros()
    optimizer = PartOptimizer(config, {"w": first}, 1e-2)
    steps(optimizer, first)
    moments = optimizer.export_moments()
    for start in (None, moments):
        with torch.no_grad():
            first.zero_()
        optimizer.begin(2e-2, start)
        assert set(optimizer.export_moments()) == set(start or {})
        steps(optimizer, first)
        other = zeros()
        fresh = PartOptimizer(config, {"w": other}, 2e-2, start)
        steps(fresh, other)
        assert torch.equal(first, other)
        for name, tensor in fresh.export_moments().items():
            assert torch.equal(optimizer.export_moments()[name], tensor)


def test_each_client_gets_an_equal_share_of_the_gpus_that_ray_finds() -> None:
    def share(gpus: float, cores: int, **resources: Any) -> float:
        config = tiny_config({f"resources.{key}": value for key, value in resources.items()})
        return client_share(config, gpus, cores)

    assert share(0, 2, device="auto") == 0, "no GPU, no share"
    assert share(1, 2, device="cpu") == 0, "nor where the run is the CPU's"
    assert share(1, 2, device="auto") == 0.5
    assert share(1, 16, device="auto") == 0.3333, "three clients at once, and all fit"
    assert share(1, 16, device="auto", client_cpus=8) == 0.5
    assert share(8, 16, device="cuda") == 1, "a client trains on one GPU"
    assert share(1, 16, device="auto", client_gpus=0.25) == 0.25
    with pytest.raises(UserError, match=r"bfloat16 needs CUDA, and Ray finds no GPU.*: float32"):
        share(0, 2, device="auto", precision="bfloat16")
    with pytest.raises(UserError, match=r"client_gpus = 0\.25 is above the 0 GPUs that Ray finds"):
        share(0, 2, device="auto", client_gpus=0.25)
    with pytest.raises(
        UserError, match=r"device = cuda, but Ray finds no GPU here; allowed: auto, cpu"
    ):
        share(0, 2, device="cuda")


def test_a_share_of_a_gpu_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for share in ("-0.1", "1.5", "nan"):
        said = message_of(
            lambda share=share: load_config(None, [f"resources.client_gpus={share}"])  # type: ignore[misc]
        )
        assert f"resources.client_gpus = {share}" in said or share == "nan"
        assert said.endswith("allowed: number | null, ≥ 0, ≤ 1")
        assert "\n" not in said
    ray_run = {"resources.backend": "ray", "resources.device": "auto"}
    config = tiny_config({**ray_run, "resources.client_gpus": 0.25})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        UserError, match=r"client_gpus = 0\.25 is above the 0 GPUs that PyTorch.*: null, 0$"
    ):
        check_simulation(config)
    elsewhere = {"resources.ray_address": "host:6379", "resources.client_gpus": 0.25}
    for settings in ({"resources.client_gpus": 0}, {"resources.client_gpus": None}, elsewhere):
        check_simulation(tiny_config({**ray_run, **settings}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_simulation(config)


BLURRED = """
import torch.nn.functional as F
from own_network import Mixer
class Blurred(Mixer):
    def forward(self, x, time, tasks=None):
        small = F.avg_pool2d(super().forward(x, time, tasks), 2)
        return F.interpolate(small, size=x.shape[-2:], mode="bilinear")
"""


def test_what_no_gpu_repeats_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "blurred_network.py").write_text(BLURRED)

    def check(network: str, **resources: Any) -> None:
        given = {f"resources.{key}": value for key, value in resources.items()}
        content = tiny_config({"resources.device": "auto", **given}).model_dump(mode="json")
        content["model"] = {"network": network, "exclusive_stages": 1}
        check_simulation(parse_config(content))

    blurred, mixer = "blurred_network:Blurred", "own_network:Mixer"
    check(blurred)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check(mixer)
    check(blurred, deterministic=False)
    check(blurred, device="cpu")
    said = message_of(lambda: check(blurred))
    assert said == (
        f"resources.deterministic true: model.network {blurred} takes "
        "upsample_bilinear2d_backward, which no GPU repeats bit by bit; allowed: false, device "
        "cpu, or another operation in its place"
    )


@pytest.mark.parametrize("asked", [{"device": "cuda"}, {"precision": "bfloat16"}])
def test_clients_without_a_gpu_are_refused_what_needs_one(asked: dict[str, str]) -> None:
    no_gpu = {"backend": "ray", "client_gpus": 0, "device": "auto"}
    check_resources(ResourcesConfig.model_validate(no_gpu))
    with pytest.raises(UserError, match=r"client_gpus = 0 gives clients under Ray no GPU; allowed"):
        check_resources(ResourcesConfig.model_validate({**no_gpu, **asked}))


def test_where_clients_train_is_no_matter_of_a_card_that_they_do_not_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cluster's nodes say themselves what they have, whatever its driver has."""

    def device(**resources: Any) -> str:
        return device_of_clients(ResourcesConfig.model_validate(resources)).type

    cluster = {"backend": "ray", "ray_address": "auto"}
    assert device(**cluster, device="cuda", precision="bfloat16") == "cpu"
    with pytest.raises(UserError, match="no CUDA device here"):
        device(backend="ray", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device(backend="ray") == "cuda"
    assert device(backend="ray", client_gpus=0) == "cpu"
    assert device(backend="inline", client_gpus=0) == "cuda"
    assert device(**cluster) == "cpu"


def test_a_client_gets_no_less_of_a_gpu_than_it_has_memory_for() -> None:
    """Of three clients that the cores would run at once."""

    def share(fit: int, gpus: float = 1, **resources: Any) -> float:
        config = tiny_config(
            {"resources.device": "auto", **{f"resources.{k}": v for k, v in resources.items()}}
        )
        return client_share(config, gpus, 16, fit)

    assert [share(fit) for fit in (1, 2, 3, 80)] == [1, 0.5, 0.3333, 0.3333]
    assert share(3, gpus=2) == 0.5, "two on one GPU and one on the other: none is on both"
    assert share(80, gpus=5) == 1
    assert share(1, client_gpus=0.25) == 0.25, "who says a share has it"


def test_memory_of_a_gpu_is_measured_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image of a step takes 1 GiB of a card that is made up."""
    gib, run, steps = 2**30, LocalStep.run, list[int]()

    def counted(step: LocalStep, parts: Any, batch: Any, *tasks: Any) -> Any:
        steps.append(len(batch.images))
        return run(step, parts, batch, *tasks)

    def fit(settings: dict[str, Any]) -> int:
        steps.clear()
        return processes_that_fit(tiny_config(settings), torch.device("cuda", 0))

    monkeypatch.setattr(LocalStep, "run", counted)
    monkeypatch.setattr(measured, "take_one_step", faked_card.on_the_cpu)
    monkeypatch.setattr(
        torch.cuda, "max_memory_reserved", lambda device: max(steps) * gib - CONTEXT
    )
    # Of 100 GiB, what the step has taken is not free.
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: ((100 - max(steps)) * gib, 100 * gib)
    )
    assert fit({"training.batch_size": 10}) == 10
    assert steps == [10]
    assert fit({"training.batch_size": 8, "training.local_steps": None, "training.local_epochs": 2})
    assert steps == [8]
    assert fit({"training.batch_size": 10, "resources.stack": 2}) == 5
    assert steps == [20], "one program of two"
    assert fit({"training.batch_size": 60}) == 1


@pytest.mark.slow
def test_rays_clients_share_a_gpu_by_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real Ray is told of a GPU that is not there; in its process the card is made up."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ray_start, "look_at_gpu", faked_card.look_at_gpu)
    ray_run = {"resources.backend": "ray", "resources.device": "auto"}
    run = begin(tmp_path / "run", {**ray_run, "resources.cpus": 3})
    with ray_start.started_ray(run) as (room, _, _):
        assert room.gpus == 0.5
        assert room.place.in_words == "cuda (NVIDIA H200), float32"
        assert room.now() == 2
        monkeypatch.setattr(ray_start, "look_at_gpu", ray_node.look_at_gpu)
        asked = tiny_config({**ray_run, "resources.precision": "bfloat16"})
        with pytest.raises(UserError, match=r"on Ray's GPU: .*bfloat16 needs CUDA, and there is"):
            ray_start._look_at_gpu(asked, 0.5, measure=True)
        # A client alone on a GPU is not measured, a stack is, as it may be too large.
        monkeypatch.setattr(ray_start, "look_at_gpu", lambda _, measure: f"measured: {measure}")
        for stack, share in ((1, None), (2, None), (1, 0.5), (2, 0.5)):
            own = {"resources.stack": stack, "resources.client_gpus": share}
            alone = tiny_config({**ray_run, "resources.cpus": 1, **own})
            with pytest.raises(UserError, match=f"on Ray's GPU: measured: {stack == 2}"):
                ray_start._room(alone, 1)


def test_where_a_run_trains_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    here = place_of(ResourcesConfig(precision="bfloat16"), torch.device("cuda", 0))
    assert here.in_words == "cuda (NVIDIA H200), bfloat16"
    assert place_of(ResourcesConfig(), torch.device("cpu")).in_words == "cpu, float32"


def test_a_run_that_fails_at_its_clients_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_in_process(begin(tmp_path / "run", {"federation.rounds": 1}))
    for client in ("digit-0", "digit-1", "digit-2"):
        for state in store_of(run, client).glob("*/state.safetensors"):
            state.write_bytes(state.read_bytes()[:100])
    assert simulate.main(["--resume", str(run.path), "--set", "federation.rounds=2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "client.log ends with: " in line
    assert "is damaged" in line.split("client.log ends with: ")[1]


@pytest.fixture
def cuda_that_nobody_may_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is there, and whoever begins to use it fails."""

    def refuse() -> None:
        raise AssertionError("CUDA is initialised")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)


@pytest.mark.usefixtures("cuda_that_nobody_may_touch")
def test_who_looks_before_a_run_takes_nothing_of_a_gpu() -> None:
    config = tiny_config({"resources.device": "auto", "resources.backend": "ray"})
    assert resolve_device(config.resources) == torch.device("cuda", 0)
    assert len(check_simulation(config)) == 3
    with pytest.raises(AssertionError, match="CUDA is initialised"):
        torch.zeros(1).to(resolve_device(config.resources))


@pytest.mark.usefixtures("cuda_that_nobody_may_touch")
def test_a_plan_of_a_ray_run_takes_its_steps_in_a_process_of_its_own() -> None:
    """Which finds no GPU; in this one's process there is one that it may not touch."""
    ray_run = tiny_config({"resources.device": "auto", "resources.backend": "ray"})
    tasks = load_tasks(ray_run.data, 3)
    plan = plan_run(ray_run, tasks)
    assert plan.where == "cuda, 1 owner at once"
    assert plan.seconds_per_round > 0
    assert plan.memory > 0
    inline = tiny_config({"resources.device": "auto"})
    with pytest.raises(AssertionError, match="CUDA is initialised"):
        plan_run(inline, tasks)


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_that_nobody_may_touch")
def test_rays_driver_holds_no_gpu_and_a_client_that_is_short_of_memory_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clients' processes see none, as the real Ray finds none here."""
    run = begin(tmp_path / "run", {**LARGE, "resources.backend": "ray", "resources.device": "auto"})
    with pytest.raises(UserError, match="round 1 has 0 accepted updates"):
        run_on_ray(run, [Console(run.config)], short_memory.app)
    assert not torch.cuda.is_initialized()
    assert capsys.readouterr().out.startswith("trains on cpu, float32\n"), "as its clients do"
    assert json.loads(run.identity_file.read_text())["device"] == "cpu"
    log = (run.clients / "digit-0" / "client.log").read_text()
    assert re.search(r"task digit-0: there is not enough memory .*; [1-9]\d* images fit; ", log)


def test_forward_passes_of_an_evaluation_have_the_runs_precision() -> None:
    """As a CPU's bfloat16 shows: the network's own numbers have 8 bits, and what is made of them
    is float32 again.
    """
    config, here = tiny_config(), torch.device("cpu")
    model = build_model(config, 1).eval()
    objective = build_objective(config, here)
    x, times = torch.randn(4, 1, 8, 8), torch.full((4,), 250)
    found = {}
    for precision in ("float32", "bfloat16"):
        forwards = captured_forwards(model, ResourcesConfig(precision=precision), here)
        with torch.no_grad():
            assert forwards.task(x, times).dtype == getattr(torch, precision)
            found[precision] = denoiser_of_task(objective, model, None, forwards)(x, times)
    assert found["bfloat16"].dtype == torch.float32
    assert not torch.equal(found["bfloat16"], found["float32"])
    assert torch.allclose(found["bfloat16"], found["float32"], rtol=0.05, atol=0.05)


@needs_cuda
def test_parts_go_to_a_gpu_and_come_back_with_their_bits() -> None:
    weights = {"a": torch.rand(2, 3, 4, 5), "b": torch.rand(7), "step": torch.tensor(3.0)}
    there = {name: torch.empty_like(tensor, device="cuda") for name, tensor in weights.items()}
    there["a"] = there["a"].to(memory_format=torch.channels_last)
    load_tensors(there, weights)
    found = copies(there)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert not any(tensor.is_pinned() for tensor in found.values())


def test_captured_work_on_a_cpu_is_the_function_itself() -> None:
    calls: list[int] = []
    work = Captured(lambda x: (calls.append(1), x * 2)[1], torch.device("cpu"))
    work.prepare(torch.ones(2))
    assert not calls
    first, second = work(torch.ones(2)), work(torch.full((2,), 2.0))
    assert torch.equal(first, torch.full((2,), 2.0))
    assert torch.equal(second, torch.full((2,), 4.0))


SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "dropout": {"model.dropout": 0.1},
    "alternating": {"training.update": "alternating", "training.exclusive_steps": 3},
    "a short last minibatch": {"training.minibatches": "ragged"},
    "proximal": {"training.proximal": 0.1},
    "control variates": {"training.control_variates": True},
    "plain SGD": {"training.optimizer": "sgd"},
    "a table of tasks": {"model.task_embedding": "shared", "model.exclusive_stages": "none"},
    "mirrored, falling rate": {
        "data.horizontal_flip": True,
        "training.learning_rate_schedule": "cosine",
    },
    "owned parts at a rate of their own": {
        "model.owned": ["vector", "film"],
        "training.owned_learning_rate": 2e-2,
        "training.learning_rate_schedule": "linear",
    },
    "bfloat16": {"resources.precision": "bfloat16"},
    "channels last": {"resources.channels_last": True},
}


def two_rounds(device: str, changes: dict[str, Any], *, captures: bool) -> LocalResult:
    config = tiny_config({**changes, "resources.device": device})
    model = build_model(config, 1)
    partition = build_partition(config, model)
    state = initial_state(model, partition)
    shared = {
        name: tensor.clone() for name, tensor in partition.take_shared(model.state_dict()).items()
    }
    here = resolve_device(config.resources)
    model, objective = model.to(here), build_objective(config, here)
    step = LocalStep(config, model, partition, objective)
    step.captures = step.captures and captures
    images = np.random.default_rng(0).integers(0, 256, (21, 8, 8, 1), dtype=np.uint8)
    trainer = LocalTrainer(config, model, partition, objective, "digit-0", images, 0, step)
    first = trainer.train(1, shared, state)
    return trainer.train(2, first.shared, first.state, first.gradient)


def all_tensors(result: LocalResult) -> Tensor:
    state = result.state
    parts = (
        result.shared,
        state.exclusive.weights,
        state.exclusive.average,
        state.exclusive.moments,
        state.shared_moments,
        result.gradient,
    )
    return torch.cat([tensor.flatten() for part in parts for tensor in part.values()])


@needs_cuda
@pytest.mark.parametrize("name", SETTINGS)
def test_a_captured_step_has_the_bits_of_the_step(name: str) -> None:
    captured, plain = (
        two_rounds("cuda", SETTINGS[name], captures=captures) for captures in (True, False)
    )
    assert torch.equal(all_tensors(captured), all_tensors(plain))
    assert captured.loss == plain.loss


def of_three(
    device: str,
    changes: dict[str, Any],
    *,
    stacked: bool,
    captures: bool = True,
    as_one: bool | None = None,
) -> list[LocalResult]:
    """A round of three owners with images of their own."""
    config = tiny_config({**changes, "resources.device": device, "resources.stack": 3})
    here = resolve_device(config.resources)
    model = build_model(config, 1)
    partition = build_partition(config, model)
    shared = copies(partition.take_shared(model.state_dict()))
    state = initial_state(model, partition)
    model, objective = model.to(here), build_objective(config, here)
    alone = LocalStep(config, model, partition, objective)
    jobs = [
        Job(
            LocalTrainer(
                config, model, partition, objective, f"digit-{k}", some_images(20, k), k, alone
            ),
            1,
            Shared(shared),
            state,
        )
        for k in range(3)
    ]
    if not stacked:
        return [job.trainer.run_alone(job) for job in jobs]
    together = LocalStep(config, model, partition, objective, 3, as_one)
    together.captures = together.captures and captures
    return train_owners(config, together, jobs)


@needs_cuda
@pytest.mark.parametrize("name", ["as it is", "control variates", "bfloat16", "channels last"])
def test_a_captured_stack_has_the_bits_of_the_stack(name: str) -> None:
    captured, plain = (
        of_three("cuda", SETTINGS[name], stacked=True, captures=captures)
        for captures in (True, False)
    )
    for one, other in zip(captured, plain, strict=True):
        assert torch.equal(all_tensors(one), all_tensors(other))


@pytest.mark.parametrize("prediction", ["noise", "velocity", "edm"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_losses_and_gradients_are_those_of_float64_on_a_cpu(device: str, prediction: str) -> None:
    config = tiny_config({"diffusion.prediction": prediction, "resources.device": device})
    here, generator = resolve_device(config.resources), torch.Generator().manual_seed(0)
    model = build_model(config, 1)
    with torch.no_grad():
        # What starts at zero would hide what lies before it.
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    exact = deepcopy(model).double()
    # Sines and cosines of times are float32 anywhere.
    exact.timestep.expand.register_forward_pre_hook(lambda _, given: (given[0].double(),))  # type: ignore[union-attr]
    drawn = draw_minibatch(
        config, build_objective(config, here), to_model_range(some_images(6)), "digit-0", 1, 0
    )
    found = []
    for network, dtype, where in (
        (model.to(here), torch.float32, here),
        (exact, torch.float64, torch.device("cpu")),
    ):
        objective = build_objective(config, where)
        images, times, noise = drawn
        batch = (images.to(where, dtype), times.to(where), noise.to(where, dtype))
        with arithmetic(config.resources, where):
            losses = objective.loss(network, *batch)
            losses.mean().backward()
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found.append([tensor.detach().cpu().double() for tensor in (losses, torch.cat(gradients))])
    for got, expected in zip(*found, strict=True):
        assert float((got - expected).norm() / expected.norm()) < 1e-5


@needs_cuda
def test_owners_who_step_as_one_have_what_each_has_who_steps_by_itself() -> None:
    found = [of_three("cuda", {}, stacked=True, as_one=as_one) for as_one in (True, False)]
    for one, other in zip(*found, strict=True):
        assert torch.allclose(all_tensors(one), all_tensors(other), atol=1e-5)


@needs_cuda
def test_owners_of_a_stack_on_a_gpu_have_what_they_have_by_themselves() -> None:
    together, one_by_one = (of_three("cuda", {}, stacked=stacked) for stacked in (True, False))
    on_a_cpu = of_three("cpu", {}, stacked=True)
    for one, other, third in zip(together, one_by_one, on_a_cpu, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.loss == pytest.approx(third.loss, rel=1e-4)


@needs_cuda
@pytest.mark.parametrize("method", ["pooled", "balanced"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_captured_centralised_step_has_the_bits_of_the_step(method: str, dropout: float) -> None:
    config = tiny_config(
        {
            "training.method": method,
            "training.minibatches": "ragged",
            "training.centralised_batch_size": 6,
            "model.exclusive_stages": "none" if method == "pooled" else 2,
            "model.dropout": dropout,
            "resources.device": "cuda",
        }
    )
    tasks = load_tasks(config.data, config.federation.clients)
    here = resolve_device(config.resources)
    found = []
    for captures in (True, False):
        model = build_model(config, 1)
        partition = build_partition(config, model)
        shared = Shared(copies(partition.take_shared(model.state_dict())))
        begin_from = CentralisedState(
            Part(shared, Shared(copies(shared))),
            {task.name: initial_state(model, partition) for task in tasks},
        )
        objective = build_objective(config, here)
        trainer = CentralisedTrainer(config, model.to(here), partition, objective, tasks)
        trainer.captures = trainer.captures and captures
        state = trainer.train(2, trainer.train(1, begin_from).state).state
        found.append(torch.cat([tensor.flatten() for tensor in state.shared.weights.values()]))
    assert torch.equal(*found)


@needs_cuda
def test_features_have_one_arithmetic_whatever_a_run_trains_in() -> None:
    network = load_feature_network("embedded", "", torch.device("cuda"))
    images = some_images(8)
    with arithmetic(ResourcesConfig(precision="tf32"), torch.device("cuda")):
        within = network(images)
    assert np.array_equal(within, network(images))
    on_a_cpu = load_feature_network("embedded", "", torch.device("cpu"))(images)
    assert np.allclose(within, on_a_cpu, rtol=1e-4, atol=1e-4)


@needs_cuda
def test_attention_over_many_tokens_repeats_its_gradients() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(64, 32, 8).cuda()
    torch.nn.init.normal_(attention.project.weight)
    x = torch.randn(32, 64, 24, 24, device="cuda", requires_grad=True)

    def gradient() -> Tensor:
        with arithmetic(ResourcesConfig(), x.device):
            (found,) = torch.autograd.grad(attention(x).square().sum(), x)
        return found

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(5))


def test_attention_that_is_to_repeat_itself_does_without_fused_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card, fused = torch.device("cuda", 0), torch.backends.cuda.flash_sdp_enabled
    assert fused()
    for repeats, tokens, device, expected in (
        (True, ATTENTION_BLOCK + 1, card, False),
        (True, ATTENTION_BLOCK, card, True),
        (False, 4096, card, True),
        (True, 4096, torch.device("cpu"), True),
    ):
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", repeats)
        with repeatable_attention(tokens, device):
            assert fused() is expected
            assert torch.backends.cuda.math_sdp_enabled()


@needs_cuda
def test_a_gpu_trains_and_draws_as_a_cpu_does() -> None:
    """The same draws, so that only rounding is another."""
    on_gpu, on_cpu = (two_rounds(device, {}, captures=True) for device in ("cuda", "cpu"))
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-4)
    config = tiny_config()
    model = build_model(config, 1).eval()
    objectives = {
        device: build_objective(config, torch.device(device)) for device in ("cpu", "cuda")
    }
    images = [
        generate(
            objective.denoiser(model.to(device)),
            objective.process,
            config.sampling,
            count=4,
            shape=(8, 8, 1),
            seed=0,
            task="digit-0",
        ).images
        for device, objective in objectives.items()
    ]
    assert np.abs(images[0].astype(int) - images[1].astype(int)).max() <= 1


@needs_cuda
def test_a_gpu_guides_as_a_cpu_does() -> None:
    """Both forward passes captured, and weights that change in place."""
    owned = {"model.exclusive_stages": "none", "model.owned": ("vector", "film")}
    config = tiny_config({**owned, "sampling.guidance": 1.5})
    images = {}
    for device in (torch.device("cpu"), torch.device("cuda", torch.cuda.current_device())):
        model = build_model(config, 1).to(device).eval()
        objective = build_objective(config, device)
        forwards = captured_forwards(model, config.resources, device)
        denoiser, found = denoiser_of_task(objective, model, None, forwards), []
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(
                        0.1 * torch.randn(parameter.shape, generator=generator).to(device)
                    )
            found.append(
                generate(
                    denoiser,
                    objective.process,
                    config.sampling,
                    count=4,
                    shape=(8, 8, 1),
                    seed=0,
                    task="digit-0",
                ).images
            )
        images[device.type] = np.stack(found).astype(int)
    assert np.abs(images["cpu"] - images["cuda"]).max() <= 1
    assert (images["cpu"][0] != images["cpu"][1]).any()


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(run_config().resources) == torch.device("cpu")
    with pytest.raises(UserError, match=r"device = cuda, but .* allowed: auto, cpu"):
        resolve_device(run_config(resources={"device": "cuda"}).resources)
    with pytest.raises(UserError, match=r"precision = bfloat16 needs CUDA"):
        resolve_device(run_config(resources={"precision": "bfloat16"}).resources)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(run_config(resources={"device": "cpu"}).resources) == torch.device("cpu")
