"""One frozen, validated dataclass for each job; flags and YAML keys are its field names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeVar

from anomalydino_plugin import ConfigError
from jobs.settings import (
    BankSettings,
    EncodingSettings,
    JobSettings,
    MaskSettings,
    MutualSettings,
    RaySettings,
    ReportSettings,
    ShardSettings,
    as_list,
)

Config = TypeVar("Config", bound=JobSettings)


def part_of(config: JobSettings, kind: type[Config], **more: object) -> Config:
    """The settings of another job that a job's settings hold, and more."""
    names = {field.name for field in dataclasses.fields(kind)} & {field.name for field in dataclasses.fields(config)}
    return kind(**{**{name: getattr(config, name) for name in names}, **more})


@dataclass(frozen=True, kw_only=True)
class FitConfig(BankSettings, MaskSettings, EncodingSettings, RaySettings, JobSettings):
    """Settings of ``anomalydino fit``: memory banks of normal images, one for each category.

    Attributes:
        images: MVTec-style tree, one category folder, or CSV/Parquet manifest; with ``references`` also a flat folder.
    """

    images: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_shots()


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(MaskSettings, EncodingSettings, ShardSettings, RaySettings, JobSettings):
    """Settings of ``anomalydino extract``: patch embeddings of images, as Parquet.

    Attributes:
        images: MVTec-style tree (its test images), one category folder, flat folder, or CSV/Parquet manifest.
        embedding_dtype: ``float32`` or ``float16``.
    """

    images: str
    embedding_dtype: Literal["float32", "float16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(
    BankSettings, MaskSettings, EncodingSettings, ShardSettings, ReportSettings, RaySettings, JobSettings
):
    """Settings of ``anomalydino score``: few-shot scores of images, or of stored embeddings.

    Attributes:
        images: MVTec-style tree, one category folder, flat folder (with ``references``), or CSV/Parquet manifest.
        embeddings: output folder of ``extract``, in place of images; needs ``banks``, no backbone is loaded.
        banks: output folder of ``fit`` whose banks are used; built from normal images if not given.
        write_embeddings: also write patch embeddings.
        embedding_dtype: ``float32`` or ``float16``.
    """

    images: str | None = None
    embeddings: str | None = None
    banks: str | None = None
    write_embeddings: bool = False
    embedding_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_shots()
        if (self.images is None) == (self.embeddings is None):
            raise ConfigError("score: expected either --images or --embeddings.")
        if self.embeddings is not None and self.banks is None:
            raise ConfigError(
                "score --embeddings needs --banks: reference images are rotated before they are encoded, so a bank "
                "cannot come from stored embeddings. Build it with `anomalydino fit`."
            )
        if self.embeddings is not None and self.write_embeddings:
            raise ConfigError("score --embeddings --write_embeddings: the embeddings are stored already.")


@dataclass(frozen=True, kw_only=True)
class MatchConfig(MutualSettings, ShardSettings, RaySettings, JobSettings):
    """Settings of ``anomalydino match``: batched zero-shot scores from stored embeddings.

    Attributes:
        embeddings: output folder of ``extract``; may be ``out`` itself.
        masking: ``auto`` (a vote of the images), ``on`` or ``off``.
    """

    embeddings: str
    masking: Literal["auto", "on", "off"] | bool = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_memory()


@dataclass(frozen=True, kw_only=True)
class BatchedConfig(
    MutualSettings, MaskSettings, EncodingSettings, ShardSettings, ReportSettings, RaySettings, JobSettings
):
    """Settings of ``anomalydino batched``: extract and match in one, into one output folder.

    Attributes:
        images: as for ``extract``.
        embedding_dtype: ``float32`` or ``float16``.
    """

    images: str
    embedding_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_memory()

    @property
    def extract(self) -> ExtractConfig:
        """Its first half."""
        return part_of(self, ExtractConfig)

    @property
    def match(self) -> MatchConfig:
        """Its second half, on the first one's output; shards of its own size."""
        return part_of(self, MatchConfig, embeddings=self.out, shard_size=None)


@dataclass(frozen=True)
class MaskingTestConfig:
    """Settings of ``anomalydino masking-test``.

    Attributes:
        images: as for ``score``, or a single image file.
        out: folder for the pictures, one PNG for each category.
        category: only these categories.
        references: folder of normal images to use instead of ``train/good``.
        resolution: smaller edge after resizing, pixels.
        backbone: see ``score``.
        weights: see ``score``.
        morphology: see ``score``.
        index_source: see ``score``.
    """

    images: str
    out: str
    category: str | list[str] | None = None
    references: str | None = None
    resolution: int = 448
    backbone: str = "dinov2_vits14"
    weights: str | None = None
    morphology: Literal["official", "grid"] = "official"
    index_source: bool = True

    @property
    def categories(self) -> list[str] | None:
        """``category`` as a list."""
        return as_list(self.category)


@dataclass(frozen=True)
class ReportConfig:
    """Settings of ``anomalydino report``.

    Attributes:
        out: output folder of a finished run, a path or URI.
        file: where the report goes; OUT/report.html if not given.
        category: only these categories.
        max_images: images that get a card; metrics and charts are of all.
        thumbnail: longer edge of the pictures, pixels.
    """

    out: str
    file: str | None = None
    category: str | list[str] | None = None
    max_images: int = 1000
    thumbnail: int = 384

    def __post_init__(self) -> None:
        if self.max_images < 0:
            raise ConfigError(f"--max_images={self.max_images}: expected 0 or more.")
        if not 32 <= self.thumbnail <= 2048:
            raise ConfigError(f"--thumbnail={self.thumbnail}: expected 32 to 2048 pixels.")

    @property
    def categories(self) -> list[str] | None:
        """``category`` as a list."""
        return as_list(self.category)


@dataclass(frozen=True)
class MapsConfig:
    """Settings of ``anomalydino maps``.

    Attributes:
        out: output folder of a finished run, a path or URI.
        format: ``png`` (coloured), ``overlay`` (over the image), ``npy`` or ``tiff`` (the values, float32).
        to: folder for the maps; OUT/maps if not given.
        category: only these categories.
    """

    out: str
    format: Literal["png", "overlay", "npy", "tiff"] = "png"
    to: str | None = None
    category: str | list[str] | None = None

    @property
    def categories(self) -> list[str] | None:
        """``category`` as a list."""
        return as_list(self.category)


@dataclass(frozen=True)
class DemoConfig:
    """Settings of ``anomalydino demo``.

    Attributes:
        out: folder for sample images, results and pictures; it is made anew if it holds an earlier demo.
        resolution: smaller edge after resizing, pixels.
        weights: see ``score``.
        index_source: see ``score``.
    """

    out: str = "demo_output"
    resolution: int = 448
    weights: str | None = None
    index_source: bool = True
