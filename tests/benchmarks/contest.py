"""Several ways to do the same work, each in its own process, taking turns; medians, ratios, peak memory.

Machines are shared and their clocks wander: turns are taken within one run, and only ratios within it are compared.
"""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ASSETS = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared")).resolve()
WEIGHTS = str(ASSETS / "weights" / "dinov2_vits14.safetensors")
_PAUSE = 0.4  # seconds: idle threads of OpenMP spin for a while, and would take the next contender's cores
PACKAGES = ("torch", "openvino", "numba", "faiss-cpu", "anomalib", "timm", "numpy", "ray")


class Result(NamedTuple):
    """One contender.

    Attributes:
        name: of it.
        seconds: of each turn.
        peak_bytes: of its process.
        extra: what its last turn returned.
    """

    name: str
    seconds: list[float]
    peak_bytes: int
    extra: Any

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: "Result") -> float:
        """How much longer the other one takes: median over turns."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def spread(self) -> str:
        return f"{min(self.seconds):.4g} to {max(self.seconds):.4g}"


class Contender(NamedTuple):
    """A way to do the work: ``setup(*arguments)`` returns a function of the turn's number, which does ``units`` of it."""

    name: str
    setup: Callable[..., Callable[[int], Any]]
    arguments: tuple[Any, ...] = ()
    units: int = 1


def compete(contenders: list[Contender], turns: int) -> list[Result]:
    """All contenders take their turns one after the other; one more turn before that warms each up."""
    context = multiprocessing.get_context("spawn")
    running = []
    for contender in contenders:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, contender), daemon=True)
        process.start()
        theirs.close()
        ours.recv()
        running.append((contender, ours, process))
    results = {contender.name: ([], None) for contender in contenders}
    for turn in range(-1, turns):
        for contender, pipe, _ in running:
            time.sleep(_PAUSE)
            pipe.send(turn)
            seconds, extra = pipe.recv()
            if turn >= 0:
                results[contender.name][0].append(seconds / contender.units)
            results[contender.name] = (results[contender.name][0], extra)
    found = []
    for contender, pipe, process in running:
        pipe.send(None)
        peak = pipe.recv()
        process.join()
        found.append(Result(contender.name, *results[contender.name][:1], peak, results[contender.name][1]))
    return found


def _serve(pipe: Any, contender: Contender) -> None:
    work = contender.setup(*contender.arguments)
    pipe.send("ready")
    while (turn := pipe.recv()) is not None:
        started = time.perf_counter()
        extra = work(max(turn, 0))
        pipe.send((time.perf_counter() - started, extra))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def engine_missing(engine: str) -> str:
    """Why an engine cannot run here; empty if it can. Loads the backbone."""
    from anomalydino_plugin import ConfigError, engine_for, load_backbone

    try:
        engine_for(engine, load_backbone("dinov2_vits14", WEIGHTS))
    except ConfigError as error:
        return str(error).splitlines()[0]
    return ""


def circumstances() -> str:
    """Machine, versions and commit, for the head of a table."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    features = next((line for line in lines if line.startswith("flags")), "")
    fast = [name for name in ("avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if name in features]
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return (
        f"{date.today()}, commit {commit.strip()}; {os.cpu_count()} CPUs, {model} ({', '.join(fast)}); load "
        f"{os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, {', '.join(found)}"
    )


def table(results: list[Result], reference: Result, unit: str = "s", scale: float = 1.0) -> str:
    """Markdown, every contender beside one of them."""
    lines = [
        f"| way | median, {unit} | spread, {unit} | {reference.name} takes | peak memory, GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        low, high = min(result.seconds) * scale, max(result.seconds) * scale
        lines.append(
            f"| {result.name} | {result.median * scale:.4g} | {low:.4g} to {high:.4g} | "
            f"{result.ratio(reference):.2f} times as long | {result.peak_bytes / 1e9:.2f} |"
        )
    return "\n".join(lines)


def write_json(path: Path | None, results: dict[str, list[Result]]) -> None:
    """All figures, for machines."""
    if path is not None:
        rows = {name: [result._asdict() for result in found] for name, found in results.items()}
        path.write_text(json.dumps({"circumstances": circumstances(), "results": rows}, indent=1, default=str))
