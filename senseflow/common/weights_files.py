"""What a file that should hold weights is instead, by its beginning and its size; needs no torch.

Downloads end early, logins answer in place of files, and `git clone` without Git LFS leaves
pointers: the libraries say of all of them that some number is wrong, and torch advises to read the
file unsafely.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path

BEGINNING = 4096  # bytes that are looked at
MOST_HEADER = 100 * 2**20  # bytes of a safetensors header: the format's own limit
SMALLEST = 10  # bytes of a safetensors file without a tensor
LFS = b"version https://git-lfs.github.com/spec/"
MARKUP = (b"<!doctype html", b"<html", b"<?xml", b"<!doctype")
GGUF = "a GGUF file"
OTHERS = {  # by how they begin
    b"GGUF": GGUF,
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras)",
    b"\x93NUMPY": "an array of NumPy",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"BZh": "a bzip2 archive: unpack it",
    b"\xfd7zXZ": "an xz archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"%PDF": "a PDF",
}
SAFETENSORS, PICKLE, JSON = "a safetensors file", "a pickle of torch", "a JSON text"
NAMED = {
    ".safetensors": SAFETENSORS,
    ".json": JSON,
    ".gguf": GGUF,
}  # by suffix; any other is a pickle's
DAMAGES = (  # a pickle of arbitrary bytes may fail in any of these ways
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError,
    TypeError, AttributeError, LookupError, OverflowError, MemoryError,
)  # fmt: skip
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # in torch's words: what a pickle names


def fault_of(file: Path) -> str | None:
    """What a file is, in words that follow its name; None where by its beginning and its size it
    is what its suffix says: a safetensors file, a JSON text, or else a pickle of torch.

    Raises OSError when it cannot be read.
    """
    if not file.is_file():
        return "is not a file"
    size, expected = file.stat().st_size, NAMED.get(file.suffix, PICKLE)
    with file.open("rb") as stream:
        begins = stream.read(BEGINNING)
    if not begins.strip(b"\0"):
        return f"is {'nothing but zeros' if begins else 'empty'}: a download that did not end"
    if begins.startswith(LFS):
        held = re.search(rb"size (\d+)", begins)
        what = f"the {size_in_words(int(held[1]))} it stands for" if held else "what it stands for"
        return f"is a pointer of Git LFS: `git lfs pull` in its folder fetches {what}"
    if size < SMALLEST and expected != JSON:
        return f"is damaged: {expected} cut short at {size_in_words(size)}"
    text = begins.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(MARKUP):
        return "is an HTML page, such as a login or an error in place of the file: download it anew"
    found, damage = _kind(file, size, begins, text)
    if damage:
        return f"is damaged: {found} {damage}"
    if found == expected:
        return None
    return (
        f"is {found}, not {expected}" if found else f"is not {expected}: it begins {begins[:8]!r}"
    )


def fault_in(file: Path, error: Exception) -> str:
    """What is wrong with a file that a library could not read, in words that follow its name.

    Raises OSError as `fault_of`.
    """
    return fault_of(file) or f"cannot be read: {words_of(error)}"


def words_of(error: Exception) -> str:
    """What a library says of a file of weights, in one line, but for torch's advice to read it
    unsafely."""
    said = " ".join(str(error).split())
    if name := GLOBAL.search(said):
        return f"it holds more than tensors, which is not read: {name[1]}"
    return said.rpartition("WeightsUnpickler error: ")[2].partition(". ")[0] or repr(error)


def size_in_words(num_bytes: float) -> str:
    """A number of bytes in words, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"


def _kind(file: Path, size: int, begins: bytes, text: bytes) -> tuple[str, str]:
    """What a file is by its content and what is wrong with it, both "" where that is not known."""
    header = int.from_bytes(begins[:8], "little")
    if begins[8:9] == b"{" and header <= MOST_HEADER:
        return SAFETENSORS, _cut(file, size, header)
    if begins.startswith(b"PK"):
        if not zipfile.is_zipfile(file):
            return "a zip archive (torch.save)", f"cut short at {size_in_words(size)}"
        with zipfile.ZipFile(file) as archive:
            is_torchs = any(name.endswith("/data.pkl") for name in archive.namelist())
        return (PICKLE if is_torchs else "a zip archive: unpack it"), ""
    if begins[:1] == b"\x80" and begins[1:2] <= b"\x05":
        return PICKLE, ""
    if begins[257:262] == b"ustar":
        return "a tar archive: unpack it", ""
    if text.startswith(b"{"):
        return JSON, ""
    return next((what for mark, what in OTHERS.items() if begins.startswith(mark)), ""), ""


def _cut(file: Path, size: int, header: int) -> str:
    """What is wrong with the size of a safetensors file; "" where it is what its header says."""
    if 8 + header > size:
        return f"cut short within its header, at {size_in_words(size)}"
    with file.open("rb") as stream:
        stream.seek(8)
        said = stream.read(header)
    try:
        tensors = {name: entry for name, entry in json.loads(said).items() if name[:2] != "__"}
        whole = 8 + header + max((e["data_offsets"][1] for e in tensors.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "whose header is none"
    if size == whole:
        return ""
    return f"with {size:,} bytes in place of {whole:,}"
