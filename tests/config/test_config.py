"""The configuration: every error names the key, every setting is read, described and travels
unharmed.
"""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from srfed.config import (
    RunConfig,
    UNetConfig,
    describe,
    load_config,
    parse_config,
    parse_config_json,
    what_decides,
)
from srfed.errors import UserError
from srfed.model import build_objective

FOLDER = Path(__file__).parents[2] / "configs"


def refusal(path: Path | None = None, overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides or [])
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def settings_of(content: dict[str, Any]) -> dict[str, Any]:
    """A nested configuration as {"section.key": value}; top-level settings keep their name."""
    flat = {name: value for name, value in content.items() if not isinstance(value, dict)}
    for section, values in content.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
    return flat


def dump(config: RunConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json())
    return content


# Reading


def test_nothing_given_is_the_defaults(tmp_path: Path) -> None:
    assert load_config() == RunConfig() == load_config(write(tmp_path, ""))


def test_yaml_and_json_round_trip(tmp_path: Path) -> None:
    config = load_config(
        overrides=["seed=3", "training.learning_rate=1e-5", "model.exclusive_stages=['up.0.*']"]
    )
    assert config.model.exclusive_stages == ("up.0.*",)
    assert load_config(write(tmp_path, config.to_yaml())) == config
    assert parse_config_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "+5e-4", "0.0005", "5.e-4", ".0005", ".5e-3"])
def test_every_way_to_write_a_number_is_a_number(tmp_path: Path, text: str) -> None:
    assert (
        load_config(write(tmp_path, f"training:\n  learning_rate: {text}\n")).training.learning_rate
        == 5e-4
    )
    assert load_config(overrides=[f"training.learning_rate={text}"]).training.learning_rate == 5e-4


@pytest.mark.parametrize(
    "name", ["1e5", "12", "null", "true", "2025-01-31", "1.5", "0x10", "0100", "no", "1.e5"]
)
def test_a_text_that_looks_like_something_else_survives_the_round_trip(
    tmp_path: Path, name: str
) -> None:
    config = parse_config({"name": name, "data": {"dir": name}})
    assert load_config(write(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize("text", ["2025-01-31", "0100", "1:30", "1_000", "no", "off", "="])
def test_what_is_no_number_at_first_sight_is_text(tmp_path: Path, text: str) -> None:
    assert load_config(overrides=[f"data.dir={text}"]).data.dir == text
    assert load_config(write(tmp_path, f"data:\n  dir: {text}\n")).data.dir == text


def test_a_text_that_is_missing_is_the_empty_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "data: {dir: /data}"), ["data.dir="]).data.dir == ""


def test_a_file_changes_what_it_names_and_overrides_win_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ntraining:\n  batch_size: 16\n  minibatches: ragged\n")
    config = load_config(
        path, ["training.batch_size=8", "seed=2", "training.batch_size=4", "name=other"]
    )
    assert (config.seed, config.name) == (2, "other")
    assert (config.training.batch_size, config.training.minibatches) == (4, "ragged")
    assert config.training.learning_rate == RunConfig().training.learning_rate
    assert load_config(path).training.batch_size == 16


def test_an_override_may_hold_an_equals_sign() -> None:
    assert load_config(overrides=["data.dir=/data/a=b"]).data.dir == "/data/a=b"


def test_the_configuration_is_immutable() -> None:
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.training.batch_size = 3


# Refusing


BOMB = (
    "a0: &a0 ["
    + ", ".join("x" * 9)
    + "]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
)
MERGED = "m0: &m0 {k: v}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "stands for more than 100000 values"),
        (MERGED, "stands for more than 100000 values"),
        ("a: &a [*a]", "it is a part of itself"),
        ("data: " + 60 * "[" + 60 * "]", "nested more than 32 deep"),
        ("#" * 300_000 + "\n" + "#" * 800_000, "more than 262144 characters"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("? [1, 2]\n: 3", "no key"),
    ],
)
def test_what_a_file_stands_for_is_bounded_before_it_is_built(
    tmp_path: Path, text: str, words: str
) -> None:
    begun = time.process_time()
    assert words in refusal(write(tmp_path, text))
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("text", ["[" * 60_000, '{"across_passes": [', '["across_passes"]'])
def test_a_request_s_settings_that_are_none_are_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match="configuration"):
        parse_config_json(f"{text}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        # key, value, what is allowed
        ("federation.clients=0", ["federation.clients = 0", "whole number", "≥ 1", "≤ 10000"]),
        ("diffusion.timesteps=0", ["diffusion.timesteps = 0", "≥ 2"]),
        ("diffusion.timesteps=10001", ["diffusion.timesteps = 10001", "≤ 10000"]),
        ("seed=-1", ["seed = -1", "≥ 0"]),
        ("training.ema_decay=1", ["training.ema_decay = 1 ", "≥ 0, < 1"]),
        ("training.learning_rate=0", ["training.learning_rate = 0", "> 0, ≤ 10"]),
        ("training.gradient_clip=0", ["training.gradient_clip = 0", "number | null, > 0"]),
        ("data.dataset=imagenet", ['data.dataset = "imagenet"', "digits | mnist", "npz | folder"]),
        ("data.channels=2", ["data.channels = 2", "1 | 3 | null"]),
        ("data.intensity=[5, 5]", ["data.intensity", "[5.0, 5.0]", "low below high"]),
        ("data.intensity=[9]", ["data.intensity = [9]", "per_image | list of number"]),
        ("data.intensity=[0, 1, 2]", ["data.intensity = [0, 1, 2]", "per_image | list of number"]),
        ("data.intensity=own", ['data.intensity = "own"', "per_image"]),
        ("data.intensity=[0, .nan]", ["data.intensity = [0, NaN]"]),
        ("name=a/b", ['name = "a/b"', "matching ^"]),
        ("name=..", ['name = ".."', "matching ^"]),
        # types
        ("training.batch_size=1.0", ["training.batch_size = 1.0", "whole number"]),
        ("training.batch_size='32'", ['training.batch_size = "32"', "whole number"]),
        ("training.batch_size=", ['training.batch_size = ""', "whole number"]),
        # nothing at all switches nothing off
        ("training.gradient_clip=", ['training.gradient_clip = ""', "number | null"]),
        ("training.gradient_clip= # none", ['training.gradient_clip = ""', "number | null"]),
        # what YAML 1.1 takes for another number, or for a truth value
        ("training.batch_size=0100", ['training.batch_size = "0100"', "in decimal digits alone"]),
        ("training.batch_size=0x10", ['training.batch_size = "0x10"', "in decimal digits alone"]),
        ("training.batch_size=0b11", ['training.batch_size = "0b11"', "in decimal digits alone"]),
        (
            "federation.join_timeout=1:30",
            ['federation.join_timeout = "1:30"', "in decimal digits alone"],
        ),
        ("evaluation.samples=1_000", ['evaluation.samples = "1_000"', "in decimal digits alone"]),
        ("model.exclusive_stages=01", ['model.exclusive_stages = "01"', "none | io | all"]),
        ("data.horizontal_flip=no", ['data.horizontal_flip = "no"', "true | false"]),
        ("sampling.clip=on", ['sampling.clip = "on"', "true | false"]),
        ("training.batch_size=[1]", ["training.batch_size = [1]", "whole number"]),
        ("training.learning_rate=fast", ['training.learning_rate = "fast"', "number"]),
        ("name=5", ["name = 5", "text"]),
        ("sampling.clip=1", ["sampling.clip = 1", "true | false"]),
        ("sampling.clip='true'", ['sampling.clip = "true"', "true | false"]),
        ("seed.x=1", ['seed = {"x": 1}', "whole number"]),
        # booleans are no numbers
        ("seed=true", ["seed = true", "whole number"]),
        ("federation.clients=true", ["federation.clients = true", "whole number"]),
        ("training.learning_rate=true", ["training.learning_rate = true", "number"]),
        ("data.channels=true", ["data.channels", "true", "1 | 3 | null"]),
        ("model.channels=[32,64,64,true]", ["model.channels", "true", "list of"]),
        ("model.exclusive_stages=true", ["model.exclusive_stages = true", "none | io | all"]),
        # no number at all
        ("training.learning_rate=.nan", ["training.learning_rate = NaN", "number"]),
        ("training.learning_rate=.inf", ["training.learning_rate = Infinity", "number"]),
        ("federation.round_timeout=.inf", ["federation.round_timeout = Infinity", "number"]),
        ("federation.round_timeout=1e999", ["federation.round_timeout = Infinity", "number"]),
        # out of their range
        ("sampling.guidance=-0.1", ["sampling.guidance = -0.1", "≥ 0, ≤ 10"]),
        ("sampling.guidance=10.1", ["sampling.guidance = 10.1", "≥ 0, ≤ 10"]),
        # lists
        (
            "model.channels=[32,64]",
            ["model.channels = [32, 64]", "≥ 4, ≤ 4096", "length ≥ 4, length ≤ 4"],
        ),
        ("model.channels=[32,64,64,2]", ["model.channels = [32, 64, 64, 2]", "≥ 4, ≤ 4096"]),
        ("model.channels=32", ["model.channels = 32", "list of"]),
        ("model.attention_stages=[4]", ["model.attention_stages = [4]", "≥ 0, < 4"]),
        ("evaluation.ssim_curve=[0]", ["evaluation.ssim_curve = [0]", "≥ 1"]),
        # the partition
        ("model.exclusive_stages=9", ["model.exclusive_stages = 9", "none | io | all", "≥ 1, ≤ 4"]),
        ("model.exclusive_stages=0", ["model.exclusive_stages = 0", "none | io | all", "≥ 1, ≤ 4"]),
        (
            "model.exclusive_stages=some",
            ['model.exclusive_stages = "some"', "none | io | all", "list of text"],
        ),
        ("model.exclusive_stages=[]", ["exclusive_stages has an empty pattern", "`none`"]),
        ("model.exclusive_stages=['up.0.*', '']", ["exclusive_stages has an empty pattern"]),
        # settings that contradict each other
        ("diffusion.beta_end=1e-5", ["beta_start 0.0001 is above beta_end 1e-05"]),
        ("diffusion.timesteps=20", ["beta_end 0.02 times 1000/T = 1 reaches 1", "beta_scale none"]),
        ("model.groups=7", ["groups 7 does not divide channels entry 32"]),
        (
            "model.attention_head_channels=48",
            ["attention_head_channels 48", "64 channels", "stage 3"],
        ),
        (
            "training.local_epochs=1",
            ["exactly one of local_steps (now 12)", "local_epochs (now 1)"],
        ),
        (
            "training.local_steps=null",
            ["exactly one of local_steps (now None)", "local_epochs (now None)"],
        ),
        ("training.exclusive_steps=2", ["exclusive_steps 2", "update: alternating"]),
        ("federation.clients_per_round=11", ["clients_per_round 11 is above clients 10"]),
        ("federation.min_clients=11", ["min_clients 11 is above the 10 clients"]),
        ("evaluation.clients=11", ["evaluation.clients 11 is above federation.clients 10"]),
        ("evaluation.clients=0", ["evaluation.clients"]),
        ("sampling.steps=501", ["sampling.steps 501 is above diffusion.timesteps 500"]),
        (
            "evaluation.ssim_timestep=501",
            ["evaluation.ssim_timestep 501 is above diffusion.timesteps 500"],
        ),
        (
            "evaluation.ssim_curve=[10, 501]",
            ["evaluation.ssim_curve 501 is above diffusion.timesteps 500"],
        ),
        (
            "training.owned_learning_rate=0.1",
            ["training.owned_learning_rate 0.1", "model.owned is []; allowed: null"],
        ),
        ("training.decay_rounds=3", ["decay_rounds 3", "linear, not constant; allowed: null"]),
        ("training.learning_rate_floor=1", ["training.learning_rate_floor = 1", "< 1"]),
        ("model.owned=[vector, vector]", ['owned ["vector", "vector"]', "twice; allowed: once"]),
        ("model.owned=[lora]", ['model.owned = ["lora"]', "allowed: list of vector | film"]),
        (
            "model.task_embedding=exclusive",
            ["model.task_embedding: exclusive is no value any more; write model.owned: [vector]"],
        ),
        # keys
        ("training.batchsize=3", ["unknown key `training.batchsize`", "minibatches, local_steps"]),
        ("trainings.batch_size=3", ["unknown key `trainings`", "data, diffusion, model, training"]),
        ("training=3", ["training = 3", "section of settings"]),
        # the override itself
        ("training.batch_size", ["--set 'training.batch_size'", "section.key=value"]),
        ("=3", ["--set '=3'", "section.key=value"]),
        ("training.=3", ["--set 'training.=3'", "section.key=value"]),
        ("a.b.c=3", ["--set 'a.b.c=3'", "section.key=value"]),
        ("seed={", ["--set 'seed={'", "not valid YAML"]),
    ],
)
def test_a_refusal_is_one_line_with_key_value_and_what_is_allowed(
    override: str, words: list[str]
) -> None:
    message = refusal(overrides=[override])
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["resources.cpus=2", "resources.client_cpus=3"], "client_cpus 3 is above cpus 2"),
        (
            ["training.learning_rate_schedule=cosine", "training.decay_rounds=3"],
            "decay_rounds 3 needs learning_rate_schedule: linear, not cosine; allowed: null",
        ),
        (
            ["training.update=exclusive", "model.exclusive_stages=none"],
            "trains nothing with model.exclusive_stages none and model.owned []",
        ),
        (
            ["resources.precision=bfloat16", "resources.device=cpu"],
            "precision bfloat16 needs device cuda",
        ),
        (
            ["federation.clients_per_round=3", "federation.min_clients=4"],
            "min_clients 4 is above the 3 clients",
        ),
        (
            ["evaluation.clients=4", "evaluation.samples_between=7"],
            "evaluation.samples_between 7 is below 8, two for each of the 4 clients",
        ),
        (
            ["evaluation.clients=4", "training.method=pooled", "model.exclusive_stages=none"],
            "evaluation.clients needs training.method federated, not pooled",
        ),
        (
            ["evaluation.clients=4", "data.dataset=sites", "evaluation.mode=statistics"],
            "evaluation.clients 4 is for simulations: under data.dataset sites an evaluation also "
            "brings each site its model; allowed: null",
        ),
        (
            ["diffusion.beta_scale=none", "diffusion.beta_end=0.9"],
            "beta_end 0.9 over 500 timesteps leaves ᾱ_T below 1e-30",
        ),
        (
            ["sampling.guidance=0.5", "model.owned=[vector]"],
            "sampling.guidance 0.5 needs model.exclusive_stages none, and it is 2; allowed: 0",
        ),
        (
            ["sampling.guidance=1", "model.owned=[vector]", "model.exclusive_stages=[up.0]"],
            'sampling.guidance 1.0 needs model.exclusive_stages none, and it is ["up.0"]; '
            "allowed: 0",
        ),
        (
            ["sampling.guidance=0.5", "model.exclusive_stages=none"],
            "in place of what is a task's own, and model.owned is []; allowed: 0",
        ),
        (["seed=3", "seed.x=4"], "`seed` is not a section"),
    ],
)
def test_two_settings_that_contradict_each_other(overrides: list[str], words: str) -> None:
    assert words in refusal(overrides=overrides)


def test_a_setting_of_the_command_is_not_laid_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"mine\.yaml with the command's own settings: unknown key"):
        load_config(path, ["training.batchsize=3"])
    path.write_text("training: {batchsize: 3}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: unknown key"):
        load_config(path)


def test_every_mistake_is_named_at_once() -> None:
    message = refusal(overrides=["federation.clients=0", "training.batch_size=0", "data.x=1"])
    assert message.startswith("configuration: ")
    assert all(name in message for name in ("federation.clients", "training.batch_size", "data.x"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training:\n  batch_size: 8\n  batch_size: 16\n", "key 'batch_size' is set twice"),
        ("seed: 1\ntraining: {}\nseed: 2\n", "key 'seed' is set twice"),
        ("- training\n- data\n", "must hold sections such as `training:`, not a list"),
        ("just text", "not a str"),
        ("0", "not a int"),
        ("training: [", "is not valid YAML"),
        ("training:\n\tbatch_size: 8\n", "is not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("seed: 1\n---\nseed: 2\n", "is not valid YAML"),
        ("training:\n", 'training = "" is not allowed; it must be a section'),
        (
            "training:\n  gradient_clip:\n",
            'training.gradient_clip = "" is not allowed; allowed: number | null',
        ),
        ("training:\n  batch_size: 0100\n", 'training.batch_size = "0100" is not allowed'),
        ("1: 2\n", "unknown key `1`"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert str(path) in message
    assert words in message


def test_an_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "absent.yaml")
        == f"cannot read {tmp_path / 'absent.yaml'}: No such file or directory"
    )
    assert f"cannot read {tmp_path}: " in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: größe".encode("latin-1"))
    assert "latin.yaml is not valid YAML" in refusal(tmp_path / "latin.yaml")


def test_what_another_program_sends_is_refused_alike() -> None:
    with pytest.raises(UserError, match="clients"):
        parse_config_json(RunConfig().to_json().replace('"clients":10', '"clients":0'))


# Describing, fingerprinting


def declared(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name == "model":
            yield from (f"{name}.{key}" for key in UNetConfig.model_fields)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{key}" for key in field.annotation.model_fields)
        else:
            yield name


def test_describe_names_every_setting_once_with_default_and_meaning() -> None:
    lines = describe().splitlines()
    heads = [re.fullmatch(r"  (\S+) = (\S.*?)  \((.+)\)", line) for line in lines[::2]]
    names = [head[1] for head in heads if head]
    # Of a network of one's own, and so not of the default's section.
    names.remove("model.options")
    assert names == list(declared(RunConfig))
    defaults = settings_of(dump(RunConfig())) | {"model.options": {}}
    assert {head[1]: json.loads(head[2]) for head in heads if head} == defaults
    assert all(line.startswith("      ") and len(line.strip()) > 5 for line in lines[1::2])


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "training.learning_rate=1e-3",
        "model.exclusive_stages=1",
        "resources.device=cpu",
        "sampling.eta=0",
        "training.learning_rate_schedule=cosine",
        "model.owned=[film]",
    ],
)
def test_a_decisive_setting_changes_the_fingerprint(override: str) -> None:
    assert load_config(overrides=[override]).fingerprint() != RunConfig().fingerprint()


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "resources.backend=inline",
        "resources.cpus=2",
        "data.dir=/data",
        "evaluation.grid_columns=3",
    ],
)
def test_where_it_runs_does_not_change_the_fingerprint(override: str) -> None:
    changed = load_config(overrides=[override])
    assert changed != RunConfig()
    assert changed.fingerprint() == RunConfig().fingerprint()


def test_rounds_decide_the_result_only_while_the_rate_follows_them() -> None:
    linear = "training.learning_rate_schedule=linear"
    for overrides, decisive in (
        (["training.learning_rate_schedule=constant"], False),
        (["training.learning_rate_schedule=cosine"], True),
        ([linear], True),
        ([linear, "training.decay_rounds=20"], False),
    ):
        more = load_config(overrides=[*overrides, "federation.rounds=99"])
        assert (more.fingerprint() != load_config(overrides=overrides).fingerprint()) == decisive
    falls = [load_config(overrides=[linear, f"training.decay_rounds={n}"]) for n in (20, 21)]
    assert falls[0].fingerprint() != falls[1].fingerprint()


def test_every_setting_says_at_its_field_what_it_decides() -> None:
    """What makes other weights, what other scores of the same weights, and what neither."""
    kinds: dict[str, set[str]] = {}
    for name in declared(RunConfig):
        kinds.setdefault(what_decides(name), set()).add(name)
    assert kinds["nothing"] == {
        "name",
        "data.dir",
        "evaluation.inception_weights",
        "evaluation.grid_columns",
        "evaluation.strip_steps",
        "federation.rounds",
        "federation.min_clients",
        "federation.on_missing",
        "federation.on_lost_store",
        "federation.join_timeout",
        "federation.round_timeout",
        "federation.keep_attempts",
        "resources.backend",
        "resources.cpus",
        "resources.ray_address",
        "resources.client_gpus",
        "sampling.batch_size",
    }
    # How EDM samples; what it is trained for is not among them.
    sampled = {"diffusion.sigma_min", "diffusion.sigma_max", "diffusion.rho"}
    assert sampled < kinds["scores"]
    sections = {name.split(".")[0] for name in kinds["scores"] - sampled}
    assert sections == {"sampling", "evaluation"}
    assert {"seed", "model.channels", "training.batch_size", "resources.precision"} <= kinds["run"]
    for name in kinds["nothing"] - {"federation.rounds"}:
        assert name not in RunConfig().decisive_settings()


def test_decisive_differences_are_named_with_both_values() -> None:
    changed = load_config(
        overrides=["seed=1", "training.batch_size=8", "resources.backend=inline", "name=other"]
    )
    default = RunConfig().training.batch_size
    assert RunConfig().decisive_differences(changed) == [
        "seed: 0 -> 1",
        f"training.batch_size: {default} -> 8",
    ]
    assert changed.decisive_differences(changed) == []


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    """A checkpoint carries it, so neither hash seeds nor the order in the file may enter."""
    shuffled = dict(reversed(dump(RunConfig()).items()))
    assert parse_config(shuffled).fingerprint() == RunConfig().fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", RunConfig().fingerprint())


# The files we ship


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_file_loads_and_names_every_setting(path: Path) -> None:
    load_config(path)
    named = settings_of(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert sorted(named) == sorted(declared(RunConfig))


def test_the_digits_file_is_the_defaults() -> None:
    assert load_config(FOLDER / "digits.yaml") == RunConfig()


# Properties

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    "seed": st.integers(0, 2**70),
    "data.dir": st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    "data.images_per_task": st.none() | st.integers(1, 10**6),
    "data.validation_images": st.just(0) | st.integers(2, 10**6),
    "data.channels": st.sampled_from([1, 3, None]),
    "data.intensity": st.just("per_image")
    | st.tuples(st.floats(-9e9, -1), st.floats(0, 9e9)).map(list),
    "data.test_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "model.exclusive_stages": st.sampled_from(["none", "io", "all", 1, 2, 3, 4])
    | st.lists(st.text("abcdown.0123*", min_size=1), min_size=1, max_size=3),
    "model.attention_stages": st.lists(st.integers(0, 3), max_size=3),
    "training.learning_rate": st.floats(0, 10, exclude_min=True),
    "training.gradient_clip": st.none() | st.floats(0, allow_infinity=False, exclude_min=True),
    "training.minibatches": st.sampled_from(["whole", "ragged", "continued"]),
    "federation.rounds": st.integers(1, 10**9),
    "sampling.eta": st.floats(0, 1),
    "resources.backend": st.sampled_from(["ray", "inline"]),
}


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_any_valid_overrides_survive_yaml(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    config = load_config(
        overrides=[f"{name}={yaml_text(value)}" for name, value in changes.items()]
    )
    flat = settings_of(dump(config))
    assert {name: flat[name] for name in changes} == changes
    path = write(tmp_path_factory.mktemp("round-trip"), config.to_yaml())
    assert load_config(path) == config == parse_config_json(config.to_json())
    assert load_config(path).fingerprint() == config.fingerprint()


def yaml_text(value: Any) -> str:
    """YAML as a careful user writes it: every text in quotes."""
    return yaml.safe_dump(
        value, default_flow_style=True, default_style='"' if isinstance(value, str) else None
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 10_000),
    st.floats(1e-10, 0.5),
    st.floats(1e-10, 0.999),
    st.sampled_from(["none", "match_1000"]),
    st.sampled_from(["linear", "cosine"]),
)
def test_a_diffusion_that_is_accepted_can_be_built(
    timesteps: int, start: float, end: float, scale: str, schedule: str
) -> None:
    content = {"timesteps": timesteps, "beta_start": start, "beta_end": end, "beta_scale": scale}
    evaluation = {"ssim_timestep": 1, "ssim_curve": []}
    try:
        config = parse_config(
            {
                "diffusion": content | {"schedule": schedule},
                "evaluation": evaluation,
                "sampling": {"steps": 1},
            }
        )
    except UserError:
        return
    build_objective(config, torch.device("cpu"))
