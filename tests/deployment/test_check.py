"""A site's check of its images and settings before it takes part."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srfed import deploy
from srfed.config import load_config
from srfed.data import accept_images, load_own_task
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import divide
from srfed.training.local import LocalTrainer
from srfed.training.part import initial_state
from support.commands import assert_one_line, deploy_here
from support.tiny_run import tiny_config


def joining_options(output: str) -> dict[str, str]:
    """The options of the printed command that joins, as a shell reads it."""
    words = shlex.split(output[output.index("python -m srfed.deploy site") :].replace("\\\n", ""))
    options = words[4:]
    return dict(zip(options[::2], options[1::2], strict=True))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures of several sizes and modes, as owners have them."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for number, mode in enumerate(["RGB", "L", "RGBA", "P", "1", "RGB", "CMYK", "LA", "L", "RGB"]):
        size = (9 + number, 20 - number, 3)
        image = Image.fromarray(pixels.integers(0, 256, size, dtype=np.uint8)).convert(mode)
        image.save(folder / f"{number}.{'tif' if mode in ('CMYK', 'LA') else 'png'}")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_check_of_a_folder_of_mixed_pictures(
    pictures: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    state = tmp_path / "new" / "state"
    settings = [
        "data.image_size=8",
        "data.channels=3",
        "training.batch_size=4",
    ]
    done = deploy_here(
        "check",
        "--data",
        pictures,
        "--state-dir",
        state,
        "--client-id",
        "clinic-1",
        "--config",
        tiny_yaml,
        *(word for setting in settings for word in ("--set", setting)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    train, test = map(
        int,
        re.search(r"(\d) for training, (\d) for tests; 8 x 8 px, 3 channels", done.stdout).groups(),
    )
    assert (train + test, min(train, test) >= 2) == (10, True)
    assert f"minibatch:  4 of {train} images" in done.stdout
    with Image.open(state / "check.png") as picture:
        assert picture.format == "PNG"
    assert [path.name for path in state.iterdir()] == ["check.png"], (
        "what it tried to write is gone again"
    )
    assert [path.stat().st_mode & 0o777 for path in (state, state / "check.png")] == [0o700, 0o600]
    assert "can be read by others" not in done.stdout
    options = joining_options(done.stdout)
    assert (options["--client-id"], options["--key"]) == ("clinic-1", "site-clinic-1.key")
    assert (options["--data"], options["--state-dir"]) == (str(pictures), str(state))

    config = tiny_config()
    model = build_model(config, 3)
    shared = divide(model, config.model.exclusive_stages).shared
    payload = 4 * sum(model.state_dict()[name].numel() for name in shared)
    assert f"each round: {payload:,} bytes" in done.stdout
    for word in (
        "never go:   your images, θ_i",
        "generated images: 10 at the end, 4 at",
        "of 192 bytes",
    ):
        assert word in done.stdout


def test_check_says_where_others_can_look_into_the_state(tiny_yaml: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "clinic.npz", train_images=images[:24], test_images=images[24:])
    state = tmp_path / "state"
    (state / "clinic").mkdir(parents=True, mode=0o700)
    state.chmod(0o750)
    done = deploy_here(
        "check", "--data", tmp_path / "clinic.npz", "--state-dir", state, "--config", tiny_yaml
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line.strip() for line in done.stdout.splitlines() if "read by others" in line]
    assert (
        line
        == f"{state} can be read by others on this machine (mode 0750); close it: chmod -R go= "
        f"{state}"
    )


def test_check_of_an_npz_file_in_moments_mode(tiny_yaml: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "site-7.npz", train_images=images[:20], test_images=images[20:])
    out = tmp_path / "grid.png"
    done = deploy_here(
        "check",
        "--data",
        "site-7.npz",
        "--state-dir",
        "state",
        "--config",
        tiny_yaml,
        "--out",
        out,
        "--set",
        "evaluation.mode=statistics",
        "--set",
        "model.exclusive_stages=none",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "20 for training, 10 for tests; 8 x 8 px, 1 channel\n" in done.stdout
    options = joining_options(done.stdout)
    values = [options[name] for name in ("--client-id", "--data", "--state-dir")]
    assert values == ["site-7", str(tmp_path / "site-7.npz"), str(tmp_path / "state")], (
        "absolute, wherever it starts"
    )
    assert not any((tmp_path / "state").iterdir())
    with Image.open(out) as picture:
        assert picture.size[0] > picture.size[1] > 0
    payload = 4 * sum(
        tensor.numel() for tensor in build_model(tiny_config(), 1).state_dict().values()
    )
    assert f"each round: {payload:,} bytes" in done.stdout
    assert "no image" in done.stdout
    assert "generated images: " not in done.stdout


@pytest.mark.parametrize(
    ("settings", "minibatch"),
    [
        (["training.batch_size=32", "training.minibatches=continued"], "32 of 20 images"),
        (["training.batch_size=32", "training.minibatches=ragged"], "20 of 20 images"),
        (["training.batch_size=8"], "8 of 20 images"),
    ],
)
def test_check_takes_the_minibatches_that_training_takes(
    settings: list[str],
    minibatch: str,
    tiny_yaml: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (22, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", train_images=images[:20], test_images=images[20:])
    overrides = [word for setting in settings for word in ("--set", setting)]
    arguments = [
        "check",
        "--data",
        str(tmp_path / "own.npz"),
        "--state-dir",
        str(tmp_path / "state"),
    ]
    assert deploy.main([*arguments, "--config", str(tiny_yaml), *overrides]) == 0
    assert f"minibatch:  {minibatch}\n" in capsys.readouterr().out
    # Training's own words on the same settings.
    config = load_config(tiny_yaml, settings)
    model = build_model(config, 1)
    trainer = LocalTrainer(
        config,
        model,
        build_partition(config, model),
        build_objective(config, torch.device("cpu")),
        "own",
        images[:20],
    )
    partition = build_partition(config, model)
    result = trainer.train(
        1, partition.take_shared(model.state_dict()), initial_state(model, partition)
    )
    assert f"{result.images // 2} of 20 images" == minibatch


def test_check_compares_with_the_sites_record_and_never_accepts(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, state = tmp_path / "own.npz", tmp_path / "state"
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(own, train_images=images[:40])
    arguments = ["check", "--data", str(own), "--state-dir", str(state), "--config", str(tiny_yaml)]
    config = load_config(tiny_yaml).data
    assert deploy.main(arguments) == 0
    assert "are put on record when the site joins" in capsys.readouterr().out
    load_own_task(config, own, "own", state / "own")
    record = (state / "own" / "images.json").read_bytes()
    assert deploy.main(arguments) == 0
    assert "these are the images on record" in capsys.readouterr().out

    np.savez(own, train_images=images)
    for _ in range(2):
        assert deploy.main(arguments) == 2
        assert "are not those on record for own" in capsys.readouterr().err
    assert (state / "own" / "images.json").read_bytes() == record
    accept_images(config, own, "own", state / "own")
    assert deploy.main(arguments) == 0


def test_check_says_what_it_takes_and_what_it_passes_over(
    pictures: Path, tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "@eaDir").mkdir()
    deep = np.linspace(7, 4000, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(deep).save(pictures / "deep.png")
    arguments = [
        "check",
        "--data",
        str(pictures),
        "--state-dir",
        str(tmp_path / "state"),
        "--config",
        str(tiny_yaml),
    ]
    for setting in ("data.image_size=8", "data.channels=3", "training.batch_size=4"):
        arguments += ["--set", setting]
    assert deploy.main(arguments) == 0
    said = capsys.readouterr().out
    assert "taken:      11 pictures (9 .png, 2 .tif)\n" in said
    assert (
        "skipped:    1 left by a system (e.g. @eaDir), 1 no picture by its name (e.g. notes.txt)\n"
        in said
    )
    assert (
        "1 of 11 pictures have more than 8 bits, values 7 to 4000; each is stretched by its own"
        in said
    )
    assert deploy.main([*arguments, "--set", "data.intensity=[0, 2000]"]) == 0
    assert "0 becomes black,\n            2000 white" in capsys.readouterr().out
    (pictures / "train").mkdir()
    (pictures / "val").mkdir()
    assert deploy.main(arguments) == 2
    assert "holds train, val" in capsys.readouterr().err


SMALL = ["--data", "small.npz", "--set", "training.batch_size=2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "missing"], "missing does not exist"),
        (["--data", "empty"], "holds no images"),
        (["--data", "my pictures"], "data.image_size"),
        (["--data", "small.npz"], "training.batch_size = 16 is above the 4 training images"),
        ([*SMALL, "--state-dir", "small.npz/state"], "cannot be written"),
        ([*SMALL, "--client-id", "a/b"], "'a/b' is no name"),
        ([*SMALL, "--out", "small.npz/x.png"], "cannot write"),
        (["--data", "small.npz", "--set", "training.batchsize=2"], "batchsize"),
    ],
)
@pytest.mark.usefixtures("pictures")
def test_what_check_finds_wrong_takes_one_line(
    options: list[str], words: str, tiny_yaml: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    images = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "small.npz", train_images=images[:4], test_images=images[4:])
    done = deploy_here(
        "check", "--state-dir", "state", "--config", tiny_yaml, *options, folder=tmp_path
    )
    assert_one_line(done, words)
