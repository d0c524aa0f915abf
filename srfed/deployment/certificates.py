"""TLS certificates of a federation of one's own, and the sites' keys for Flower's SuperNode
authentication.
"""

import os
import re
from collections.abc import Sequence
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
"""Names under which the SuperLink's own helper processes reach it; they are in every certificate.
"""
DAYS = 365
"""How long the SuperLink's certificate is valid, where nobody says otherwise."""
LONGEST = 3650
"""Most days that a certificate may be valid; the authority's is for so many, and outlives those it
signs.
"""
_CLOCK_SKEW = timedelta(minutes=10)
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DNS_NAME = re.compile(
    r"(?:\*\.)?(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_-]{1,63}"
)


def site_key(site: str) -> str:
    """File name of a site's private key."""
    return f"site-{site}.key"


def site_public_key(site: str) -> str:
    """File name of a site's public key."""
    return f"site-{site}.pub"


def check_site_name(site: str, option: str) -> None:
    """Raise UserError, naming the option, for a site's name that is no plain file name."""
    if not _FILE_NAME.fullmatch(site):
        raise UserError(
            f"{option} {site!r} is no name for a site; allowed: letters, digits, and . _ - inside"
        )


def make_certificates(
    folder: Path, hosts: Sequence[str], sites: Sequence[str] = (), days: int = DAYS
) -> None:
    """Write the SuperLink's certificates, and key pairs of sites.

    With hosts: a certificate authority of one's own (``ca.crt``, ``ca.key``) and the SuperLink's
    certificate that it signs (``superlink.crt``, ``superlink.key``). For each site:
    ``site-<name>.key`` and ``site-<name>.pub``, in OpenSSH's format. Private keys have mode 0600.

    Args:
        folder: where the files go.
        hosts: DNS names and addresses under which sites reach the SuperLink.
        sites: whose keys to make.
        days: how long the SuperLink's certificate is valid, from now; the authority's is for
            ``LONGEST`` days.

    Raises:
        UserError: a host is neither a DNS name nor an address, a site's name is no plain file name
            or given twice, ``days`` is impossible; a file exists already, in which case none is
            written; one cannot be written.
    """
    _check_days(days)
    names = _general_names(hosts)
    for site in sites:
        check_site_name(site, "--site")
        if sites.count(site) > 1:
            raise UserError(f"--site {site} is given twice")
    wanted = [CA_CERTIFICATE, CA_KEY, SERVER_CERTIFICATE, SERVER_KEY] if hosts else []
    for name in [*wanted, *(make(site) for site in sites for make in (site_key, site_public_key))]:
        if os.path.lexists(folder / name):
            renew = (
                "; the SuperLink's certificate is renewed with --renew" if name in wanted else ""
            )
            raise UserError(
                f"{folder / name} exists already and is not overwritten; name another folder with "
                f"--out{renew}"
            )
    if hosts:
        _make_authority_and_server(folder, names, days)
    for site in sites:
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        _write_private_key(folder / site_key(site), key, serialization.PrivateFormat.OpenSSH)
        write_bytes(folder / site_public_key(site), public + f" {site}\n".encode(), private=False)


def renew_certificate(folder: Path, hosts: Sequence[str] = (), days: int = DAYS) -> datetime:
    """Write a new certificate of the SuperLink, signed by the folder's authority, which every site
    knows already.

    The SuperLink's private key stays, so that one file alone changes; where it is gone, another one
    is made.

    Args:
        folder: what :func:`make_certificates` filled.
        hosts: the names that the certificate is for; none takes those of the old one.
        days: how long it is valid, from now, though never beyond the authority's own end.

    Returns:
        Until when it is valid.

    Raises:
        UserError: ``days`` or a host is impossible; the authority's certificate or key is missing,
            damaged, not of the other, or at its end; the new certificate cannot be written.
    """
    _check_days(days)
    authority, authority_key = _authority_of(folder)
    if hosts:
        names = _general_names(hosts)
    else:
        old = read_certificate(folder / SERVER_CERTIFICATE)
        names = list(old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    if (folder / SERVER_KEY).exists():
        key = _read_private_key(folder / SERVER_KEY)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private_key(folder / SERVER_KEY, key, serialization.PrivateFormat.PKCS8)
    begin = datetime.now(UTC)
    end = min(begin + timedelta(days=days), authority.not_valid_after_utc)
    server = _server_certificate(names, key, authority, authority_key, begin, end)
    write_bytes(folder / SERVER_CERTIFICATE, server.public_bytes(serialization.Encoding.PEM))
    return end


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate's file; raises UserError where it cannot be read or is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(
            f"{path} is no certificate (PEM); ask who runs the SuperLink for it again"
        ) from error


def check_validity(certificate: x509.Certificate, what: str) -> None:
    """Compare a certificate's dates with this machine's clock.

    Args:
        certificate: any.
        what: how the error names it.

    Raises:
        UserError: it has expired or is not valid yet, in words that say what to do.
    """
    now = datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    clock = f"or set this machine's clock (NTP), which says {_in_words(now)}"
    if now > end:
        is_authority = certificate.issuer == certificate.subject
        mend = "make a new authority" if is_authority else "renew it"
        option = "--host ... --out NEW-DIR" if is_authority else "--renew --out DIR"
        raise UserError(
            f"{what} has expired on {_in_words(end)}; {mend} where the SuperLink runs: python -m "
            f"srfed.deploy certificates {option}, {clock}"
        )
    if now < begin:
        raise UserError(f"{what} is not valid before {_in_words(begin)}; wait, {clock}")


def describe(folder: Path, hosts: Sequence[str], sites: Sequence[str]) -> str:
    """What each file is that was made, and who gets it."""
    rows: list[tuple[str, str]] = []
    if hosts:
        names = ", ".join(dict.fromkeys([*hosts, *OWN_HOSTS]))
        rows += [
            (
                CA_CERTIFICATE,
                "certificate of the authority, public: every site, and whoever uses `flwr run`",
            ),
            (
                CA_KEY,
                "SECRET: keep it off the network, for --renew; whoever has it can pose as the "
                "SuperLink",
            ),
            (SERVER_CERTIFICATE, f"the SuperLink's certificate, for {names}: the SuperLink"),
            (SERVER_KEY, "SECRET, the SuperLink alone"),
        ]
    for site in sites:
        rows += [
            (site_key(site), f"SECRET, site {site} alone: python -m srfed.deploy site --key"),
            (
                site_public_key(site),
                "public, who runs the SuperLink: python -m srfed.deploy register",
            ),
        ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {meaning}" for name, meaning in rows]
    lines.append(f"in {folder}")
    for name in (SERVER_CERTIFICATE, CA_CERTIFICATE) if hosts else ():
        lines.append(
            f"{name} is valid until "
            f"{_in_words(read_certificate(folder / name).not_valid_after_utc)}"
        )
    return "\n".join(lines)


def certificate_fingerprint(path: Path) -> str:
    """SHA-256 of a PEM certificate's DER bytes, hexadecimal; raises UserError where there is no
    certificate.
    """
    return read_certificate(path).fingerprint(hashes.SHA256()).hex()


def _check_days(days: int) -> None:
    if not 1 <= days <= LONGEST:
        raise UserError(f"--days {days} is impossible; allowed: 1 to {LONGEST}")


def _in_words(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _make_authority_and_server(folder: Path, names: Sequence[x509.GeneralName], days: int) -> None:
    """Extensions as RFC 5280 wants them; strict verifiers, such as Python 3.13's, refuse what lacks
    one.
    """
    begin = datetime.now(UTC)
    authority_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority_name = _name("srfed certificate authority")
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    end = begin + timedelta(days=LONGEST)
    authority = (
        _builder(authority_name, authority_name, authority_key.public_key(), begin, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    server = _server_certificate(
        names, server_key, authority, authority_key, begin, begin + timedelta(days=days)
    )
    for name, key in ((CA_KEY, authority_key), (SERVER_KEY, server_key)):
        _write_private_key(folder / name, key, serialization.PrivateFormat.PKCS8)
    for name, certificate in ((CA_CERTIFICATE, authority), (SERVER_CERTIFICATE, server)):
        write_bytes(
            folder / name, certificate.public_bytes(serialization.Encoding.PEM), private=False
        )


def _server_certificate(
    names: Sequence[x509.GeneralName],
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    begin: datetime,
    end: datetime,
) -> x509.Certificate:
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _builder(_name("srfed SuperLink"), authority.subject, key.public_key(), begin, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )


def _authority_of(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority of a folder, fit to sign."""
    certificate, key = read_certificate(folder / CA_CERTIFICATE), _read_private_key(folder / CA_KEY)
    if certificate.public_key() != key.public_key():
        raise UserError(f"{folder / CA_KEY} is not the key of {folder / CA_CERTIFICATE}")
    check_validity(certificate, str(folder / CA_CERTIFICATE))
    return certificate, key


def _read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no private key (PEM, without a password)") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path} is not an elliptic curve key, as these certificates have")
    return key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # The other party's clock may be a little behind.
        .not_valid_before(begin - _CLOCK_SKEW)
        .not_valid_after(end)
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


def _general_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    return [_general_name(host) for host in dict.fromkeys([*hosts, *OWN_HOSTS])]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    if len(host) > 253 or not _DNS_NAME.fullmatch(host):
        raise UserError(
            f"--host {host!r} is impossible; allowed: a DNS name or an IP address, without a port"
        )
    return x509.DNSName(host)


def _write_private_key(
    path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat
) -> None:
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    write_bytes(path, content)
