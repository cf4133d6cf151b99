"""The codec of deltas: what it gives is bit for bit what was, and what it is given can do no harm."""

import itertools

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from databus.delta import (
    BLOCK_WORDS,
    CHUNK_WORDS,
    HEADER,
    MAX_RAW_BYTES,
    DeltaEncoder,
    MalformedDelta,
    apply_chunk,
    touched,
)

ENCODERS = {word_bytes: DeltaEncoder(word_bytes, level=1) for word_bytes in (2, 4)}
"""Used again and again, as a learner does."""


def encode(old: np.ndarray, new: np.ndarray, first: int = 0) -> list[bytes]:
    """`old` stays as it is."""
    encoder = ENCODERS[new.itemsize]
    before = old.copy()
    chunks = [*encoder.encode(before, new, first), *encoder.flush()]
    assert np.array_equal(before, new), "the base becomes the new version"
    encoder.take_tables()
    return chunks


def altered(words: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    flips = rng.integers(1, 1 << 8 * words.itemsize, len(words)).astype(words.dtype)
    return np.where(rng.random(len(words)) < share, words ^ flips, words)


def random_words(length: int, word_bytes: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 1 << 8 * word_bytes, length).astype(f"<u{word_bytes}")


@settings(deadline=None, max_examples=60)
@given(
    length=st.one_of(st.integers(1, 200), st.sampled_from([BLOCK_WORDS - 1, BLOCK_WORDS, BLOCK_WORDS + 1, 200_003])),
    share=st.sampled_from([0.0, 1e-5, 1e-3, 0.02, 0.3, 0.5, 0.8, 1.0]),
    word_bytes=st.sampled_from([2, 4]),
    offset=st.integers(0, 9),
    seed=st.integers(0, 1 << 30),
)
def test_a_delta_gives_the_new_version_bit_for_bit(
    length: int, share: float, word_bytes: int, offset: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base = random_words(offset + length, word_bytes, rng)[offset:]  # however it lies in memory
    new = altered(base, share, rng)
    chunks = encode(base, new)
    assert bool(chunks) == (not np.array_equal(base, new))
    for _ in range(2):  # overwriting twice is harmless
        words = base.copy()
        for chunk in chunks:
            apply_chunk(chunk, words)
        assert np.array_equal(words, new)
        base = words


def test_nothing_is_larger_than_the_whole_by_more_than_its_table() -> None:
    rng = np.random.default_rng(0)
    base, new = random_words(300_000, 2, rng), random_words(300_000, 2, rng)
    assert sum(map(len, encode(base, new))) < new.nbytes + 1000


def test_two_percent_of_changes_take_a_twentieth_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    weights = (0.02 * rng.standard_normal(1 << 20)).astype(np.float32).view(np.uint32)
    base = (weights >> 16).astype(np.uint16)
    new = np.where(rng.random(len(base)) < 0.02, base + 1, base).astype(np.uint16)
    assert sum(map(len, encode(base, new))) < base.nbytes / 20


def test_pieces_of_a_version_are_chunks_of_one_delta() -> None:
    """As the shards of several ranks: small stretches share a chunk, long ones are cut."""
    rng = np.random.default_rng(0)
    base = random_words(CHUNK_WORDS + 100_000, 2, rng)
    new = altered(base, 0.01, rng)
    encoder, before = DeltaEncoder(2, level=1), base.copy()
    chunks: list[bytes] = []
    bounds = [0, *range(1, 400, 7), 65_000, 65_001, len(base)]
    for start, stop in itertools.pairwise(bounds):
        chunks += encoder.encode(before[start:stop], new[start:stop], start)
    chunks += encoder.flush()
    assert 2 <= len(chunks) <= 4
    words = base.copy()
    tables = [apply_chunk(chunk, words) for chunk in reversed(chunks)]
    assert np.array_equal(words, new)
    ours = encoder.take_tables()
    assert all(np.array_equal(*pair) for pair in zip(ours, reversed(tables), strict=True))


def test_touched_tensors_are_those_with_changes() -> None:
    starts = np.array([0, 10, 70_000, 140_000])
    base = np.zeros(150_000, np.uint16)
    for changed in ({1}, {0, 3}, {2}):
        new = base.copy()
        new[starts[list(changed)]] = 7
        encoder = DeltaEncoder(2, level=1)
        ends = [*starts[1:], len(base)]
        for start, end in zip(starts, ends, strict=True):
            assert not list(encoder.encode(base[start:end].copy(), new[start:end], int(start)))
        (chunk,) = encoder.flush()
        assert touched(apply_chunk(chunk, base.copy()), starts) == changed


def raw_of(chunk: bytes) -> bytearray:
    return bytearray(zstandard.ZstdDecompressor().decompress(chunk))


def framed(raw: bytes | bytearray) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(raw))


def assert_harmless(chunk: bytes, length: int, word_bytes: int) -> None:
    """It is refused, or overwrites words of the version alone; those around it stay."""
    fence = 4096
    memory = np.full(length + 2 * fence, 0x5A5A, f"<u{word_bytes}")
    words = memory[fence : fence + length]
    before = words.copy()
    try:
        apply_chunk(chunk, words)
    except MalformedDelta:
        assert np.array_equal(words, before), "refused, so nothing was written"
    assert (memory[:fence] == 0x5A5A).all() and (memory[fence + length :] == 0x5A5A).all()


@settings(deadline=None, max_examples=200)
@given(data=st.data(), word_bytes=st.sampled_from([2, 4]), seed=st.integers(0, 1 << 16))
def test_damaged_deltas_never_write_beyond_the_version(data: st.DataObject, word_bytes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = 70_000
    base = random_words(length, word_bytes, rng)
    (chunk,) = encode(base, altered(base, 0.003, rng))
    raw = raw_of(chunk)
    table_end = HEADER.size + 24 * 2
    for _ in range(data.draw(st.integers(1, 4))):  # header and table above all
        at = data.draw(st.one_of(st.integers(0, table_end - 1), st.integers(0, len(raw) - 1)))
        raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(raw), len(raw) - 1, table_end, table_end - 1, 7, 0]))
    assert_harmless(framed(raw[:cut]), length, word_bytes)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_are_harmless(noise: bytes) -> None:
    assert_harmless(noise, 100, 2)
    assert_harmless(framed(noise), 100, 2)
    assert_harmless(framed(HEADER.pack(1, 2) + noise), 100, 2)


def block(first: int, length: int, count: int, payload: bytes) -> bytes:
    return framed(HEADER.pack(1, 2) + np.array([first, length, count], "<i8").tobytes() + payload)


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        (block(0, 0, 0, b""), "0 of 0 words"),
        (block(-1, 5, 1, b"\0" * 4), "words at -1"),
        (block(96, 5, 1, b"\0" * 4), "at 96, of 100 in all"),
        (block(2**62, 5, 1, b"\0" * 4), "of 100 in all"),
        (block(0, BLOCK_WORDS + 1, 1, b"\0" * 4), "65537 words"),
        (block(0, 5, 6, b"\0" * 12), "6 of 5 words"),
        (block(0, 5, 1, b"\0" * 5), "5 bytes of gaps and values, expected 4"),
        (block(0, 5, 1, b"\5\0\0\0"), "block 0 has places beyond its 5 words"),
        (block(0, 5, 2, b"\3\1\0\0" + b"\0" * 4), "block 0 has places beyond its 5 words"),
        (framed(HEADER.pack(0, 4)), "words of 4 bytes, those of the version have 2"),
        (framed(HEADER.pack(9, 2)), "9 blocks in a chunk of 8 bytes"),
        (framed(b"\0"), "a chunk of 1 bytes"),
        (b"no frame", "no zstd frame"),
        (framed(bytes(MAX_RAW_BYTES + 1)), "says that it is 67108865 bytes long"),
        (block(0, 5, 1, b"\0" * 4)[:-3], "no zstd frame"),
        (block(0, 5, 1, b"\0" * 4) + b"more", "no zstd frame"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(chunk: bytes, says: str) -> None:
    words = np.zeros(100, np.uint16)
    with pytest.raises(MalformedDelta, match=says) as error:
        apply_chunk(chunk, words)
    assert "\n" not in str(error.value)
    assert not words.any()
