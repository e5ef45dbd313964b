from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def build_info() -> dict[str, str]: ...
def cpu_level() -> str: ...
def cpu_forward_plan(
    images: int, ways: int, dim: int, pixels: int, threads: int, item: int = 4
) -> tuple[int, int, int]: ...
def cuda_plan(
    *,
    capability: int,
    multiprocessors: int,
    shared_memory: int,
    dtype: str,
    episodes: int,
    queries: int,
    ways: int,
    dim: int,
    pixels: int,
    total: int,
    save: bool = False,
    tma_ok: bool = True,
    has_sm90: bool = True,
    kernels: str = "",
) -> dict[str, Any]: ...
def supervoxels(
    image: npt.NDArray[np.float32],
    mask: npt.NDArray[np.bool_] | npt.NDArray[np.uint8],
    spacing: tuple[float, float, float],
    scale: float,
    min_sizes: Sequence[int],
    exponent: float = 2.0,
) -> npt.NDArray[np.int32]: ...
