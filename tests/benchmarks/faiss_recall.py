"""What approximate search misses and saves: `faiss_ivf` beside exact search in a bank of many reference images.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/faiss_recall.py [--references 48] [--images 24]

Screw, 448 pixels, 8 rotations: 8,192 rows a reference image. Recall: share of patches whose nearest row is found.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from contest import ASSETS, WEIGHTS, circumstances
from verdicts import Verdicts

PROBED = (8, 32, 128)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main() -> int:
    import torch

    from anomalydino_plugin import (
        FewShotModel,
        SearchRows,
        image_score,
        load_backbone,
        nearest,
        read_image,
        search_rows,
    )
    from anomalydino_plugin.kernels.faiss_search import faiss_rows

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=48)
    parser.add_argument("--images", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(2)
    data = ASSETS / "data" / "mvtec" / "screw"
    model = FewShotModel(load_backbone("dinov2_vits14", WEIGHTS), masking="off")
    model.fit(sorted((data / "train" / "good").iterdir())[: options.references])
    tests = sorted((data / "test").rglob("*.png"))
    tests = tests[:: len(tests) // options.images][: options.images]
    queries = [
        torch.nn.functional.normalize(model.encode([model.prepare(read_image(path))])[0], dim=1) for path in tests
    ]
    bank = model.bank.rows
    exact = search_rows(bank)
    nearest(queries[0], exact)
    seconds, truth = zip(*(timed(lambda q=q: nearest(q, exact)) for q in queries), strict=True)
    print(f"{circumstances()}\n\n{len(bank)} rows, {len(queries)} images of {len(queries[0])} patches\n")
    print(
        "| search | build, s | an image, ms | recall | mean distance too high by | largest | score too high by, at most |"
    )
    print("| --- " * 7 + "|")
    print(f"| {exact.kernel}, exact | - | {1e3 * statistics.median(seconds):.0f} | 1 | 0 | 0 | 0 |", flush=True)
    verdicts, recalls = Verdicts(), dict[int, float]()
    for probed in PROBED:
        build, layout = timed(lambda p=probed: faiss_rows(bank, probed=p))
        rows = SearchRows(bank, (len(bank),), "faiss_ivf", layout)
        seconds, found = zip(*(timed(lambda q=q, r=rows: nearest(q, r)) for q in queries), strict=True)
        pairs = list(zip(found, truth, strict=True))
        recall = recalls[probed] = statistics.mean(
            float((one.rows == other.rows).float().mean()) for one, other in pairs
        )
        excess = torch.cat([one.distances - other.distances for one, other in pairs])
        scores = [
            float(image_score(one.distances[:, 0]) / image_score(other.distances[:, 0])) - 1 for one, other in pairs
        ]
        print(
            f"| faiss_ivf, {probed} of {layout.index.nlist} cells | {build:.0f} | {1e3 * statistics.median(seconds):.0f} | "
            f"{recall:.4f} | {float(excess.mean()):.1e} | {float(excess.max()):.1e} | {max(scores):.2%} |",
            flush=True,
        )
    print()
    for probed, recall in recalls.items():
        verdicts.report(f"faiss_ivf, {probed} cells: share of the nearest rows that it finds", recall)
    return 0


if __name__ == "__main__":
    sys.exit(main())
