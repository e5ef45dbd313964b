from typing import Any

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
