import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.telemetry.flops import mfu, peak_flops, training_flops
from iiverl_core.training.planning import Work

LAYERS, HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB = 32, 32, 128, 4096, 11008, 32000  # Llama 2 7B
LLAMA_7B = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * MLP) + 2 * VOCAB * HIDDEN


def alone(*lengths: int) -> list[Work]:
    return [Work(n, n * n) for n in lengths]


def test_llama_7b_has_the_known_number_of_flops():
    assert LLAMA_7B == 6_738_149_376
    assert training_flops(LLAMA_7B, LAYERS, HEADS, HEAD_DIM, alone(512, 1024, 2048)) == 149_226_491_215_872


def test_counting_norms_as_well_changes_next_to_nothing():
    full = LLAMA_7B + (2 * LAYERS + 1) * HIDDEN
    assert full == 6_738_415_616
    more = training_flops(full, LAYERS, HEADS, HEAD_DIM, alone(512, 1024, 2048))
    assert more == pytest.approx(149_226_491_215_872, rel=4e-5)


@given(st.lists(st.integers(1, 5000), max_size=6), st.lists(st.integers(1, 5000), max_size=6))
def test_flops_of_two_batches_add_up(a: list[int], b: list[int]):
    def count(lengths: list[int]) -> int:
        return training_flops(1000, 2, 4, 16, alone(*lengths))

    assert count(a + b) == count(a) + count(b)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None):
    assert peak_flops(name) == peak


def test_mfu_is_a_share_of_all_devices():
    assert mfu(2 * 989e12, 1.0, "NVIDIA H100 80GB HBM3", devices=8) == pytest.approx(0.25)
    assert mfu(989e12, 4.0, "NVIDIA H100 80GB HBM3", devices=1) == pytest.approx(0.25)


def test_mfu_is_not_made_up():
    assert mfu(1e12, 1.0, "cpu", devices=2) is None
    assert mfu(1e12, 0.0, "NVIDIA H200", devices=2) is None
