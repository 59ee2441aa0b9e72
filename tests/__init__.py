"""Tests, and what they share.

Threads of OpenMP that have nothing to do sleep at once, in this process and in those it starts: by default each spins for
a while after every product, and on the two cores of `make test` they took more time than what is computed. OpenMP reads
this when torch is imported.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
