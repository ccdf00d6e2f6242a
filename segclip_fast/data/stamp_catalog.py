"""Which Tux Paint stamps are photographic cut-outs, and what each one shows.

Rules, in order; a stamp is a file NAME.png with NAME.txt beside it:
1. folders of drawings, signs, letters and money are left out (`SKIPPED_FOLDERS`), and so are single drawings
   in the other folders (`SKIPPED_STAMPS`) and mirrored copies (`*_mirror`);
2. the first line of NAME.txt is the English caption; no text, an empty one, or one that addresses the
   reader ("Eat your broccoli!") leaves the stamp out;
3. the picture needs an alpha channel that is neither empty nor opaque everywhere;
4. the concept is the noun phrase that opens the caption, at most three words, in lower case: articles,
   numbers and leading words of size or state are dropped, colours stay ("blue whale"), counting phrases are
   opened ("a pair of scissors" -> "scissors"); it ends at punctuation or at the first verb or preposition;
5. stamps share a class when one concept ends with another's ("sumatran tiger" -> "tiger"), when at least
   three of a top-level folder end with the same word ("fire truck", "garbage truck", "pickup truck" ->
   "truck"), or when they differ by a plural s. `WHOLE_NAMES` are exempt.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "tuxpaint-stamps-default"
MIN_SIDE = 24  # pixels; smaller pictures are icons
MAX_WORDS = 3


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SKIPPED_FOLDERS = _words(
    "cartoon toys plastic symbols clothes military naturalforces people easter halloween hanukkah newyears "
    "flags roadsigns"
)
SKIPPED_STAMPS = _words(
    # drawn, blurred or half transparent
    "hedgehog echidna pizza tooth highlighter glass bee Santa bow candy_cane hard_candy lamp santahat star "
    "stocking tree xmas_tp_bulb inukshuk-outline 0_sun sedan_police birch rugby_goal_posts "
    # shows something else than its caption says
    "rambutan albino_peahen"
)
WHOLE_NAMES = frozenset({"sea lion", "guinea fowl", "roast turkey", "pine wreath"})

_ARTICLES = _words("a an the our some one two another")
_STATES = _words(
    "very small little tiny big large old old-fashioned modern ripe sweet male female baby sitting sleeping "
    "open closed sliced colorful lit folded full poisonous freshwater bolted"
)
_COUNTS = _words("pair bunch head string quarter plant baby")
_ENDS = _words(
    "is are was lets has resembles means with in at as from by covered making used like for that to also "
    "called or of"
)
_READER = _words("you your we remember eat this it's it\u2019s")
_STOPS = ".,;:!?\u2014("
_QUOTES = "\u201c\u201d\"\u2018\u2019'"


@dataclass(frozen=True)
class Stamp:
    """One cut-out.

    Attributes:
        path: its PNG, relative to the root, with forward slashes.
        caption: the English sentence that comes with it.
        concept: its class name.
        held_out: True if the stamp belongs to the "val" split.
    """

    path: str
    caption: str
    concept: str
    held_out: bool = False


@lru_cache(maxsize=4)
def read_catalog(root: Path) -> tuple[Stamp, ...]:
    """All photographic stamps under `root`, sorted by path.

    In every class of at least two stamps one third of them, and at least one, is held out (chosen by a hash
    of the path, so that the choice does not depend on which other classes there are).

    Raises:
        FileNotFoundError: no such folder, or no stamp in it.
        ValueError: a picture that cannot be decoded.
    """
    found = [stamp for stamp in (_read_stamp(root, path) for path in _pictures(root)) if stamp]
    if not found:
        raise FileNotFoundError(
            f"root: expected the stamps folder of the Debian package {PACKAGE} (animals/, food/, ... "
            f"with NAME.png beside NAME.txt), got {str(root)!r}. To fetch it without installing:\n"
            f"  apt-get download {PACKAGE} && dpkg -x {PACKAGE}_*.deb stamps\n"
            f"  then pass stamps/usr/share/tuxpaint/stamps"
        )
    return _hold_out(_share_classes(found))


def concept_of(caption: str) -> str | None:
    """The noun phrase that opens a caption, or None if there is none (rule 4 above)."""
    words = caption.lower().replace("\u2014", "\u2014 ").replace("(", " ( ").split()
    if any(word.strip(_QUOTES + _STOPS) in _READER for word in words[:3]):
        return None
    phrase: list[str] = []
    for word in words:
        bare = word.strip(_QUOTES + _STOPS)
        counted = bare == "of" and phrase[-1:] and phrase[-1] in _COUNTS
        if counted or (
            phrase and bare in ("the", "and")
        ):  # "George the blue groper", "red and white anemone"
            phrase = []
        elif (phrase and bare in _ENDS) or not bare:
            break
        elif phrase or bare not in _ARTICLES | _ENDS:
            phrase = [*phrase, bare] if not _STATES.issuperset(phrase) else [bare]
        if word.rstrip(_QUOTES).endswith(tuple(_STOPS)) and not _STATES.issuperset(phrase):
            break
    return " ".join(phrase[-MAX_WORDS:]) or None


def _pictures(root: Path) -> Iterable[Path]:
    if not root.is_dir():
        return
    for path in sorted(root.rglob("*.png")):
        folders = path.relative_to(root).parts[:-1]
        drawn = path.stem in SKIPPED_STAMPS or path.stem.endswith("_mirror")
        if not drawn and SKIPPED_FOLDERS.isdisjoint(folders):
            yield path


def _read_stamp(root: Path, path: Path) -> Stamp | None:
    """The stamp of a picture, or None if rule 2 or 3 leaves it out."""
    text = path.with_suffix(".txt")
    if not text.is_file():
        return None
    lines = text.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    caption = lines[0].strip() if lines else ""
    concept = concept_of(caption)
    if concept is None or not _is_cut_out(path):
        return None
    return Stamp(path.relative_to(root).as_posix(), caption, concept)


def _is_cut_out(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            if min(picture.size) < MIN_SIDE:
                return False
            if "A" not in picture.getbands() and "transparency" not in picture.info:
                return False
            alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"root: expected readable stamps, got {str(path)!r} ({error})") from error
    solid = float((alpha > 127).mean())
    return 0.0 < solid < 1.0


def _share_classes(stamps: list[Stamp]) -> list[Stamp]:
    """Rule 5: replace concepts by the shorter ones they belong to."""
    concepts = {stamp.concept for stamp in stamps}
    heads = Counter((stamp.path.split("/")[0], stamp.concept.split()[-1]) for stamp in stamps)

    def shared(stamp: Stamp) -> str:
        concept = stamp.concept
        if concept in WHOLE_NAMES:
            return concept
        words = concept.split()
        if heads[stamp.path.split("/")[0], words[-1]] >= 3:
            concept = words[-1]
        else:
            tails = [" ".join(words[start:]) for start in range(len(words) - 1, 0, -1)]
            concept = next((tail for tail in tails if tail in concepts), concept)
        return concept[:-1] if concept.endswith("s") and concept[:-1] in concepts else concept

    return [replace(stamp, concept=shared(stamp)) for stamp in stamps]


def _hold_out(stamps: list[Stamp]) -> tuple[Stamp, ...]:
    members: dict[str, list[str]] = defaultdict(list)
    for stamp in stamps:
        members[stamp.concept].append(stamp.path)
    held: set[str] = set()
    for paths in members.values():
        if len(paths) >= 2:
            paths.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
            held.update(paths[: max(1, len(paths) // 3)])
    return tuple(replace(stamp, held_out=stamp.path in held) for stamp in stamps)
