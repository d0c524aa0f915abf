"""TLS certificates of a federation of one's own, and the sites' keys for Flower's SuperNode authentication."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from srfed.errors import UserError
from srfed.files import write_bytes

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "superlink.crt", "superlink.key"
OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Names under which the SuperLink's own helper processes reach it; they are in every certificate."""
LONGEST = 3650
"""Most days that a certificate may be valid."""
_CLOCK_SKEW = timedelta(minutes=10)
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DNS_NAME = re.compile(r"(?:\*\.)?(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_-]{1,63}")


def site_key(site: str) -> str:
    """File name of a site's private key."""
    return f"site-{site}.key"


def site_public_key(site: str) -> str:
    """File name of a site's public key."""
    return f"site-{site}.pub"


def make_certificates(folder: Path, hosts: Sequence[str], sites: Sequence[str] = (), days: int = 365) -> None:
    """Write the SuperLink's certificates, and key pairs of sites.

    With hosts: a certificate authority of one's own (``ca.crt``, ``ca.key``) and the SuperLink's certificate that
    it signs (``superlink.crt``, ``superlink.key``). For each site: ``site-<name>.key`` and ``site-<name>.pub``, in
    OpenSSH's format. Private keys have mode 0600.

    Args:
        folder: where the files go.
        hosts: DNS names and addresses under which sites reach the SuperLink.
        sites: whose keys to make.
        days: how long the certificates are valid, from now.

    Raises:
        UserError: a host is neither a DNS name nor an address, a site's name is no plain file name or given twice,
            ``days`` is impossible; a file exists already, in which case none is written; one cannot be written.
    """
    if not 1 <= days <= LONGEST:
        raise UserError(f"--days {days} is impossible; allowed: 1 to {LONGEST}")
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *OWN_HOSTS])]
    for site in sites:
        if not _FILE_NAME.fullmatch(site):
            raise UserError(f"--site {site!r} is no name for a site; allowed: letters, digits, and . _ - inside")
        if sites.count(site) > 1:
            raise UserError(f"--site {site} is given twice")
    wanted = [CA_CERTIFICATE, CA_KEY, SERVER_CERTIFICATE, SERVER_KEY] if hosts else []
    for name in [*wanted, *(make(site) for site in sites for make in (site_key, site_public_key))]:
        if os.path.lexists(folder / name):
            raise UserError(f"{folder / name} exists already and is not overwritten; name another folder with --out")
    if hosts:
        _make_authority_and_server(folder, names, days)
    for site in sites:
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _write_private_key(folder / site_key(site), key, serialization.PrivateFormat.OpenSSH)
        write_bytes(folder / site_public_key(site), public + f" {site}\n".encode())


def describe(folder: Path, hosts: Sequence[str], sites: Sequence[str], days: int) -> str:
    """What each file is that was made, and who gets it."""
    rows: list[tuple[str, str]] = []
    if hosts:
        names = ", ".join(dict.fromkeys([*hosts, *OWN_HOSTS]))
        rows += [
            (CA_CERTIFICATE, "certificate of the authority, public: every site, and whoever uses `flwr run`"),
            (CA_KEY, "SECRET: keep it off the network; whoever has it can pose as the SuperLink"),
            (SERVER_CERTIFICATE, f"the SuperLink's certificate, for {names}: the SuperLink"),
            (SERVER_KEY, "SECRET, the SuperLink alone"),
        ]
    for site in sites:
        rows += [
            (site_key(site), f"SECRET, site {site} alone: flower-supernode --auth-supernode-private-key"),
            (site_public_key(site), "public, who runs the SuperLink: python -m srfed.deploy register"),
        ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {meaning}" for name, meaning in rows]
    lines.append(f"in {folder}" + (f"; certificates valid for {days} days" if hosts else ""))
    return "\n".join(lines)


def _make_authority_and_server(folder: Path, names: Sequence[x509.GeneralName], days: int) -> None:
    """Extensions as RFC 5280 wants them; strict verifiers, such as Python 3.13's, refuse what lacks one."""
    begin = datetime.now(UTC)
    authority_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority_name = _name("srfed certificate authority")
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    authority = (
        _builder(authority_name, authority_name, authority_key.public_key(), begin, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    server = (
        _builder(_name("srfed SuperLink"), authority_name, server_key.public_key(), begin, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server_key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    for name, key in ((CA_KEY, authority_key), (SERVER_KEY, server_key)):
        _write_private_key(folder / name, key, serialization.PrivateFormat.PKCS8)
    for name, certificate in ((CA_CERTIFICATE, authority), (SERVER_CERTIFICATE, server)):
        write_bytes(folder / name, certificate.public_bytes(serialization.Encoding.PEM))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begin: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # The other party's clock may be a little behind.
        .not_valid_before(begin - _CLOCK_SKEW)
        .not_valid_after(begin + timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    if len(host) > 253 or not _DNS_NAME.fullmatch(host):
        raise UserError(f"--host {host!r} is impossible; allowed: a DNS name or an IP address, without a port")
    return x509.DNSName(host)


def _write_private_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with _for_the_owner_only():
        write_bytes(path, content)


@contextmanager
def _for_the_owner_only() -> Iterator[None]:
    """Files made within have mode 0600 from their first moment, folders 0700."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)
