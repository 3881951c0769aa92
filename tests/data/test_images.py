"""Files of every kind that is read or written, and every kind of damage."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from mitnet_fast.data.images import ImageError, decoder_versions, read_image, read_pixels, read_size, write_image

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def samples(channels: int, bits: int = 8, height: int = 11, width: int = 13, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 2**bits, (height, width, channels))
    return values.astype(np.uint8 if bits == 8 else np.uint16)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def filtered(pixels: np.ndarray) -> bytes:
    """PNG rows that use each of the five filters in turn."""
    height, _, channels = pixels.shape
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    step = 2 * channels
    result = bytearray()
    for y, row in enumerate(rows):
        above = rows[y - 1] if y else np.zeros_like(row)
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        corner = np.concatenate([np.zeros(step, int), above[:-step]])
        estimate = left + above - corner
        distances = np.stack([np.abs(estimate - each) for each in (left, above, corner)])
        paeth = np.choose(distances.argmin(0), [left, above, corner])
        kind = y % 5
        predicted = [0, left, above, (left + above) // 2, paeth][kind]
        result += bytes([kind]) + ((row - predicted) % 256).astype(np.uint8).tobytes()
    return bytes(result)


def png_16(pixels: np.ndarray, colour: int, *, interlaced: bool = False, extra: bytes = b"") -> bytes:
    height, width = pixels.shape[:2]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = b"".join(
        filtered(part) for y, x, dy, dx in passes for part in [np.ascontiguousarray(pixels[y::dy, x::dx])] if part.size
    )
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array.squeeze()).save(path, **options)
    return path


def levels(value: torch.Tensor, bits: int = 8) -> np.ndarray:
    """[C, H, W] in [0, 1] back to integer samples [H, W, C]; exact, not rounded to hide an error."""
    scaled = value.double() * (2**bits - 1)
    assert (scaled - scaled.round()).abs().max() < 0.01
    return scaled.round().permute(1, 2, 0).numpy().astype(int)


class TestRead:
    @pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp"])
    def test_rgb_is_exact(self, tmp_path: Path, suffix: str) -> None:
        pixels = samples(3)
        path = save(tmp_path / f"a{suffix}", pixels, **({"lossless": True} if suffix == ".webp" else {}))
        image = read_image(path)
        assert (image.rgb.dtype, image.rgb.shape, image.bits) == (torch.float32, (3, 11, 13), 8)
        assert image.rgb.is_contiguous()
        assert (image.alpha, image.path, image.notes) == (None, path, ())
        assert np.array_equal(levels(image.rgb), pixels)
        assert float(image.rgb[0, 0, 0]) == np.float32(pixels[0, 0, 0]) / np.float32(255)

    def test_jpeg_is_what_pillow_decodes(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.jpg", samples(3), quality=90)
        assert np.array_equal(levels(read_image(path).rgb), np.array(Image.open(path)))

    def test_grey_is_repeated(self, tmp_path: Path) -> None:
        pixels = samples(1)
        image = read_image(save(tmp_path / "a.png", pixels))
        assert np.array_equal(levels(image.rgb), np.repeat(pixels, 3, axis=2))
        assert image.alpha is None

    def test_one_bit(self, tmp_path: Path) -> None:
        bits = samples(1)[..., 0] > 127
        Image.fromarray(bits).save(tmp_path / "a.png")
        assert np.array_equal(levels(read_image(tmp_path / "a.png").rgb)[..., 1], bits * 255)

    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_alpha(self, tmp_path: Path, mode: str) -> None:
        pixels = samples(len(mode.replace("LA", "xx")) if mode == "LA" else 4)
        image = read_image(save(tmp_path / "a.png", pixels))
        assert np.array_equal(levels(image.rgb), pixels[..., [0, 0, 0]] if mode == "LA" else pixels[..., :3])
        assert np.array_equal(levels(image.alpha)[..., 0], pixels[..., -1])

    def test_opaque_alpha_stays(self, tmp_path: Path) -> None:
        pixels = np.concatenate([samples(3), np.full((11, 13, 1), 255, np.uint8)], axis=2)
        assert bool((read_image(save(tmp_path / "a.png", pixels)).alpha == 1).all())

    def test_palette(self, tmp_path: Path) -> None:
        indices = samples(1)[..., 0] % 4
        colours = samples(3, height=1, width=4)[0]
        picture = Image.fromarray(indices, "P")
        picture.putpalette(colours.tobytes())
        picture.save(tmp_path / "plain.png")
        picture.save(tmp_path / "clear.png", transparency=2)
        plain, clear = read_image(tmp_path / "plain.png"), read_image(tmp_path / "clear.png")
        assert np.array_equal(levels(plain.rgb), colours[indices])
        assert plain.alpha is None
        assert np.array_equal(levels(clear.rgb), colours[indices])
        assert np.array_equal(levels(clear.alpha)[..., 0], np.where(indices == 2, 0, 255))

    def test_transparent_colour(self, tmp_path: Path) -> None:
        pixels = samples(3)
        save(tmp_path / "a.png", pixels, transparency=tuple(map(int, pixels[3, 4])))
        expected = np.where((pixels == pixels[3, 4]).all(axis=2), 0, 255)
        assert expected[3, 4] == 0
        assert np.array_equal(levels(read_image(tmp_path / "a.png").alpha)[..., 0], expected)

    @pytest.mark.parametrize("suffix", [".tif", ".jpg"])
    def test_cmyk(self, tmp_path: Path, suffix: str) -> None:
        flat = np.zeros((16, 16, 4), np.uint8)
        flat[..., 0] = 255  # cyan
        Image.fromarray(flat, "CMYK").save(tmp_path / f"a{suffix}")
        assert np.abs(levels(read_image(tmp_path / f"a{suffix}").rgb) - [0, 255, 255]).max() <= 2

    @pytest.mark.parametrize("interlaced", [False, True])
    @pytest.mark.parametrize(
        ("colour", "channels"),
        [(GREY, 1), (RGB, 3), (GREY_ALPHA, 2), (RGBA, 4)],
        ids=["grey", "rgb", "grey+alpha", "rgba"],
    )
    def test_16_bit_png_is_exact(self, tmp_path: Path, colour: int, channels: int, interlaced: bool) -> None:
        pixels = samples(channels, 16)
        (tmp_path / "a.png").write_bytes(png_16(pixels, colour, interlaced=interlaced))
        image = read_image(tmp_path / "a.png")
        rgb = pixels[..., :3] if channels >= 3 else pixels[..., [0, 0, 0]]
        assert image.bits == 16
        assert np.array_equal(levels(image.rgb, 16), rgb)
        if channels in (2, 4):
            assert np.array_equal(levels(image.alpha, 16)[..., 0], pixels[..., -1])
        else:
            assert image.alpha is None

    @pytest.mark.parametrize("colour", [GREY, RGB])
    def test_16_bit_transparent_colour(self, tmp_path: Path, colour: int) -> None:
        pixels = samples(3 if colour == RGB else 1, 16)
        pixels[0, 0] = pixels[3, 4] ^ 1  # differs in the lowest bit only
        key = chunk(b"tRNS", pixels[3, 4].astype(">u2").tobytes())
        (tmp_path / "a.png").write_bytes(png_16(pixels, colour, extra=key))
        expected = np.where((pixels == pixels[3, 4]).all(axis=2), 0, 65535)
        assert np.array_equal(levels(read_image(tmp_path / "a.png").alpha, 16)[..., 0], expected)

    @pytest.mark.parametrize("byteorder", ["<", ">"])
    @pytest.mark.parametrize("compression", [None, "zlib"])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_16_bit_tiff_is_exact(self, tmp_path: Path, channels: int, compression: str | None, byteorder: str) -> None:
        pixels = samples(channels, 16)
        kind = {"photometric": "rgb"} if channels > 1 else {"photometric": "minisblack"}
        extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
        tifffile.imwrite(
            tmp_path / "a.tif", pixels.squeeze(), compression=compression, byteorder=byteorder, **kind, **extra
        )
        image = read_image(tmp_path / "a.tif")
        assert image.bits == 16
        assert np.array_equal(levels(image.rgb, 16), pixels[..., :3] if channels > 1 else pixels[..., [0, 0, 0]])
        assert (image.alpha is not None) == (channels == 4)
        if channels == 4:
            assert np.array_equal(levels(image.alpha, 16)[..., 0], pixels[..., 3])

    def test_premultiplied_16_bit_tiff(self, tmp_path: Path) -> None:
        straight, alpha = samples(3, 16), samples(1, 16, seed=1) // 2 + 30000
        multiplied = np.rint(straight / 65535 * alpha).astype(np.uint16)
        pixels = np.concatenate([multiplied, alpha], axis=2)
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["assocalpha"])
        image = read_image(tmp_path / "a.tif")
        assert np.abs(levels(image.rgb, 16) - straight).max() <= 2  # of 65535: the file's own rounding over its alpha
        assert np.array_equal(levels(image.alpha, 16), alpha)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "png16", "tif16"])
    def test_orientation(self, tmp_path: Path, orientation: int, kind: str) -> None:
        bits = 16 if kind.endswith("16") else 8
        blocks = np.kron(samples(3, bits, 2, 3), np.ones((16, 16, 1))).astype(np.uint8 if bits == 8 else np.uint16)
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{kind.removesuffix('16')}"
        if kind == "png16":
            path.write_bytes(png_16(blocks, RGB, extra=chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))))
        elif kind == "tif16":
            tifffile.imwrite(path, blocks, photometric="rgb", extratags=[(0x0112, 3, 1, orientation, True)])
        else:
            lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
            save(path, blocks, exif=exif, **lossless)
        # EXIF 2.32, tag 0x0112: which side of the scene row 0 and column 0 of the file are
        upright = {
            1: blocks,
            2: blocks[:, ::-1],
            3: blocks[::-1, ::-1],
            4: blocks[::-1],
            5: blocks.transpose(1, 0, 2),
            6: blocks[::-1].transpose(1, 0, 2),
            7: blocks[::-1, ::-1].transpose(1, 0, 2),
            8: blocks[:, ::-1].transpose(1, 0, 2),
        }[orientation]
        image = read_image(path)
        assert image.bits == bits
        assert np.abs(levels(image.rgb, bits) - upright.astype(int)).max() <= (4 if kind == "jpg" else 0)
        assert read_size(path) == (upright.shape[1], upright.shape[0])

    def test_damaged_exif_is_noted(self, tmp_path: Path) -> None:
        pixels = samples(3)
        save(tmp_path / "a.png", pixels, exif=b"Exif\0\0garbage")
        image = read_image(tmp_path / "a.png")
        assert np.array_equal(levels(image.rgb), pixels)
        assert "orientation ignored" in image.notes[0]
        assert read_size(tmp_path / "a.png") == (13, 11)

    @pytest.mark.parametrize("suffix", [".webp", ".png", ".tif"])
    def test_first_of_several_frames(self, tmp_path: Path, suffix: str) -> None:
        first, second = samples(3), samples(3, seed=1)
        lossless = {"lossless": True} if suffix == ".webp" else {}
        save(tmp_path / f"a{suffix}", first, save_all=True, append_images=[Image.fromarray(second)], **lossless)
        image = read_image(tmp_path / f"a{suffix}")
        assert np.array_equal(levels(image.rgb), first)
        assert image.notes == ("holds 2 frames, the first is used",)

    def test_multi_picture_jpeg(self, tmp_path: Path) -> None:
        first = samples(3)
        path = save(
            tmp_path / "a.jpg", first, format="MPO", save_all=True, append_images=[Image.fromarray(first[::-1])]
        )
        image = read_image(path)
        assert np.array_equal(levels(image.rgb), np.array(Image.open(path).convert("RGB")))
        assert image.notes == ("holds 2 frames, the first is used",)

    def test_16_bit_cmyk_is_reduced_and_says_so(self, tmp_path: Path) -> None:
        flat = np.zeros((8, 8, 4), np.uint16)
        flat[..., 0] = 65535
        tifffile.imwrite(tmp_path / "a.tif", flat, photometric="separated")
        image = read_image(tmp_path / "a.tif")
        assert levels(image.rgb)[0, 0].tolist() == [0, 255, 255]
        assert (image.bits, image.notes) == (8, ("16-bit CMYK is reduced to 8 bits",))

    def test_wrong_extension(self, tmp_path: Path) -> None:
        pixels = samples(3)
        save(tmp_path / "a.png", pixels)
        (tmp_path / "a.png").rename(tmp_path / "a.jpg")
        assert np.array_equal(levels(read_image(tmp_path / "a.jpg").rgb), pixels)

    def test_pixels_are_the_files_samples(self, tmp_path: Path) -> None:
        pixels = samples(4)
        stored = read_pixels(save(tmp_path / "a.png", pixels))
        assert np.array_equal(stored.rgb, pixels[..., :3])
        assert np.array_equal(stored.alpha, pixels[..., 3])
        assert stored.rgb.dtype == np.uint8


class TestDamage:
    def message(self, path: Path) -> str:
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_missing(self, tmp_path: Path) -> None:
        assert "no such file" in self.message(tmp_path / "a.png")

    def test_folder(self, tmp_path: Path) -> None:
        assert "folder" in self.message(tmp_path)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        assert "empty" in self.message(tmp_path / "a.png")

    @pytest.mark.parametrize("content", [b"not an image", b"\x89PNG", b"\xff\xd8", bytes(1000)])
    def test_no_image(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(content)
        assert "not an image" in self.message(tmp_path / "a.png")

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".webp"])
    @pytest.mark.parametrize("part", [0.4, 0.8])
    def test_truncated(self, tmp_path: Path, suffix: str, part: float) -> None:
        path = save(tmp_path / f"a{suffix}", samples(3, height=64, width=64))
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        self.message(path)

    def test_truncated_16_bit(self, tmp_path: Path) -> None:
        content = png_16(samples(3, 16, 64, 64), RGB)
        (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
        self.message(tmp_path / "a.png")

    @pytest.mark.parametrize("read", [read_image, read_size])
    def test_huge_header(self, tmp_path: Path, read: object) -> None:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, RGB, 0, 0, 0))
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))))
        with pytest.raises(ImageError, match=r"a\.png: too large, refused before decoding: .*400000000 pixels"):
            read(tmp_path / "a.png")

    @pytest.mark.parametrize(("dtype", "words"), [("float32", "32"), ("uint32", "32"), ("int16", "range")])
    def test_samples_without_range(self, tmp_path: Path, dtype: str, words: str) -> None:
        tifffile.imwrite(tmp_path / "a.tif", np.ones((8, 8), dtype))
        assert words in self.message(tmp_path / "a.tif")

    def test_separate_planes_of_16_bits(self, tmp_path: Path) -> None:
        planes = samples(3, 16).transpose(2, 0, 1)
        tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
        assert "separate colour planes" in self.message(tmp_path / "a.tif")

    @pytest.mark.parametrize("kind", ["GIF", "PPM"])
    def test_other_formats(self, tmp_path: Path, kind: str) -> None:
        Image.fromarray(samples(3)).save(tmp_path / "a.png", kind)
        assert "PNG, JPEG, TIFF, BMP and WebP" in self.message(tmp_path / "a.png")


class TestWrite:
    @pytest.mark.parametrize("alpha", [False, True])
    @pytest.mark.parametrize("bits", [8, 16])
    @pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF", ".webp", ".bmp"])
    def test_round_trip(self, tmp_path: Path, suffix: str, bits: int, alpha: bool) -> None:
        path = tmp_path / f"a{suffix}"
        pixels = samples(4, bits)
        values = torch.from_numpy(pixels.astype(np.float64) / (2**bits - 1)).permute(2, 0, 1)
        arguments = (path, values[:3].float(), values[3:].float() if alpha else None, bits)
        if (bits == 16 and suffix in (".webp", ".bmp")) or (alpha and suffix == ".bmp"):
            with pytest.raises(ImageError, match=r"a\.(webp|bmp): .* holds"):
                write_image(*arguments)
            assert list(tmp_path.iterdir()) == []
            return
        write_image(*arguments)
        image = read_image(path)
        assert image.bits == bits
        assert np.array_equal(levels(image.rgb, bits), pixels[..., :3])
        assert (image.alpha is not None) == alpha
        if alpha:
            assert np.array_equal(levels(image.alpha, bits), pixels[..., 3:])
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("channels", [3, 4])
    def test_16_bit_png_by_the_specification(self, tmp_path: Path, channels: int) -> None:
        pixels = samples(channels, 16)
        values = torch.from_numpy(pixels.astype(np.float64) / 65535).permute(2, 0, 1)
        write_image(tmp_path / "a.png", values[:3], values[3:] if channels == 4 else None, 16)
        stream = io.BytesIO((tmp_path / "a.png").read_bytes())
        assert stream.read(8) == b"\x89PNG\r\n\x1a\n"
        chunks = {}
        while head := stream.read(8):
            length, kind = struct.unpack(">I4s", head)
            content = stream.read(length)
            assert struct.unpack(">I", stream.read(4))[0] == zlib.crc32(kind + content)
            chunks[kind] = content
        assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
        assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (13, 11, 16, {3: RGB, 4: RGBA}[channels], 0, 0, 0)
        rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(11, -1)
        assert (rows[:, 0] == 2).all()  # "up": each row is the difference to the one above
        unfiltered = np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8)
        assert np.array_equal(unfiltered.reshape(-1).view(">u2").reshape(pixels.shape), pixels)

    def test_16_bit_tiff_by_another_reader(self, tmp_path: Path) -> None:
        pixels = samples(4, 16)
        values = torch.from_numpy(pixels.astype(np.float64) / 65535).permute(2, 0, 1)
        write_image(tmp_path / "a.tif", values[:3], values[3:], 16)
        assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), pixels)

    def test_jpeg_keeps_colour(self, tmp_path: Path) -> None:
        checks = np.indices((32, 32)).sum(0)[..., None] % 2 * np.array([255, 0, 0]) + np.array([0, 0, 128])
        write_image(tmp_path / "a.jpg", torch.from_numpy(checks / 255).permute(2, 0, 1))
        # subsampled chroma would leave errors of more than 50 levels in a checkerboard of single pixels
        assert np.abs(levels(read_image(tmp_path / "a.jpg").rgb) - checks).mean() < 6

    def test_values_are_clipped_and_rounded(self, tmp_path: Path) -> None:
        rgb = torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 254.51 / 255, 1.7]).expand(3, 1, 5)
        write_image(tmp_path / "a.png", rgb)
        assert levels(read_image(tmp_path / "a.png").rgb)[0, :, 0].tolist() == [0, 0, 1, 255, 255]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_floats(self, tmp_path: Path, dtype: torch.dtype) -> None:
        write_image(tmp_path / "a.png", torch.full((3, 2, 2), 0.5, dtype=dtype, requires_grad=True))
        assert (levels(read_image(tmp_path / "a.png").rgb) == 128).all()

    @pytest.mark.parametrize(("suffix", "bits"), [(".png", 8), (".png", 16), (".tif", 8), (".tif", 16), (".jpg", 8)])
    def test_colour_profile(self, tmp_path: Path, suffix: str, bits: int) -> None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        write_image(tmp_path / f"a{suffix}", torch.rand(3, 8, 8), bits=bits, icc_profile=profile)
        assert read_image(tmp_path / f"a{suffix}").icc_profile == profile

    def test_jpeg_refuses_alpha(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="JPEG holds no transparency; PNG, TIFF, WEBP do"):
            write_image(tmp_path / "a.jpg", torch.rand(3, 4, 4), torch.rand(1, 4, 4))

    @pytest.mark.parametrize("name", ["a", "a.gif", "a.png.txt"])
    def test_unknown_extension(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ImageError, match=r"names no format; there are \.png"):
            write_image(tmp_path / name, torch.rand(3, 4, 4))

    @pytest.mark.parametrize(
        ("rgb", "alpha", "bits", "words"),
        [
            (torch.rand(1, 4, 4), None, 8, r"rgb: expected floating point \[3, H, W\]"),
            (torch.rand(1, 3, 4, 4), None, 8, "rgb: expected"),
            (torch.rand(3, 0, 4), None, 8, "rgb: expected"),
            (torch.zeros(3, 4, 4, dtype=torch.uint8), None, 8, "rgb: .*uint8"),
            (torch.full((3, 4, 4), float("nan")), None, 8, "rgb: 48 values are not finite"),
            (torch.rand(3, 4, 4), torch.rand(3, 4, 4), 8, r"alpha: expected floating point \[1, H, W\]"),
            (torch.rand(3, 4, 4), torch.rand(1, 4, 5), 8, "alpha: expected the size of rgb"),
            (torch.rand(3, 4, 4), None, 12, "bits: expected 8 or 16, got 12"),
        ],
    )
    def test_bad_values(
        self, tmp_path: Path, rgb: torch.Tensor, alpha: torch.Tensor | None, bits: int, words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            write_image(tmp_path / "a.png", rgb, alpha, bits)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_interrupted_write_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
    ) -> None:
        path = tmp_path / "a.png"
        write_image(path, torch.zeros(3, 4, 4))
        before = path.read_bytes()

        def fail(image: Image.Image, stream: io.BufferedWriter, *args: object, **options: object) -> None:
            stream.write(b"half")
            raise error("stopped")

        monkeypatch.setattr(Image.Image, "save", fail)
        with pytest.raises(error, match="stopped"):
            write_image(path, torch.ones(3, 4, 4))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            write_image(tmp_path / "none" / "a.png", torch.rand(3, 4, 4))


def test_decoder_versions() -> None:
    assert "zlib " in decoder_versions()
