"""Manifests: what is wrong with each, and what must be said of it; or how many images a run finds in it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from generated import save, textured


class ManifestKind(NamedTuple):
    """One kind of manifest.

    Attributes:
        name: of the kind.
        file: name of the file.
        content: bytes, text or columns of a Parquet file.
        says: regular expression that the error matches; empty where there is none.
        failed: images of ``a.png`` and ``b.png`` that fail, where there is no error.
        categories: that are scored then.
    """

    name: str
    content: bytes | str | dict | Callable[[Path], bytes]
    says: str = ""
    failed: int = 0
    categories: tuple[str, ...] = ("list",)
    file: str = "list.csv"


def write(folder: Path, kind: ManifestKind) -> Path:
    """Write a manifest beside two images; returns its path."""
    for name, seed in (("a.png", 1), ("b.png", 2), ("sub/c.png", 3)):
        save(folder / name, textured(seed))
    path, content = folder / kind.file, kind.content
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content(folder))
    return path


def _parquet(name: str, columns: dict, says: str = "", **more) -> ManifestKind:
    return ManifestKind(name, columns, says, file="list.parquet", **more)


MANIFESTS = (
    ManifestKind("empty file", "", r"cannot read manifest .*Expected CSV with a header, or Parquet"),
    ManifestKind("header alone", "uri,label\n", "no images to score"),
    ManifestKind("wrong columns", "file,label\na.png,good\n", r"has columns \['file', 'label'\]: expected 'uri'"),
    ManifestKind("column twice", "uri,uri\na.png,b.png\n", "several columns 'uri': expected one"),
    ManifestKind("ragged rows", "uri,label\na.png\nb.png,good,extra\n", r"cannot read manifest .*Expected CSV with"),
    ManifestKind("open quote", 'uri,label\n"a.png,good\nb.png,good\n', "cannot read manifest|a.png,good"),
    ManifestKind("binary", b"\x00\xff\xfe" * 40, "cannot read manifest|has columns"),
    ManifestKind("latin-1", "uri,label\na.png,gr\xfcn\n".encode("latin-1"), r"cannot read manifest .*UTF-?8"),
    ManifestKind("utf-16", "uri\na.png\n".encode("utf-16"), "cannot read manifest|has columns"),
    ManifestKind("no uri in a row", "uri,label\na.png,good\n,good\n", "no 'uri' in row 2"),
    ManifestKind("unknown split", "uri,split\na.png,validation\n", "row 1: split 'validation', expected 'train' or"),
    ManifestKind("image twice", "uri\na.png\na.png\n", "one row for each image"),
    ManifestKind("id twice", "uri,image_id\na.png,1\nb.png,1\n", "image_id '1' stands for both"),
    ManifestKind("reference that is scored", "uri,split\na.png,train\na.png,test\n", "one row for each image"),
    ManifestKind(
        "category too long", f"uri,category\na.png,{'x' * 200}\n", "200 bytes as a folder name: expected 1 to"
    ),
    ManifestKind("category of spaces", 'uri,category\na.png,"   "\n', "and more than spaces"),
    ManifestKind("secret in a uri", "uri\ns3://AKIA:hunter2@bucket/a.png\n", "row 1: a s3:// URI holds credentials"),
    ManifestKind("signed uri", "uri\nhttps://x.test/a.png?X-Amz-Signature=hunter2\n", "row 1: .*holds credentials"),
    ManifestKind("secret in a mask", "uri,mask_uri\na.png,s3://A:hunter2@b/m.png\n", "row 1: .*holds credentials"),
    ManifestKind("zero byte", b"uri\na\x00b.png\n", "holds a zero byte|cannot read manifest"),
    _parquet("uri as numbers", {"uri": [1, 2]}, "column 'uri' has type int64, expected text"),
    _parquet("uri as lists", {"uri": [["a.png"]]}, "column 'uri' has type list.*, expected text"),
    _parquet("uri as bytes", {"uri": [b"a.png"]}, "column 'uri' has type binary, expected text"),
    _parquet("label as floats", {"uri": ["a.png"], "label": [1.0]}, "column 'label' has type double, expected text"),
    _parquet("uri null", {"uri": ["a.png", None]}, "no 'uri' in row 2"),
    ManifestKind("parquet cut in half", b"PAR1" + b"\0" * 50, "cannot read manifest", file="list.parquet"),
    ManifestKind("csv called parquet", "uri\na.png\n", "cannot read manifest", file="list.parquet"),
    _parquet("category as integers", {"uri": ["a.png", "b.png"], "category": [1, 1]}, categories=("1",)),
    ManifestKind("byte order mark", b"\xef\xbb\xbfuri\na.png\nb.png\n"),
    ManifestKind("line ends of Windows", b"uri\r\na.png\r\nb.png\r\n"),
    ManifestKind("superfluous column", "uri,weight\na.png,1.5\nb.png,x\n"),
    ManifestKind("relative and absolute", lambda folder: f"uri\n./sub/../a.png\n{folder}/b.png\n".encode()),
    ManifestKind("file uri", lambda folder: f"uri\nfile://{folder}/a.png\nb.png\n".encode()),
    ManifestKind("missing image", "uri\na.png\nnone.png\n", failed=1),
    ManifestKind("unknown scheme", "uri\na.png\nnowhere-fs://x/b.png\n", failed=1),
    ManifestKind("image in two categories", "uri,category\na.png,x\na.png,y\n", categories=("x", "y")),
    ManifestKind("category NA", "uri,category\na.png,NA\nb.png,null\n", categories=("NA", "null")),
    ManifestKind(
        "formula", 'uri,category,label\na.png,=1+1,"=HYPERLINK(""x"")"\nb.png,=1+1,@SUM(1)\n', categories=("=1+1",)
    ),
    ManifestKind("category upwards", "uri,category\na.png,..\nb.png,../../up\n", categories=("..", "../../up")),
    ManifestKind("category absolute", "uri,category\na.png,/etc\nb.png,C:\\x\n", categories=("/etc", "C:\\x")),
    ManifestKind("missing mask", "uri,label,mask_uri\na.png,cut,none.png\nb.png,cut,none.png\n"),
    ManifestKind("mask of another size", "uri,label,mask_uri\na.png,cut,sub/c.png\nb.png,good,sub/c.png\n"),
)
