"""The kind of stage `export`: what is published beside the weights, and where."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.durable.stage import Kind
from pipeline.store import Store, open_store
from pipeline.store.readonly import ReadOnlyStore
from pipeline.tracking.names import check_name, check_tags


class ExportConfig(Config):
    """What is published beside the weights, where, and how exactly a copy must match."""

    name: str = "compressed"
    """The model's name, on its card and in MLflow, which replaces forbidden characters with `-`:
    llava-1.5-7b is registered as llava-1-5-7b."""
    base: str = ""
    """Name of the base, for card and adapter: a hub id or a few words."""
    licence: str = ""
    """Licence id of the base (apache-2.0); empty if unknown."""
    to: str = ""
    """Also publish it at this address, s3://bucket/prefix or a folder: one checkpoint, and nothing
    else, ever. Empty leaves it in the store of the run."""
    encryption: Literal["", "AES256", "aws:kms"] = ""
    """S3's encryption of published files; empty uses the bucket's default."""
    kms_key: str = ""
    """The key for `aws:kms`; empty uses the account's default."""
    tags: dict[str, str] = {}
    """Tags of every object that is published; they need s3:PutObjectTagging."""
    tolerance: float = Field(default=1e-4, ge=0)
    """Largest allowed difference of a logit in the fresh process, as a share of the largest logit.
    On one machine the difference is 0; other processors and kernels round differently."""
    timeout: float = Field(default=1800, gt=0)
    """Seconds that the fresh process may take."""
    log_model: bool = True
    """Also log it as an MLflow model, which copies all files to MLflow's artifact store, and
    register that under `name`, with the alias `candidate`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Fail now rather than after hours of training."""
        check_name(self.name)
        check_tags(self.tags)
        if self.to and isinstance(self.store(), ReadOnlyStore):
            raise ValueError(f"export.to = {self.to!r}: publish to a folder or s3://bucket/prefix")
        return self

    def store(self) -> Store:
        """The store at `to`."""
        return open_store(self.to, self.encryption, self.kms_key, tuple(self.tags.items()))


EXPORT = Kind(
    id="pipeline.stages.export.export",
    version=2,
    body="pipeline.stages.export.export",
    config=ExportConfig,
    complete="pipeline.stages.export.register_again",
)
