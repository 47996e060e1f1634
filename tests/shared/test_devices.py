"""Every device file: complete figures, and peaks that follow from units, operations per cycle and clock."""

from __future__ import annotations

import math
import re

import pytest
import yaml
from hydra import compose, initialize_config_dir

from shared.hardware import list_devices, load_device
from shared.hardware.checks import MIN_J_PER_OP
from shared.hardware.device import DEVICE_FOLDER

DEVICES = list_devices()


def test_the_devices_are_there() -> None:
    kinds = [load_device(name).kind for name in DEVICES]
    assert len(DEVICES) >= 30
    assert set(kinds) == {"gpu", "soc", "cpu", "fpga", "npu", "ssd", "flash"}


@pytest.mark.parametrize("name", DEVICES)
def test_every_number_of_the_file_is_a_figure_with_unit_source_tag_and_uncertainty(name: str) -> None:
    # Walks the raw YAML, not the schema: a bare number anywhere would be caught here.
    def walk(node: object, path: str) -> int:
        if isinstance(node, dict) and "value" in node:
            assert {"unit", "source", "tag"} <= set(node), path
            assert ("rel_unc" in node) != ("lo" in node and "hi" in node), path
            return 1
        if isinstance(node, dict):
            return sum(walk(child, f"{path}.{key}") for key, child in node.items())
        if isinstance(node, list):
            return sum(walk(child, f"{path}[]") for child in node)
        assert isinstance(node, (str, bool)), f"{path} is a bare {node!r}"
        return 0

    raw = yaml.safe_load((DEVICE_FOLDER / f"{name}.yaml").read_text())
    assert walk(raw, name) == len(load_device(name).figures()) > 0


@pytest.mark.parametrize("name", DEVICES)
def test_floats_are_written_so_that_every_loader_reads_numbers(name: str) -> None:
    for number in re.findall(r"(?:value|lo|hi|rel_unc): ([^,}]+)", (DEVICE_FOLDER / f"{name}.yaml").read_text()):
        assert isinstance(yaml.safe_load(number), (int, float)), number
        assert "e" not in number or re.fullmatch(r"\d+\.\d+e[+-]\d+", number), number


@pytest.mark.parametrize("name", DEVICES)
def test_hydra_composes_the_group_into_the_package_device(name: str) -> None:
    with initialize_config_dir(str(DEVICE_FOLDER.parent), version_base="1.3"):
        cfg = compose(config_name=f"device/{name}")
    assert list(cfg) == ["device"]
    assert load_device(cfg.device) == load_device(name)


# units, operations per cycle and unit (2 per MAC), clock in Hz, precision
PEAKS = {
    "v100_sxm2_32gb": (80, 1024, 1.53e9, "fp16"),
    "a100_sxm4_80gb": (108, 2048, 1.41e9, "bf16"),
    "a100_sxm4_40gb": (108, 2048, 1.41e9, "fp16"),
    "a100_pcie_80gb": (108, 4096, 1.41e9, "int8"),
    "h100_sxm5_80gb": (132, 4096, 1.83e9, "bf16"),
    "h200_sxm_141gb": (132, 8192, 1.83e9, "fp8"),
    "h100_pcie_80gb": (114, 4096, 1.62e9, "bf16"),
    "mi250x_gcd": (110, 1024, 1.7e9, "bf16"),
    "rtx_a6000": (84, 1024, 1.8e9, "bf16"),
    "rtx_3090": (82, 512, 1.695e9, "bf16"),
    "rtx_4090": (128, 512, 2.52e9, "bf16"),
    "jetson_nano": (128, 4, 9.216e8, "fp16"),
    "jetson_tx2": (256, 2, 1.30e9, "fp32"),
    "jetson_orin_nano_8gb": (1024, 2, 6.25e8, "fp32"),
    "jetson_orin_nano_super_8gb": (1024, 2, 1.02e9, "fp32"),
    "raspberry_pi_4b": (4, 8, 1.5e9, "fp32"),
    "raspberry_pi_5": (4, 16, 2.4e9, "fp32"),
    "zcu104": (1728, 2, 3e8, "int16"),
    "zcu102": (2520, 4, 3e8, "int8"),
    "ethos_u55_32": (32, 2, 5e8, "int8"),
    "ethos_u55_256": (256, 2, 5e8, "int8"),
    "tpu_v4i": (4 * 128 * 128, 2, 1.05e9, "bf16"),
}
ROUNDED = {
    "v100_sxm2_32gb": 125.34e12,
    "tpu_v4i": 137.63e12,
}  # printed as 125e12 and 138e12: the product to five digits


@pytest.mark.parametrize("name", PEAKS)
def test_peak_is_units_times_operations_per_cycle_times_clock(name: str) -> None:
    units, per_cycle, clock_hz, precision = PEAKS[name]
    device, derived = load_device(name), units * per_cycle * clock_hz
    assert device.compute.clock is not None
    assert device.compute.clock.value == clock_hz
    if name in ROUNDED:
        assert derived == pytest.approx(ROUNDED[name], rel=1e-4)
        assert abs(device.op_per_s(precision) - derived) < 0.5e12
    else:
        assert device.op_per_s(precision) == pytest.approx(derived, rel=1e-3)


def test_peaks_are_dense_and_sparse_ones_are_apart() -> None:
    orin = load_device("jetson_orin_nano_8gb")
    assert orin.op_per_s("int8") == 2.0e13
    assert orin.sparse_peak["int8"].value == 4.0e13
    assert load_device("h200_sxm_141gb").op_per_s("bfloat16") == 9.89e14
    assert "int4" not in load_device("h100_sxm5_80gb").peak  # Hopper has no int4 tensor core
    mi250x = load_device("mi250x_gcd")
    assert mi250x.op_per_s("int8") == mi250x.op_per_s("float16")  # int8 does not double there
    assert load_device("rtx_3090").op_per_s("float16") == 7.12e13  # fp32 accumulation: half of the fp16-accumulate rate


def test_bandwidths_capacities_and_powers_as_printed() -> None:
    bandwidth = {
        "a100_sxm4_80gb": 2.039e12,
        "a100_sxm4_40gb": 1.555e12,
        "h100_sxm5_80gb": 3.35e12,
        "h200_sxm_141gb": 4.8e12,
        "rtx_4090": 1.008e12,
        "jetson_nano": 2.56e10,
        "raspberry_pi_4b": 1.28e10,
        "zcu104": 1.92e10,
        "quadro_rtx_8000": 6.72e11,
    }
    assert {name: load_device(name).bandwidth_bytes_per_s() for name in bandwidth} == bandwidth
    assert load_device("a100_sxm4_80gb").size_bytes() == pytest.approx(81_920 * 2**20, rel=1e-3)
    assert load_device("h100_sxm5_80gb").size_bytes() == pytest.approx(81_559 * 2**20, rel=1e-3)
    # 108 SMs of 192 KiB: 21.2e6 bytes
    assert load_device("a100_sxm4_80gb").size_bytes("l1") == pytest.approx(108 * 192 * 1024, rel=5e-3)
    assert load_device("quadro_rtx_8000").power_w("limit") == 295
    assert load_device("jetson_nano").power_w("limit") == 10
    assert load_device("nvme_gen4").storage_bytes_per_s("seq") == 7e9
    assert load_device("ufs_4_0").storage_bytes_per_s("rand_4k") == 4.5e8


def test_on_chip_memory_of_the_fabrics_is_blocks_times_bytes() -> None:
    zcu104 = load_device("zcu104")
    assert zcu104.size_bytes("bram") == pytest.approx(312 * 36 * 1024 / 8, rel=1e-3)
    assert zcu104.size_bytes("uram") == pytest.approx(96 * 288 * 1024 / 8, rel=1e-3)
    assert zcu104.size_bytes("bram", usable=True) == pytest.approx(610 * 18 * 1024 / 8, rel=1e-3)
    assert load_device("zcu102").size_bytes("bram") == pytest.approx(912 * 36 * 1024 / 8, rel=1e-3)


def test_power_model_figures_of_the_calibrated_boards() -> None:
    a100, h200 = load_device("a100_sxm4_40gb"), load_device("h200_sxm_141gb")
    assert a100.energy_floor_w("board") == 66.5
    assert a100.energy_j_per_op("float32", "board") == 5.2e-12
    assert a100.energy_j_per_byte("dram", "board") == 1.18e-10
    assert (h200.energy_floor_w("board"), h200.energy_j_per_op("fp32", "board")) == (105, 5.8e-12)
    for device in (a100, h200):  # the active floor lies above idle and below the limit
        assert device.power_w("idle") < device.energy_floor_w("board") < device.power_w("limit")
    # tensor cores: what is left of the limit above the floor, over the best matmul, is an upper bound per operation
    assert a100.energy_j_per_op("bf16", "board") == pytest.approx((400 - 66.5) / 2.712e14, rel=1e-2)
    assert h200.energy_j_per_op("bf16", "board") == pytest.approx((700 - 105) / 7.945e14, rel=1e-2)


@pytest.mark.parametrize("name", DEVICES)
def test_energy_per_operation_lies_within_what_circuits_allow(name: str) -> None:
    device = load_device(name)
    for path, figure in device.figures().items():
        if figure.unit == "J/op":
            assert 1e-15 < 2 * figure.value < 1e-8, path  # per MAC
            assert figure.value >= MIN_J_PER_OP.get(path.split(".")[-1], 0), path
        if figure.unit == "J/B":
            assert 0.2e-12 < figure.value / 8 < 120e-12, path  # pJ per bit: registers of a chip to an SSD


def test_a_board_byte_costs_more_than_a_device_byte() -> None:
    # 14.8 and 3.9 pJ/bit: the commonest error is to mix them
    a100 = load_device("a100_sxm4_40gb")
    ratio = a100.energy_j_per_byte("dram", "board") / a100.energy_j_per_byte("dram", "component")
    assert ratio == pytest.approx(14.75 / 3.9, rel=1e-3)


def test_calibrations_carry_fractions_overhead_and_held_out_error() -> None:
    expected = {
        "a100_sxm4_80gb": (0.713, 0.845, 7.5e-6, 0.089),
        "h100_sxm5_80gb": (0.712, 0.955, 7.8e-6, 0.119),
        "a40_48gb": (0.732, 0.821, 10.9e-6, 0.091),
    }
    for name, figures in expected.items():
        c = load_device(name).calibration
        found = [c.compute_fraction, c.bandwidth_fraction, c.overhead, c.held_out_error_rel]
        assert tuple(figure.value for figure in found if figure) == figures
        assert c.roofline_error_rel is not None
        assert c.roofline_error_rel.value > figures[-1]
    h200 = load_device("h200_sxm_141gb").calibration
    assert h200.compute_fraction is not None
    assert h200.bandwidth_fraction is not None
    assert h200.compute_fraction.value == pytest.approx(7.945e14 / 9.89e14, abs=5e-4)
    assert h200.bandwidth_fraction.value == pytest.approx(3.5e12 / 4.8e12, abs=1e-3)
    assert h200.overhead is None  # not published for this board: absent, not borrowed


@pytest.mark.parametrize("name", DEVICES)
def test_measured_rates_stay_below_peaks(name: str) -> None:
    device = load_device(name)
    for rate in device.calibration.stream.values():
        assert rate.value <= device.bandwidth_bytes_per_s()
    for link in device.link.values():
        assert link.achieved is None or link.achieved.value <= link.bandwidth.value
    assert math.isfinite(sum(figure.value for figure in device.figures().values()))


def test_storage_named_by_a_phone_exists() -> None:
    named = {device.storage_device for device in map(load_device, DEVICES) if device.storage_device}
    assert named
    assert named <= set(DEVICES)
