"""Flags and YAML files that no run should start with, and what must be said of each."""

from typing import NamedTuple

BASE = {"images": "IMAGES", "out": "OUT", "references": "IMAGES"}


class ConfigurationKind(NamedTuple):
    """One kind of configuration.

    Attributes:
        name: of the kind.
        says: regular expression that the message matches.
        flags: of ``score``, beside those that are needed.
        yaml: text of a file given with ``--config``.
        status: of the command: 1 for our own errors, 2 for wrong usage.
        hidden: must not be printed.
    """

    name: str
    says: str
    flags: tuple[str, ...] = ()
    yaml: str | bytes | None = None
    status: int = 1
    hidden: str = ""


def _flag(flag: str, says: str, status: int = 1, hidden: str = "") -> ConfigurationKind:
    return ConfigurationKind(flag, says, (flag,), None, status, hidden)


def _yaml(name: str, text: str | bytes, says: str, status: int = 2) -> ConfigurationKind:
    return ConfigurationKind(name, says, (), text, status)


CONFIGURATIONS = (
    _flag("--imagse=x", "imagse", 2),
    _flag("--resolution=large", "--resolution=large: expected int. See anomalydino score --help", 2),
    _flag("--resolution=64.5", "resolution", 2),
    _flag("--resolution=0", "expected at least 1"),
    _flag("--resolution=-448", "expected at least 1"),
    _flag("--resolution=8", "resolution=8: expected at least one patch"),
    _flag("--shots=0", "expected at least 1, or -1"),
    _flag("--shots=1000", "needs 1000 normal images, found 3"),
    _flag("--seed=-1", "expected at least 0"),
    _flag("--k=0", "expected at least 1"),
    _flag("--k=1000000", "k=1000000.*expected"),
    _flag("--batch-size=0", "expected at least 1"),
    _flag("--shard-size=0", "expected at least 1"),
    _flag("--num-workers=0", "expected at least 1"),
    _flag("--num-workers=100000", "Lower --num_workers"),
    _flag("--threads=0", "expected at least 1"),
    _flag("--threads=1000000000", "--threads=1000000000: expected at most"),
    _flag("--max-pixels=0", "expected at least 1"),
    _flag("--gpus-per-worker=-1", "gpus_per_worker.*expected"),
    _flag("--gpus-per-worker=nan", "--gpus_per_worker=nan: expected float", 2),
    _flag("--max-failures=0", "expected a share above 0 and at most 1"),
    _flag("--max-failures=nan", "--max_failures=nan: expected float", 2),
    _flag("--false-alarm=2", "expected a share above 0 and at most 1"),
    _flag("--false-alarm=-inf", "--false_alarm=-inf: expected float", 2),
    _flag("--statistic=median", "expected 'max', 'mean_top:F' or"),
    _flag("--statistic=mean_top:nan", "expected 'max', 'mean_top:F' or"),
    _flag("--statistic=mean_top:0", "expected 'max', 'mean_top:F' or"),
    _flag("--masking=maybe", r"--masking=maybe: expected Literal\['auto', 'on', 'off'\]", 2),
    _flag("--rotations=some", "rotations", 2),
    _flag("--embedding-dtype=float64", "embedding_dtype", 2),
    _flag("--category=nothing", "no category 'nothing'"),
    _flag("--backbone=resnet18", "vision transformer"),
    _flag("--backbone=../../etc/passwd", "vision transformer"),
    _flag("--weights=none.safetensors", "no such file"),
    _flag("--weights=random:x", "integer seed"),
    _flag("--references=nowhere", "has no images: expected a folder of normal"),
    _flag("--banks=nowhere", "no output of `anomalydino fit`"),
    _flag("--embeddings=x", "expected either --images or --embeddings"),
    _flag("--out=/dev/null/x", "cannot write to output folder"),
    _flag("--out=s3://AKIA:hunter2@bucket/run", "--out: a s3:// URI holds credentials", hidden="hunter2"),
    _flag("--images=s3://AKIA:hunter2@bucket/run", "--images: a s3:// URI holds credentials", hidden="hunter2"),
    _flag("--images=s3://b/x?secret_key=hunter2", "--images: a s3:// URI holds credentials", hidden="hunter2"),
    _flag("--banks=gs://hunter2@bucket/run", "--banks: a gs:// URI holds credentials", hidden="hunter2"),
    _flag("--images=nowhere-fs://x", "no filesystem for nowhere-fs://"),
    _flag("--images=s3://3:]/x", "a s3:// location is no URI: its host cannot be read"),
    _flag("--images=nowhere", "does not exist. Give a folder"),
    _flag("--images=", "--images is empty"),
    _flag("--out=", "--out is empty"),
    _flag("--imagse=s3://AKIA:hunter2@bucket/x", "imagse", 2, "hunter2"),
    _flag("--config=none.yaml", "config.*none.yaml", 2),
    _yaml("unknown key", "shotz: 2\n", "shotz"),
    _yaml("wrong type", "resolution: large\n", "resolution"),
    _yaml("list in place of a number", "shots: [1, 2]\n", "shots"),
    _yaml("no mapping", "- a\n- b\n", "config"),
    _yaml("no yaml", "a: [1\nb: }\n", "config"),
    _yaml("binary", b"\x00\xff\xfe\x00" * 9, "--config is no text file in UTF-8"),
    _yaml("python object", "shots: !!python/object/apply:os.system ['touch PWNED']\n", "config"),
    _yaml("class path", "images: {class_path: os.system, init_args: {command: touch PWNED}}\n", "images"),
    _yaml("out of range", "false_alarm: .nan\n", "expected a share above 0", 1),
)
