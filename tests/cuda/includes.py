"""The files of this project that a C++ source includes, found by reading the sources."""

import re
from collections.abc import Iterable
from pathlib import Path


def files_of(source: Path, folders: Iterable[Path]) -> set[Path]:
    """``source`` and all files it includes by ``#include "name"``: beside the including file, or below ``folders``.

    Both branches of an #if count.
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
