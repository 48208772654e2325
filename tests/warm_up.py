"""Compile once what every test process would compile: bytecode of all that unit tests import, and the C kernels.

Set-up runs it: `python -m tests.warm_up`. The processes of the first `make unit` start together, so each of them would
compile both, which takes as long as a third of the tests.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from worker.drafters.suffix.kernels import suffix_kernels
from worker.engine.cpu.kernels import kernels
from worker.engine.host.growth import growth_library
from worker.engine.host.tree_kernels import tree_kernels
from worker.engine.paged.compiled_layout import compiled_layout
from worker.engine.sampling.native import native_sampler


def main() -> int:
    with ThreadPoolExecutor(1) as beside:  # compilers run beside the collection
        beside.submit(_compile_kernels)
        return int(pytest.main(["--collect-only", "-qq", "-p", "no:schemathesis", "tests/unit"]))


def _compile_kernels() -> None:
    kernels(torch.float32), kernels(torch.bfloat16), native_sampler(torch.device("cpu"))
    tree_kernels(), growth_library(), suffix_kernels(), compiled_layout()


if __name__ == "__main__":
    sys.exit(main())
