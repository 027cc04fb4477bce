"""The Triton kernels without a GPU: runs test_triton*.py on CPU tensors in Triton's interpreter.

It needs its own process, because Triton reads TRITON_INTERPRET when it is imported.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# VCR's in two processes that take about as long, so that they can run side by side.
@pytest.mark.parametrize(
    ("file", "part", "marker", "fewest"),
    [
        ("test_triton", "TestNumbers", "not slow", 95),
        ("test_triton", "not TestNumbers", "not slow", 65),
        ("test_triton_sigreg", "", "not slow", 36),
        pytest.param("test_triton", "TestNumbers", "slow", 105, marks=pytest.mark.slow),
        pytest.param("test_triton", "not TestNumbers", "slow", 105, marks=pytest.mark.slow),
        pytest.param("test_triton_sigreg", "", "slow", 45, marks=pytest.mark.slow),
    ],
)
def test_kernels_in_the_interpreter(file, part, marker, fewest, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed (pip install 'vjvcr_fast[triton]')")
    report = tmp_path / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "FAIL_WITHOUT_CUDA": "0"}
    options = ["-m", marker, "-k", part, "--tb=short", f"--junit-xml={report}"]
    command = [sys.executable, "-m", "pytest", f"tests/kernels/{file}.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot()[0]
    tests, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    assert tests - skipped >= fewest, f"{tests} tests, {skipped} of them skipped"
