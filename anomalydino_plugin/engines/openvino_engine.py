"""The backbone in OpenVINO, on the CPU.

One graph serves every grid and batch size: the position embeddings are an input, resampled by the backbone itself. The
graph is traced once and kept in the cache folder, as tracing takes seconds. It is known by the checksum of all
parameters, so other weights never meet an old graph.

Legend: ``B`` images, ``H W`` pixels, ``P`` patches, ``D`` features.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from anomalydino_plugin.backbone import Backbone
from anomalydino_plugin.weights import cache_folder

logger = logging.getLogger(__name__)
_FORMAT = 1  # of the traced graph
_TRACE_GRID = (4, 6)  # patches; any will do


class OpenVINOEngine:
    """Runs a backbone.

    Args:
        backbone: DINOv2, float32, on the CPU.
        bfloat16: compute in it where the processor can; else in float32, which OpenVINO must be told.
    """

    def __init__(self, backbone: Backbone, *, bfloat16: bool = False) -> None:
        import openvino

        self.backbone = backbone
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        }
        core = openvino.Core()
        self._request = core.compile_model(_graph(backbone, core), "CPU", settings).create_infer_request()

    def __call__(self, images: Tensor) -> Tensor:
        """See ``Engine``."""
        rows, columns = (edge // self.backbone.patch_size for edge in images.shape[-2:])
        prefix, positions = self.backbone.positions(rows, columns)
        inputs = [np.ascontiguousarray(tensor.detach().numpy()) for tensor in (images, prefix, positions)]
        found = self._request.infer(inputs, share_inputs=True)[0]
        return torch.from_numpy(np.array(found))


class _Tokens(nn.Module):
    """Images, prefix tokens and position embeddings -> patch tokens, without shapes in Python."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.vit, self.prefix_tokens = cast(Any, backbone.vit), backbone.prefix_tokens

    def forward(self, images: Tensor, prefix: Tensor, positions: Tensor) -> Tensor:
        patches = self.vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + positions
        tokens = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
        tokens = self.vit.norm(self.vit.blocks(self.vit.norm_pre(tokens)))
        return cast(Tensor, tokens[:, self.prefix_tokens :])


def _graph(backbone: Backbone, core: Any) -> Any:
    """The traced graph, from the cache if it is there."""
    import openvino

    path = cache_folder() / "openvino" / f"{_checksum(backbone, openvino.__version__)}.xml"
    if path.is_file():
        return core.read_model(path)
    graph = _trace(backbone)
    try:
        _keep(graph, path)
    except OSError as error:
        logger.warning("the traced backbone could not be kept in %s: %s", path.parent, error)
    return graph


def _trace(backbone: Backbone) -> Any:
    import openvino

    edges = [edge * backbone.patch_size for edge in _TRACE_GRID]
    prefix, positions = backbone.positions(*_TRACE_GRID)
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, of shapes that the graph takes as they come
        example = (torch.zeros(2, 3, *edges), prefix.clone(), positions.clone())
        graph = openvino.convert_model(_Tokens(backbone), example_input=example)
    shapes = [[-1, 3, -1, -1], list(prefix.shape), [1, -1, positions.shape[2]]]
    graph.reshape({place: openvino.PartialShape(shape) for place, shape in enumerate(shapes)})
    return graph


def _keep(graph: Any, path: Path) -> None:
    """Write the graph whole or not at all: weights first, as the file that is looked for names them."""
    import openvino

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        openvino.save_model(graph, Path(folder) / path.name, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            os.replace((Path(folder) / path.name).with_suffix(suffix), path.with_suffix(suffix))  # noqa: PTH105


def _checksum(backbone: Backbone, version: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {version} {backbone.name}".encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()
