"""The stand-in: corpus, classes of bytes, the model and its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from papers.moepp import corpus, jobs
from papers.moepp.bytes_of_text import CLASSES, classify
from papers.moepp.lm import LanguageModel, Options, loss, rotary, rotate
from papers.moepp.routing import Experts
from shared.errors import UserError

TINY = {"layers": 2, "d_model": 16, "d_expert": 16, "heads": 2, "lb_scale": None}
ARM = {"n_ffn": 4, "n_constant": 2, "n_copy": 1, "n_zero": 1}
TRAIN = {"steps": 3, "batch": 2, "sequence": 16, "lr": 3e-3, "weight_decay": 0.1, "beta": 0.05, "validation_windows": 4}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for index in range(40):
        name = folder / ("deep" if index % 2 else "") / f"{index:02}.txt"
        name.write_text(f"line {index} of a text\n" * 5)
    (folder / "notes.bin").write_bytes(b"no text")
    return folder


def test_corpus_splits_by_file(texts: Path) -> None:
    """40 sorted files: deep/01 … deep/39 come after 00 … 38; numbers 20 and 40 in that order are for validation."""
    text = corpus.load(str(texts))
    validation = bytes(text.validation).split(b"\n\x00")[:-1]
    assert text.files == 40
    assert [part.split()[1] for part in validation] == [b"38", b"39"]
    assert len(bytes(text.train).split(b"\n\x00")) - 1 == 38
    assert len(text.digest) == 64


def test_standard_library_corpus() -> None:
    text = corpus.load()
    assert text.files > 300
    assert len(text.train) > 5e6
    assert 0.01 < len(text.validation) / len(text.train) < 0.1
    assert b"site-packages" not in bytes(text.train[:1000])


def test_windows_are_drawn_from_the_seed() -> None:
    data = np.arange(200, dtype=np.uint8)
    x, y = corpus.windows(data, 5, 16, 7)
    assert torch.equal(x + 1, y)
    assert torch.equal(x, corpus.windows(data, 5, 16, 7)[0])
    assert not torch.equal(x, corpus.windows(data, 5, 16, 8)[0])
    with pytest.raises(UserError, match="window needs"):
        corpus.windows(data[:10], 1, 16, 0)


def test_bad_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root"):
        corpus.load(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="at least 2"):
        corpus.load(str(tmp_path))


def test_classes_of_bytes() -> None:
    text = b"def f_1(x):\n    return x9 + 42\n\x00"
    kinds = [CLASSES[index] for index in classify(np.frombuffer(text, np.uint8))]
    start, inside, other = "word start", "inside a word", "operator or bracket"
    assert kinds[:12] == [start, inside, inside, "space", start, inside, inside, other, start, other, other, "newline"]
    assert kinds[12:16] == ["indentation"] * 4
    assert kinds[16:] == [
        start,
        *[inside] * 5,
        "space",
        start,
        inside,
        "space",
        other,
        "space",
        "digit",
        "digit",
        "newline",
        "other",
    ]


def test_rotary_positions_keep_relative_products() -> None:
    cos, sin = rotary(12, 8)
    q, k = torch.randn(8), torch.randn(8)
    at = lambda v, p: rotate(v, cos[p], sin[p])  # noqa: E731
    torch.testing.assert_close(at(q, 7) @ at(k, 4), at(q, 5) @ at(k, 2))
    torch.testing.assert_close(at(q, 0), q)


def test_published_tiny_sizes() -> None:
    """E = 16: 1,265,088 parameters of the MoE; MoE++ adds 1152 of two constants, 768 of a wider router and W_g in layers 2 and 3."""
    vanilla = LanguageModel(Options(Experts(16), pathway=False))
    plus = LanguageModel(Options(Experts(16, 2, 1, 1)))
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(vanilla) == 1_265_088
    assert count(plus) - count(vanilla) == 3 * 2 * 3 * 64 + 3 * 4 * 64 + 2 * 20 * 20


def test_later_bytes_do_not_change_earlier_ones() -> None:
    torch.manual_seed(0)
    model = LanguageModel(Options(Experts(4, 2, 1, 1), layers=2, d_model=16, d_expert=16, heads=2))
    a = torch.randint(256, (1, 20))
    b = a.clone()
    b[0, 12:] = 0
    torch.testing.assert_close(model(a).logits[:, :12], model(b).logits[:, :12])


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = LanguageModel(Options(Experts(4, 2, 1, 1), layers=2, d_model=16, d_expert=16, heads=2))
    x = torch.randint(256, (8, 32))
    loss(model, x, x, 0.05).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0.0]
    assert silent == []
    assert model.blocks[0].moe.router.pathway is None  # type: ignore[union-attr]


def test_training_balances_the_experts() -> None:
    """The balance loss alone brings the FFN share to rho: 16/3 · … = 0.5 at tau 0.5 with 4 + 2 experts."""
    torch.manual_seed(0)
    options = Options(Experts(4, 0, 1, 1), layers=1, d_model=16, d_expert=16, heads=2, tau=0.5)
    model, x = LanguageModel(options), torch.randint(256, (16, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        out = model(x)
        out.balance_loss.backward()
        optimizer.step()
    share = float((model(x).ids < 4).float().mean())
    assert share == pytest.approx(0.5, abs=0.08)


def job(workdir: Path, root: str, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "arm": ARM,
        "seed": 0,
        "model": TINY,
        "train": TRAIN,
        "root": root,
        "show": 20,
        **changes,
    }
    workdir.mkdir(exist_ok=True)
    return jobs.train_job(**options, workdir=workdir, progress=lambda done, total: None)


def test_a_job_is_reproducible_and_tells_what_it_saw(tmp_path: Path, texts: Path) -> None:
    a = job(tmp_path / "a", str(texts))
    assert a == job(tmp_path / "b", str(texts))
    assert len(a["shown"]["ffn"]) == len(a["shown"]["text"]) == 20
    assert 0 <= a["ffn_per_token"] <= 2
    assert a["ffn_flops_per_token"] == pytest.approx(6 * 16 * 16 * 2 * a["ffn_per_token"])
    vanilla = job(tmp_path / "c", str(texts), arm={**ARM, "n_constant": 0, "n_copy": 0, "n_zero": 0, "pathway": False})
    assert vanilla["ffn_per_token"] == 2.0
    assert vanilla["spread"] == 0.0


def test_routing_of_a_text_does_not_depend_on_its_windows() -> None:
    """Overlapping windows: the second half of each has full context, so the first window equals one pass."""
    torch.manual_seed(0)
    model = LanguageModel(Options(Experts(4, 2, 1, 1), layers=2, d_model=16, d_expert=16, heads=2))
    text = "for x in range(10): print(x)"
    values = jobs.ffn_of_text(model, text, 16)
    assert len(values) == len(text)
    ids = model(torch.tensor([list(text.encode())])[:, :16]).ids
    assert values[:16] == pytest.approx((ids < 4).sum(-1).float().mean(0)[0].tolist())
