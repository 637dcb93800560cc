"""Compilation and CUDA graphs under a plan: what is asked of vLLM, what of it goes with a plan.

Neither is on unless vLLM's own options ask for it. A whole-model graph would freeze the step that
runs, so layers are compiled part by part (`parts`), and only batches that decode, which drop
nothing, run as a graph. What doesn't go with a plan runs eagerly, and the log says so.
"""

from __future__ import annotations

from typing import Any

from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger("vllm.adsc")

COMPILED = (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE)


def settle(config: Any) -> str:
    """Leave in a `VllmConfig` what goes with a plan of the compilation and the graphs that its user
    asked for, before vLLM fills in its own defaults.

    Returns:
        How the engine runs, for the log.
    """
    chosen = config.compilation_config
    asks = not config.model_config.enforce_eager
    compiled = asks and chosen.mode in COMPILED
    graphed = asks and chosen.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    if asks and chosen.mode == CompilationMode.STOCK_TORCH_COMPILE:
        logger.warning("%s is off: it traces whole steps, use VLLM_COMPILE", chosen.mode.name)
    if graphed and (reason := against_graphs(config)):
        logger.warning("CUDA graphs are off: %s", reason)
        graphed = False
    chosen.mode = chosen.mode if compiled else CompilationMode.NONE
    chosen.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY if graphed else CUDAGraphMode.NONE
    # Where attention splits what is compiled, vLLM may fall back from full graphs to piecewise.
    chosen.splitting_ops, chosen.use_inductor_graph_partition = [], False
    if not compiled and not graphed:
        config.model_config.enforce_eager = True
        return "eagerly"
    return " and ".join(["compiled"] * compiled + ["with CUDA graphs for decoding"] * graphed)


def against_graphs(config: Any) -> str | None:
    """Why there can be no CUDA graphs, if so."""
    if not current_platform.support_static_graph_mode():
        return "this platform has none"
    if config.compilation_config.cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
        return (
            "piecewise ones are made for one number of tokens, of which a plan's parts have "
            "several; use cudagraph_mode=FULL_DECODE_ONLY"
        )
    if config.parallel_config.data_parallel_size > 1:
        return "under data parallelism ranks must agree on them in each step"
    if is_breakable_cudagraph_enabled():
        return "VLLM_USE_BREAKABLE_CUDAGRAPH would cut them at attention"
    return None


def check_settled(config: Any) -> None:
    """Raise RuntimeError if vLLM has made something else of what `settle` left."""
    chosen = config.compilation_config
    if chosen.mode not in (CompilationMode.NONE, *COMPILED) or chosen.cudagraph_mode not in (
        CUDAGraphMode.NONE,
        CUDAGraphMode.FULL_DECODE_ONLY,
    ):
        raise RuntimeError(
            f"vLLM settled on compilation mode {chosen.mode.name} with CUDA graphs "
            f"{chosen.cudagraph_mode.name}, which a pruning plan can't run in: use --enforce-eager"
        )
