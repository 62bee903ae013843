"""Bank, thresholds and normal scores keep their bits whatever precision a host asks for; state dicts of any length."""

import dataclasses

import pytest
import torch
from generated import TINY, textured
from torch import nn

from anomalydino_plugin import BankError, FewShotModel, load_backbone
from anomalydino_plugin.exact_buffers import ExactBuffers
from anomalydino_plugin.few_shot.bank_module import BankModule
from anomalydino_plugin.post_processor import AnomalyDINOPostProcessor

CASTS = {
    "half": lambda module: module.half(),
    "to float16": lambda module: module.to(torch.float16),
    "to bfloat16": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "float": lambda module: module.float(),
    "half and back": lambda module: module.half().float(),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
}


@pytest.fixture(params=CASTS.values(), ids=CASTS)
def cast(request):
    return request.param


@pytest.fixture
def backbone():
    """One of our own: casts would round the weights of the session's."""
    return load_backbone(TINY, "random:0")


@pytest.fixture
def model(backbone):
    return FewShotModel(backbone, resolution=64, masking="off").fit([textured(0), textured(1)])


def calibrated(scores=(0.1, 0.2, 1 / 3), peaks=(0.3, 0.4, 0.5)) -> AnomalyDINOPostProcessor:
    processor = AnomalyDINOPostProcessor()
    processor.calibrate(scores, peaks, 0.05)
    return processor


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_bit_equal(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = dict(module.named_buffers())
    assert after.keys() == before.keys()
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype, name
        assert torch.equal(after[name].nan_to_num(-1), buffer.nan_to_num(-1)), name


# Precision


def test_a_bank_keeps_its_bits(model, cast):
    before, source = snapshot(model.memory), model.bank.source(77)
    assert cast(model.memory) is model.memory
    assert_bit_equal(model.memory, before)
    assert {name: buffer.dtype for name, buffer in before.items()} == {
        "rows": torch.float32,
        "sources": torch.int32,
        "foreground": torch.bool,
    }
    assert model.bank.source(77) == source


def test_a_model_keeps_its_bank_and_casts_its_encoder(model, cast):
    before = snapshot(model.memory)
    expected = cast(nn.Linear(1, 1)).weight.dtype
    cast(model)
    assert_bit_equal(model.memory, before)
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {expected}


def test_a_post_processor_keeps_its_bits(cast):
    processor = calibrated()
    before = snapshot(processor)
    cast(processor)
    assert_bit_equal(processor, before)
    assert processor.normal_scores.dtype == torch.float64
    assert processor.normal_scores.tolist() == [0.1, 0.2, 1 / 3]
    assert processor.image_threshold.dtype == torch.float32
    assert processor.calibrated


def test_the_cast_reaches_other_parts():
    """Only own buffers are exempt: those of children are the children's business."""

    class Parent(ExactBuffers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("own", torch.full((2,), 1 / 3))
            self.child = nn.BatchNorm1d(2)

    parent = Parent().half()
    assert parent.own.dtype == torch.float32
    assert parent.own.tolist() == torch.full((2,), 1 / 3).tolist()
    assert parent.child.weight.dtype == parent.child.running_mean.dtype == torch.float16


def test_moved_buffers_move(model):
    moved = model.memory.to("meta", torch.float16)
    assert {(buffer.device.type, buffer.dtype) for buffer in (moved.rows,)} == {("meta", torch.float32)}
    assert moved.sources.device.type == moved.foreground.device.type == "meta"


def test_thresholds_set_after_a_cast_are_exact():
    processor = AnomalyDINOPostProcessor().half()
    processor.calibrate([0.1, 1 / 3], [0.2, 0.7], 0.05)
    expected = AnomalyDINOPostProcessor()
    expected.calibrate([0.1, 1 / 3], [0.2, 0.7], 0.05)
    assert_bit_equal(processor, snapshot(expected))


# Encoding in reduced precision


@pytest.fixture
def low_precision() -> torch.dtype:
    """Half where the CPU has it, else bfloat16."""
    try:
        nn.functional.layer_norm(torch.ones(2, 4, dtype=torch.float16) @ torch.ones(4, 4, dtype=torch.float16), (4,))
    except RuntimeError:
        return torch.bfloat16
    return torch.float16


def test_the_encoder_runs_in_low_precision(model, low_precision):
    pixels = model.prepare(textured(5))
    exact = model.encode([pixels])
    rough = model.to(low_precision).encode([pixels])
    assert rough.dtype == torch.float32  # features always are
    assert not torch.equal(rough, exact)
    assert torch.nn.functional.cosine_similarity(rough, exact, dim=2).min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_in_low_precision_stay_within_a_few_per_cent(model, dtype, low_precision):
    if low_precision != torch.float16 and dtype == torch.float16:
        pytest.skip("no half precision on this CPU")
    probes = [textured(seed, spot=bool(seed % 2)) for seed in range(10, 16)]
    exact = [model.score(probe).score for probe in probes]
    model.to(dtype)
    rough = [model.score(probe).score for probe in probes]
    assert rough == pytest.approx(exact, rel=0.03)
    assert rough != exact  # the encoder did change
    assert min(exact) > 0.05  # and the scores are none of rounding errors


def test_a_bank_built_in_low_precision_is_float32(backbone, low_precision):
    rough = FewShotModel(backbone.to(low_precision), resolution=64, masking="off").fit([textured(0)])
    assert rough.memory.rows.dtype == torch.float32
    assert torch.allclose(rough.memory.rows.norm(dim=1), torch.ones(len(rough.memory)), atol=1e-6)


# State dicts of any length


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("known", [0, 2])
def test_normal_scores_of_any_length_load(count, known):
    stored = calibrated([0.1 * n for n in range(1, count + 1)], [0.5] * count) if count else AnomalyDINOPostProcessor()
    target = calibrated([9.0] * known, [9.0] * known) if known else AnomalyDINOPostProcessor()
    target.load_state_dict(stored.state_dict())
    assert_bit_equal(target, snapshot(stored))
    assert target.calibrated == (count > 0)


@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize("known", [0, 2])
def test_banks_of_any_length_load(backbone, references, known):
    stored = FewShotModel(backbone, resolution=64, masking="off", rotations="informed")
    target = FewShotModel(backbone, resolution=64, masking="off", rotations="informed")
    if references:
        stored.fit([textured(seed) for seed in range(references)])
    if known:
        target.fit([textured(seed) for seed in range(10, 10 + known)])
    target.load_state_dict(stored.state_dict())
    assert_bit_equal(target.memory, snapshot(stored.memory))
    assert len(target.memory) == references * 16
    if not references:
        with pytest.raises(BankError, match="empty"):
            target.score(textured(0))
        return
    assert target.bank.image_ids == stored.bank.image_ids
    assert target.score(textured(7)).score == stored.score(textured(7)).score


def test_a_loaded_bank_is_a_copy(model, backbone):
    again = FewShotModel(backbone, resolution=64, masking="off")
    again.load_state_dict(model.state_dict())
    again.memory.rows.zero_()
    assert model.memory.rows.abs().sum() > 0


def test_an_earlier_bank_object_survives_what_the_module_loads(model):
    earlier = model.bank
    rows = earlier.rows.clone()
    empty = FewShotModel(model.backbone, resolution=64, masking="off")
    model.load_state_dict(empty.state_dict())
    assert torch.equal(earlier.rows, rows)


def test_a_rounded_state_dict_loads_into_exact_buffers(model):
    state = {name: value.half() if name == "rows" else value for name, value in model.memory.state_dict().items()}
    target = BankModule(64)
    target.load_state_dict(state)
    assert target.rows.dtype == torch.float32
    assert torch.allclose(target.rows, model.memory.rows, atol=1e-3)


def test_a_state_dict_without_the_rows_is_refused(model):
    state = {name: value for name, value in model.memory.state_dict().items() if name != "rows"}
    with pytest.raises(RuntimeError, match='Missing key.*"rows"'):
        BankModule(64).load_state_dict(state)


# The bank as a module


def test_a_cleared_bank_is_gone(model, tmp_path):
    torch.save(model.memory.state_dict(), tmp_path / "full.pt")
    model.clear()
    assert len(model.memory) == 0
    assert model.masking_decision is None
    assert sum(buffer.untyped_storage().nbytes() for buffer in model.memory.buffers()) == 0
    torch.save(model.memory.state_dict(), tmp_path / "empty.pt")
    assert (tmp_path / "empty.pt").stat().st_size < 5000 < (tmp_path / "full.pt").stat().st_size
    with pytest.raises(BankError, match="memory bank is empty: fit the model"):
        model.memory.get()
    model.fit([textured(3)])
    assert model.score(textured(3)).score == pytest.approx(0, abs=1e-6)


def test_what_is_put_is_what_one_gets(model):
    bank = dataclasses.replace(model.bank, notes={"made": "on a Tuesday"})
    module = BankModule(64)
    module.put(bank)
    found = module.get()
    assert torch.equal(found.rows, bank.rows)
    assert torch.equal(found.sources, bank.sources)
    assert torch.equal(found.foreground, bank.foreground)
    assert dataclasses.replace(found, rows=0, sources=0, foreground=0) == dataclasses.replace(
        bank, rows=0, sources=0, foreground=0
    )
