"""Matching alone: the nearest of 8192 rows for 1024 patches, and batched zero-shot on bottle, each beside its peers.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/speed_matching.py --official DIR [--musc DIR] [--turns 9]

Features are bottle's, encoded once; batched zero-shot matches an image against the 82 others: our kernels sixteen images a
turn, which pass over the stored features together as in `anomalydino match`, or all 83 at once as in `BatchedModel`; seconds
are those of one image. Operations are 2 Q M D. The rate of a kernel is compared with the best plain matrix
product found here in the precision it searches in.
"""

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path

import matching_ways as ways
import numpy as np
import official_code
from contest import Contender, Result, circumstances, compete, table, write_json
from matching_ways import QUERIES, ROWS
from verdicts import Verdicts

NEAREST_AIMS = (3.0, 4.0)  # times as fast as faiss; with a fused kernel
OFFICIAL_AIM, REDUCED_AIM, BLOCKED_AIM = 8.0, 15.0, 2.0
SHARES = {"nearest": 0.60, "batched": 0.35}
MEMORY_AIM, MAX_ERROR = 3.0, 1e-5
IMAGES, PATCHES, WIDTH = 83, 1024, 384
PRECISIONS = {"tiles_f32": "float32", "tiles_bf16": "bfloat16", "tiles_int8": "int8"}
PRODUCTS = [
    *((precision, library) for precision in ("float32", "bfloat16") for library in ("torch", "openvino")),
    ("int8", "torch"),  # OpenVINO has no such product outside of a quantised network
]


def kernels() -> list[str]:
    """Those that run here, fastest last."""
    from anomalydino_plugin import ConfigError, kernel_for

    found = ["torch"]
    for name in PRECISIONS:
        try:
            found.append(kernel_for(name))
        except ConfigError:
            continue
    return found


def rates(results: list[Result], flop: float) -> str:
    return ", ".join(f"{result.name} {flop / result.median / 1e9:.0f}" for result in results) + " GFLOP/s"


def products(turns: int) -> tuple[list[Result], dict[str, float]]:
    """Plain matrix products, and the highest rate of each precision."""
    found = compete(
        [Contender(f"{precision}, {library}", ways.product, (precision, library)) for precision, library in PRODUCTS],
        turns,
    )
    flop = 2.0 * QUERIES * ROWS * WIDTH
    print(f"Matrix products of {QUERIES} x {ROWS} x {WIDTH}: {rates(found, flop)}\n", flush=True)
    return found, {
        precision: max(flop / result.median for result in found if result.name.startswith(precision))
        for precision in PRECISIONS.values()
    }


def ceiling(kernel: str, ceilings: dict[str, float]) -> tuple[str, float]:
    precision = PRECISIONS.get(kernel, "float32")
    return precision, ceilings[precision]


def nearest(features: str, turns: int, ceilings: dict[str, float], verdicts: Verdicts) -> list[Result]:
    names = kernels()
    found = compete(
        [
            Contender("faiss IndexFlatL2", ways.faiss_search, (features,)),
            *(Contender(name, ways.our_search, (features, name)) for name in names),
        ],
        turns,
    )
    queries, bank = ways.one_image(features)
    exact = (1 - queries.double() @ bank.double().T).min(dim=1).values.clamp(0, 2).numpy()
    print(f"## {QUERIES} queries, {ROWS} rows, the nearest\n\n{table(found, found[0], 'ms', 1e3)}\n")
    flop = 2.0 * QUERIES * ROWS * WIDTH
    print(f"Rates: {rates(found, flop)}\n")
    ours, name = found[-1], names[-1]
    precision, most = ceiling(name, ceilings)
    for aim in NEAREST_AIMS:
        if name == "tiles_f32":
            why = "the processor has neither AVX512-VNNI nor AVX512-BF16"
            verdicts.not_measured(f"nearest row against faiss, at least {aim:g}", why)
        else:
            verdicts.at_least(f"nearest row, {name} against faiss", ours.ratio(found[0]), aim)
    if name == "tiles_f32":
        print(f"\n{name} against faiss: {ours.ratio(found[0]):.2f}\n")
    verdicts.at_least(f"nearest row, share of the {precision} product", flop / ours.median / most, SHARES["nearest"])
    verdicts.at_most("nearest row, distances off float64", np.abs(ours.extra - exact).max(), MAX_ERROR)
    return found


def batched(features: str, official: str, turns: int, ceilings: dict[str, float], verdicts: Verdicts) -> list[Result]:
    names = kernels()
    whole = f"{names[-1]}, all at once"
    found = compete(
        [
            Contender("official", official_code.batched, (official, features)),
            Contender("blocked float32 products", ways.blocked_products, (features,)),
            *(Contender(name, ways.our_batched, (features, name), units=ways.SHARD) for name in names),
            Contender(whole, ways.our_set, (features, names[-1]), units=IMAGES),
        ],
        turns,
    )
    theirs, blocked, single, ours = found[0], found[1], found[-2], found[-1]
    flop = 2.0 * PATCHES * (IMAGES - 1) * PATCHES * WIDTH
    print(f"\n## Batched zero-shot, bottle: an image against 82\n\n{table(found, theirs)}\n")
    print(f"Rates (all at once: as if each product were computed twice): {rates(found, flop)}\n")
    precision, most = ceiling(names[-1], ceilings)
    verdicts.at_least(f"batched, {whole}, against the official code", ours.ratio(theirs), OFFICIAL_AIM)
    verdicts.at_least(
        f"batched, {names[-1]}, one by one, against the official code", single.ratio(theirs), OFFICIAL_AIM
    )
    verdicts.at_least("batched, where reduced distances would do", ours.ratio(theirs), REDUCED_AIM)
    verdicts.at_least("batched, against blocked float32 products", ours.ratio(blocked), BLOCKED_AIM)
    verdicts.at_least(f"batched, share of the {precision} product", flop / single.median / most, SHARES["batched"])
    for result in (single, ours):
        figure = f"batched, {result.name}, peak memory of the official code over ours"
        verdicts.at_least(figure, theirs.peak_bytes / result.peak_bytes, MEMORY_AIM)
    exact = ways.exact_batched(features, turns - 1)
    worst = max(np.abs(result.extra - exact).max() for result in found[2:])
    verdicts.at_most("batched, distances off float64", worst, MAX_ERROR)
    # It averages what is less than the n-th lowest: where float32 ties there, one distance fewer.
    print(f"\nThe official distances are off float64 by {np.abs(theirs.extra - exact).max():.1e}\n")
    return found


def against_musc(features: str, folder: str, turns: int, verdicts: Verdicts) -> list[Result]:
    name = kernels()[-1]
    found = compete(
        [
            Contender("MuSc", ways.musc, (folder, features)),
            Contender(f"{name}, mode musc", ways.our_batched, (features, name, "musc"), units=ways.SHARD),
        ],
        turns,
    )
    print(f"\n## MuSc's mutual scoring, bottle: one image against 82\n\n{table(found, found[0])}\n")
    verdicts.at_least("mode musc against MuSc's own code", found[1].ratio(found[0]), 1.0)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", required=True)
    parser.add_argument("--musc")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(circumstances(), "\n")
    verdicts = Verdicts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bottle.npy"
        # In a process of its own: on Linux the peak memory of a child starts at its parent's.
        encoder = multiprocessing.get_context("spawn").Process(target=ways.encode_bottle, args=(path,))
        encoder.start()
        encoder.join()
        features = str(path)
        plain, ceilings = products(options.turns)
        results = {"products": plain, "nearest": nearest(features, 3 * options.turns, ceilings, verdicts)}
        results["batched"] = batched(features, options.official, options.turns, ceilings, verdicts)
        if options.musc:
            results["musc"] = against_musc(features, options.musc, options.turns, verdicts)
        else:
            verdicts.not_measured("mode musc against MuSc's own code", "no checkout was given")
    write_json(options.json, results)
    return verdicts.status


if __name__ == "__main__":
    sys.exit(main())
