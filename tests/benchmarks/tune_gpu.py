"""Ways to run backbone and matching on one GPU, to choose from.

    python tests/benchmarks/tune_gpu.py [--parts encode nearest batched]

Weights are untrained and rows random: speed does not depend on them.
"""

import argparse
import contextlib
import copy
import functools
import time
from collections.abc import Callable

import torch
import triton
from speed_gpu import FULL, encode_flop, product_rate, seconds, unit


def graphed(work: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """The same launches as one."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def encode(ceiling: float) -> None:
    from anomalydino_plugin import load_backbone
    from anomalydino_plugin.engines.half_gpu import HalfEngine

    print("## Encoding\n\n| backbone | pixels | way | batch | ms | images/s | share of the product |")
    print("| --- " * 7 + "|", flush=True)
    for name, resolution, batch in (("dinov2_vits14", 448, 1), ("dinov2_vits14", 448, 32), ("dinov2_vits14", 672, 32)):
        backbone = load_backbone(name, "random:0").to("cuda")
        half = copy.deepcopy(backbone).half()
        images = torch.randn(batch, resolution, resolution, 3, device="cuda").permute(0, 3, 1, 2)  # as pixels come

        def autocast(backbone=backbone, images=images) -> torch.Tensor:
            with torch.autocast("cuda", torch.float16):
                return backbone(images)

        ours = functools.partial(HalfEngine(backbone), images)
        ways = {
            "autocast": autocast,
            "float16 copy": lambda h=half, i=images: h(i.half()),
            "torch_half": ours,
            "torch_half, CUDA graph": graphed(ours),
        }
        for way, work in ways.items():
            took = seconds(work, "cuda", 10)
            rate = batch / took
            share = rate * encode_flop(name, resolution) / ceiling
            row = f"{name} | {resolution} | {way} | {batch} | {1e3 * took:.2f} | {rate:.0f} | {share:.3f}"
            print(f"| {row} |", flush=True)


def nearest(ceiling: float) -> None:
    from anomalydino_plugin import nearest as search
    from anomalydino_plugin import search_rows
    from anomalydino_plugin.kernels import triton_products as products

    bank = unit(131_072, "cuda")
    rows = search_rows(bank, kernel="triton")
    print("\n## Tiles' maxima\n\n| queries | blocks | ms | share of the product |\n" + "| --- " * 4 + "|", flush=True)
    best = (0.0, None)
    for blocks in (
        products.Blocks(128, 128, 64, 4, 3),
        products.Blocks(128, 128, 64, 8, 3),
        products.Blocks(128, 128, 64, 4, 4),
        products.Blocks(128, 128, 64, 8, 4),
        products.Blocks(128, 128, 128, 8, 2),
        products.Blocks(128, 128, 128, 8, 3),
        products.Blocks(128, 256, 64, 8, 3),
        products.Blocks(128, 256, 64, 8, 4),
        products.Blocks(256, 128, 64, 8, 3),
        products.Blocks(256, 128, 64, 8, 4),
        products.Blocks(128, 64, 64, 4, 4),
    ):
        for count in (1024, 8192):
            half = unit(count, "cuda").half()
            with contextlib.suppress(triton.OutOfResources):  # blocks that the card cannot hold
                took = seconds(lambda h=half, b=blocks: products.tile_maxima(h, rows.layout.half, -2.0, b), "cuda", 20)
                share = 2.0 * 384 * count * len(bank) / took / ceiling
                print(f"| {count} | {tuple(blocks)} | {1e3 * took:.3f} | {share:.3f} |", flush=True)
                if count == 8192:
                    best = max(best, (share, blocks))
    print("best:", best)
    products.tile_maxima.__defaults__ = (best[1],)
    print("\n| queries | whole search, ms | share of the product | off float64 |\n" + "| --- " * 4 + "|", flush=True)
    for count in (1024, 2304, 8192):
        queries = unit(count, "cuda")
        took = seconds(lambda q=queries: search(q, rows), "cuda", 20)
        found = search(queries[:256], rows).distances[:, 0]
        exact = (1 - queries[:256].double() @ bank.double().T).amin(dim=1)
        share = 2.0 * 384 * count * len(bank) / took / ceiling
        print(f"| {count} | {1e3 * took:.3f} | {share:.3f} | {float((found - exact).abs().max()):.1e} |", flush=True)
    took = seconds(lambda: search(unit(1024, "cuda"), bank), "cuda", 5)
    print(f"torch, float32, 1024 queries: {1e3 * took:.2f} ms")


def batched(ceiling: float) -> None:
    from anomalydino_plugin import RunningLowest, lowest_count, search_rows
    from anomalydino_plugin.kernels import triton_products as products

    images, patches = 500, 2304
    stored = unit(images * patches, "cuda")
    rows = search_rows(stored, [patches] * images, "triton")
    count = lowest_count("official", images - 1, (images - 1) * patches)
    queries = stored[:patches].contiguous()
    flop = 2.0 * 384 * patches * len(stored)

    def one() -> RunningLowest:
        lowest = RunningLowest(queries, count)
        lowest.update(rows, rows.lengths, 0, 0)
        return lowest

    print(f"\n## Batched, one of {images} images of {patches} patches\n", flush=True)
    print("| blocks | s for all images | share of the product |\n" + "| --- " * 3 + "|", flush=True)
    best = (0.0, products.Blocks())
    for blocks in (
        products.Blocks(128, 128, 64, 8, 3),
        products.Blocks(128, 128, 64, 4, 3),
        products.Blocks(128, 64, 64, 4, 4),
        products.Blocks(128, 64, 64, 8, 4),
        products.Blocks(128, 256, 64, 8, 3),
        products.Blocks(64, 128, 64, 4, 4),
        products.Blocks(64, 256, 64, 8, 3),
        products.Blocks(64, 64, 64, 4, 4),
    ):
        products.collect.__defaults__ = (blocks,)
        with contextlib.suppress(triton.OutOfResources):  # blocks that the card cannot hold
            took = seconds(one, "cuda", 3)
            best = max(best, (flop / took / ceiling, blocks))
            print(f"| {tuple(blocks)} | {images * took:.1f} | {flop / took / ceiling:.3f} |", flush=True)
    products.collect.__defaults__ = (best[1],)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        one()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=40))
    some = torch.arange(0, patches, 64, device="cuda")
    similarity = queries[some].double() @ stored[patches:].double().T
    exact = (1 - similarity.topk(count, dim=1).values).mean(dim=1)
    found = one().result()
    print(f"off float64: {float((found.distances[some] - exact).abs().max()):.1e}")
    print(f"rows equal: {bool((found.rows[some] == similarity.argmax(dim=1) + patches).all())}")


PARTS = {"nearest": nearest, "batched": batched, "encode": encode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    with torch.inference_mode():
        ceiling = product_rate(FULL, "cuda")
        for part in parser.parse_args().parts:
            started = time.perf_counter()
            PARTS[part](ceiling)
            print(f"({part}: {time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
