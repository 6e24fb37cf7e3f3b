"""Find the project files that a C++ source includes, by reading the sources."""

import re
from collections.abc import Iterable
from pathlib import Path


def files_of(source: Path, folders: Iterable[Path]) -> set[Path]:
    """Return ``source`` and the files that it includes, transitively.

    Resolves ``#include "name"`` beside the including file and below ``folders``, in both branches of an #if.
    """
    folders, known, new = tuple(folders), set(), [source.resolve()]
    while new:
        path = new.pop()
        if path in known:
            continue
        known.add(path)
        for name in re.findall(r'^\s*#include "(.*)"', path.read_text(), re.MULTILINE):
            candidates = ((folder / name).resolve() for folder in (path.parent, *folders))
            new += [p for p in candidates if p.exists()][:1]
    return known
