"""What mkdocs does besides: docstrings name things as Sphinx does, and pages link to files of the
repository, which a site does not have.
"""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Without Sphinx's roles, and without links that lead out of the site."""
    html = re.sub(r":(?:class|func|meth|mod|data|attr):(?=<code>|`)", "", html)
    outside = r'<a href="(?:\.\./)+(?:CONTRIBUTING|README|srfed/|examples/)[^"]*">(.*?)</a>'
    return re.sub(outside, r"\1", html)
