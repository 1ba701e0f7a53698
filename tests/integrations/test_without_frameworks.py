"""A framework that is not installed is told with what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("framework", "extra"),
    [("lightning", "lightning"), ("transformers", "transformers"), ("stable_baselines3", "sb3")],
)
def test_what_to_install_is_said(framework, extra):
    """In one sentence, when the adapter is imported."""
    code = f"import sys; sys.modules[{framework!r}] = None; import relu_doctor.integrations.{framework}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"which is not installed: pip install 'relu-doctor[{extra}]'." in result.stderr


def test_importing_relu_doctor_imports_no_framework():
    """Nor does the monitor."""
    code = (
        "import sys, relu_doctor; relu_doctor.Monitor; "
        "print(sorted({'lightning', 'transformers', 'stable_baselines3', 'accelerate'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
