"""Methods of vLLM 0.32 that are wrapped for want of an interface, each with its reason.

`GPUModelRunner` (the first model runner, which its CPU runner extends): attention metadata must be
built from which rows reach which part. The second runner asks a model for a state that prepares
them (`state`); the first has no such place between knowing a step's requests and building metadata.

Both model runners: a step runs as a CUDA graph where each of its requests computes one token. That
may be a token of an image, which is dropped, and neither runner asks the model.

`InputProcessor.process_inputs`: requests that a plan can't serve must be refused where the client
gets the error, in the front end. vLLM has a hook for platforms there, none for models.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from adsc.serving.engine import attention
from adsc.serving.engine.requests import UnservedRequest, check_request, kept_of
from adsc.serving.kept import Kept
from adsc.serving.settings import SERVED, ServedPlan, served_plan
from adsc.serving.step import make_step

_MARK = "adsc_wrapped"
_SERVED = "adsc_served"
_KEPT = "adsc_kept"  # on the runner's own record of a request, so it goes when that goes


def install() -> None:
    """Wrap them; again is no more."""
    if hasattr(GPUModelRunner, _MARK):
        return
    setattr(GPUModelRunner, _MARK, True)
    _wrap_runner()
    _wrap_processor()


def _wrap_runner() -> None:
    prepare, execute = GPUModelRunner._prepare_inputs, GPUModelRunner.execute_model
    determine = GPUModelRunner._determine_batch_execution_and_padding

    @wraps(prepare)
    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = prepare(self, scheduler_output, num_scheduled_tokens)
        served = getattr(self.model, "served", None)
        if isinstance(served, ServedPlan):
            names = self.input_batch.req_ids
            attention.current = make_step(
                self.input_batch.num_computed_tokens_cpu[: len(names)],
                np.asarray(num_scheduled_tokens),
                [_kept(served, self.requests[name]) for name in names],
                self.device,
            )
        return prepared

    @wraps(execute)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return execute(self, *args, **kwargs)
        finally:
            attention.current = None

    @wraps(determine)
    def determine_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if attention.current is not None and attention.current.drops:
            kwargs["force_eager"] = True
        return determine(self, *args, **kwargs)

    GPUModelRunner._prepare_inputs, GPUModelRunner.execute_model = prepare_inputs, execute_model
    GPUModelRunner._determine_batch_execution_and_padding = determine_batch


def wrap_second_runner() -> None:
    """Wrap it where it runs, for its module loads Triton; again is no more."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner

    if hasattr(SecondRunner, _MARK):
        return
    setattr(SecondRunner, _MARK, True)
    gather = SecondRunner.gather_batch_req_state

    @wraps(gather)
    def gather_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        """While a prompt is computed there is no number of tokens that all requests compute, by
        which this runner finds graphs."""
        batch, each = gather(self, *args, **kwargs)
        served = isinstance(getattr(self.model, "served", None), ServedPlan)
        return batch, None if served and batch is not None and batch.has_prefill else each

    SecondRunner.gather_batch_req_state = gather_batch


def _kept(served: ServedPlan, record: Any) -> Kept | None:
    if not hasattr(record, _KEPT):
        setattr(record, _KEPT, kept_of(served, record))
    kept: Kept | None = getattr(record, _KEPT)
    return kept


def _wrap_processor() -> None:
    process = InputProcessor.process_inputs

    @wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        if not hasattr(self, _SERVED):
            setattr(self, _SERVED, _served(self.vllm_config.model_config.hf_config))
        if served := getattr(self, _SERVED):
            try:
                check_request(served, request)
            except UnservedRequest:
                _forget_pictures(self.renderer.mm_processor_cache, request)
                raise
        return request

    InputProcessor.process_inputs = process_inputs


def _forget_pictures(cache: Any, request: Any) -> None:
    """Pictures that a refused request would have brought to the engine first: the front end notes
    them as sent before requests are checked, and would leave them out of the next one."""
    for feature in request.mm_features or ():
        if cache is not None and feature.data is not None:
            cache.invalidate(feature.mm_hash or feature.identifier)


def _served(config: Any) -> ServedPlan | None:
    """None for models of all other kinds, too: the front end serves them as well."""
    return served_plan(config) if getattr(config, "model_type", None) in SERVED else None
