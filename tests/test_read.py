"""Files to raw rows: every format gives the same rows, and numbers lines as an editor does."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sftx.arrow import from_numpy, rows_of
from sftx.data.sources import read
from sftx.data.sources.read import Block, find_files, is_hub_name, is_lines, rows_in, scan
from sftx.data.sources.to_jsonl import convert, dump
from sftx.types import RowError, UserError

ROWS = [
    {"prompt": "1", "completion": "null"},
    {"prompt": 'a "quoted"\nline, and {"a": 1}', "completion": "2024-01-01"},
    {"prompt": "héllo \u2028 שלום 🙂", "completion": "  white space "},
]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def converted(path: Path) -> list[tuple[int, Any]]:
    out = io.BytesIO(path.read_bytes())
    if not is_lines(path):
        out = io.BytesIO()
        convert([path], out)
        out.seek(0)
    found = []
    for block in scan(out, path.name):
        found += [
            (line, value)
            for line, _, value in rows_in(out.getvalue()[block.start : block.stop], block.line)
        ]
    return found


def csv_bytes(rows: list[dict[str, str]], newline: str = "\r\n") -> bytes:
    quoted = [",".join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows]
    return newline.join(["prompt,completion", *quoted, ""]).encode()


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    """No format changes a value: texts that look like numbers, null, JSON or dates stay the texts
    they are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    files = {
        "a.jsonl": lines(ROWS),
        "bom.jsonl": b"\xef\xbb\xbf" + lines(ROWS),
        "crlf.jsonl": lines(ROWS).replace(b"\n", b"\r\n"),
        "a.jsonl.gz": gzip.compress(lines(ROWS)),
        "a.jsonl.zst": zstandard.compress(lines(ROWS[:1])) + zstandard.compress(lines(ROWS[1:])),
        "a.json": json.dumps(ROWS).encode(),
        "pretty.json": json.dumps(ROWS, indent=2).encode(),
        "lines.json": lines(ROWS),
        "a.csv": csv_bytes(ROWS),
        "a.tsv": csv_bytes(ROWS).replace(b",", b"\t", 1).replace(b'","', b'"\t"'),
        "a.csv.gz": gzip.compress(csv_bytes(ROWS)),
        **{
            f"{file.name}.zst": zstandard.compress(file.read_bytes())
            for file in [*tmp_path.iterdir()]
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for path in find_files(str(tmp_path)):
        assert [row for _, row in converted(path)] == ROWS, path.name
    assert len(find_files(str(tmp_path))) == len(files) + 3


def test_line_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \r\n{"a": 2}\n{"a": \n\n{"a": 3}')
    found = converted(path)
    assert [line for line, _ in found] == [1, 4, 5, 7]
    assert isinstance(found[2][1], RowError)
    assert "cut off" in str(found[2][1])
    table = tmp_path / "a.csv"
    table.write_bytes(csv_bytes(ROWS, "\n") + b"\nlast,one\ntoo,many,values\n")
    assert [line for line, _ in converted(table)] == [2, 3, 5, 7, 8]
    assert "3 values where the first line names 2" in str(converted(table)[-1][1])


def test_plain_text_is_one_row_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"second\r\n\n")
    (tmp_path / "a.txt").write_bytes("first ü".encode())
    assert [converted(path) for path in find_files(str(tmp_path))] == [
        [(1, "first ü")],
        [(1, "second\r\n\n")],
    ]
    (tmp_path / "c.jsonl").write_bytes(lines(["a row"]))
    assert [path.name for path in find_files(str(tmp_path))] == [
        "c.jsonl"
    ]  # texts beside rows are notes
    assert [path.name for path in find_files(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]


def test_arrow_does_not_invent_null_keys(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls = [{"name": "a", "arguments": {"city": "Paris"}}, {"name": "b", "arguments": {"n": 1}}]
    pq.write_table(
        pa.Table.from_pylist([{"calls": [call]} for call in calls]), tmp_path / "a.parquet"
    )
    assert [row for _, row in converted(tmp_path / "a.parquet")] == [
        {"calls": [call]} for call in calls
    ]


def test_nulls_that_somebody_wrote_stay(tmp_path: Path) -> None:
    """Where all structs have the same keys, or a map says which there are, a null is real; else it
    may be invented.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    same = [
        {"name": name, "arguments": {"city": city, "unit": None}} for name, city in ("aP", "bR")
    ]
    mixed = [
        {"name": "a", "arguments": {"city": "Paris", "n": None}},
        {"name": "b", "arguments": {"n": 1}},
    ]
    for calls, expected in (
        (same, same),
        (mixed, [{"name": "a", "arguments": {"city": "Paris"}}, mixed[1]]),
    ):
        table = pa.Table.from_pylist([{"id": None, "calls": [call]} for call in calls])
        pq.write_table(table, tmp_path / "a.parquet")
        for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
            with new(tmp_path / name, table.schema) as writer:
                writer.write_table(table, max_chunksize=1)
        for name in ("a.parquet", "stream.arrow", "file.arrow"):
            found = [row for _, row in converted(tmp_path / name)]
            assert found == [{"id": None, "calls": [call]} for call in expected], name
    maps = pa.array(
        [[("city", "Paris"), ("unit", None)], [("n", "1")], None], pa.map_(pa.string(), pa.string())
    )
    pq.write_table(pa.table({"arguments": maps}), tmp_path / "m.parquet")
    found = [row["arguments"] for _, row in converted(tmp_path / "m.parquet")]
    assert found == [{"city": "Paris", "unit": None}, {"n": "1"}, None]


def test_nulls_in_frames_and_data_sets() -> None:
    """As pandas and `datasets` hand rows out: arrays of structs from Arrow, and a table behind the
    rows.
    """
    import pyarrow as pa

    rows = [
        {"text": "a", "calls": [{"x": 1, "y": None}]},
        {"text": "b", "calls": [{"x": 2, "y": None}]},
    ]

    class Table:
        table = pa.Table.from_pylist(rows)

    class Dataset(list[Any]):
        features = "of all columns"
        data = Table()

    assert list(rows_of(Dataset(rows))) == rows
    Table.table = pa.Table.from_pylist([*rows, {"text": "c", "calls": [{"y": 1}]}])
    read_rows: list[Any] = list(rows_of(Dataset(rows)))
    assert [row["calls"] for row in read_rows] == [[{"x": 1}], [{"x": 2}]]
    read = {
        "text": "a",
        "calls": np.array([{"x": 1, "y": None, "z": np.array([1, 2])}], dtype=object),
        "n": np.int64(3),
    }
    assert from_numpy(read) == {"text": "a", "calls": [{"x": 1, "z": [1, 2]}], "n": 3}
    written = {"calls": [{"x": None}], "label": None}
    assert from_numpy(written) == written


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1},\n {"a": }]', ":2: not valid JSON"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', ":2: not valid JSON: expected ',' or ']'"),
        ("a.json", b'[{"a": 1},', "not valid JSON"),
        ("a.json", b'{"data": [\n1]}', "expected a JSON array of rows"),
        ("a.json", b'["\xff"]', "not UTF-8"),
        (
            "a.json",
            b'[\n{"a": 1}\n]\n[\n{"a": 2}\n]',
            ":4: not valid JSON: expected nothing after the array",
        ),
        ("a.json", b"[\n" + b"[" * 100_000, ":2: not valid JSON: nested too deeply"),
        ("a.json", b"[1, " + b"1" * 5000 + b"]", "thousands of digits, in the row at column 5"),
        ("a.csv", b"a,b,a\n1,2,3\n", ":1: two columns are called 'a'"),
        ("a.csv", b'a,b\n1,"2"3\n', ":2: not valid CSV"),
        ("a.csv", b"a,b\n1,2\n\xff,3\n", ":3: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-9], "damaged or cut off"),
        ("a.jsonl.gz", b"no gzip at all", "damaged or cut off"),
        ("a.jsonl.zst", zstandard.compress(lines(ROWS * 9999))[:-1], "damaged or cut off"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.arrow", b"neither is this", "not a readable Arrow file"),
        ("utf16.jsonl", '{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        (
            "a.csv",
            "a,b\n1,2\n".encode("utf-16-le"),
            ":1: not UTF-8 text: byte 0x00 (is it UTF-16?)",
        ),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        converted(tmp_path / name)
    assert message in str(caught.value)


def test_bad_bytes_are_row_errors() -> None:
    found = [
        value
        for _, _, value in rows_in(b'"\xff"\n{"a": 1]\n' + b"[" * 100_000 + b"\n" + b"1" * 5000, 1)
    ]
    assert all(isinstance(value, RowError) for value in found)
    assert [str(value)[:14] for value in found] == [
        "not UTF-8: byt",
        "not valid JSON",
        "not valid JSON",
        "not valid JSON",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"One.\n\xffTwo.", "not UTF-8: byte 0xff in line 2"),
        ("One.\n".encode("utf-16-le"), "not UTF-8 text: byte 0x00 (is it UTF-16?) in line 1"),
    ],
)
def test_a_file_that_is_no_text_is_a_row_error(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    ((_, value),) = converted(tmp_path / "a.txt")
    assert isinstance(value, RowError)
    assert str(value).strip() == message


def test_a_folder_is_read_without_what_stands_beside_its_data(tmp_path: Path) -> None:
    """Hidden folders hold older states of files; `datasets` leaves what `map` made, and notes,
    beside saved rows.
    """
    for name in (
        "a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        ".b.jsonl",
        "state.json",
        "cache-0f3a12.arrow",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")
    assert [path.name for path in find_files(str(tmp_path))] == ["a.jsonl"]
    assert len(find_files(str(tmp_path / ".b.jsonl"))) == 1  # what is named is read


def test_missing_files_are_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("1\n")
    for path, message in (
        ("trian.jsonl", "did you mean"),
        ("*.csv", "no data file matches"),
        ("nothing", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            find_files(str(tmp_path / path))
    (tmp_path / "model.bin").write_text("1\n")
    with pytest.raises(UserError, match="unknown kind of file"):
        find_files(str(tmp_path / "model.bin"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no data file"):
        find_files(str(tmp_path / "empty"))


def test_hub_names_are_never_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("owner/name")
    assert is_hub_name("owner/name/config:train[:10%]")
    (tmp_path / "owner").mkdir()
    for path in ("owner/name", "other/train.jsonl", "name", "/abs/name", "./a/b", "a/b/c/d", "a/*"):
        assert not is_hub_name(path), path


def blocks_of(content: bytes) -> list[Block]:
    return list(scan(io.BytesIO(content), "x"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"x")), max_size=60),
    st.booleans(),
    st.integers(0, 9),
)
def test_blocks_cover_every_line_once(content: list[bytes], ended: bool, chunk: int) -> None:
    """For any size of chunks and blocks: blocks are the file, in order, and count its lines."""
    data = b"".join(line + b"\n" for line in content)
    data = data if ended else data[:-1]
    assume(data[:2] not in (b"\xff\xfe", b"\xfe\xff"))  # UTF-16, which is refused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "CHUNK", 7 + 13 * chunk)
        patch.setattr(read, "MIN_BLOCK", 40)
        patch.setattr(read, "MAX_BLOCK", 150)
        found = blocks_of(data)
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    assert b"".join(data[b.start : b.stop] for b in found) == data[start:]
    line = 1
    for block in found:
        assert block.line == line
        piece = data[block.start : block.stop]
        assert block.lines == piece.count(b"\n") + (not piece.endswith(b"\n"))
        line += block.lines


def test_an_edit_changes_only_the_blocks_it_touches() -> None:
    random.seed(0)
    rows = [
        json.dumps({"text": "x" * random.randint(10, 900)}).encode() + b"\n" for _ in range(30_000)
    ]
    before = {block.digest for block in blocks_of(b"".join(rows))}
    assert len(before) > 5
    appended = {block.digest for block in blocks_of(b"".join([*rows, b'"one more"\n']))}
    assert len(appended - before) <= 1
    inserted = {
        block.digest for block in blocks_of(b"".join([*rows[:9000], b'"one more"\n', *rows[9000:]]))
    }
    assert len(inserted - before) <= 2
    assert len(before & inserted) >= len(before) - 2


def test_the_right_line_far_into_a_large_file() -> None:
    """A malformed line 120,000 of 30 MB is called 120,000."""
    good = json.dumps({"text": "x" * 240}).encode() + b"\n"
    data = good * 119_999 + b'{"text": "x\n' + good * 1000
    assert len(data) > 30_000_000
    found = [
        line
        for block in blocks_of(data)
        for line, _, value in rows_in(data[block.start : block.stop], block.line)
        if isinstance(value, RowError)
    ]
    assert found == [120_000]


def test_an_array_named_jsonl_is_told_what_to_be_called() -> None:
    found = [str(value) for _, _, value in rows_in(json.dumps(ROWS, indent=1).encode(), 1)]
    assert found[0].endswith("; a JSON array of rows is read from a file named .json")


def test_texts_that_are_no_utf8_inside_parquet_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    pq.write_table(
        pa.Table.from_arrays([pa.Array.from_buffers(pa.string(), 1, buffers)], ["a"]),
        tmp_path / "a.parquet",
    )
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file: 'utf-8' codec"):
        converted(tmp_path / "a.parquet")


def test_what_is_no_json_is_a_bad_row() -> None:
    itself: list[Any] = []
    itself.append(itself)
    for value, message in (({(1, 2): 3}, "keys must be str"), (itself, "Circular reference")):
        [(_, _, found)] = rows_in(dump(value), 1)
        assert isinstance(found, RowError)
        assert message in str(found)


def test_a_full_disk_is_no_damage_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS).encode())
    with open("/dev/full", "wb", 0) as out, pytest.raises(OSError, match="No space left"):
        convert([tmp_path / "a.json"], out)
