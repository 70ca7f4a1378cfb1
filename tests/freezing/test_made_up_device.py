import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_tensors_of_two_devices_do_not_meet() -> None:
    cases = HERE / "on_made_up_device.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", str(cases)]
    ran = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    if ran.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("this torch knows no made-up device")
    assert ran.returncode == 0, ran.stdout[-5000:]
