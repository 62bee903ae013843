"""Engines that are not in the product: `torch.compile` and int8 by NNCF, beside those that are.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/other_engines.py [--ways eager compiled openvino int8] [--accuracy]

The forward pass of DINOv2 S/14 on one image, 448 pixels, two threads, in turns. ``--accuracy`` adds what int8 does to scores
and AUROC on bottle and screw, 1 shot: calibrated on up to 32 training images of the category (NNCF's defaults for transformers).
``compiled`` needs a C++ compiler, ``int8`` needs ``pip install nncf``.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from contest import ASSETS, WEIGHTS, Contender, circumstances, compete, table
from sklearn.metrics import roc_auc_score

MASKING = {"bottle": "off", "screw": "on"}
CALIBRATED_ON = 32


def prepared(paths: list) -> list:
    """(3, 448, 448) normalised float32 each."""
    from anomalydino_plugin import prepare_image, read_image

    return [prepare_image(read_image(path), 448, 14).reshape(3, 448, 448) for path in paths]


def training_images(category: str, count: int) -> list:
    return sorted((ASSETS / "data" / "mvtec" / category / "train" / "good").iterdir())[:count]


def torch_way(compiled: bool) -> Callable[[int], float]:
    import torch

    from anomalydino_plugin import load_backbone

    torch.set_num_threads(2)
    backbone = load_backbone("dinov2_vits14", WEIGHTS)
    (image,) = prepared(training_images("bottle", 1))
    batch = image.reshape(1, *image.shape[-3:])
    run = torch.compile(backbone) if compiled else backbone

    @torch.inference_mode()
    def work(_: int) -> float:
        return float(run(batch).sum())

    return work


def openvino_way(int8: bool) -> Callable[[int], float]:
    import torch

    from anomalydino_plugin import load_backbone

    torch.set_num_threads(2)
    backbone = load_backbone("dinov2_vits14", WEIGHTS)
    (image,) = prepared(training_images("bottle", 1))
    engine = engine_of(backbone, "bottle" if int8 else None)
    batch = image.reshape(1, *image.shape[-3:])
    return lambda _: float(engine(batch).sum())


def engine_of(backbone: Any, int8: str | None) -> Any:
    """Our OpenVINO engine; with the graph quantised on a category's training images."""
    from anomalydino_plugin.engines import openvino_engine

    engine = openvino_engine.OpenVINOEngine(backbone)
    if int8 is None:
        return engine
    import nncf
    import openvino

    images = prepared(training_images(int8, CALIBRATED_ON))
    grid = [edge // backbone.patch_size for edge in images[0].shape[-2:]]
    prefix, positions = (part.detach().numpy() for part in backbone.positions(*grid))
    inputs = [[image.reshape(1, *image.shape[-3:]).numpy(), prefix, positions] for image in images]
    core = openvino.Core()
    graph = nncf.quantize(
        openvino_engine._graph(backbone, core),
        nncf.Dataset(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CALIBRATED_ON,
    )
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 1}
    engine._request = core.compile_model(graph, "CPU", settings).create_infer_request()
    return engine


WAYS: dict[str, tuple[Callable[..., Any], tuple]] = {
    "eager": (torch_way, (False,)),
    "compiled": (torch_way, (True,)),
    "openvino": (openvino_way, (False,)),
    "int8": (openvino_way, (True,)),
}


def accuracy(category: str) -> None:
    """Scores of int8 features, banks included, beside the official code's."""
    import torch

    from anomalydino_plugin import FewShotModel, load_backbone, read_image

    torch.set_num_threads(2)
    data = ASSETS / "data" / "mvtec" / category
    golden = json.loads((ASSETS / "golden" / "fewshot_448_1shot.json").read_text())[category]["0"]
    backbone = load_backbone("dinov2_vits14", WEIGHTS)
    model = FewShotModel(backbone, masking=MASKING[category], engine="openvino")
    engine = engine_of(backbone, category)
    model.encode([model.prepare(read_image(data / "train" / "good" / "000.png"))])
    (key,) = model._engines
    model._engines = {key: engine}
    model.fit([data / "train" / "good" / "000.png"])
    if list(model._engines.values()) != [engine]:
        raise SystemExit("the model loaded an engine of its own")
    found = {name: model.score(data / "test" / name).score for name in golden["scores"]}
    off = [abs(found[name] / value - 1) for name, value in golden["scores"].items()]
    auroc = 100 * roc_auc_score([not name.startswith("good/") for name in found], list(found.values()))
    print(
        f"| {category} | {100 * golden['auroc']:.2f} | {auroc:.2f} | {np.median(off):.1%} | {max(off):.1%} |",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["eager", "compiled", "openvino"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--accuracy", action="store_true")
    options = parser.parse_args()
    print(circumstances(), "\n")
    found = compete([Contender(name, *WAYS[name]) for name in options.ways], options.turns)
    print(table(found, found[0]), "\n", flush=True)
    if options.accuracy:
        print(
            "| category | AUROC of reference | int8 | scores off, median | largest |\n| --- | --- | --- | --- | --- |"
        )
        for category in MASKING:
            accuracy(category)
    return 0


if __name__ == "__main__":
    sys.exit(main())
