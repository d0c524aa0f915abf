"""A network that srfed has never heard of: its shells, its initial values, and a federation of
it.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import srfed
from srfed.commands import evaluate, sample
from srfed.config import OwnNetworkConfig, RunConfig, load_config, parse_config
from srfed.errors import UserError
from srfed.model import build_model, build_partition
from srfed.networks.initialise import initialise
from srfed.networks.network import Network
from srfed.networks.partition import divide
from support.tiny_run import tiny_config

ROOT = Path(__file__).parents[2]


class Tower(Network):
    """Three shells around one convolution; a vector of its own; values of every kind."""

    owned = ("own",)

    def __init__(self, image_channels: int, width: int = 4, steps: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width {width} is impossible")
        self.steps = steps
        self.enter = nn.Conv2d(image_channels, width, 1)
        self.inner_in = nn.Conv2d(width, width, 3, padding=1)
        self.core = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)
        self.inner_out = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.inner_out.weight)
        self.leave = nn.Conv2d(width, image_channels, 1)
        self.own = nn.Parameter(torch.zeros(width, 1, 1))

    def shells(self) -> list[tuple[str, ...]]:
        return [("enter", "leave"), ("inner_in", "inner_out")]

    def forward(self, x: Tensor, time: Tensor, tasks: Tensor | None = None) -> Tensor:
        hidden = self.inner_in(self.enter(x)) + self.own + (time / 500).view(-1, 1, 1, 1)
        return self.leave(self.inner_out(self.norm(self.core(hidden).tanh())) + hidden)


class WithStatistics(Tower):
    def __init__(self, image_channels: int) -> None:
        super().__init__(image_channels)
        self.norm = nn.BatchNorm2d(4)


HERE = f"{__name__}:"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's import mode gives a test no place among the modules."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Tower.__module__])


def own(name: str = "Tower", stages: Any = 1, **options: Any) -> RunConfig:
    section = {"network": HERE + name, "exclusive_stages": stages, "options": options}
    return parse_config({"model": section})


# The partition


@pytest.mark.parametrize(
    ("rule", "exclusive"),
    [
        ("none", "own"),
        ("io", "own enter leave"),
        (1, "own enter leave inner_in inner_out"),
        ("all", "own enter leave inner_in inner_out core norm"),
        (["norm"], "own norm"),
    ],
    ids=str,
)
def test_the_dial_reads_the_networks_own_shells(rule: Any, exclusive: str) -> None:
    config = own(stages=rule)
    parts = build_partition(config, build_model(config, 1))
    assert {name.split(".")[0] for name in parts.exclusive} == set(exclusive.split())


@pytest.mark.parametrize(
    ("rule", "words"),
    [(2, "the network has stages 1 to 1"), (["up.0"], "'up.0' matches no tensor")],
)
def test_a_dial_beyond_the_shells_is_refused(rule: Any, words: str) -> None:
    config = own(stages=rule)
    with pytest.raises(UserError, match=rf"model\.exclusive_stages .*{words}"):
        build_partition(config, build_model(config, 1))


def test_a_pattern_of_owned_that_matches_nothing_is_said_to_be_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tower, "owned", ("own", "adapter"))
    with pytest.raises(UserError) as raised:
        build_partition(own(), build_model(own(), 1))
    assert str(raised.value) == (
        "model.network Tower: owned pattern 'adapter' matches no tensor of the model"
    )


def test_what_a_class_owns_is_trained_alone_and_is_in_no_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = {"network": f"{HERE}Tower", "exclusive_stages": "none"}
    alone = parse_config({"model": model, "training": {"update": "exclusive"}})
    pooled = parse_config({"model": model, "training": {"method": "pooled"}})
    rated = parse_config({"model": model, "training": {"owned_learning_rate": 0.1}})
    for config in (alone, rated):
        assert build_partition(config, build_model(config, 1)).owned == ("own",)
    with pytest.raises(UserError, match=r"method pooled has no exclusive layers, and .* owns own;"):
        build_partition(pooled, build_model(pooled, 1))
    monkeypatch.setattr(Tower, "owned", ())
    with pytest.raises(UserError, match=r"update exclusive trains nothing .* owns nothing"):
        build_partition(alone, build_model(alone, 1))
    build_partition(pooled, build_model(pooled, 1))


def test_only_what_owns_something_can_be_guided(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"network": f"{HERE}Tower", "exclusive_stages": "none"}
    config = parse_config({"model": model, "sampling": {"guidance": 0.5}})
    assert build_partition(config, build_model(config, 1)).exclusive == ("own",)
    with pytest.raises(UserError, match=r"guidance 0.5 needs model.exclusive_stages none, and it"):
        parse_config({"model": {**model, "exclusive_stages": 1}, "sampling": {"guidance": 0.5}})
    monkeypatch.setattr(Tower, "owned", ())
    with pytest.raises(UserError, match=r"sampling.guidance 0.5 .* owns nothing; allowed: 0"):
        build_partition(config, build_model(config, 1))


def test_a_module_that_is_no_network_has_no_shells_but_can_be_divided_by_patterns() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert divide(plain, ["0"]).shared == ("1.weight", "1.bias")
    for rule in ("io", 1):
        with pytest.raises(ValueError, match="the network has 0 shells"):
            divide(plain, rule)


# Initial values


def test_the_shared_core_is_the_same_whatever_the_images_channels() -> None:
    """Of the UNet too: φ_0 of grey and of coloured owners, bit for bit."""
    for config in (own(), load_config(None, ["model.exclusive_stages=1"])):
        grey, coloured = (build_model(config, channels) for channels in (1, 3))
        shared = build_partition(config, grey).shared
        assert shared == build_partition(config, coloured).shared
        for name in shared:
            assert torch.equal(grey.state_dict()[name], coloured.state_dict()[name]), name


def test_values_follow_from_the_seed_and_the_modules_name_alone() -> None:
    config = load_config()
    plain = build_model(config, 1).state_dict()
    more = build_model(load_config(None, ["model.attention_stages=[2,3]"]), 1).state_dict()
    common = {name for name in plain if "attentions" not in name}
    assert common < set(more)
    assert all(torch.equal(plain[name], more[name]) for name in common)
    other = build_model(load_config(None, ["seed=1"]), 1).state_dict()
    assert not torch.equal(plain["stem.weight"], other["stem.weight"])
    assert not torch.equal(
        plain["down.1.blocks.0.conv_in.weight"], plain["down.2.blocks.0.conv_in.weight"]
    )


def test_values_are_distributed_as_torchs_own() -> None:
    layer = nn.Linear(300, 200)
    network = nn.Sequential(layer)
    initialise(network, 0)
    torch.manual_seed(0)
    theirs = nn.Linear(300, 200)
    for ours, expected in (
        (layer.weight.detach(), theirs.weight.detach()),
        (layer.bias.detach(), theirs.bias.detach()),
    ):
        assert float(ours.std()) == pytest.approx(float(expected.std()), rel=0.1)
        assert float(ours.abs().max()) == pytest.approx(float(expected.abs().max()), rel=0.05)


def test_what_a_constructor_has_set_stays() -> None:
    built = build_model(own(), 1)
    assert isinstance(built, Tower)
    assert not built.inner_out.weight.any()
    assert not built.own.any()
    assert built.norm.weight.eq(1).all()
    assert built.inner_out.bias.any(), "drawn, beside a weight that was set"


def test_initialising_leaves_the_process_generator_alone() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    before = torch.get_rng_state()
    initialise(network, 0)
    assert torch.equal(before, torch.get_rng_state())


# Bad input


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: own("Nobody"), "cannot be loaded: AttributeError"),
        (lambda: own("ROOT"), "is no network; allowed: a class of srfed.networks.network.Network"),
        (lambda: own(width=0), "cannot be made: width 0 is impossible"),
        (lambda: own(depth=3), "cannot be made: .*depth"),
        (lambda: own("WithStatistics"), "keeps 'norm.num_batches_tracked', which is no parameter"),
    ],
)
def test_a_network_that_cannot_be_used_is_one_sentence(config: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model(config(), 1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.network=unett", "'unett' is unknown; allowed: unet, or module:Class"),
        ("model={network: 'a:B', channels: [8, 8, 8, 8]}", "unknown key `model.channels`"),
        ("model.options={a: 1}", "unknown key `model.options`; allowed: network, channels"),
        ("model={network: 'a:B', options: 3}", "model.options = 3 is not allowed; allowed: names"),
        ("model={network: 'a:B', options: {a: {b: 1}}}", "model.options"),
        ("model={network: 'a b:B'}", 'model.network = "a b:B" is not allowed'),
        ("model=3", "model = 3 is not allowed; it must be a section of settings"),
    ],
)
def test_an_impossible_section_is_refused_before_anything_is_loaded(
    override: str, words: str
) -> None:
    with pytest.raises(UserError) as raised:
        load_config(None, [override])
    assert words in str(raised.value)


def test_options_survive_yaml_and_json_and_count_for_the_fingerprint(tmp_path: Path) -> None:
    config = own(width=6, steps=[1, 2])
    assert isinstance(config.model, OwnNetworkConfig)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert hash(again) == hash(config)
    assert config.settings()["model.options"] == {"width": 6, "steps": [1, 2]}
    assert own(width=5).fingerprint() != config.fingerprint()
    assert own(width=5).decisive_differences(config)[0].startswith('model.options: {"width": 5}')
    network = build_model(config, 1)
    assert isinstance(network, Tower)
    assert network.steps == (1, 2)


# A whole run


def test_a_network_of_ones_own_trains_through_the_front_door(tmp_path: Path) -> None:
    config = tiny_config({"model.exclusive_stages": "io"})
    run = srfed.train(config, network=Tower, run_dir=tmp_path / "run")
    assert run.round == 3
    assert run.config.model.exclusive_stages == "io"
    assert run.sample(0, 2).shape == (2, 8, 8, 1)
    again = srfed.open_run(tmp_path / "run")
    assert (again.sample(0, 2) == run.sample(0, 2)).all()


def test_a_command_guides_no_run_whose_network_owns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Tower, "owned", ())
    config = tiny_config({"model.exclusive_stages": "none", "federation.rounds": 1})
    run = srfed.train(config, network=Tower, run_dir=tmp_path / "run")
    capsys.readouterr()
    out = ["--out", str(tmp_path / "x.png")]
    for command, options in ((sample, out), (evaluate, [])):
        assert command.main(["--run", str(run.path), "--guidance", "1", *options]) == 2
        said = capsys.readouterr().err
        assert "sampling.guidance 1.0" in said
        assert "owns nothing; allowed: 0" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
    assert not (run.path / "evaluations").exists()


@pytest.mark.slow
def test_the_example_trains_under_ray_without_a_change_to_srfed(tmp_path: Path) -> None:
    program = ROOT / "examples" / "own_network.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    said = done.stdout.splitlines()
    losses = [float(line.split()[-1]) for line in said if ": loss " in line]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert said[-1].endswith("(4, 8, 8, 1) uint8")
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.model.network == "own_network:Mixer"
    assert config.resources.backend == "ray"
