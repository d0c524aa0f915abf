"""Every setting is a key of Flower's run configuration: what of it counts, and in which order."""

import io
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_fused_config_from_dir, parse_config_args
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from srfed.config import RunConfig, load_config
from srfed.federation.flower import server_app
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.server_app import begin_or_go_on, simulated_nodes
from srfed.federation.run_config import with_app_config
from support.commands import run_here
from support.errors import message_of
from support.tiny_run import real_client_app

PROJECT = Path(__file__).parents[2]


def said(text: str, tmp_path: Path, app: Path = PROJECT, nodes: int | None = None) -> RunConfig:
    """The configuration of the run that ``flwr run --run-config TEXT`` begins or goes on with, as
    Flower reads text and app.
    """
    typed = parse_config_args([text])
    typed.setdefault("run-dir", str(tmp_path / "run"))
    fused = get_fused_config_from_dir(app, typed)
    context = Context(0, 0, {}, RecordDict(), fused)
    return begin_or_go_on(context, typed, nodes).config


def edited(tmp_path: Path, **values: object) -> Path:
    """The project's app, with values of ``[tool.flwr.app.config.federation]`` set otherwise."""
    text = (PROJECT / "pyproject.toml").read_text()
    begin = text.index("[tool.flwr.app.config.federation]")
    for key, value in values.items():
        at = text.index(f"\n{key} = ", begin) + 1
        text = text[:at] + f"{key} = {value}" + text[text.index("\n", at) :]
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(text)
    return tmp_path / "app"


# --- The table ------------------------------------------------------------------------------------


def test_the_projects_table_is_what_the_command_writes(tmp_path: Path) -> None:
    text = (PROJECT / "pyproject.toml").read_text()
    assert with_app_config(text) == text, "run: srfed schema --flower pyproject.toml"
    file = tmp_path / "pyproject.toml"
    file.write_text(text.replace("\nrounds = 30\n", "\nrounds = 31\n").replace("seed = 0\n", ""))
    assert run_here("schema", "--flower", file).returncode == 0
    assert file.read_text() == text


def test_the_table_names_every_setting_with_its_default() -> None:
    config = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    names = {
        f"{section}.{key}" if isinstance(keys, dict) else section
        for section, keys in config["config"].items()
        for key in (keys if isinstance(keys, dict) else [section])
    }
    assert set(RunConfig().settings()) <= names
    assert names - set(RunConfig().settings()) == {
        "run-dir",
        "config",
        "set",
        "roster",
        "model.options",
    }


def test_what_is_no_app_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text("[project]\n")
    done = run_here("schema", "--flower", file)
    assert done.returncode == 2
    assert "there is no table [tool.flwr.app.config]" in done.stderr
    assert file.read_text() == "[project]\n"


def test_flower_finds_nothing_to_install_and_no_code() -> None:
    names = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(PROJECT))).namelist()
    assert "configs/digits.yaml" in names
    assert not [name for name in names if name.endswith((".py", ".txt"))]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert "dependencies" not in project
    assert {"dependencies", "optional-dependencies"} <= set(project["dynamic"])


# --- What counts ----------------------------------------------------------------------------------


def test_nothing_said_is_the_default_configuration(tmp_path: Path) -> None:
    assert said("", tmp_path) == RunConfig()


def test_each_kind_of_value_is_said_by_its_own_key(tmp_path: Path) -> None:
    config = said(
        'federation.rounds=3 training.learning_rate=1 training.ema_warmup=false name="12" '
        'model.channels="[16, 32, 32, 32]" model.exclusive_stages="io" data.image_size=16 '
        'training.gradient_clip="null" data.intensity="per_image"',
        tmp_path,
    )
    assert config == load_config(
        None,
        [
            "federation.rounds=3",
            "training.learning_rate=1.0",
            "training.ema_warmup=false",
            'name="12"',
            "model.channels=[16, 32, 32, 32]",
            "model.exclusive_stages=io",
            "data.image_size=16",
            "training.gradient_clip=null",
        ],
    )


def test_a_network_of_ones_own_takes_none_of_the_unets_defaults(tmp_path: Path) -> None:
    text = 'model.network="mine:Mixer" model.options="{width: 8}"'
    model = said(text, tmp_path).settings()
    assert model["model.options"] == {"width": 8}
    assert "model.channels" not in model


def test_the_tables_defaults_leave_a_configuration_file_as_it_is(tmp_path: Path) -> None:
    file = PROJECT / "configs" / "mnist.yaml"
    whole = load_config(file)
    assert said(f'config="{file}"', tmp_path) == whole
    # Nor does one that somebody has written into the table; what is typed does.
    app = edited(tmp_path, rounds=5)
    (tmp_path / "a").mkdir()
    assert said(f'config="{file}"', tmp_path / "a", app) == whole
    assert whole.federation.rounds not in (5, 30)
    (tmp_path / "b").mkdir()
    typed = said(f'config="{file}" federation.rounds=30', tmp_path / "b", app)
    assert typed.federation.rounds == 30, "though that is the default"
    assert typed.training == whole.training


def test_a_value_written_into_the_table_begins_a_run_and_leaves_one_that_goes_on(
    tmp_path: Path,
) -> None:
    app = edited(tmp_path, rounds=5, clients=4)
    assert said("federation.clients=3", tmp_path, app).federation.rounds == 5
    again = said("", tmp_path, PROJECT)
    assert (again.federation.rounds, again.federation.clients) == (5, 3)
    assert said("federation.rounds=7", tmp_path, app).federation.rounds == 7
    assert "federation.clients: 3 -> 4" in message_of(
        lambda: said("federation.clients=4", tmp_path, app)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'federation.rounds=3 set="federation.rounds=4"',
            "federation.rounds is 3 by its own key and 4 by set; say it once",
        ),
        ('set="seed=1 seed=2"', "seed is 1 and 2 by set; say it once"),
        ('set="name=\'a"', "allowed: section.key=value, separated by spaces"),
        ('model.channels="[1, "', "model.channels = '[1,' is not valid YAML"),
        ("federation.rounds=1.5", "federation.rounds = 1.5 is not allowed; allowed: whole number"),
        ('federation.rounds=""', 'federation.rounds = "" is not allowed'),
        ('set="federation.round=3"', "did you mean federation.rounds?"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(
    text: str, expected: str, tmp_path: Path
) -> None:
    said_of_it = message_of(lambda: said(text, tmp_path))
    assert expected in said_of_it
    assert "\n" not in said_of_it
    assert not (tmp_path / "run").exists()


def test_a_setting_said_twice_alike_is_said(tmp_path: Path) -> None:
    text = 'federation.rounds=3 set="federation.rounds=3 seed=1"'
    config = said(text, tmp_path)
    assert (config.federation.rounds, config.seed) == (3, 1)


# --- Flower's simulation --------------------------------------------------------------------------


def test_there_are_as_many_clients_as_simulated_nodes_unless_somebody_says_how_many(
    tmp_path: Path,
) -> None:
    assert said("", tmp_path, nodes=2).federation.clients == 2
    for name, text in (("a", "federation.clients=10"), ("b", 'set="federation.clients=10"')):
        (tmp_path / name).mkdir()
        assert "there are 2; run it with --federation-config num-supernodes=10" in message_of(
            lambda text=text, name=name: said(text, tmp_path / name, nodes=2)
        )
        assert said(text, tmp_path / name, nodes=10).federation.clients == 10
    # And a run that goes on has those that it began with.
    assert "federation.clients = 2 needs" in message_of(lambda: said("", tmp_path, nodes=3))


def test_the_nodes_of_a_simulation_are_counted_when_all_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(server_app, "STILL_SECONDS", 0.0)
    grid = InMemoryGrid(cast(Any, SimpleNamespace(state=lambda: None)))
    seen = iter([[], [1], [1, 2], [1, 2, 3], [1, 2, 3]])
    monkeypatch.setattr(grid, "get_node_ids", lambda: next(seen))
    assert simulated_nodes(grid) == 3
    assert simulated_nodes(InlineGrid(real_client_app, 2, tmp_path)) is None
