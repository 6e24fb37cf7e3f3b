"""Shared-memory accesses of the recurrences, counted from their own index functions: which of them conflict."""

import emulator
import pytest

# Access -> wavefronts beyond the least number. No fragment of a product conflicts.
KNOWN = {"cluster backward, staged gradients of floats": 2, "grid backward, sums read": 1}


@pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")
def test_no_other_access_conflicts():
    done = emulator.run_program("bank_conflicts")
    assert done.returncode == 0, done.stderr
    more = {}
    for line in done.stdout.splitlines():
        wavefronts, least, name = line.split(" ", 2)
        more[name] = max(more.get(name, 0), int(wavefronts) - int(least))
    assert len(more) == 9
    assert {name: n for name, n in more.items() if n} == KNOWN
