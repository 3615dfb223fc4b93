"""No test touches the user's own privacy ledgers."""

import atexit
import os
import shutil
import tempfile

_STATE = tempfile.mkdtemp(prefix="umbel-tests-")
os.environ["UMBEL_STATE"] = _STATE  # inherited by every process that a test starts
atexit.register(shutil.rmtree, _STATE, ignore_errors=True)
