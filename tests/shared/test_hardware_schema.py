"""Device files that are wrong in one way each: one sentence that names the file or device, the key and what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from shared.errors import UserError
from shared.hardware import load_device


def fig(value: Any, unit: str, **more: Any) -> dict[str, Any]:
    rest = {"source": "a test", "tag": "read", "rel_unc": 0.1} | more
    return {"value": value, "unit": unit} | {key: item for key, item in rest.items() if item is not None}


def toy() -> dict[str, Any]:
    return {
        "id": "toy",
        "title": "Toy",
        "kind": "gpu",
        "peak": {"fp32": fig(1e12, "op/s"), "fp16_acc32": fig(4e12, "op/s"), "fp16_acc16": fig(8e12, "op/s")},
        "memory": {"dram": {"size": fig(1e9, "B"), "bandwidth": fig(1e11, "B/s")}},
        "power": {"limit": fig(100.0, "W", scope="board")},
    }


def put(path: str, value: Any) -> dict[str, Any]:
    """The toy device with one key set (``...`` deletes it)."""
    device = copy.deepcopy(toy())
    node = device
    *parents, last = path.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return device


def test_the_toy_device_is_valid_as_mapping_omegaconf_and_file(tmp_path: Path) -> None:
    device = load_device(toy())
    assert load_device(OmegaConf.create(toy())) == device
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy()))
    assert load_device(tmp_path / "toy.yaml") == device
    assert load_device(str(tmp_path / "toy.yaml")) == device


WRONG = {
    "missing unit": ("peak.fp32.unit", ..., "peak.fp32.unit is missing"),
    "wrong unit": (
        "memory.dram.bandwidth.unit",
        "GB/s",
        "memory.dram.bandwidth: unknown unit 'GB/s': did you mean 'B/s'?",
    ),
    "unit of another kind": ("memory.dram.bandwidth", fig(1e11, "op/s"), "memory.dram.bandwidth: unit must be B/s"),
    "giga left out": ("memory.dram.bandwidth.value", 768.0, "outside 1e+06 to 1e+15 B/s"),
    "negative": ("peak.fp32.value", -1.0, "peak.fp32: value -1"),
    "zero": ("peak.fp32.value", 0, "peak.fp32: value 0"),
    "not a number": ("peak.fp32.value", float("nan"), "peak.fp32.value: Input should be a finite number"),
    "infinite": ("peak.fp32.value", float("inf"), "peak.fp32.value: Input should be a finite number"),
    "a string": ("peak.fp32.value", "1e12", "peak.fp32.value: must be a number, got '1e12'"),
    "a boolean": ("peak.fp32.value", True, "peak.fp32.value: must be a number"),
    "no uncertainty": ("peak.fp32.rel_unc", ..., "peak.fp32: uncertainty missing: give rel_unc, or lo and hi"),
    "half an interval": ("peak.fp32", fig(1e12, "op/s", rel_unc=None, lo=1e11), "give rel_unc, or lo and hi"),
    "both uncertainties": ("peak.fp32", fig(1e12, "op/s", lo=1e11, hi=1e13), "either rel_unc or lo and hi"),
    "lo over hi": ("peak.fp32", fig(1e12, "op/s", rel_unc=None, lo=2e12, hi=1e11), "needs lo <= value <= hi"),
    "value outside": ("peak.fp32", fig(1e12, "op/s", rel_unc=None, lo=2e12, hi=3e12), "needs lo <= value <= hi"),
    "uncertainty over 1": ("peak.fp32.rel_unc", 2.0, "rel_unc must be in [0, 1)"),
    "no source": ("peak.fp32.source", ..., "peak.fp32.source is missing"),
    "empty source": ("peak.fp32.source", " ", "source must say where"),
    "unknown tag": ("peak.fp32.tag", "guessed", "'read', 'page', 'derived', 'fit', 'measured' or 'recalled'"),
    "no scope": ("power.limit.scope", ..., "power.limit: a figure in W needs a scope"),
    "scope too much": ("peak.fp32.scope", "board", "a figure in op/s cannot have a scope"),
    "unknown key": ("peek", {}, "unknown key 'peek': did you mean 'peak'?"),
    "unknown key below": (
        "memory.dram.bandwith",
        fig(1e11, "B/s"),
        "memory.dram: unknown key 'bandwith': did you mean",
    ),
    "unknown precision": ("peak.fp61", fig(1e12, "op/s"), "unknown precision 'fp61'"),
    "unknown level": ("memory.hbm", {}, "unknown memory level 'hbm'"),
    "unknown kind": ("kind", "tpu", "kind: Input should be 'gpu'"),
    "bare number": ("peak.fp32", 1e12, "peak.fp32: must be a mapping with keys among: value, unit"),
    "fraction in per cent": ("calibration.compute_fraction", fig(71.3, "ratio"), "outside 1e-06 to 10 ratio"),
    "fraction over 1": ("calibration.compute_fraction", fig(1.05, "ratio"), "an achieved fraction lies in (0, 1]"),
    "runs_as nothing": ("runs_as.fp16", "fp16_acc64", "runs_as.fp16: unknown peak 'fp16_acc64'"),
    "per unit of nothing": ("memory.l1", {"per_unit": True, "size": fig(1e5, "B")}, "needs compute.units"),
    "storage of a GPU": ("storage", {"read": {"seq": fig(1e9, "B/s")}}, "a device of kind gpu has no section storage"),
    "mixed scopes": (
        "energy.board",
        {"per_byte": {"dram": fig(3e-11, "J/B", scope="device")}},
        "figures under board have scope board, got device",
    ),
    "board energy as component": (
        "energy.component",
        {"per_byte": {"dram": fig(1e-10, "J/B", scope="board")}},
        "figures under component have scope device or package, got board",
    ),
    "floor over limit": ("energy.board", {"floor": fig(120.0, "W", scope="board")}, "floor must lie below power.limit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_gives_one_clear_sentence(case: str, tmp_path: Path) -> None:
    path, value, expected = WRONG[case]
    with pytest.raises(UserError) as error:
        load_device(put(path, value))
    message = str(error.value)
    assert message.startswith("device 'toy': ")
    assert expected in message
    assert "\n" not in message
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(put(path, value)))
    with pytest.raises(UserError, match=r"^device file toy\.yaml: "):
        load_device(tmp_path / "toy.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read device file"):
        load_device(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("id: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_device(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="must hold a mapping"):
        load_device(tmp_path / "list.yaml")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(toy()))
    with pytest.raises(UserError, match="id must be the file's name, other, got toy"):
        load_device(tmp_path / "other.yaml")
    with pytest.raises(UserError, match="unknown device 'zcu105': did you mean 'zcu104'"):
        load_device("zcu105")


def test_what_a_device_lacks_is_an_error_that_names_what_it_has() -> None:
    device = load_device(toy())
    with pytest.raises(UserError, match="no peak rate for int8: it has fp32, fp16_acc32, fp16_acc16"):
        device.op_per_s("int8")
    with pytest.raises(UserError, match=r"say which with device\.runs_as\.fp16=KEY, KEY among fp16_acc32, fp16_acc16"):
        device.op_per_s("float16")
    with pytest.raises(UserError, match="no memory level l2: it has dram"):
        device.bandwidth_bytes_per_s("l2")
    with pytest.raises(UserError, match="no usable size for memory level dram"):
        device.size_bytes(usable=True)
    with pytest.raises(UserError, match="no link nvlink: it has nothing"):
        device.link_bytes_per_s("nvlink")
    with pytest.raises(UserError, match="no power figure idle: it has limit"):
        device.power_w("idle")
    with pytest.raises(UserError, match=r"no figure energy\.board\.per_op\.fp32: its energy figures are nothing"):
        device.energy_j_per_op("float32", "board")
    with pytest.raises(UserError, match="no storage read pattern seq"):
        device.storage_bytes_per_s("seq")
    with pytest.raises(UserError, match=r"did you mean 'peak\.fp32'"):
        device.figure("peak.fp23")


def test_runs_as_decides_and_the_vector_rate_is_the_fp32_peak() -> None:
    device = load_device(put("runs_as", {"fp16": "fp16_acc16", "fp32": "fp16_acc32"}))
    assert device.op_per_s("float16") == 8e12
    assert device.op_per_s("float32") == 4e12  # asked for explicitly, as with tf32
    assert device.vector_op_per_s() == 1e12  # runs_as is about matrix units
    assert load_device(put("peak.vector", fig(3e11, "op/s"))).vector_op_per_s() == 3e11
    with pytest.raises(UserError, match=r"no rate for vector operations.*add peak\.vector or peak\.fp32"):
        load_device(put("peak", {"int8": fig(1e12, "op/s")})).vector_op_per_s()


def test_uncertainty_of_a_figure() -> None:
    device = load_device(put("peak.fp32", fig(1e12, "op/s", rel_unc=None, lo=5e11, hi=1.5e12)))
    figure = device.figure("peak.fp32")
    assert (figure.low, figure.high) == (5e11, 1.5e12)
    figure = device.figure("memory.dram.bandwidth")
    assert (figure.low, figure.high) == (pytest.approx(9e10), pytest.approx(1.1e11))
