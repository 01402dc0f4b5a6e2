import subprocess
import sys
import time

import pytest

from afina.beside import begun
from afina.errors import DataError


def test_what_is_begun_is_had_or_raised():
    assert begun(lambda: 3).result() == 3

    def fail():
        raise DataError("no")

    with pytest.raises(DataError):
        begun(fail).result()


def test_a_program_that_ends_does_not_wait():
    code = "import time; from afina.beside import begun; begun(lambda: time.sleep(60)); print('ended')"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert done.stdout == "ended\n" and time.monotonic() - started < 50
