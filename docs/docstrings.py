"""Griffe extension for the API pages: turns the reStructuredText of docstrings into Markdown.

Roles such as :func:`fastseq.explain` become links, simple tables become text blocks. All else is Markdown already.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod):`([\w.]+)`")
STAR = re.compile(r"(```.*?```|`+[^`]+`+)|(?<=\S)\*(?=\S)", re.DOTALL)  # L*D: a product outside of code, no emphasis
TABLE = re.compile(r"^=+(?: +=+)+\n.*?\n=+(?: +=+)+\n.*?\n=+(?: +=+)+$", re.DOTALL | re.MULTILINE)


def _link(role: re.Match) -> str:
    name = role[1]
    return f"[`{name}`][{name}]" if name.startswith("fastseq.") else f"`{name}`"


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = TABLE.sub(lambda table: f"```text\n{table[0]}\n```", obj.docstring.value)
            obj.docstring.value = STAR.sub(lambda found: found[1] or r"\*", ROLE.sub(_link, text))
