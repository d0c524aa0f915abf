"""Guidance: closed forms, what it costs, and the same images wherever a run's are drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import srfed
from srfed.commands import evaluate, sample
from srfed.config import RunConfig
from srfed.config.choices import OBJECTIVES, SAMPLERS, chosen
from srfed.data import load_tasks
from srfed.data.images import Images
from srfed.diffusion.guidance import TaskDenoiser, guided
from srfed.diffusion.objective import Objective
from srfed.diffusion.process import Denoiser
from srfed.diffusion.sampler import drawn_from
from srfed.diffusion.sampler import sample as run_backwards
from srfed.diffusion.schedule import linear_schedule
from srfed.evaluation.features.load import FeatureNetwork
from srfed.evaluation.generation import generate
from srfed.evaluation.shares import share_of_samples
from srfed.evaluation.task import evaluate_task, generate_share
from srfed.federation.flower.client_app import app
from srfed.federation.flower.packing import read_tensors
from srfed.federation.messages import EVALUATE, GENERATED, REPLY
from srfed.model import build_model, build_objective, build_partition, denoiser_of_task
from srfed.networks.network import Network
from srfed.networks.partition import Exclusive, Shared
from srfed.runs.adapting import score_adaptation
from srfed.runs.centralised import Centralised
from srfed.runs.loop import run_rounds
from srfed.runs.run import TrainedRun
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.site_model import save_site_model
from support.tiny_run import CLIENTS, all_bits, begin, run_on_grid, tiny_config
from support.wire import RecordingGrid

WEIGHT = 1.5
SMALL: dict[str, Any] = {
    "model.exclusive_stages": "none",
    "model.owned": ("vector", "film"),
    # θ_i has to be far from zero, and its average too, for a picture of 256 grey levels to show it.
    "training.owned_learning_rate": 0.3,
    "training.ema_decay": 0.0,
    "federation.rounds": 2,
    "evaluation.samples": 6,
    "evaluation.samples_between": 6,
    "evaluation.memorisation_quantile": 0,
}
GUIDED = {**SMALL, "sampling.guidance": WEIGHT}

# --- Closed forms -------------------------------------------------------------------------------


class Linear(Network):
    """A prediction that is linear in what it owns: a shift, and a slope over the time."""

    owned = ("shift", "slope")

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.tensor([0.3, -0.2]).view(2, 1, 1))
        self.slope = nn.Parameter(torch.tensor(0.1))

    def shells(self) -> list[tuple[str, ...]]:
        return []

    def forward(self, x: Tensor, time: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.core * x + self.shift + self.slope * (time / 100).view(-1, 1, 1, 1)


def made(name: str) -> Objective:
    return chosen(OBJECTIVES, name)(linear_schedule(100))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_of_a_network_that_is_linear_in_what_it_owns_the_guided_one_owns_more(name: str) -> None:
    """D(x; θ) + w (D(x; θ) - D(x; 0)) = D(x; (1 + w) θ)."""
    objective, network, longer = made(name), Linear(), Linear()
    x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    times = objective.draw_times(5, torch.Generator().manual_seed(1))
    denoiser = denoiser_of_task(objective, network, None)
    for weights in ({"shift": 0.4, "slope": -0.3}, {"shift": -0.1, "slope": 0.2}):
        # In place, as a run's weights change: the denoiser is that of those which are there.
        for key, value in weights.items():
            network.get_parameter(key).fill_(value)
            longer.get_parameter(key).fill_((1 + WEIGHT) * value)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        torch.testing.assert_close(
            guided(denoiser, WEIGHT)(x, times), objective.denoiser(longer)(x, times)
        )
        assert torch.equal(denoiser(x, times), objective.denoiser(network)(x, times))
        assert all(torch.equal(before[key], t) for key, t in network.state_dict().items())


def of_gaussian(objective: Objective, mean: float, deviation: float) -> Denoiser:
    """E[x_0 | x_t] of images N(mean, deviation²), in closed form."""

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        signal, noise = objective.process.levels(float(times[0]))
        total = (signal * deviation) ** 2 + noise**2
        return mean + signal * deviation**2 / total * (x - signal * mean)

    return denoise


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_gaussians_that_differ_by_their_means_are_drawn_further_apart(
    name: str, sampler: str
) -> None:
    """A task N(m, s²) away from N(0, s²) is N((1 + w) m, s²)."""
    objective, mean, deviation, count = made(name), 0.2, 0.3, 400
    denoisers = [of_gaussian(objective, m, deviation) for m in (mean, 0.0, (1 + WEIGHT) * mean)]
    task, nobody, further = denoisers
    shape, draws = (count, 1, 3, 3), torch.Generator().manual_seed(2)
    start = objective.process.start(torch.randn(shape, generator=draws, dtype=torch.float64))
    images = [
        run_backwards(
            chosen(SAMPLERS, sampler)(),
            denoiser,
            objective.process,
            start,
            drawn_from(torch.Generator().manual_seed(3)),
            steps=50,
            clip=False,
        ).images
        for denoiser in (guided(TaskDenoiser(task, nobody), WEIGHT), further)
    ]
    torch.testing.assert_close(*images, rtol=0, atol=1e-9)
    assert float(images[0].mean()) == pytest.approx((1 + WEIGHT) * mean, abs=0.03)
    assert float(images[0].std()) == pytest.approx(deviation, rel=0.1)


# --- What it costs, and what it leaves alone ----------------------------------------------------


def perturbed(config: RunConfig) -> Network:
    """The run's network, of which nothing is zero."""
    model, generator = build_model(config, 1).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def drawn(config: RunConfig, denoiser: Denoiser, objective: Objective) -> Images:
    settings: dict[str, Any] = {"count": 3, "shape": (8, 8, 1), "seed": 0, "task": "t"}
    return generate(denoiser, objective.process, config.sampling, **settings).images


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
def test_without_guidance_the_bits_of_none_and_with_it_twice_the_passes(sampler: str) -> None:
    plain, with_it = (
        tiny_config({**settings, "sampling.sampler": sampler}) for settings in (SMALL, GUIDED)
    )
    model, objective = perturbed(plain), build_objective(plain, torch.device("cpu"))
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(count)
    images = drawn(plain, objective.denoiser(model), objective)
    assert passes == plain.sampling.steps
    denoiser, passes = denoiser_of_task(objective, model, None), 0
    np.testing.assert_array_equal(drawn(plain, denoiser, objective), images)
    assert passes == plain.sampling.steps
    passes = 0
    assert (drawn(with_it, denoiser, objective) != images).any()
    assert passes == 2 * plain.sampling.steps


def test_reconstructions_are_not_guided() -> None:
    found = []
    for settings in (SMALL, GUIDED):
        config = tiny_config(settings)
        objective = build_objective(config, torch.device("cpu"))
        images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
        denoiser = denoiser_of_task(objective, perturbed(config), None)
        found.append(
            evaluate_task(
                denoiser,
                objective.process,
                config,
                task="t",
                train=images,
                test=images,
                generated=generate_share(
                    denoiser, objective.process, config, task="t", shape=(8, 8, 1), samples=2
                ),
                final=True,
            )
        )
    assert found[0].ssim == found[1].ssim
    assert (found[0].generated.images != found[1].generated.images).any()


def test_what_has_no_guide_is_not_guided() -> None:
    config = tiny_config({"sampling.guidance": 0.0})
    objective = build_objective(config, torch.device("cpu"))
    owns_nothing = denoiser_of_task(objective, build_model(config, 1), None)
    assert guided(owns_nothing, 0.0) is owns_nothing
    sampling = tiny_config(GUIDED).sampling
    with pytest.raises(ValueError, match=r"guidance 1.5 needs a TaskDenoiser.*; allowed: 0"):
        generate(
            owns_nothing, objective.process, sampling, count=1, shape=(8, 8, 1), seed=0, task="t"
        )


# --- Runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RecordingGrid]:
    run = begin(tmp_path_factory.mktemp("guided") / "run", GUIDED)
    grid = run_on_grid(run, RecordingGrid, app)
    assert isinstance(grid, RecordingGrid)
    return run, grid


@pytest.fixture(scope="module")
def unguided(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = begin(tmp_path_factory.mktemp("unguided") / "run", SMALL)
    run_on_grid(run, RecordingGrid, app)
    return run


def test_a_federations_samples_are_those_of_its_opened_run(
    recorded: tuple[RunFolder, RecordingGrid], unguided: RunFolder
) -> None:
    run, grid = recorded
    opened, other = (srfed.open_run(folder.path, device="cpu") for folder in (run, unguided))
    replies = [reply for reply in grid.replies if reply.metadata.message_type == EVALUATE]
    assert len(replies) == 3
    for reply in replies:
        client = str(reply.content.config_records[REPLY]["client"])
        sent = read_tensors(reply.content, GENERATED)["images"].numpy()
        np.testing.assert_array_equal(sent, opened.sample(client, 2, seed=run.config.seed))
        assert (sent != other.sample(client, 2, seed=run.config.seed)).any()


def test_guidance_decides_no_weights_and_no_reconstruction(
    recorded: tuple[RunFolder, RecordingGrid], unguided: RunFolder
) -> None:
    run, _ = recorded
    assert all_bits(run) == all_bits(unguided)
    (ours,), (theirs,) = (MetricsLog(r.metrics).evaluations() for r in (run, unguided))
    assert ours["ssim_by_client"] == theirs["ssim_by_client"]
    assert ours["score"] != theirs["score"]


def test_commands_guide_a_run_that_was_not(
    recorded: tuple[RunFolder, RecordingGrid], unguided: RunFolder, tmp_path: Path
) -> None:
    run, _ = recorded
    opened = srfed.open_run(run.path, device="cpu")
    common = ["--run", str(unguided.path), "--device", "cpu", "--guidance", str(WEIGHT)]
    out = ["--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")]
    assert sample.main([*common, "--n", "2", *out]) == 0
    found = np.load(tmp_path / "x.npz")["images"]
    np.testing.assert_array_equal(
        found, np.concatenate([opened.sample(client, 2) for client in CLIENTS])
    )
    assert evaluate.main([*common, "--samples", "6"]) == 0
    (scores,) = unguided.path.glob("evaluations/*/scores.json")
    guided_by_command = json.loads(scores.read_text())
    assert guided_by_command["sampling"]["guidance"] == WEIGHT
    as_run = opened.evaluate(6)
    for name in ("scores", "agreement", "ssim"):
        assert guided_by_command[name] == as_run[name], name
    scores_of_none = srfed.open_run(unguided.path, device="cpu").evaluate(6)["scores"]
    assert scores_of_none != as_run["scores"]


def test_a_sites_own_model_is_guided_as_the_runs(
    recorded: tuple[RunFolder, RecordingGrid], unguided: RunFolder, tmp_path: Path
) -> None:
    """By its own configuration, and by the command."""
    run, _ = recorded
    trained, client = TrainedRun(run.path, run.config.resources), CLIENTS[1]
    exclusive = Exclusive(trained.exclusive_of(trained.find_task(client)))
    expected = srfed.open_run(run.path, device="cpu").sample(client, 2)
    for number, config in enumerate((run.config, unguided.config)):
        store = tmp_path / str(number) / client
        shared = Shared(trained.shared)
        save_site_model(store, config, "lineage", 2, (8, 8, 1), shared, exclusive)
        images = srfed.open_run(store, device="cpu").sample(client, 2)
        assert (images == expected).all() == (number == 0)
        out = ["--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")]
        guidance = ["--guidance", str(WEIGHT), "--device", "cpu", "--n", "2", *out]
        assert sample.main(["--store", str(store), *guidance]) == 0
        np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["images"], expected)


def test_a_centralised_runs_samples_are_those_of_its_opened_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Images] = {}

    def recorded_evaluation(*arguments: Any, task: str, **options: Any) -> Any:
        found = evaluate_task(*arguments, task=task, **options)
        sent[task] = found.generated.images
        return found

    monkeypatch.setattr("srfed.runs.centralised.evaluate_task", recorded_evaluation)
    changes = {"training.method": "balanced", "training.centralised_batch_size": 48}
    run = begin(tmp_path / "run", {**GUIDED, **changes, "training.shared_moments": "keep"})
    run_rounds(run, Centralised(run), [])
    opened = srfed.open_run(run.path, device="cpu")
    assert len(sent) == 3
    for task, images in sent.items():
        np.testing.assert_array_equal(
            images, opened.sample(task, share_of_samples(6, 3), seed=run.config.seed)
        )


def test_a_new_owner_is_guided_from_the_core_by_itself(
    recorded: tuple[RunFolder, RecordingGrid], network: FeatureNetwork
) -> None:
    run, _ = recorded
    config, trained = run.config, TrainedRun(run.path, run.config.resources)
    newcomer = load_tasks(config.data.model_copy(update={"images_per_task": 16}), 4)[3]
    (found,) = score_adaptation(
        config,
        trained.shared,
        newcomer,
        network,
        mode="frozen",
        steps=2,
        every=2,
        samples=2,
        seed=0,
    )
    objective = build_objective(config, torch.device("cpu"))
    denoisers = []
    for exclusive in (
        found.adapted.exclusive,
        {name: torch.zeros_like(tensor) for name, tensor in found.adapted.exclusive.items()},
    ):
        model = build_model(config, 1).eval()
        assert build_partition(config, model).exclusive == tuple(exclusive)
        model.load_state_dict({**found.adapted.shared, **exclusive})
        denoisers.append(objective.denoiser(model))

    def by_hand(x: Tensor, times: Tensor) -> Tensor:
        own, nobody = (denoiser(x, times) for denoiser in denoisers)
        return (1 + WEIGHT) * own - WEIGHT * nobody

    plain = config.sampling.model_copy(update={"guidance": 0.0})
    expected = generate(
        by_hand, objective.process, plain, count=2, shape=(8, 8, 1), seed=0, task=newcomer.name
    ).images
    assert np.abs(found.samples.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("weight", "words"),
    [("-1", "sampling.guidance = -1"), ("11", "≤ 10"), ("nan", "sampling.guidance = NaN")],
)
@pytest.mark.parametrize("command", [sample, evaluate], ids=["sample", "evaluate"])
def test_an_impossible_weight_is_one_line(
    command: Any, weight: str, words: str, unguided: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--run", str(unguided.path), "--guidance", weight]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
