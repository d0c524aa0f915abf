"""What mkdocs does besides: docstrings name things as Sphinx does, and pages link to files of the
repository, which a site does not have.
"""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Without Sphinx's roles, and without links that lead out of the site."""
    html = re.sub(r":(?:class|func|meth|mod|data|attr):(?=<code>|`)", "", html)
    return re.sub(
        r'<a href="\.\./(?:\.\./)*(?:CONTRIBUTING|srfed|README)[^"]*">(.*?)</a>', r"\1", html
    )
