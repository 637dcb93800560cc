"""Ray Serve: vLLM's OpenAI server as a deployment, whose replicas follow the load.

    serve run workflows.deployment:build checkpoint=s3://models/out plan=64

A replica is one engine with its HTTP routes. Ray Serve starts replicas, sends them requests, counts
those under way and replaces a replica whose engine has died. vLLM's metrics become Ray's
(`ray_vllm_...`). Ray's own LLM deployments are not used: those of Ray 2.60 need vLLM 0.29.
"""

from __future__ import annotations

import asyncio
import shlex
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from workflows.serving import engine_arguments, fetched


class Options(BaseModel):
    """What is served; the arguments of `adsc serve`."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    """A folder that every node has, a hub id, s3://bucket/prefix or models:/name@alias."""
    plan: str | None = None
    """A named plan of the checkpoint, `dense`, or any plan; the checkpoint's own without it."""
    engine: str = ""
    """vLLM's own flags, as on a command line."""
    expect: str = ""
    """Expected digest of a fetched manifest."""
    mlflow: str | None = None
    """For models:/."""


@serve.deployment(
    name="engine",
    max_ongoing_requests=256,
    autoscaling_config={
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 32,
        "downscale_delay_s": 600,
    },
    health_check_period_s=10,
    graceful_shutdown_timeout_s=60,
)
@serve.ingress()
class Replica:
    """One engine; it may take minutes to load."""

    async def __init__(self, options: Options) -> None:  # type: ignore[misc]  # Serve awaits it
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        place = await asyncio.to_thread(fetched, options)
        words = engine_arguments(place, options.plan, shlex.split(options.engine))
        given = parsed(words)
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(given), stat_loggers=[RayPrometheusStatLogger]
        )
        tasks = await self.engine.get_supported_tasks()
        self.routes = build_app(given, tasks, self.engine.model_config)
        await init_app_state(self.engine, self.routes.state, given, tasks)

    def __serve_build_asgi_app__(self) -> Any:
        return self.routes

    async def check_health(self) -> None:
        """Raises once the engine has died; Ray Serve then starts another replica."""
        await self.engine.check_health()

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.shutdown()


def parsed(words: list[str]) -> Any:
    """vLLM's namespace of a server's options.

    Raises:
        ValueError: an option that it doesn't know.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        given = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    except SystemExit:
        raise ValueError(f"vLLM refuses these options, see above: {shlex.join(words)}") from None
    validate_parsed_serve_args(given)
    return given


def build(options: Options) -> serve.Application:
    """The application that a Serve config names as `workflows.deployment:build`."""
    deployment: Any = Replica
    application: serve.Application = deployment.bind(options)
    return application
