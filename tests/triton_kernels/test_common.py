"""What the Triton launchers share: division of sums, offsets, tuned configurations."""

import json
from itertools import pairwise, product

import pytest
import torch
from mitnet_fast.triton_kernels import _common
from mitnet_fast.triton_kernels._common import Map, as_map, configuration, divide, offset_type, record_launches

TUNED = sorted(_common.TUNED.glob("*.json"))


@pytest.mark.parametrize(("wanted", "max_tiles"), [(88.0, 64), (4.0, 1), (0.3, 7), (600.0, 256)])
def test_every_tile_belongs_to_exactly_one_part(wanted, max_tiles):
    for batch, tiles in product((1, 2, 3, 8, 100), (1, 2, 7, 64, 65)):
        parts = divide(batch, tiles, wanted, max_tiles)
        owners = {}
        for part in range(parts.count):  # as the kernel finds its samples and tiles
            split, first = part % parts.splits, part // parts.splits * parts.samples
            for sample in range(first, min(first + parts.samples, batch)):
                for tile in range(split * parts.tiles, min((split + 1) * parts.tiles, tiles)):
                    owners[sample, tile] = owners.get((sample, tile), 0) + 1
        assert owners == dict.fromkeys(product(range(batch), range(tiles)), 1)
        assert parts.samples * parts.tiles <= max(max_tiles, 1)
        assert parts.samples == 1 or parts.splits == 1
        needed = batch * -(-tiles // max_tiles)
        assert parts.count <= max(2 * wanted, needed, 1 + batch / max(1, max_tiles // tiles))


def test_no_samples_make_no_parts():
    assert divide(0, 5, 10.0, 4).count == 0


@pytest.mark.parametrize(
    ("tensor", "in_place", "stride_p"),
    [
        (torch.zeros(2, 3, 4, 5), True, 1),
        (torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True, 3),
        (torch.zeros(2, 6, 4, 5)[:, 2:5], True, 1),
        (torch.zeros(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)[:, 2:5], True, 6),
        (torch.zeros(()).expand(2, 3, 4, 5), True, 0),
        (torch.zeros(2, 3, 1, 5), True, 1),
        (torch.zeros(2, 3, 4, 1), True, 1),
        (torch.zeros(2, 3, 4, 10)[..., ::2], False, 1),
        (torch.zeros(2, 3, 4, 6)[..., :5], False, 1),
        (torch.zeros(2, 3, 5, 4).transpose(2, 3), False, 1),
        (torch.zeros(2, 1, 4, 10)[..., ::2], False, 1),
    ],
)
def test_only_maps_whose_pixels_lie_apart_are_copied(tensor, in_place, stride_p):
    found = as_map(tensor)
    assert (found.data.data_ptr() == tensor.data_ptr()) == in_place
    assert found.stride_p == stride_p


def test_offsets_have_64_bits_where_32_do_not_suffice():
    def strided(stride_c):
        return Map(torch.empty(1, 3, 4, 5, device="meta"), 0, stride_c, 1)

    assert str(offset_type(strided(20), strided(2**28))) == "int32"
    assert str(offset_type(strided(20), strided(2**29))) == "int64"


@pytest.mark.parametrize("path", TUNED, ids=lambda path: path.stem)
def test_tuned_files_are_complete_and_say_what_they_rest_on(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content.pop("measured"), bool)
    assert len(content.pop("reason")) > 40
    default = json.loads((_common.TUNED / "default.json").read_text(encoding="utf-8"))
    for family, kernels in content.items():
        for kernel, variants in kernels.items():
            assert set(variants) <= set(default[family][kernel])
            for entries in variants.values():
                limits = [entry.get("up_to", float("inf")) for entry in entries]
                assert limits[-1] == float("inf")
                assert all(smaller < larger for smaller, larger in pairwise(limits))
                for entry in entries:
                    blocks = [value for name, value in entry.items() if name.startswith("BLOCK_")]
                    assert blocks
                    assert all(block & (block - 1) == 0 for block in blocks)
                    assert entry.keys() <= {"up_to", "num_warps", "num_stages", "programs"} | {
                        name for name in entry if name.startswith("BLOCK_")
                    }


def test_the_nearest_tuned_file_wins(tmp_path, monkeypatch):
    def write(name, **kernels):
        (tmp_path / f"{name}.json").write_text(json.dumps({"family": kernels}))

    write("default", first={"half": [{"up_to": 32, "BLOCK": 1}, {"BLOCK": 2}]}, second={"half": [{"BLOCK": 3}]})
    write("sm_90", first={"half": [{"BLOCK": 4}]})
    write("some_gpu", second={"half": [{"BLOCK": 5}]})
    monkeypatch.setattr(_common, "TUNED", tmp_path)
    _common._tuned_file.cache_clear()
    device = torch.device("meta")
    try:
        with record_launches():
            assert [configuration(device, "family", "first", "half", size)["BLOCK"] for size in (20, 32, 33)] == [
                1,
                1,
                2,
            ]
        with record_launches("sm_90"):
            assert configuration(device, "family", "first", "half", 20) == {"BLOCK": 4}
            assert configuration(device, "family", "second", "half", 20) == {"BLOCK": 3}
        with record_launches("some_gpu", "sm_90"):
            assert configuration(device, "family", "first", "half", 20) == {"BLOCK": 4}
            assert configuration(device, "family", "second", "half", 20) == {"BLOCK": 5}
    finally:
        _common._tuned_file.cache_clear()
