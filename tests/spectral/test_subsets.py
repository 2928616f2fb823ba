"""Table 1 on the SD-1.x UNet, counted on the meta device."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch

from svdiff.models.sizes import build
from svdiff.spectral import SUBSETS, select
from svdiff.spectral.subsets import PAPER_KB, shift_sizes, subset_sizes

TABLE_1 = {
    "UNet": (391, 322_856), "UNet-1D": (109, 100_160), "UNet-2D": (184, 140_416), "UNet-4D": (98, 82_280),
    "UNet-CA": (64, 43_776), "UNet-CA-KV": (32, 18_816), "Up-Blocks": (219, 181_568),
    "Down-Blocks": (141, 107_072), "Mid-Block": (26, 32_256), "Up-CA": (36, 23_808), "Down-CA": (24, 15_872),
    "Mid-CA": (4, 4_096),
}  # fmt: skip


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    return build("sd15")


@pytest.mark.parametrize("name", SUBSETS)
def test_counts_and_sizes_of_table_1(unet: torch.nn.Module, name: str) -> None:
    row = subset_sizes(unet, name)
    assert (row.tensors, row.shifts) == TABLE_1[name]
    paper = PAPER_KB[name] * 1024
    assert row.bytes_fp32 < PAPER_KB[name] * 1000
    assert row.bytes_fp16 < 0.55 * PAPER_KB[name] * 1000
    stored = {n: torch.zeros(size) for n, size in shift_sizes(unet, name).items()}
    assert abs(size_in_2023(stored) / paper - 1) < 0.03, "the paper stored what we count"


def size_in_2023(content: object) -> int:
    """Bytes of `torch.save`, less the records that it has taken to since the paper (0.7 KB a file)."""
    file = io.BytesIO()
    torch.save(content, file)
    records = sorted(zipfile.ZipFile(file).infolist(), key=lambda record: record.header_offset)
    ends = [record.header_offset for record in records[1:]] + [zipfile.ZipFile(file).start_dir]
    later = {"byteorder", ".format_version", ".storage_alignment", "serialization_id"}
    new = sum(
        end - record.header_offset + 46 + len(record.filename)
        for record, end in zip(records, ends, strict=True)
        if record.filename.rpartition("/")[2] in later
    )
    return len(file.getvalue()) - new


def test_the_unet_is_that_of_the_paper_and_no_bias_is_shifted(unet: torch.nn.Module) -> None:
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 2) == 859.52
    assert all(name.endswith(".weight") for name in select(unet, "UNet"))


def test_text_encoder() -> None:
    assert subset_sizes(build("sd15", "text_encoder"), "UNet", prefix="text_encoder").shifts == 75_341


def test_a_pattern_of_ones_own(unet: torch.nn.Module) -> None:
    assert select(unet, r"mid_block.*attn2") == select(unet, "Mid-CA")
    assert select(unet, r"^conv_(in|out)\.") == ["conv_in.weight", "conv_out.weight"]
