"""Reading and writing photographs: PNG, JPEG, TIFF, BMP and WebP, 8 and 16 bits, with transparency.

Layout: colour is float32 [3, H, W] in [0, 1], transparency [1, H, W] (0 clear, 1 opaque); an n-bit sample s is
s / (2ⁿ − 1). Files are decoded by Pillow. Pillow holds colour in 8 bits only: of a 16-bit colour file its unpackers
give either the upper or the lower byte of each sample, so such a file is decoded once for each.

What Pillow warns of, damage or a size beyond ``PIL.Image.MAX_IMAGE_PIXELS`` for one, is noted with the image.
"""

from __future__ import annotations

import io
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, features

from .files import atomic_write

EXTENSIONS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".webp": "WEBP",
}
"""What a file's name may end with, and the format that is written under it."""

READABLE = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
WITH_ALPHA = ("PNG", "TIFF", "WEBP")
WITH_16_BITS = ("PNG", "TIFF")

ORIENTATION = 0x0112  # EXIF and TIFF tag; 5 to 8 swap the sides
BITS_PER_SAMPLE, PLANAR_CONFIGURATION = 258, 284  # TIFF tags


class ImageError(ValueError):
    """A file that cannot be read as an image, or an image that its file cannot hold; the message names the file."""


@dataclass(frozen=True)
class Pixels:
    """A decoded file as it is stored, upright.

    Args:
        rgb: [H, W, 3], uint8 or uint16.
        alpha: [H, W] of the same type, or None.
        icc_profile: the colour profile of RGB files.
        notes: what the file holds and this does not (further frames, for one), and what its decoder warned of.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """Bits per sample, 8 or 16."""
        return 8 * self.rgb.itemsize


@dataclass(frozen=True)
class ImageFile:
    """An image read from a file.

    Args:
        rgb: float32 [3, H, W] in [0, 1]; grey files are repeated over the channels.
        alpha: float32 [1, H, W] in [0, 1], or None where the file has no transparency.
        bits: 8 or 16, per sample in the file.
        path: the file.
        icc_profile: the colour profile of RGB files, to be written with the result.
        notes: what the file holds and this does not, and what its decoder warned of.
    """

    rgb: torch.Tensor
    alpha: torch.Tensor | None
    bits: int
    path: Path
    icc_profile: bytes | None = None
    notes: tuple[str, ...] = ()


def read_image(path: str | PathLike[str]) -> ImageFile:
    """Read a PNG, JPEG, TIFF, BMP or WebP file, whatever its extension, turned upright by its EXIF orientation.

    Args:
        path: grey, RGB, palette, CMYK or 1-bit; with or without transparency; 8 or 16 bits.

    Returns:
        Its samples as RGB, with everything else that a result should keep.

    Raises:
        ImageError: missing, empty, truncated, no image, of a kind that cannot be read without loss, or with more than
            twice as many pixels as ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    pixels = read_pixels(path)
    return ImageFile(
        rgb=to_float(torch.from_numpy(pixels.rgb).permute(2, 0, 1)),
        alpha=None if pixels.alpha is None else to_float(torch.from_numpy(pixels.alpha)[None]),
        bits=pixels.bits,
        path=Path(path),
        icc_profile=pixels.icc_profile,
        notes=pixels.notes,
    )


def to_float(samples: torch.Tensor) -> torch.Tensor:
    """Samples of unsigned integers scaled to float32 in [0, 1], contiguous.

    Args:
        samples: uint8 or uint16, any shape.

    Raises:
        TypeError: samples of another type.
    """
    if samples.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"samples: expected uint8 or uint16, got {samples.dtype}")
    return samples.to(torch.float32, memory_format=torch.contiguous_format) / torch.iinfo(samples.dtype).max


def read_pixels(path: str | PathLike[str]) -> Pixels:
    """Decode a file to its integer samples; accepts and raises what `read_image` does."""
    with _warnings.noted() as notes, open_image(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            notes.append(f"holds {frames} frames, the first is used")
        samples = _raw_mode(image)
        if image.format == "TIFF":
            _check_tiff(path, image)
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
        if image.mode.startswith("I"):
            rgb, alpha = _grey_16(image, notes)
        elif samples.startswith(("RGB", "LA")) and ";16" in samples:
            rgb, alpha = _colour_16(path, image, samples, notes)
        else:
            if ";16" in samples:
                notes.append(f"16-bit {image.mode} is reduced to 8 bits")
            rgb, alpha = _any_8(image, notes)
    if Image.MAX_IMAGE_PIXELS is not None and rgb.shape[0] * rgb.shape[1] > Image.MAX_IMAGE_PIXELS:
        notes.append(f"{rgb.shape[1]}×{rgb.shape[0]} pixels are more than most photographs have: is it one?")
    return Pixels(rgb, alpha, profile, tuple(dict.fromkeys(notes)))


def read_size(path: str | PathLike[str]) -> tuple[int, int]:
    """Width and height of an image turned upright, from its header alone.

    Args:
        path: of the file.

    Returns:
        Pixels.

    Raises:
        ImageError: as `read_image` does, as far as the header shows it.
    """
    with open_image(path) as image:
        width, height = image.size
        # Pillow gives a TIFF's size upright; of a PNG it would decode all pixels to look for EXIF behind them.
        if image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info):
            try:
                if image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
                    width, height = height, width
            except Exception:  # unreadable EXIF says nothing about the size
                pass
    return width, height


@contextmanager
def open_image(path: str | PathLike[str]) -> Iterator[Image.Image]:
    """Open an image file with Pillow, its header read.

    Whatever fails inside the block becomes an ImageError, and what Pillow warns of is not shown.

    Args:
        path: of the file, whatever its extension.

    Raises:
        ImageError: missing, empty, no image, too large, or damaged as far as it is read.
    """
    path = Path(path)
    try:
        with _warnings.noted(), path.open("rb") as stream:
            if not stream.read(1):
                raise ImageError(f"{path}: the file is empty")
            stream.seek(0)
            with Image.open(stream, formats=READABLE) as image:
                yield image
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: a folder, not an image") from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image; PNG, JPEG, TIFF, BMP and WebP can be read") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too large, refused before decoding: {error}") from error
    except Exception as error:  # decoders raise whatever damaged data makes them meet
        raise ImageError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error


class _DecoderWarnings:
    """Keeps what Pillow warns of from the error stream, for the thread that reads the image.

    ``warnings.catch_warnings`` changes the whole process and has to be left in the order in which it was entered, to
    which threads do not keep: so the first reader enters it and the last one leaves it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._reader = threading.local()

    @contextmanager
    def noted(self) -> Iterator[list[str]]:
        """Warnings of this thread inside the block, each in one line; those of size are left to `read_pixels`."""
        if hasattr(self._reader, "notes"):  # a file opened within the reading of one
            yield self._reader.notes
            return
        self._reader.notes = notes = []
        self._enter()
        try:
            yield notes
        finally:
            self._leave()
            del self._reader.notes

    def _enter(self) -> None:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                self._show = warnings.showwarning
                warnings.filterwarnings("always", module=r"PIL\.")
                warnings.showwarning = self._note

    def _leave(self) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._caught.__exit__(None, None, None)

    def _note(self, message: Warning | str, category: type[Warning], *place: object) -> None:
        if not hasattr(self._reader, "notes"):
            self._show(message, category, *place)
        elif not issubclass(category, Image.DecompressionBombWarning):
            self._reader.notes.append(" ".join(str(message).split()))


_warnings = _DecoderWarnings()


def write_image(
    path: str | PathLike[str],
    rgb: torch.Tensor,
    alpha: torch.Tensor | None = None,
    bits: int = 8,
    icc_profile: bytes | None = None,
) -> None:
    """Write an image in the format that the file's extension names; the file appears whole or not at all.

    PNG, TIFF, BMP and WebP are written without loss, JPEG at quality 95 without chroma subsampling.

    Args:
        path: .png, .jpg, .jpeg, .tif, .tiff, .bmp or .webp.
        rgb: [3, H, W], floating point; values are clipped to [0, 1] and rounded.
        alpha: [1, H, W] in [0, 1], or None.
        bits: 8, or 16 (PNG and TIFF).
        icc_profile: the colour profile to embed; BMP files carry none.

    Raises:
        ImageError: the format cannot hold transparency or 16 bits, or the extension names none.
        ValueError: wrong shapes, or values that are not finite.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check_writable(path, alpha=alpha is not None, bits=bits)
    file_format = EXTENSIONS[path.suffix.lower()]
    samples = _quantised("rgb", rgb, 3, bits)
    if alpha is not None:
        if alpha.shape[-2:] != rgb.shape[-2:]:
            raise ValueError(f"alpha: expected the size of rgb {list(rgb.shape)}, got {list(alpha.shape)}")
        samples = np.concatenate([samples, _quantised("alpha", alpha, 1, bits)], axis=2)
    with atomic_write(path) as stream:
        if bits == 8:
            options: dict[str, object] = {
                "JPEG": {"quality": 95, "subsampling": 0},
                "WEBP": {"lossless": True, "exact": True},
            }.get(file_format, {})
            encoded = io.BytesIO()  # Pillow writes to a file past Python, which then knows no reason for a failure
            Image.fromarray(samples).save(encoded, file_format, icc_profile=icc_profile, **options)
            stream.write(encoded.getbuffer())
        elif file_format == "PNG":
            _write_png_16(stream, samples, icc_profile)
        else:
            _write_tiff_16(stream, samples, icc_profile)


def check_writable(path: Path, *, alpha: bool, bits: int) -> None:
    """Raise ImageError unless the format that ``path`` names holds transparency, if wanted, and that many bits."""
    file_format = EXTENSIONS.get(path.suffix.lower())
    if file_format is None:
        raise ImageError(f"{path}: extension {path.suffix!r} names no format; there are {', '.join(EXTENSIONS)}")
    if bits not in (8, 16):
        raise ValueError(f"bits: expected 8 or 16, got {bits!r}")
    if alpha and file_format not in WITH_ALPHA:
        raise ImageError(f"{path}: {file_format} holds no transparency; {', '.join(WITH_ALPHA)} do")
    if bits == 16 and file_format not in WITH_16_BITS:
        raise ImageError(f"{path}: {file_format} holds 8 bits only; {', '.join(WITH_16_BITS)} hold 16")


def decoder_versions() -> str:
    """The libraries that Pillow decodes images with, and their versions, on one line."""
    versions = {name: features.version(name) for name in ("libjpeg_turbo", "zlib", "libtiff", "webp")}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _raw_mode(image: Image.Image) -> str:
    """Name of the unpacker that Pillow means to use, such as ``RGB;16B``."""
    if not image.tile:
        return image.mode
    args = image.tile[0].args
    return args if isinstance(args, str) else str(args[0]) if args else image.mode


def _check_tiff(path: str | PathLike[str], image: Image.Image) -> None:
    bits = set(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    if not bits <= {1, 2, 4, 8, 16} or image.mode in ("I", "F"):
        raise ImageError(
            f"{path}: TIFF samples of {sorted(bits)} bits, Pillow's mode {image.mode}; unsigned ones of 1, 2, 4, 8 or "
            "16 bits can be read, others have no set range"
        )
    if 16 in bits and len(image.getbands()) > 1 and image.tag_v2.get(PLANAR_CONFIGURATION) == 2:
        raise ImageError(f"{path}: 16-bit TIFF with separate colour planes; save it with interleaved channels")


def _any_8(image: Image.Image, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    if image.has_transparency_data:
        samples = np.array(_upright(image, notes).convert("RGBA"))
        return np.ascontiguousarray(samples[..., :3]), np.ascontiguousarray(samples[..., 3])
    return np.array(_upright(image, notes).convert("RGB")), None


def _grey_16(image: Image.Image, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    transparent = image.info.get("transparency")
    grey = np.array(_upright(image, notes)).astype(np.uint16)
    alpha = None if transparent is None else np.where(grey == transparent, 0, 65535).astype(np.uint16)
    return np.repeat(grey[..., None], 3, axis=2), alpha


def _colour_16(
    path: str | PathLike[str], image: Image.Image, samples: str, notes: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    kind, order = samples.split(";16")
    transparent = image.info.get("transparency")
    if kind == "LA":  # the four bytes of a pixel, grey and alpha, pass for one 8-bit RGBA pixel
        pixel_bytes = _decode_as(image, "RGBA", notes).astype(np.uint16)
        grey, alpha = (pixel_bytes[..., i] * 256 + pixel_bytes[..., i + 1] for i in (0, 2))
        return np.repeat(grey[..., None], 3, axis=2), alpha
    # Both orders name the unpacker that keeps the upper byte; the opposite order keeps the lower one.
    opposite = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[order]
    stored = "RGBA" if kind == "RGBa" else kind  # Pillow would divide by alpha in 8 bits
    with open_image(path) as again:
        lower = _decode_as(again, f"{stored};16{opposite}", [])
    values = _decode_as(image, f"{stored};16{order}", notes).astype(np.uint16) * 256 + lower
    if values.shape[2] == 4:
        rgb, alpha = np.ascontiguousarray(values[..., :3]), np.ascontiguousarray(values[..., 3])
        if kind == "RGBa":
            straight = rgb.astype(np.float64) * 65535 / np.maximum(alpha, 1)[..., None]
            rgb = np.minimum(np.rint(straight), 65535).astype(np.uint16)
        return rgb, alpha
    if transparent is not None:
        return values, np.where((values == transparent).all(axis=2), 0, 65535).astype(np.uint16)
    return values, None


def _decode_as(image: Image.Image, samples: str, notes: list[str]) -> np.ndarray:
    """Decode with another unpacker of the same pixel size than the one that Pillow chose."""
    image.tile = [
        tile._replace(args=samples if isinstance(tile.args, str) else (samples, *tile.args[1:])) for tile in image.tile
    ]
    return np.array(_upright(image, notes))


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged EXIF raises whatever its parser meets
        notes.append(f"EXIF cannot be read, orientation ignored: {error}")
        return image


def _quantised(name: str, value: torch.Tensor, channels: int, bits: int) -> np.ndarray:
    """[C, H, W] floating point to [H, W, C] uint8 or uint16."""
    if value.ndim != 3 or value.shape[0] != channels or 0 in value.shape or not value.is_floating_point():
        expected = f"expected floating point [{channels}, H, W]"
        raise ValueError(f"{name}: {expected}, got {value.dtype} {list(value.shape)}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name}: {int((~torch.isfinite(value)).sum())} values are not finite")
    scaled = value.detach().to("cpu", torch.float64).clamp(0, 1).mul(2**bits - 1).round().permute(1, 2, 0)
    return np.ascontiguousarray(scaled.numpy(), dtype=np.uint8 if bits == 8 else np.uint16)


def _write_png_16(stream: BinaryIO, samples: np.ndarray, icc_profile: bytes | None) -> None:
    """PNG of 16-bit RGB or RGBA, which Pillow cannot write: rows with the "up" filter (2), no interlacing.

    Source: PNG specification (third edition), sections 5, 9 and 11.
    """
    height, width, channels = samples.shape
    rows = samples.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])

    def chunk(kind: bytes, content: bytes) -> None:
        stream.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))

    stream.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0))
    if icc_profile:
        chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    chunk(b"IDAT", zlib.compress(filtered))
    chunk(b"IEND", b"")


def _write_tiff_16(stream: BinaryIO, samples: np.ndarray, icc_profile: bytes | None) -> None:
    import tifffile  # comes with scikit-image; Pillow cannot write 16-bit colour

    tifffile.imwrite(
        stream,
        samples,
        photometric="rgb",
        extrasamples=["unassalpha"] if samples.shape[2] == 4 else None,
        iccprofile=icc_profile,
        metadata=None,
    )
