"""Certificates and keys as others verify them."""

import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from srfed import deploy
from srfed.deployment import certificates as certificates_module
from srfed.deployment.certificates import make_certificates
from srfed.deployment.deployment import Deployment
from srfed.errors import UserError
from support.commands import assert_one_line, deploy_here

HOSTS = ("fed.example.org", "10.0.0.5")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes for two hosts and two sites, with Flower's files beside another's."""
    folder = tmp_path_factory.mktemp("certificates") / "new"
    options = [option for host in HOSTS for option in ("--host", host)]
    done = deploy_here(
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
    done = deploy_here("certificates", "--renew", "--out", tmp_path, "--days", 90)
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
    done = deploy_here(
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
        deploy_here("certificates", "--renew", "--out", tmp_path / "a"), "ca.key is not the key of"
    )
    (tmp_path / "a" / "ca.key").unlink()
    assert_one_line(
        deploy_here("certificates", "--renew", "--out", tmp_path / "a"), "cannot read", "ca.key"
    )
    assert_one_line(
        deploy_here("certificates", "--renew", "--out", tmp_path / "b", "--site", "a"),
        "do not expire",
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
    done = deploy_here(
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
