"""The kind of stage `base`: the checkpoint to compress, and what is known without loading it."""

import hashlib
import json
from pathlib import Path

from pydantic import Field

from adsc.costs.geometries import HUB_IDS, shape
from adsc.weight_files import original_layout, original_name
from pipeline.config import ADDED, Config
from pipeline.durable.record import manifest
from pipeline.durable.stage import Kind
from pipeline.packaged import resolve


class BaseConfig(Config):
    """Which checkpoint."""

    source: str
    """A folder, a hub id such as llava-hf/llava-1.5-7b-hf, or package://NAME/FOLDER for a folder
    that ships inside an installed package."""
    revision: str | None = Field(None, json_schema_extra=ADDED)
    """Commit, branch or tag of a hub id; null is its main branch. `adsc eval` takes the commit."""
    digest: str | None = None
    """`folder_digest` of the folder, so that changed weights are another checkpoint; null skips
    the check."""


class BaseError(ValueError):
    """The checkpoint can't be used; the message has the reason."""


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of a checkpoint's files."""
    lines = [f"{file.path} {file.sha256}\n" for file in manifest(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def pin_digest(config: BaseConfig) -> BaseConfig:
    """The config with the digest of a checkpoint that ships in a package, so that new weights are
    another base. Folders of users are not hashed: for a large one that takes minutes."""
    if config.digest is not None or not config.source.startswith("package://"):
        return config
    if not resolve(config.source).is_dir():
        raise BaseError(f"there is no folder {config.source!r} in this installation")
    return config.model_copy(update={"digest": folder_digest(resolve(config.source))})


def num_decoder_layers(source: str) -> int | None:
    """Decoder layers of a known hub id, or from the checkpoint's config.json; None if it isn't
    available.

    Raises:
        BaseError: it is a checkpoint of LLaVA's own code.
    """
    if other := original_name(source):
        raise BaseError(f"can't compress {source}: {other}")
    if source in HUB_IDS:
        return int(shape(source).get_text_config().num_hidden_layers)
    file = resolve(source) / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    if other := original_layout(config):
        raise BaseError(f"can't compress {source}: {other}")
    return int((config.get("text_config") or config)["num_hidden_layers"])


BASE = Kind(
    id="pipeline.stages.base.base",
    version=1,
    body="pipeline.stages.base.base",
    config=BaseConfig,
)
