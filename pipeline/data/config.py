"""Config of data preparation, separate from the stage so that importing it loads nothing else."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from pipeline.config import ADDED, Config
from pipeline.data.mixture import Source


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """Limits of a picture."""

    min_side: int
    """Shortest allowed side, pixels."""
    max_pixels: int
    """Largest allowed area, pixels; checked before decoding, so a bomb is never unpacked."""
    max_bytes: int
    """Largest encoded size."""
    max_aspect: float
    """Most times that the longer side may be as long as the shorter one: processors bring the
    shorter one to a fixed length, and the other one with it."""


class PrepareConfig(Config):
    """Sources, rendering, and the allowed share of bad records."""

    unique: ClassVar[bool] = True
    """Whether duplicate records are quarantined; fixed for each class, not a setting."""

    bounded: ClassVar[str] = "mend the data, or raise max_quarantined"
    """The way out of too many bad records, for the error."""

    splits: dict[str, str | dict[str, Source]] = {"train": "train.json", "test": "test.json"}
    """Name of a split -> its records: a file, glob or folder (JSON list, JSON Lines, Parquet,
    `datasets`) in the data folder, or named sources to mix. A record of an earlier split is a leak
    in a later one."""
    images: str = "images"
    """Root of the pictures: a folder, a tar file or a glob of them, relative to the data folder; or
    the address of one, such as s3://bucket/prefix or gs://bucket/part-*.tar. No picture path leads
    out of it."""
    template: str = "vicuna_v1"
    """Conversation template: a name from pipeline/data/templates.py, `tokenizer` for the
    checkpoint's own, or `auto` for the checkpoint's own where it marks the end of answers, else
    vicuna_v1."""
    context: int = Field(2048, gt=0)
    """Longest rendered conversation in tokens, vision tokens included; longer ones are
    quarantined."""
    min_side: int = Field(14, gt=0)
    """Shortest allowed side of a picture, pixels."""
    max_pixels: int = Field(50_000_000, gt=0)
    """Largest allowed area of a picture, pixels."""
    max_picture_bytes: int = Field(64 << 20, gt=0)
    """Largest allowed encoded picture, bytes."""
    max_aspect: float = Field(100, ge=1, json_schema_extra=ADDED)
    """Most times that a picture's longer side may be as long as its shorter one."""
    max_quarantined: float = Field(0.01, ge=0, le=1)
    """Share of records that may be quarantined before the stage fails."""
    rows_per_shard: int = Field(5000, gt=0)
    """Most records in one Parquet file."""
    bytes_per_shard: int = Field(256 << 20, gt=0)
    """Most bytes of rows in one Parquet file; a single larger row still gets one."""
    rows_per_group: int = Field(64, gt=0)
    """Records in one row group of a Parquet file: the least that a reader fetches at once."""
    seed: int = Field(0, ge=0)
    """Seed of which records a mixture takes."""

    def limits(self) -> PictureLimits:
        return PictureLimits(
            min_side=self.min_side,
            max_pixels=self.max_pixels,
            max_bytes=self.max_picture_bytes,
            max_aspect=self.max_aspect,
        )

    def sources(self, split: str) -> dict[str, Source]:
        """The named sources of a split; a plain one is named like the split."""
        found = self.splits[split]
        return {split: Source(data=found)} if isinstance(found, str) else found
