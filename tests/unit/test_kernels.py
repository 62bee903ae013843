"""Which kernel runs where, and what only the compiled ones could get wrong."""

import copy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anomalydino_plugin import (
    ConfigError,
    FewShotModel,
    MemoryBank,
    RunningLowest,
    SearchRows,
    block_rows,
    kernel_for,
    nearest,
    search_rows,
)
from anomalydino_plugin.few_shot.bank_module import BankModule
from anomalydino_plugin.kernels import faiss_search
from anomalydino_plugin.kernels import rows as kernel_rows


def unit_rows(count: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def tiled() -> list[str]:
    return [name for name in ("tiles_f32", "tiles_bf16", "tiles_int8") if not kernel_rows._missing(name, "cpu", 2)]


needs_tiles = pytest.mark.skipif(not tiled(), reason="needs numba and a processor with AVX-512")


def test_auto_takes_the_fastest_that_can_run(monkeypatch):
    monkeypatch.setattr(kernel_rows, "_cpu_has", lambda feature: feature == "avx512f")
    assert kernel_for("auto") == "tiles_f32"
    monkeypatch.setattr(kernel_rows, "_cpu_has", lambda feature: feature != "avx512vnni")
    assert kernel_for("auto") == "tiles_bf16"
    monkeypatch.setattr(kernel_rows, "_cpu_has", lambda _: True)
    assert kernel_for("auto") == "tiles_int8"
    monkeypatch.setattr(kernel_rows, "_cpu_has", lambda _: False)
    assert kernel_for("auto") == "torch"
    assert block_rows("auto") == 8192


@pytest.mark.parametrize(
    ("kernel", "device", "width", "message"),
    [
        ("fast", "cpu", 2, "expected one of 'auto', 'torch'"),
        ("tiles_bf16", "cuda", 2, "runs on the CPU, not on 'cuda'"),
        ("tiles_bf16", "cpu", 3, "features in pairs, not 3"),
    ],
)
def test_what_cannot_run_says_why(kernel, device, width, message):
    with pytest.raises(ConfigError, match=message):
        kernel_for(kernel, device, width)


def test_what_asks_for_the_processor_cannot_be_loaded(monkeypatch):
    """Found by a ceiling of memory: loading llvmlite ended the command with its traceback."""

    def short_of_memory(_):
        raise OSError("Could not find/load shared object file 'libllvmlite.so'\nand more")

    monkeypatch.setattr(kernel_rows, "_cpu_has", short_of_memory)
    assert kernel_for("auto") == "torch"
    with pytest.raises(ConfigError, match=r"llvmlite cannot be loaded: Could not find/load .*libllvmlite\.so'\. Use"):
        kernel_for("tiles_f32")


def test_without_numba(monkeypatch):
    monkeypatch.setattr(kernel_rows.importlib.util, "find_spec", lambda _: None)
    assert kernel_for("auto") == "torch"
    with pytest.raises(ConfigError, match="numba is not installed"):
        kernel_for("tiles_bf16")


def test_few_rows_and_odd_widths_stay_with_torch():
    assert search_rows(unit_rows(100)).kernel == "torch"
    assert search_rows(unit_rows(5000, width=63)).kernel == "torch"


@needs_tiles
def test_compiled_code_that_cannot_be_kept(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "anomalydino_plugin.kernels.search", None)
    assert search_rows(unit_rows(5000)).kernel == "torch"
    assert "searching in torch" in caplog.text
    with pytest.raises(ConfigError, match="NUMBA_CACHE_DIR"):
        search_rows(unit_rows(5000), kernel=tiled()[0])


@needs_tiles
@pytest.mark.parametrize("kernel", tiled())
@pytest.mark.parametrize("count", [1, 15, 16, 17, 255, 256, 257, 5000])
def test_near_ties_below_the_precision_of_the_search(kernel, count):
    """Rows that differ by less than bfloat16 can tell apart: the best must still be the best."""
    base = unit_rows(1)
    bank = torch.nn.functional.normalize(base + 1e-2 * unit_rows(count, seed=1), dim=1)
    queries = torch.nn.functional.normalize(base + 1e-2 * unit_rows(70, seed=2), dim=1)
    match = nearest(queries, search_rows(bank, kernel=kernel), k=min(3, count))
    exact = (1 - queries.double() @ bank.double().T).clamp(0, 2).sort(dim=1).values[:, : min(3, count)]
    np.testing.assert_allclose(match.distances.numpy(), exact.numpy(), atol=3e-7)


@needs_tiles
@pytest.mark.parametrize("kernel", tiled())
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(kernel, threads):
    bank, queries = search_rows(unit_rows(3000), kernel=kernel), unit_rows(500, seed=1)
    expected = nearest(queries, bank)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = nearest(queries, bank)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.distances, expected.distances)
    assert torch.equal(found.rows, expected.rows)


@needs_tiles
@pytest.mark.parametrize("kernel", tiled())
@pytest.mark.parametrize(("lengths", "count"), [((20, 30), 5), ((20, 30), 40), ((300, 20, 30), 45)])
def test_the_image_left_out_never_counts_while_the_lowest_are_not_full(kernel, lengths, count):
    """Found in random order by a property test: its tiles have no maximum, which is within reach of an empty place."""
    images = [unit_rows(length, seed=seed) for seed, length in enumerate(lengths)]
    lowest, row = RunningLowest(images[0], count), 0
    for place, image in enumerate(images):
        lowest.update(search_rows(image, [len(image)], kernel), [len(image)], row, 0 if place == 0 else None)
        row += len(image)
    others = (1 - images[0].double() @ torch.cat(images[1:]).double().T).sort(dim=1).values[:, :count]
    np.testing.assert_allclose(lowest.result().distances.numpy(), others.mean(dim=1).numpy(), atol=2e-6)
    assert (lowest.result().rows >= lengths[0]).all()
    together = RunningLowest(images[0], count)
    together.update(search_rows(torch.cat(images), lengths, kernel), lengths, 0, 0)
    np.testing.assert_allclose(together.result().distances.numpy(), others.mean(dim=1).numpy(), atol=2e-6)


@pytest.mark.parametrize("kernel", ["torch", *tiled()])
@pytest.mark.parametrize("away", [1, -1])
def test_distances_stay_between_0_and_2(kernel, away):
    """Rows a rounding longer than one, equal and opposite to the queries: their products lie beyond 1 and -1."""
    queries = 1.000001 * unit_rows(20)
    bank = away * queries[:1].repeat(5000, 1)
    assert (away * (queries[0].double() @ bank[0].double())) > 1
    rows = search_rows(bank, kernel=kernel)
    assert rows.kernel == kernel
    lowest = RunningLowest(queries, 3)
    lowest.update(search_rows(bank, [5000], kernel), [5000], 0)
    for distances in (nearest(queries, rows, k=2).distances, lowest.result().distances):
        assert distances.min() >= 0
        assert distances.max() <= 2
        assert (distances == (0 if away > 0 else 2)).any()
    assert (lowest.result().rows < 5000).all()


@needs_tiles
def test_zero_vectors_equal_rows_and_no_query():
    bank = torch.cat([torch.zeros(20, 8), unit_rows(1, 8).repeat(600, 1)])
    match = nearest(torch.cat([torch.zeros(1, 8), bank[-1:]]), search_rows(bank, kernel=tiled()[-1]), k=2)
    assert match.distances[0].tolist() == [1.0, 1.0]
    assert match.rows[1].tolist() == [20, 21]  # the lower row first among equals
    assert len(nearest(bank[:0], search_rows(bank, kernel=tiled()[-1])).rows) == 0


def test_a_changed_bank_is_laid_out_again():
    module = BankModule(8)
    empty = {"sources": torch.zeros(5, 4, dtype=torch.int32), "foreground": torch.ones(5, dtype=torch.bool)}
    names = {"image_ids": ("a",), "angles": (0.0,), "sizes": ((1, 5),), "fingerprint": {}}
    module.put(MemoryBank(rows=unit_rows(5, 8), **empty, **names))
    first = module.search_rows("torch")
    assert module.search_rows("torch") is first
    module.rows.mul_(-1)
    assert module.search_rows("torch") is not first
    copied = copy.deepcopy(module)
    assert copied._laid_out is None
    module.put(MemoryBank(rows=unit_rows(5, 8, seed=3), **empty, **names))
    assert torch.equal(module.search_rows("torch").rows, module.rows)


def test_a_model_may_ask_for_the_gpu_kernel_before_it_is_moved_there(tiny_backbone):
    """Models are built on the CPU; what is refused is searching there."""
    model = FewShotModel(tiny_backbone, resolution=64, kernel="triton", masking="off")
    with pytest.raises(ConfigError, match="runs on a GPU, not on 'cpu'|triton is not installed"):
        model.memory.search_rows(model.kernel)


def test_the_model_refuses_an_unknown_kernel(tiny_backbone):
    with pytest.raises(ConfigError, match="kernel='quick'"):
        FewShotModel(tiny_backbone, kernel="quick")


class TestApproximateSearch:
    """`faiss_ivf`: exact where it looks into every cell, and exact in the distances of what it finds."""

    @pytest.fixture(autouse=True)
    def _needs_faiss(self):
        pytest.importorskip("faiss")

    @pytest.mark.parametrize("k", [1, 3])
    def test_every_cell_looked_into_equals_exact_search(self, k):
        bank, queries = unit_rows(3000), unit_rows(40, seed=1)
        layout = faiss_search.faiss_rows(bank, probed=10_000)
        exact = nearest(queries, bank, k=k)
        found = nearest(queries, SearchRows(bank, (3000,), "faiss_ivf", layout), k=k)
        np.testing.assert_allclose(found.distances, exact.distances, atol=1e-6)
        assert (found.rows == exact.rows).float().mean() > 0.99  # float16 in the cells: near ties may swap

    def test_distances_are_those_of_the_rows_found(self):
        bank, queries = unit_rows(5000), unit_rows(30, seed=1)
        found = nearest(queries, search_rows(bank, kernel="faiss_ivf"))
        expected = 1 - (queries.double() * bank[found.rows[:, 0]].double()).sum(dim=1)
        np.testing.assert_allclose(found.distances[:, 0], expected, atol=1e-6)
        exact = nearest(queries, bank)
        assert (found.distances >= exact.distances - 1e-6).all()

    def test_the_same_rows_give_the_same_cells(self):
        bank, queries = unit_rows(5000), unit_rows(30, seed=1)
        first, second = (nearest(queries, search_rows(bank, kernel="faiss_ivf")) for _ in range(2))
        assert torch.equal(first.rows, second.rows)

    def test_few_rows_give_k_different_ones(self):
        bank, queries = unit_rows(6), unit_rows(5, seed=1)
        found = nearest(queries, search_rows(bank, kernel="faiss_ivf"), k=6)
        assert found.rows.sort(dim=1).values.tolist() == [list(range(6))] * 5

    def test_mutual_matching_stays_exact(self):
        rows, queries = unit_rows(500), unit_rows(20, seed=1)
        exact, other = RunningLowest(queries, 5), RunningLowest(queries, 5)
        exact.update(rows, [500], 0)
        other.update(search_rows(rows, kernel="faiss_ivf"), [500], 0)
        assert torch.equal(exact.result().distances, other.result().distances)

    def test_only_on_the_cpu(self):
        with pytest.raises(ConfigError, match="runs on the CPU, not on 'cuda'"):
            kernel_for("faiss_ivf", "cuda")


def test_without_faiss(monkeypatch):
    found = kernel_rows.importlib.util.find_spec
    monkeypatch.setattr(kernel_rows.importlib.util, "find_spec", lambda name: None if name == "faiss" else found(name))
    with pytest.raises(ConfigError, match="faiss is not installed"):
        kernel_for("faiss_ivf")


def test_where_triton_fails_its_trial_auto_says_so_and_takes_torch(monkeypatch, caplog):
    gpu_search = pytest.importorskip("anomalydino_plugin.kernels.gpu_search")
    monkeypatch.setattr(gpu_search, "why_not", lambda device: "CompilationError: no compiler")
    monkeypatch.setattr(kernel_rows, "kernel_for", lambda *_: "triton")
    rows = torch.nn.functional.normalize(torch.randn(5000, 4), dim=1)
    assert search_rows(rows, kernel="auto").kernel == "torch"
    assert "Triton cannot run on cpu: CompilationError: no compiler" in caplog.text
    with pytest.raises(ConfigError, match="kernel='triton' cannot run on 'cpu': CompilationError: no compiler"):
        search_rows(rows, kernel="triton")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernel_rows.importlib.util, "find_spec", lambda _: None)
    assert kernel_rows._no_triton("cuda") == "triton is not installed"
    assert kernel_for("auto", "cuda") == "torch"


@pytest.mark.parametrize(("memory", "rows"), [(80 * 10**9, 80 * 10**9 // 4 // (7 * 384)), (10**6, 8192)])
def test_a_gpus_memory_says_how_many_rows_it_holds_at_a_time(monkeypatch, memory, rows):
    found = {"cuda:1": SimpleNamespace(total_memory=memory)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", found.__getitem__)
    monkeypatch.setattr(kernel_rows, "_no_triton", lambda device: "")
    assert block_rows("auto", "cuda:1", 384) == rows
    assert block_rows("torch", "cuda", 384) == 8192


@needs_tiles
def test_blocks_of_two_kernels_are_not_taken_into_each_other():
    rows = torch.nn.functional.normalize(torch.randn(5000, 4), dim=1)
    layout = search_rows(rows, kernel=tiled()[0]).layout
    assert not layout.take_in_each_other(object(), [], [], (0, 0))
