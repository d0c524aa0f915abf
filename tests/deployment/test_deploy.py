"""Deployment: certificates as others verify them, a site's check, and a whole federation of real
processes.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import tomllib
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from PIL import Image

from srfed import deploy
from srfed.config import load_config
from srfed.data import accept_images, load_own_task
from srfed.deployment import certificates as certificates_module
from srfed.deployment import deployment as deployment_module
from srfed.deployment.certificates import make_certificates
from srfed.deployment.deployment import Deployment
from srfed.deployment.flower import FOLDER_VARIABLE
from srfed.errors import UserError
from srfed.files import held
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import divide
from srfed.storage.manifest import read_manifest
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.training.local import LocalTrainer
from srfed.training.part import initial_state
from support.commands import run_here
from support.tiny_run import CLIENTS, all_bits, begin, run_in_process, server_bits, tiny_config

HOSTS = ("fed.example.org", "10.0.0.5")


def command(*arguments: object, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return run_here("deploy", *arguments, folder=folder)


def assert_one_line(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """Exit code 2, and one line on standard error that has the words."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout
    for word in words:
        assert word in done.stderr


# --- Certificates --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes for two hosts and two sites, with Flower's files beside another's."""
    folder = tmp_path_factory.mktemp("certificates") / "new"
    options = [option for host in HOSTS for option in ("--host", host)]
    done = command(
        "certificates",
        "--out",
        folder,
        *options,
        "--site",
        "north",
        "--site",
        "south",
        "--days",
        30,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    names = {line.split()[0] for line in done.stdout.splitlines()} - {"in"}
    assert names == {path.name for path in folder.iterdir()}, (
        "each file is explained, and there are no others"
    )
    return folder


def test_private_keys_are_for_their_owner_only(certificates: Path) -> None:
    for path in certificates.iterdir():
        if path.suffix == ".key":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert {path.name for path in certificates.glob("*.key")} == {
        "ca.key",
        "superlink.key",
        "site-north.key",
        "site-south.key",
    }


def test_a_private_key_is_never_readable_by_others_not_even_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    replace = os.replace

    def spy(source: Path, target: Path) -> None:
        modes.append((Path(target).suffix, stat.S_IMODE(os.stat(source).st_mode)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    make_certificates(tmp_path, ["localhost"], ["a"])
    assert [mode for suffix, mode in modes if suffix == ".key"] == [0o600] * 3


def test_openssl_accepts_the_certificates(certificates: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl command here to verify with")

    def verify(*options: str) -> int:
        files = ["-CAfile", str(certificates / "ca.crt"), str(certificates / "superlink.crt")]
        return subprocess.run(
            [openssl, "verify", "-x509_strict", "-purpose", "sslserver", *options, *files],
            capture_output=True,
        ).returncode

    assert verify() == 0
    for host in ("fed.example.org", "localhost"):
        assert verify("-verify_hostname", host) == 0
    for address in ("10.0.0.5", "127.0.0.1"):
        assert verify("-verify_ip", address) == 0
    assert verify("-verify_hostname", "other.example.org") != 0
    text = subprocess.run(
        [openssl, "x509", "-in", str(certificates / "ca.crt"), "-noout", "-text"],
        capture_output=True,
        text=True,
    ).stdout
    assert re.search(r"Basic Constraints: critical\s+CA:TRUE, pathlen:0", text)
    assert re.search(r"Key Usage: critical\s+Certificate Sign, CRL Sign\n", text)


def seconds_left(path: Path) -> timedelta:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    assert certificate.not_valid_before_utc < datetime.now(UTC)
    return certificate.not_valid_after_utc - datetime.now(UTC)


def test_the_certificate_is_valid_as_long_as_was_asked_and_the_authority_longer(
    certificates: Path,
) -> None:
    assert (
        timedelta(days=29, hours=23)
        < seconds_left(certificates / "superlink.crt")
        <= timedelta(days=30)
    )
    assert (
        timedelta(days=3649, hours=23)
        < seconds_left(certificates / "ca.crt")
        <= timedelta(days=3650)
    )


def handshake(server: Path, authority: Path, host: str) -> None:
    """A strict TLS handshake over the loopback; raises ssl.SSLError where the client refuses."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(server / "superlink.crt", server / "superlink.key")
    client_context = ssl.create_default_context(cafile=authority / "ca.crt")
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            # A client that refuses says why itself.
            with connection, suppress(ssl.SSLError, ConnectionError):
                server_context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname()) as connection:
                client_context.wrap_socket(connection, server_hostname=host).close()
        finally:
            thread.join()


def test_a_tls_handshake_succeeds_with_the_authority_and_host_names_only(
    certificates: Path, tmp_path: Path
) -> None:
    for host in (*HOSTS, "localhost", "127.0.0.1"):
        handshake(certificates, certificates, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(certificates, certificates, "other.example.org")
    make_certificates(tmp_path, list(HOSTS))
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        handshake(certificates, tmp_path, HOSTS[0])


def test_a_renewed_certificate_is_trusted_by_sites_that_have_the_old_authority(
    tmp_path: Path,
) -> None:
    make_certificates(tmp_path, list(HOSTS), ["a"], days=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = command("certificates", "--renew", "--out", tmp_path, "--days", 90)
    assert (done.returncode, done.stderr) == (0, "")
    assert "superlink.crt is valid until" in done.stdout
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert [name for name in after if after[name] != before.get(name)] == ["superlink.crt"], (
        "one file, and no other"
    )
    assert seconds_left(tmp_path / "superlink.crt") > timedelta(days=89)
    for host in (*HOSTS, "localhost"):
        handshake(tmp_path, tmp_path, host)

    # Another name, and another key where the old one is lost.
    (tmp_path / "superlink.key").unlink()
    done = command(
        "certificates", "--renew", "--out", tmp_path, "--host", "new.example.org", "--days", 3650
    )
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((tmp_path / "superlink.key").stat().st_mode) == 0o600
    handshake(tmp_path, tmp_path, "new.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path, tmp_path, HOSTS[0])
    beyond = seconds_left(tmp_path / "superlink.crt") - seconds_left(tmp_path / "ca.crt")
    assert beyond < timedelta(seconds=1), "never beyond its authority"


def test_what_cannot_be_renewed_takes_one_line_and_changes_nothing(tmp_path: Path) -> None:
    make_certificates(tmp_path / "a", ["localhost"])
    make_certificates(tmp_path / "b", ["localhost"])
    certificate = (tmp_path / "a" / "superlink.crt").read_bytes()
    shutil.copy(tmp_path / "b" / "ca.key", tmp_path / "a" / "ca.key")
    assert_one_line(
        command("certificates", "--renew", "--out", tmp_path / "a"), "ca.key is not the key of"
    )
    (tmp_path / "a" / "ca.key").unlink()
    assert_one_line(
        command("certificates", "--renew", "--out", tmp_path / "a"), "cannot read", "ca.key"
    )
    assert_one_line(
        command("certificates", "--renew", "--out", tmp_path / "b", "--site", "a"), "do not expire"
    )
    assert (tmp_path / "a" / "superlink.crt").read_bytes() == certificate


def test_a_rehearsal_names_its_expired_certificate(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates_module, "_CLOCK_SKEW", timedelta(days=3))
        patch.setattr(certificates_module, "timedelta", lambda days: timedelta(days=days - 2))
        make_certificates(tmp_path / "d" / "certificates", ["localhost"], days=1)
    with pytest.raises(UserError, match=r"superlink\.crt has expired on .* --renew"):
        Deployment(tmp_path / "d")


def test_site_keys_are_what_flower_reads(certificates: Path) -> None:
    private = load_ssh_private_key((certificates / "site-north.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    registered = try_load_public_key(certificates / "site-north.pub")
    assert registered == public_key_to_bytes(private.public_key())
    assert registered != try_load_public_key(certificates / "site-south.pub")


def test_a_site_makes_its_own_keys_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy.main(["certificates", "--out", str(tmp_path), "--site", "east"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"site-east.key", "site-east.pub"}
    assert "valid" not in capsys.readouterr().out


def test_nothing_is_overwritten_and_then_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "site-b.pub").write_text("mine")
    done = command(
        "certificates", "--out", tmp_path, "--host", "localhost", "--site", "a", "--site", "b"
    )
    assert_one_line(done, "site-b.pub exists already")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"site-b.pub": "mine"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "nothing to make"),
        (["--host", "fed.example.org:8000"], "without a port"),
        (["--host", "späth.de"], "a DNS name"),
        (["--host", "localhost", "--days", "0"], "allowed: 1 to"),
        (["--site", "../up"], "no name for a site"),
        (["--site", "a", "--site", "a"], "given twice"),
        (["--site", "a", "--days", "30"], "would be ignored"),
        (["--renew"], "cannot read"),
    ],
)
def test_impossible_certificates_take_one_line(
    options: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy.main(["certificates", "--out", str(tmp_path), *options]) == 2
    message = capsys.readouterr().err
    assert word in message
    assert message.count("\n") == 1
    assert not any(tmp_path.iterdir())


# --- A site's check ------------------------------------------------------------------------------


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
    done = command(
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
    done = command(
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
    done = command(
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
    done = command(
        "check", "--state-dir", "state", "--config", tiny_yaml, *options, folder=tmp_path
    )
    assert_one_line(done, words)


# --- Processes -----------------------------------------------------------------------------------


def processes_of(folder: Path) -> list[str]:
    """Living processes other than this one that were told of the folder, by whatever way."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in told and int(entry.name) != os.getpid():
            found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


class Rehearsal:
    """The command in a process of its own, its lines as they come."""

    def __init__(self, *arguments: object) -> None:
        whole = [sys.executable, "-m", "srfed", "deploy", "rehearse", *map(str, arguments)]
        self.process = subprocess.Popen(
            whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []

    def read_until(self, beginning: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(beginning):
                return
        raise AssertionError(f"{beginning!r} never came: {self.lines} {self.finish()}")

    def finish(self) -> tuple[int, str]:
        """The exit code, and what it said on standard error."""
        rest, errors = self.process.communicate(timeout=400)
        self.lines += rest.splitlines()
        return self.process.returncode, errors


def deployed_bits(folder: Path) -> dict[str, Any]:
    """As tiny_run.all_bits, from the sites' own stores."""
    run = RunFolder.open(folder / "run")
    bits: dict[str, Any] = {"server": server_bits(run)}
    attempts = read_manifest(sorted(run.server.glob("round-*"))[-1])["attempts"]
    for client, attempt in attempts.items():
        manifest = read_manifest(
            folder / "sites" / client / "state" / client / "lineages" / run.lineage / attempt
        )
        bits[client] = {
            name: manifest[name] for name in ("round", "steps", "exclusive_steps", "sha256")
        }
    return bits


def assert_none_left(folder: Path) -> None:
    assert processes_of(folder) == []


@pytest.mark.slow
def test_a_rehearsal_stopped_and_resumed_has_the_bits_of_a_simulation(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rehearsal"
    first = Rehearsal(
        "--clients", 2, "--config", tiny_yaml, "--set", "federation.rounds=2", "--dir", folder
    )
    first.read_until("round 1/2")
    assert len(processes_of(folder)) >= 1 + 1 + 2, "this command, a SuperLink, two SuperNodes"
    first.process.send_signal(signal.SIGTERM)
    code, errors = first.finish()
    assert code == 143
    assert f"go on with: python -m srfed.deploy rehearse --dir {folder}" in errors
    assert "Traceback" not in errors
    assert_none_left(folder)
    certificate = (folder / "certificates" / "ca.crt").read_bytes()
    assert len(MetricsLog(folder / "run" / "metrics.jsonl").rounds()) == 1

    second = Rehearsal("--dir", folder)
    code, errors = second.finish()
    assert (code, errors) == (0, "")
    output = "\n".join(second.lines)
    assert "going on after round 1" in output
    assert "round 2/2" in output
    assert "INFO" not in output, "Flower's own log is in the files"
    assert_none_left(folder)
    assert (folder / "certificates" / "ca.crt").read_bytes() == certificate

    # Databases, images, θ_i, keys, logs; what is handed out has its own modes, in a folder that is
    # closed.
    for path in (folder, *folder.rglob("*")):
        assert path.suffix in (".crt", ".pub") or not path.stat().st_mode & 0o077, path

    run = RunFolder.open(folder / "run")
    assert (run.server / "round-00002" / "state.safetensors").is_file()
    log = MetricsLog(run.metrics)
    assert [line["round"] for line in log.rounds()] == [1, 2]
    assert [(line["round"], line["final"]) for line in log.evaluations()] == [(2, True)]
    assert not run.clients.exists(), "what clients keep is at the sites"
    page = run.report.read_text()
    assert "a federation, deployed" in page
    assert "Real training images" not in page
    settings = {"federation.rounds": 2, "federation.clients": 2}
    simulated = run_in_process(begin(tmp_path / "simulated", settings))
    bits = deployed_bits(folder)
    assert set(bits) == {"server", *CLIENTS[:2]}
    assert bits == all_bits(simulated)

    # A setting that decides the result cannot change any more; that is said before anything starts.
    changed = command("rehearse", "--dir", folder, "--set", "seed=1")
    assert_one_line(changed, "was begun with another configuration: seed: 0 -> 1")


@pytest.mark.slow
def test_a_run_that_fails_takes_one_line_and_leaves_nothing(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rehearsal"
    make_certificates(folder / "certificates", ["localhost"])
    (folder / "run").write_text("in the way")
    failed = Rehearsal("--clients", 1, "--config", tiny_yaml, "--dir", folder)
    code, errors = failed.finish()
    assert code == 2
    assert errors.count("\n") == 1
    assert "is not an empty folder" in errors
    assert "Traceback" not in "".join(failed.lines)
    assert_none_left(folder)


def test_a_folder_of_something_else_is_left_alone(tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    done = command("rehearse", "--clients", 1, "--config", tiny_yaml, "--dir", tmp_path)
    assert_one_line(done, "neither an empty folder nor that of a rehearsal")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_rehearsal_in_use_is_left_alone(tiny_yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rehearsal"
    with held(folder / "lock", wait=False):
        done = command("rehearse", "--clients", 1, "--config", tiny_yaml, "--dir", folder)
    assert_one_line(done, f"{folder} is in use by another process")
    assert [path.name for path in folder.iterdir()] == ["lock"]


@pytest.mark.slow
def test_a_deployment_starts_flower_as_a_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Deployment(tmp_path / "d") as deployment:
        deployment.start_superlink()
        (superlink,) = deployment.pids("superlink")
        words = Path(f"/proc/{superlink}/cmdline").read_text().split("\0")
        for word in (
            "--enable-supernode-auth",
            "--ssl-certfile",
            "--disable-runtime-dependency-installation",
        ):
            assert word in words
        certificates = tmp_path / "d" / "certificates"
        context = ssl.create_default_context(cafile=certificates / "ca.crt")
        with socket.create_connection(("127.0.0.1", deployment.superlink_port)) as connection:
            context.wrap_socket(connection, server_hostname="127.0.0.1").close()

        with monkeypatch.context() as patch:
            patch.setattr(deployment, "_register", lambda public_key: None)
            patch.setattr(deployment_module, "REJOIN_SECONDS", 0)
            with pytest.raises(UserError, match="flower-supernode of site stranger ended"):
                deployment.add_site("stranger", tmp_path, tmp_path / "state")

        deployment.add_site("a", tmp_path, tmp_path / "state")
        (supernode,) = deployment.pids("supernode", "a")
        deployment.kill_superlink()
        assert deployment.pids("superlink") == []
        assert deployment.pids("supernode") == [supernode], "another machine"
        deployment.start_superlink()
        (again,) = deployment.pids("superlink")
        assert again != superlink
        assert Path(f"/proc/{again}/cmdline").read_text().split("\0") == words, (
            "the same port and database"
        )
        deployment.stop_site("a")
        assert deployment.pids("supernode") == []
    assert processes_of(tmp_path / "d") == []


def test_only_marked_processes_are_ended_and_living_ones_refused(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    # A process's environment can be read only a moment after it was started: this one says when it
    # runs.
    waits = [sys.executable, "-c", "import time; print('runs', flush=True); time.sleep(60)"]
    marked = {**os.environ, FOLDER_VARIABLE: str(folder)}
    with subprocess.Popen(waits, env=marked, stdout=subprocess.PIPE, text=True) as left:
        try:
            assert left.stdout is not None
            assert left.stdout.readline() == "runs\n"
            with pytest.raises(UserError, match=f"kill {left.pid}$"):
                Deployment(folder)
        finally:
            left.kill()
    with subprocess.Popen([*waits, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "runs\n"
            Deployment(folder, tls=False, authentication=False).close()
            assert other.poll() is None
        finally:
            other.kill()


def test_authentication_needs_tls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs tls"):
        Deployment(tmp_path / "d", tls=False)


def test_the_submitted_app_is_the_projects(tmp_path: Path) -> None:
    Deployment(tmp_path / "d")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    submitted = tomllib.loads((tmp_path / "d" / "app" / "pyproject.toml").read_text())
    for key in ("components", "config", "publisher"):
        assert submitted["tool"]["flwr"]["app"][key] == project["tool"]["flwr"]["app"][key]
    for key in ("name", "version", "license"):
        assert submitted["project"][key] == project["project"][key]


def test_importing_the_processes_loads_neither_flower_nor_torch() -> None:
    modules = "{'flwr', 'ray', 'torch'} & set(sys.modules)"
    code = f"import sys, srfed.deploy, srfed.deployment.deployment; print(sorted({modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
