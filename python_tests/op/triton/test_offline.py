# SPDX-License-Identifier: Apache-2.0
"""What can be proved about the compiled kernels without a GPU: they compile, fit, do not spill.

And torch.compile sees through the ops: traced with tensors of a GPU that is not there.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

from fastproto.op.triton import support

pytest.importorskip("triton", reason="triton is not installed")
if support.INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from support import offline
from support.offline import SHARED_LIMIT, SHARED_MEMORY, Case, Resources, cases

from fastproto.op.triton.configs import KERNELS, Config, choose

CASES = list(cases())


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, concurrent.futures.Future[Resources]]]:
    """Everything, on all cores: a second for each."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        yield {case.name: pool.submit(Case.compile, case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fits_without_spilling(
    case: Case, compiled: dict[str, concurrent.futures.Future[Resources]]
) -> None:
    found = compiled[case.name].result()
    assert found.stack == 0
    assert found.shared <= SHARED_LIMIT
    assert found.instructions == ("mma.sync",)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_the_prototypes(dtype: torch.dtype, capability: int) -> None:
    resources = offline.compile_launch(offline.stats_launch(dtype), capability)
    assert resources.stack == 0
    assert resources.shared <= 48 * 1024  # any GPU's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_numbers_may_arrive_as_float64(kernel: str, dtype: torch.dtype) -> None:
    """As Inductor hands them over (torch 2.11)."""
    config = getattr(choose(dtype, 512), kernel)
    found = offline.launches(config, kernel, dtype)
    assert offline.compile_launch(found, 90, "fp64") == offline.compile_launch(found, 90)


def test_a_spilling_configuration_is_noticed() -> None:
    config = Config(64, 64, 512, 1, 4, 1)
    case = Case("forward", config, 80, torch.bfloat16, 512, False, True, "")
    assert case.compile().stack > 0


TRACE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic, ShapeEnv, StatelessSymbolicContext
)
from fastproto.op.triton import ops

class Driver:  # what torch asks of the GPU to find out which tensors a kernel writes
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_active_torch_device(self): return torch.device("cuda", 0)
triton.runtime.driver.set_active(Driver())

class Step(torch.nn.Module):
    def forward(self, feat, protos, offsets, grad):
        out, *saved = torch.ops.fastproto.triton_fwd(
            feat * 2, protos, offsets, None, 0.05, 1e-6, True, True
        )
        grads = torch.ops.fastproto.triton_bwd(
            grad, feat * 2, protos, offsets, None, *saved, 0.05, 1e-6, True, True, False
        )
        return (out.sin(), *(g + 1 for g in grads[:2]))

env = ShapeEnv()
with FakeTensorMode(shape_env=env) as mode:
    def cuda(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, device="cuda", dtype=dtype)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    real = torch.empty(300, device="meta")
    total = mode.from_tensor(real, symbolic_context=context).shape[0]
    feat, grad = cuda(2, 1, 512, 16, 16), cuda(2, 1, 2, 1024, 16, 16)
    inputs = (feat, cuda(total, 512), cuda(5, dtype=torch.int32), grad)
    module, signature = aot_export_module(Step(), inputs, trace_joint=False)
for node in module.graph.nodes:
    if "triton_kernel_wrapper" in str(node.target):
        print(node.kwargs["tensors_to_clone"])
print(signature.user_inputs_to_mutate)
print([str(guard.expr) for guard in env.guards])
"""


def test_compile_sees_the_kernels_and_what_they_write() -> None:
    """Forward and backward in one graph, whatever the number of prototypes."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRACE],
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    *written, mutated, guards = result.stdout.splitlines()
    assert written == [
        "['proto_stats']",
        "['out', 'agg', 'lse', 'query_stats']",
        "['grad_feat', 'delta', 'temperature_terms']",
        "['offsets', 'grad_protos']",  # the op's own copy of the offsets, see ops.py
    ]
    assert mutated == "{}"
    assert guards == "[]"  # nothing is assumed of the number of prototypes
