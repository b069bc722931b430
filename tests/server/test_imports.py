"""What the server costs those who do not use it, and what it does not need itself."""

import subprocess
import sys


def loaded_by(*modules):
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_the_package_imports_no_server():
    loaded = loaded_by("nanoflow_compiler", "nanoflow_compiler.cli")
    assert not loaded & {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"}


def test_the_server_imports_neither_torch_nor_transformers():
    assert not loaded_by("nanoflow_compiler.server.run") & {"torch", "transformers"}
