"""How the published dehazing sets lie on disk, and which hazy image belongs to which clear one.

| name          | set                     | folders, and a pair                                                     |
|---------------|-------------------------|-------------------------------------------------------------------------|
| mitnet        | MITNet's                | ``{train,val}_indoor/{hazy,gt}``: 1_1.png → 1.png, ``vallist.txt``      |
| its           | RESIDE ITS              | ``{hazy,clear}``: 1_1_0.90179.png → 1.png                               |
| ots           | RESIDE OTS, SOTS outdoor| ``{hazy,clear}``: 0001_0.8_0.2.jpg → 0001.jpg or 0001.png               |
| sots-indoor   | RESIDE SOTS indoor      | ``{hazy,gt}``: 1400_1.png → 1400.png                                    |
| dehazeformer  | DehazeFormer, DCMPNet   | ``{train,test}/{GT,hazy}``: same names                                  |
| gunet         | gUNet                   | ``{GT,IN}``: same names                                                 |
| haze4k        | Haze4K, ConvIR          | ``{train,test}/{hazy,gt}``: stem before the first ``_``                 |
| dense-nh-haze | Dense-Haze, NH-HAZE     | 01_hazy.png → 01_GT.png; 1 to 50 for training, 51 to 55 for testing     |
| o-haze        | O-HAZE                  | 01_outdoor_hazy.jpg → 01_outdoor_GT.jpg                                 |
| i-haze        | I-HAZE                  | 01_indoor_hazy.jpg → 01_indoor_GT.jpg                                   |

``hazy`` may also be ``haze`` or ``input``, ``clear`` also ``clear_images``, ``gt`` or ``GT``; the last three sets may
lie in one folder. A set without splits is used whole, whichever split is asked for. Where several layouts fit, the one
that pairs most images is taken.

Hazy and clear image have the same size, but for SOTS indoor: there the truth (640×480) is cut by 10 pixels on every
side to the hazy image's 620×460. Nothing is ever resized.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Column, Table
from rich.text import Text

from .images import EXTENSIONS, ImageError, read_pixels, read_size

SPLITS = ("train", "val", "test")

HAZY_FOLDERS = ("hazy", "haze", "input")
CLEAR_FOLDERS = ("clear", "clear_images", "gt", "GT")

SOTS_HAZY, SOTS_CLEAR, SOTS_MARGIN = (620, 460), (640, 480), 10  # width × height, pixels

ALL = "all"
"""Name of the only split of a set that has none."""

SPLIT_FOLDERS = {"train": "train", "val": "val", "test": "test"}
NO_SPLITS = {ALL: ""}

VALIDATION_LIST = "vallist.txt"

HEADER_READERS = 8  # threads; a header is a matter of waiting for the disk


class DataError(ValueError):
    """A data set that cannot be used as it is; the message names what was looked for and what was found."""


@dataclass(frozen=True)
class Layout:
    """One way to lay out a set.

    Args:
        name: what ``layout=`` accepts.
        title: the published sets that lie so.
        example: a pair's names.
        pattern: what a hazy image's stem must look like; its group "id" begins the clear image's stem.
        ending: what follows the id in the clear image's stem.
        splits: for each variant, the folder of each split below the root.
        hazy: names of the folder of hazy images; "" for the split's own folder, shared with the clear ones.
        clear: names of the folder of clear images.
        numbers: the images of each split by the number that their names begin with, where folders do not part them.
        listed: hazy images of the "val" split are those of ``vallist.txt``, if there is one.
    """

    name: str
    title: str
    example: str
    pattern: re.Pattern[str]
    ending: str = ""
    splits: tuple[Mapping[str, str], ...] = (NO_SPLITS,)
    hazy: tuple[str, ...] = HAZY_FOLDERS
    clear: tuple[str, ...] = CLEAR_FOLDERS
    numbers: Mapping[str, range] | None = None
    listed: bool = False

    def describe(self) -> str:
        """Folders and names in one line, for messages."""
        variants = (", ".join(f"{folder or '.'}/" for folder in variant.values()) for variant in self.splits)
        hazy, clear = ("|".join(name or "." for name in names) for names in (self.hazy, self.clear))
        return f"{self.name}: in {' or in '.join(variants)}: {hazy} with {clear}, {self.example}"


NUMBER = r"(?:\d+\.?\d*|\.\d+)"
ONE_FOLDER_TOO = {"hazy": ("", *HAZY_FOLDERS), "clear": ("", *CLEAR_FOLDERS)}

# Of layouts that find the same pairs the first gives its name.
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "mitnet",
            "MITNet's RESIDE indoor",
            "1_1.png → 1.png",
            re.compile(r"(?P<id>[^_]+)_.+"),
            splits=({"train": "train_indoor", "val": "val_indoor"},),
            listed=True,
        ),
        Layout("its", "RESIDE ITS", "1_1_0.90179.png → 1.png", re.compile(rf"(?P<id>\d+)_\d+_{NUMBER}")),
        Layout(
            "ots",
            "RESIDE OTS or SOTS outdoor",
            "0001_0.8_0.2.jpg → 0001.jpg or 0001.png",
            re.compile(rf"(?P<id>\d+)_{NUMBER}_{NUMBER}"),
        ),
        Layout("sots-indoor", "RESIDE SOTS indoor", "1400_1.png → 1400.png", re.compile(r"(?P<id>\d+)_\d+")),
        Layout(
            "dehazeformer",
            "DehazeFormer or DCMPNet",
            "same names",
            re.compile(r"(?P<id>.+)"),
            splits=(SPLIT_FOLDERS, NO_SPLITS),
        ),
        Layout(
            "gunet",
            "gUNet",
            "same names",
            re.compile(r"(?P<id>.+)"),
            splits=(SPLIT_FOLDERS, NO_SPLITS),
            hazy=("IN",),
            clear=("GT",),
        ),
        Layout(
            "haze4k",
            "Haze4K or ConvIR",
            "1_0.8_1.6.png → 1.png",
            re.compile(r"(?P<id>[^_]+)_.+"),
            splits=(SPLIT_FOLDERS, NO_SPLITS),
        ),
        Layout(
            "dense-nh-haze",
            "Dense-Haze or NH-HAZE",
            "01_hazy.png → 01_GT.png",
            re.compile(r"(?P<id>\d+)_hazy"),
            ending="_GT",
            numbers={"train": range(1, 51), "test": range(51, 56)},
            **ONE_FOLDER_TOO,
        ),
        Layout(
            "o-haze",
            "O-HAZE",
            "01_outdoor_hazy.jpg → 01_outdoor_GT.jpg",
            re.compile(r"(?P<id>\d+_outdoor)_hazy"),
            ending="_GT",
            **ONE_FOLDER_TOO,
        ),
        Layout(
            "i-haze",
            "I-HAZE",
            "01_indoor_hazy.jpg → 01_indoor_GT.jpg",
            re.compile(r"(?P<id>\d+_indoor)_hazy"),
            ending="_GT",
            **ONE_FOLDER_TOO,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A hazy image and its truth.

    Args:
        hazy: path of the hazy image below the set's root.
        clear: path of the clear one.
    """

    hazy: str
    clear: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a set.

    Args:
        kind: what sort of thing, such as "hazy without clear".
        message: the files, and what was expected.
        fatal: whether it keeps the set from being used.
    """

    kind: str
    message: str
    fatal: bool = True


@dataclass(frozen=True)
class Split:
    """What one split of a set holds.

    Args:
        name: "train", "val", "test", or "all".
        pairs: hazy and clear images that belong together, sorted by name.
        problems: what does not.
        hazy: number of hazy images.
        clear: number of clear images.
    """

    name: str
    pairs: list[Pair]
    problems: list[Problem]
    hazy: int
    clear: int


@dataclass(frozen=True)
class Recognised:
    """A set whose layout is known.

    Args:
        root: the set's folder.
        layout: how it lies.
        splits: by name; only "all" for a set without splits.
    """

    root: Path
    layout: Layout
    splits: dict[str, Split]

    def split(self, name: str | None) -> Split:
        """The split of that name; "val" and "test" stand in for each other; None: all together.

        Raises:
            ValueError: no such name.
            DataError: the set has splits, but not this one.
        """
        if name is not None and name not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)} or None, got {name!r}")
        if ALL in self.splits:
            return self.splits[ALL]
        if name is None:
            parts = self.splits.values()
            return Split(
                ALL,
                [pair for part in parts for pair in part.pairs],
                [problem for part in parts for problem in part.problems],
                sum(part.hazy for part in parts),
                sum(part.clear for part in parts),
            )
        for candidate in (name, {"val": "test", "test": "val"}.get(name)):
            if candidate in self.splits:
                return self.splits[candidate]
        raise DataError(f"{self.root}: {self.layout.title} has no split {name!r} here, only {', '.join(self.splits)}")


@dataclass(frozen=True)
class Report:
    """What `check` found; `rich.print` shows it as a table.

    Args:
        root: the set's folder.
        layout: name of the layout.
        title: the published sets that lie so.
        splits: by name.
        problems: of all splits.
    """

    root: Path
    layout: str
    title: str
    splits: dict[str, Split]
    problems: tuple[Problem, ...]

    @property
    def pairs(self) -> int:
        """Number of pairs in all splits."""
        return sum(len(split.pairs) for split in self.splits.values())

    @property
    def usable(self) -> bool:
        """Whether there are pairs and no problem is fatal."""
        return self.pairs > 0 and not any(problem.fatal for problem in self.problems)

    def counts(self) -> dict[tuple[str, bool], int]:
        """How many problems there are of each kind, by kind and whether they are fatal."""
        return dict(Counter((problem.kind, problem.fatal) for problem in self.problems))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.render()

    def render(self, *, limit: int = 10) -> Group:
        """Tables of the splits and of the problems, at most ``limit`` of each kind."""
        name = Text(f"{self.root}: {self.title} ({self.layout})")
        sizes = Table("split", "pairs", "hazy", "clear")
        for column in sizes.columns[1:]:
            column.justify = "right"
        for split, content in self.splits.items():
            sizes.add_row(split, str(len(content.pairs)), str(content.hazy), str(content.clear))
        if not self.problems:
            return Group(name, sizes, Text("no problems", "green"))
        found = Table("problem", "number", Column("where", overflow="fold"))
        for (kind, fatal), count in self.counts().items():
            same = [problem.message for problem in self.problems if (problem.kind, problem.fatal) == (kind, fatal)]
            more = [f"… and {count - limit} more"] if count > limit else []
            found.add_row(Text(kind, "red" if fatal else "yellow"), str(count), Text("\n".join(same[:limit] + more)))
        return Group(name, sizes, found)


def recognise(root: str | PathLike[str], layout: str | None = None) -> Recognised:
    """Find out how a set lies on disk and pair its images, by names alone.

    Args:
        root: the set's folder.
        layout: one of `LAYOUTS`, when several fit; None finds it out.

    Returns:
        The layout, and the pairs of every split.

    Raises:
        ValueError: unknown ``layout``.
        DataError: no layout fits, or several pair the images differently.
    """
    root = Path(root)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not root.is_dir():
        raise DataError(f"{root}: {'a file, not a folder' if root.exists() else 'no such folder'}")
    wanted = [LAYOUTS[layout]] if layout else list(LAYOUTS.values())
    tree = _Tree(root)
    candidates = [candidate for each in wanted for candidate in _candidates(tree, each)]
    scored = [(_score(candidate), candidate) for candidate in candidates]
    best = max((score for score, _ in scored), default=0)
    if best == 0:
        raise DataError(_unknown(tree, wanted))
    winners = [candidate for score, candidate in scored if score == best]
    chosen = {pair for split in winners[0].splits.values() for pair in split.pairs}
    for other in winners[1:]:
        if {pair for split in other.splits.values() for pair in split.pairs} != chosen:
            raise DataError(
                f"{root}: ambiguous, {winners[0].layout.name} ({_example(winners[0])}) and {other.layout.name} "
                f"({_example(other)}) each pair {best} images; name one with layout=, or move the other's folders away"
            )
    return winners[0]


def check(root: str | PathLike[str], layout: str | None = None, *, decode: bool = False) -> Report:
    """Examine a set: its layout, its pairs, and what is missing, doubled, unreadable or of the wrong size.

    A file that is in the training split and, byte for byte, in another one too is reported: scores on it mean nothing.

    Args:
        root: the set's folder.
        layout: one of `LAYOUTS`; None finds it out.
        decode: decode every image whole instead of reading its header; finds truncated files, takes much longer.

    Returns:
        Everything that was found, right and wrong, as a :class:`Report`.

    Raises:
        ValueError: unknown ``layout``.
        DataError: no layout fits, or several do.
    """
    found = recognise(root, layout)
    problems = []
    for split in found.splits.values():
        problems += split.problems
        problems += examine(found.root, split.pairs, decode=decode)[1]
    problems += _leaks(found)
    return Report(found.root, found.layout.name, found.layout.title, found.splits, tuple(problems))


def examine(
    root: Path, pairs: Sequence[Pair], *, decode: bool = False
) -> tuple[dict[str, tuple[int, int]], list[Problem]]:
    """Read the sizes of all images and find those that cannot be read or do not fit together.

    Returns:
        Width and height of each readable image by its path below ``root``, and the problems.
    """

    def measure(path: str) -> tuple[int, int] | ImageError:
        try:
            if decode:
                height, width = read_pixels(root / path).rgb.shape[:2]
                return width, height
            return read_size(root / path)
        except ImageError as error:
            return error

    paths = list(dict.fromkeys(path for pair in pairs for path in (pair.hazy, pair.clear)))
    with ThreadPoolExecutor(HEADER_READERS) as pool:
        measured = dict(zip(paths, pool.map(measure, paths), strict=True))
    problems = [Problem("unreadable", str(error)) for error in measured.values() if isinstance(error, ImageError)]
    sizes = {path: size for path, size in measured.items() if not isinstance(size, ImageError)}
    for pair in pairs:
        if pair.hazy in sizes and pair.clear in sizes:
            try:
                truth_margin(pair, sizes[pair.hazy], sizes[pair.clear])
            except DataError as error:
                problems.append(Problem("sizes differ", str(error)))
    return sizes, problems


def _leaks(found: Recognised) -> list[Problem]:
    """Files of the training split whose bytes are those of a file that is held out."""
    held_out = {split: content for split, content in found.splits.items() if split != "train"}
    if "train" not in found.splits or not held_out:
        return []

    def by_size(pairs: Iterable[Pair]) -> dict[int, list[str]]:
        table = defaultdict(list)
        for path in sorted({path for pair in pairs for path in (pair.hazy, pair.clear)}):
            with suppress(OSError):  # what cannot be read is reported as such
                table[(found.root / path).stat().st_size].append(path)
        return table

    def digests(paths: Iterable[str]) -> dict[bytes, str]:
        table = {}
        for path in paths:
            with suppress(OSError), (found.root / path).open("rb") as stream:
                table.setdefault(hashlib.file_digest(stream, "sha256").digest(), path)
        return table

    trained = by_size(found.splits["train"].pairs)
    problems = []
    for content in held_out.values():
        for size, paths in by_size(content.pairs).items():
            if size in trained:
                same = digests(trained[size])
                problems += [
                    Problem("in train too", f"{path} is the same file as {same[digest]}", fatal=False)
                    for digest, path in digests(paths).items()
                    if digest in same
                ]
    return problems


def truth_margin(pair: Pair, hazy: tuple[int, int], clear: tuple[int, int]) -> int:
    """Pixels to cut from every side of the truth: 0 where the sizes agree, 10 for SOTS indoor.

    Args:
        pair: the two images' names, for the message.
        hazy: width and height of the hazy image.
        clear: width and height of the clear image.

    Raises:
        DataError: any other difference.
    """
    if hazy == clear:
        return 0
    if (hazy, clear) == (SOTS_HAZY, SOTS_CLEAR):
        return SOTS_MARGIN
    sizes = [f"{width}×{height}" for width, height in (hazy, clear)]
    raise DataError(f"{pair.hazy} is {sizes[0]}, its truth {pair.clear} is {sizes[1]}")


class _Tree:
    """Folders and image names below a root, each folder listed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listed: dict[str, tuple[list[str], list[str], list[str]]] = {}

    def _entries(self, folder: str) -> tuple[list[str], list[str], list[str]]:
        if folder not in self._listed:
            folders, images, others = [], [], []
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue  # ._1.png and .DS_Store, as macOS leaves them
                        is_image = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
                        (folders if entry.is_dir() else images if is_image else others).append(entry.name)
            except OSError as error:
                raise DataError(f"{self.root / folder}: cannot be listed: {error}") from error
            for names in (folders, images, others):
                names.sort()
            self._listed[folder] = folders, images, others
        return self._listed[folder]

    def folders(self, folder: str = "") -> list[str]:
        return self._entries(folder)[0]

    def images(self, folder: str) -> list[str]:
        return self._entries(folder)[1]

    def others(self, folder: str) -> list[str]:
        return self._entries(folder)[2]

    def has(self, folder: str) -> bool:
        parent, _, name = folder.rpartition("/")
        return not folder or ((not parent or self.has(parent)) and name in self.folders(parent))


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _candidates(tree: _Tree, layout: Layout) -> Iterator[Recognised]:
    """The ways in which a layout's folders are there; every split has its images in folders of the same names."""
    for variant in layout.splits:
        for hazy in layout.hazy:
            for clear in layout.clear:
                if bool(hazy) != bool(clear):
                    continue
                folders = {split: (_join(folder, hazy), _join(folder, clear)) for split, folder in variant.items()}
                folders = {split: pair for split, pair in folders.items() if all(map(tree.has, pair))}
                if layout.numbers and folders:
                    folders = dict.fromkeys(layout.numbers, folders[ALL])
                splits = {split: _pair_images(tree, layout, split, *pair) for split, pair in folders.items()}
                splits = {
                    split: content
                    for split, content in splits.items()
                    if content.hazy or content.clear or content.problems
                }
                if splits:
                    yield Recognised(tree.root, layout, splits)


def _pair_images(tree: _Tree, layout: Layout, split: str, hazy_folder: str, clear_folder: str) -> Split:
    hazy_names, clear_names = tree.images(hazy_folder), tree.images(clear_folder)
    problems = []
    if hazy_folder == clear_folder:
        clear_names = [name for name in hazy_names if not layout.pattern.fullmatch(_stem(name))]
        hazy_names = [name for name in hazy_names if layout.pattern.fullmatch(_stem(name))]
    if layout.numbers:
        if split == next(iter(layout.numbers)):
            problems += _outside(layout.numbers, hazy_folder, hazy_names)
        hazy_names, clear_names = (
            [name for name in names if _number(name) in layout.numbers[split]] for names in (hazy_names, clear_names)
        )
    if layout.listed and split == "val":
        hazy_names = _listed(tree, hazy_folder, hazy_names, problems)

    truths, stems = _by_stem(clear_names), _by_stem(hazy_names)
    pairs, used = [], set()
    for name in hazy_names:
        path = _join(hazy_folder, name)
        match = layout.pattern.fullmatch(_stem(name))
        if match is None:
            problems.append(Problem("unknown name", f"{path}: {layout.title} has names like {layout.example}"))
            continue
        stem = match["id"] + layout.ending
        found = truths.get(stem, [])
        used.update(found)
        if name in found:
            found = [name]  # the same name with its extension
        if not found:
            problems.append(Problem("hazy without clear", f"{path}: no {_join(clear_folder, stem)} with any extension"))
        elif len(found) > 1:
            names = " and ".join(_join(clear_folder, truth) for truth in found)
            problems.append(Problem("duplicates", f"{path}: its truth may be {names}"))
        elif len(stems[_stem(name)]) > 1 and found != [name]:
            names = " and ".join(_join(hazy_folder, twin) for twin in stems[_stem(name)])
            problems.append(Problem("duplicates", f"{names}: two hazy images of one name"))
        else:
            pairs.append(Pair(path, _join(clear_folder, found[0])))
    problems += [
        Problem("clear without hazy", _join(clear_folder, name), fatal=False)
        for name in clear_names
        if name not in used
    ]
    problems += [
        Problem("no image", _join(folder, name), fatal=False)
        for folder in dict.fromkeys((hazy_folder, clear_folder))
        for name in tree.others(folder)
        if name != VALIDATION_LIST
    ]
    return Split(split, pairs, list(dict.fromkeys(problems)), len(hazy_names), len(clear_names))


def _outside(numbers: Mapping[str, range], folder: str, names: Sequence[str]) -> list[Problem]:
    expected = ", ".join(f"{part.start} to {part.stop - 1} for {split}" for split, part in numbers.items())
    return [
        Problem("in no split", f"{_join(folder, name)}: numbers are {expected}", fatal=False)
        for name in names
        if not any(_number(name) in part for part in numbers.values())
    ]


def _listed(tree: _Tree, hazy_folder: str, names: Sequence[str], problems: list[Problem]) -> list[str]:
    """The images that the validation list names, or all where there is no list."""
    parent = hazy_folder.rpartition("/")[0]
    places = [place for place in (parent, "") if VALIDATION_LIST in tree.others(place)]
    if not places:
        return list(names)
    file = _join(places[0], VALIDATION_LIST)
    try:
        lines = (tree.root / file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem("unreadable", f"{file}: {error}"))
        return []
    present, chosen = set(names), {}
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry:
            continue
        path = PurePosixPath(entry)
        if path.is_absolute() or ".." in path.parts or "\\" in entry or ":" in entry or "\0" in entry:
            problems.append(Problem("unsafe name", f"{file}, line {number}: {entry!r} may lead out of {hazy_folder}"))
        elif _join(hazy_folder, path.name) not in (_join(place, str(path)) for place in (hazy_folder, parent, "")):
            problems.append(Problem("unsafe name", f"{file}, line {number}: {entry!r} is not in {hazy_folder}"))
        elif path.name not in present:
            problems.append(Problem("listed but missing", f"{file}, line {number}: {_join(hazy_folder, path.name)}"))
        elif _leads_out(tree.root, hazy_folder, path.name):
            problems.append(Problem("unsafe name", f"{file}, line {number}: {entry!r} is a link out of {tree.root}"))
        elif path.name in chosen:
            message = f"{file}, line {number}: {path.name} stands on line {chosen[path.name]} already"
            problems.append(Problem("listed twice", message, fatal=False))
        else:
            chosen[path.name] = number
    missing = len(present) - len(chosen)
    if missing:
        problems.append(Problem("not listed", f"{file} leaves out {missing} images of {hazy_folder}", fatal=False))
    return sorted(chosen)


def _leads_out(root: Path, folder: str, name: str) -> bool:
    """Whether an image is a link to a place outside the set; a folder of the set may be a link to anywhere."""
    path = root / folder / name
    if not path.is_symlink():
        return False
    target = path.resolve()
    return not any(target.is_relative_to(place.resolve()) for place in (root, root / folder))


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _by_stem(names: Sequence[str]) -> dict[str, list[str]]:
    table = defaultdict(list)
    for name in names:
        table[_stem(name)].append(name)
    return table


def _number(name: str) -> int:
    digits = re.match(r"\d+", name)
    return int(digits[0]) if digits else -1


def _example(found: Recognised) -> str:
    pair = next(pair for split in found.splits.values() for pair in split.pairs)
    return f"{pair.hazy} → {pair.clear}"


def _unknown(tree: _Tree, wanted: Sequence[Layout]) -> str:
    images = tree.images("")
    found = [f"folders {', '.join(tree.folders()[:20]) or 'none'}", f"{len(images)} images"]
    for folder in tree.folders()[:20]:
        inside = tree.images(folder)
        if inside:
            found.append(f"{folder}/ with {len(inside)} images such as {inside[0]}")
    hints = [
        f"{tree.root / folder} looks like {candidate.layout.name}"
        for folder in tree.folders()[:20]
        for candidate in [_most_pairs(_Tree(tree.root / folder))]
        if candidate
    ]
    looked = "\n  ".join(layout.describe() for layout in wanted)
    return "\n".join([f"{tree.root}: no layout fits. Looked for\n  {looked}", f"Found {'; '.join(found)}.", *hints])


def _most_pairs(tree: _Tree) -> Recognised | None:
    """What `recognise` would take the folder for, ambiguous or not."""
    scored = [(_score(candidate), candidate) for layout in LAYOUTS.values() for candidate in _candidates(tree, layout)]
    best, found = max(scored, key=lambda entry: entry[0], default=(0, None))
    return found if best else None


def _score(candidate: Recognised) -> int:
    return sum(len(split.pairs) for split in candidate.splits.values())
