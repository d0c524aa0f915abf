"""Whether a SuperLink can be spoken to from here: its certificate, and the two clocks.

What Flower says of either is "401 Unauthorized" or a stack of HTTP errors; here it is a sentence.
"""

import ssl
import urllib.error
import urllib.request
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509

from srfed.deployment.certificates import check_validity, read_certificate
from srfed.errors import UserError
from srfed.units import printable

SLOWEST, FASTEST = 300.0, 5.0
"""Seconds that a site's clock may be behind the SuperLink's, and ahead of it: what Flower's
authentication allows.
"""
TIMEOUT_SECONDS = 10.0
_NOT_YET_VALID, _EXPIRED, _WRONG_NAME, _WRONG_ADDRESS = 9, 10, 62, 64
"""OpenSSL's numbers for why a certificate was refused."""


def check_superlink(address: str, root_certificates: Path) -> str:
    """Speak to a SuperLink once over TLS.

    Args:
        address: "host:port".
        root_certificates: the certificate of the authority that signs the SuperLink's.

    Returns:
        Why it cannot be reached, which is no error, as a SuperNode waits for it; empty where it
        can.

    Raises:
        UserError: its certificate has expired, is not valid yet, is for another name or of another
            authority; or the clocks differ by more than Flower's authentication allows.
    """
    check_validity(read_certificate(root_certificates), str(root_certificates))
    context = ssl.create_default_context(cafile=str(root_certificates))
    # Through a proxy where the environment names one, as Flower itself goes.
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    asked = datetime.now(UTC)
    try:
        with opener.open(f"https://{address}/", timeout=TIMEOUT_SECONDS) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        date = error.headers["Date"]  # any answer has it
        error.close()
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(_refusal(address, root_certificates, error.reason)) from error
        return printable(str(error.reason))
    except (OSError, ValueError) as error:
        return printable(str(error))
    if date:
        _compare_clocks(address, asked, parsedate_to_datetime(date))
    return ""


def _refusal(address: str, root_certificates: Path, error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code in (_NOT_YET_VALID, _EXPIRED):
        try:
            check_validity(
                _shown_certificate(address), f"the certificate of the SuperLink at {address}"
            )
        except UserError as found:
            return str(found)
        except (OSError, ValueError):
            pass
    if code in (_WRONG_NAME, _WRONG_ADDRESS):
        return (
            f"the certificate of the SuperLink at {address} is for another name; use one of its "
            "names, or renew it where the SuperLink runs: python -m srfed.deploy certificates "
            "--renew --host HOST --out DIR"
        )
    return (
        f"the certificate of the SuperLink at {address} is not signed by the authority of "
        f"{root_certificates} ({error.verify_message}); ask who runs it for the right ca.crt"
    )


def _shown_certificate(address: str) -> x509.Certificate:
    host, _, port = address.rpartition(":")
    pem = ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=TIMEOUT_SECONDS)
    return x509.load_pem_x509_certificate(pem.encode())


def _compare_clocks(address: str, asked: datetime, theirs: datetime) -> None:
    """Raise UserError where the clocks differ too much for certain, however long the answer was on
    its way.
    """
    now = datetime.now(UTC)
    ahead = (asked - theirs).total_seconds() - 1  # the header has whole seconds
    behind = (theirs - now).total_seconds()
    if ahead <= FASTEST and behind <= SLOWEST:
        return
    difference = f"{_span(ahead)} ahead of" if ahead > FASTEST else f"{_span(behind)} behind"
    raise UserError(
        f"this machine's clock ({now:%Y-%m-%d %H:%M:%S} UTC) is {difference} that of the SuperLink "
        f"at {address} ({theirs:%Y-%m-%d %H:%M:%S} UTC), which therefore refuses this site; set "
        "the wrong one of the two by NTP (timedatectl set-ntp true)"
    )


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"
