"""What Ray costs: `extract` and `match` through Ray, and the same work in one plain process, alternately.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/ray_overhead.py [--rounds 2] [--categories bottle screw]

Wall time after start-up: through Ray from the moment when the first worker is ready, plus the decoding that it had done
by then; plain from the moment when the model is loaded. Both read, decode, encode, match and write the same files.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from verdicts import Verdicts

ASSETS = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared")).resolve()
MAX_OVERHEAD = 0.15


def configs(out: Path, categories: list[str]):
    from jobs.config import ExtractConfig, MatchConfig

    weights = str(ASSETS / "weights" / "dinov2_vits14.safetensors")
    common = {"out": str(out), "category": categories, "num_workers": 1, "threads": 2}
    extract = ExtractConfig(images=str(ASSETS / "data" / "mvtec"), weights=weights, **common)
    return extract, MatchConfig(embeddings=str(out), **common)


def plain(out: Path, categories: list[str]) -> dict[str, float]:
    """Both stages without Ray: the same bodies of work, one after the other."""
    import torch
    from rich.console import Console

    from jobs import match
    from jobs.decode import decode
    from jobs.embeddings import StoredRun
    from jobs.extract import Extractor
    from jobs.inputs import discover
    from jobs.matcher import Matcher, query_images
    from jobs.shards import cut_shards, joined_shards, shard_size
    from jobs.stage import write_job
    from jobs.store import Store

    torch.set_num_threads(2)
    extract_config, match_config = configs(out, categories)
    images = discover(extract_config.images, categories=categories, normal=False).images
    size = shard_size(1024, 384 * 4)
    store = Store(out, "extract", joined_shards(size, 1024, 384 * 4))
    store.claim("plain", ("images", "embeddings"), {})
    body = Extractor(extract_config, str(extract_config.weights), "cpu")
    started = time.perf_counter()
    for shard in cut_shards(images, size):
        decoded, failures = decode(shard.records, 448, 14)
        store.commit(shard.category, shard.name, *body.process(shard.category, decoded, failures))
    extracting = time.perf_counter() - started
    for item in store.unjoined():
        store.join(*item)
    write_job(store, {})
    stored = StoredRun.read(str(out))
    plans = {
        category: match._plan(match_config, stored, category, Console(file=io.StringIO())) for category in stored.sets
    }
    size = query_images(match_config, 1024, 384)
    target = Store(out, "match", joined_shards(size, 1024, 4))
    target.claim("plain", ("scores", "patch_scores"), {})
    started = time.perf_counter()
    matcher = Matcher(match_config, plans, target, False, "cpu")
    for shard in cut_shards([image.record for image in stored.images], size):
        matcher.run(shard)
    return {"extract": extracting, "match": time.perf_counter() - started}


def through_ray(out: Path, categories: list[str]) -> dict[str, float]:
    from rich.console import Console

    from jobs import cluster, extract, match

    extract_config, match_config = configs(out, categories)
    quiet = Console(file=io.StringIO())
    with cluster.connect(None):
        extract.run(extract_config, quiet)
        match.run(match_config, quiet)
    return {stage: after_start(out, stage) for stage in ("extract", "match")}


def after_start(out: Path, stage: str) -> float:
    """From the first worker's readiness to the last completion record."""
    paths = sorted((out / ".state" / stage / "done").rglob("*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    end = max(path.stat().st_mtime for path in paths)
    first = min(records, key=lambda record: record["worker_ready"])
    return end - first["worker_ready"] + first.get("decode_seconds", 0.0)


def in_process(way: str, categories: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", way, "--categories", *categories]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--categories", nargs="+", default=["bottle", "screw"])
    parser.add_argument("--one", choices=["plain", "ray"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            run = plain if options.one == "plain" else through_ray
            print(json.dumps(run(Path(folder) / "out", options.categories)))
        return 0
    found = [
        (in_process("plain", options.categories), in_process("ray", options.categories)) for _ in range(options.rounds)
    ]
    print("| stage | one plain process, s | through Ray, s | ratio, median |\n| --- | --- | --- | --- |")
    worst = 0.0
    for stages in (("extract",), ("match",), ("extract", "match")):
        pairs = [(sum(one[s] for s in stages), sum(other[s] for s in stages)) for one, other in found]
        ratio = statistics.median(other / one for one, other in pairs)
        worst = max(worst, ratio) if len(stages) == 2 else worst
        shown = [", ".join(f"{pair[side]:.1f}" for pair in pairs) for side in (0, 1)]
        print(f"| {' and '.join(stages)} | {shown[0]} | {shown[1]} | {ratio:.3f} |")
    print()
    verdicts = Verdicts()
    verdicts.at_most(f"through Ray over one plain process, {' and '.join(options.categories)}", worst, 1 + MAX_OVERHEAD)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
