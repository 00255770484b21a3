"""Readers: the official layouts, and every malformed row named by file and line with nothing lost."""

import gzip
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_core.data import readers, tables
from rec_core.data.schema import DataError, validate

RATINGS = "1::10::5::978300760\n1::20::3::978300760\n2::10::4::978300000\n"
MOVIES = "10::Léon: The Professional (1994)::Crime|Drama\n20::Toy::Animation\n30::Unseen::Drama\n40::None::\n"
USERS = "1::F::1::10::48067\n2::M::56::16::70072\n"


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    (tmp_path / "ratings.dat").write_text(RATINGS)
    (tmp_path / "movies.dat").write_bytes(MOVIES.encode("latin-1"))
    (tmp_path / "users.dat").write_text(USERS)
    return tmp_path


def csv(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


COLUMNS = {"user": "u", "item": "i", "time": "t"}


def test_movielens_1m_official_layout(movielens: Path) -> None:
    source = readers.movielens_1m(movielens)
    validate(source.log)
    assert source.log.user.tolist() == [1, 1, 2] and source.log.item.tolist() == [10, 20, 10]
    assert source.log.time.tolist() == [978300760, 978300760, 978300000] and source.log.rating.tolist() == [5, 3, 4]
    assert source.items.text[0] == "Léon: The Professional (1994)"  # Latin-1, and a colon in the title
    assert list(source.category_names) == ["", "Animation", "Crime", "Drama"]
    assert source.items.category.tolist() == [2, 1, 3, 0]  # the first genre
    assert [source.items.categories.row(i).tolist() for i in range(4)] == [[2, 3], [1], [3], []]
    features = source.user_features
    assert features.columns["gender"].tolist() == [1, 2] and features.columns["age"].tolist() == [1, 7]
    assert features.columns["occupation"].tolist() == [11, 17]
    assert features.sizes == {"gender": 3, "age": 8, "occupation": 22}


def test_movielens_1m_titles_in_utf8_are_read_too(movielens: Path) -> None:
    (movielens / "movies.dat").write_text(MOVIES, encoding="utf-8")
    assert readers.movielens_1m(movielens).items.text[0] == "Léon: The Professional (1994)"


def test_movielens_20m_with_quoted_titles(tmp_path: Path) -> None:
    csv(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,0.5,1112484676\n")
    movies = (
        'movieId,title,genres\n2,"American President, The (1995)",Comedy|Drama\n29,"a ""b""\nc",(no genres listed)\n'
    )
    csv(tmp_path / "movies.csv", movies)
    source = readers.movielens_20m(tmp_path)
    assert source.log.rating.tolist() == [3.5, 0.5]
    assert source.items.text == ["American President, The (1995)", 'a "b"\nc']
    assert source.items.category.tolist() == [1, 0]


def test_taobao_encodes_behaviors_and_categories(tmp_path: Path) -> None:
    file = csv(tmp_path / "UserBehavior.csv", "1,5,90,pv,1511544070\n1,6,7,buy,1511544071\n2,5,90,fav,1511544072\n")
    for path in (file, tmp_path):
        source = readers.taobao(path)
        assert source.log.behavior.tolist() == [0, 3, 2] and tuple(source.behavior_names) == (
            "pv",
            "cart",
            "fav",
            "buy",
        )
        assert source.log.category.tolist() == [2, 1, 2] and list(source.category_names) == ["", "7", "90"]
        assert source.items.item.tolist() == [5, 6] and source.items.category.tolist() == [2, 1]
    csv(file, "1,5,90,pv,1511544070\n1,6,7,view,1511544071\n")
    with pytest.raises(DataError, match=r"UserBehavior\.csv:2: behavior 'view' is not one of pv, cart, fav, buy"):
        readers.taobao(file)


def test_amazon_csv_and_parquet(tmp_path: Path) -> None:
    file = csv(tmp_path / "ratings_Books.csv", "AB,000123,5.0,1355616000\nAA,B00,3.0,1355616000\nAB,B00,1.0,1355616000")
    source = readers.amazon_2014(file)
    assert source.user_names == ["AA", "AB"] and source.log.user.tolist() == [1, 0, 1]
    assert source.item_names == ["000123", "B00"] and source.log.item.tolist() == [0, 1, 1]
    pl.DataFrame({"UserID": [7, 8], "ItemID": [3, 1], "Timestamp": [60, 61]}).write_parquet(
        tmp_path / "interactions.parquet"
    )
    pl.DataFrame({"ItemID": [1, 2, 3], "Title": ["one", "two", None]}).write_parquet(tmp_path / "items.parquet")
    source = readers.amazon_2014(tmp_path)
    assert source.log.user.tolist() == [7, 8] and source.items.item.tolist() == [1, 3]
    assert source.items.text == ["one", ""] and source.name == tmp_path.name


GOOD_ROW = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2_000_000_000))
BAD_ROW = st.one_of(
    st.text(st.characters(codec="ascii", exclude_characters='\n\r"'), min_size=1, max_size=30).filter(
        lambda line: line.strip() and line.count("::") != 3
    ),
    st.sampled_from(
        [
            *("1::2::3::4::5", "1::2::3", "x::2::3::4", "1::2.5::3::4", "1::2::nan::4", "1::2::inf::4", "1::2::::4"),
            *("1::2::3::-1", "1::2::3::4133980800", "1::2::3::4.5", "::2::3::4", "1::2::3::978300760000"),
            "99999999999999999999::2::3::4",
        ]
    ),
)  # fmt: skip


@given(
    st.lists(st.one_of(GOOD_ROW, BAD_ROW), min_size=1, max_size=30), st.sampled_from(["\n", "\r\n"]), st.integers(1, 64)
)
def test_malformed_rows_are_named_and_nothing_else_is_lost(
    tmp_path_factory: pytest.TempPathFactory, rows: list, newline: str, block: int
) -> None:
    file = tmp_path_factory.mktemp("rows") / "ratings.dat"
    lines = ["::".join(map(str, row)) if isinstance(row, tuple) else row for row in rows]
    csv(file, newline.join(lines) + newline)
    good = [row for row in rows if isinstance(row, tuple)]
    wrong = [number for number, row in enumerate(rows, 1) if isinstance(row, str)]
    kinds = {"user": "integer", "item": "integer", "rating": "rating", "time": "time"}

    def read(on_bad: str) -> tuple[pl.DataFrame, tables.BadRows]:
        bad = tables.BadRows(on_bad)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "BLOCK_BYTES", block)  # blocks of a few lines: numbers run on across them
            return tables.read_text(file, kinds, bad, separator="::"), bad

    if wrong:
        with pytest.raises(DataError) as raised:
            read("error")
        message = str(raised.value)
        assert f"\n{len(wrong)} malformed in all" in message
        for number in wrong[: tables.SHOWN]:
            assert f"ratings.dat:{number}: " in message
    if good:
        frame, bad = read("skip")
        assert frame.select("user", "item", "rating", "time").rows() == good and bad.count == len(wrong)
        assert set(frame["line"]).isdisjoint(wrong)
    else:
        with pytest.raises(DataError, match=rf"no rows left after {len(wrong)} malformed ones"):
            read("skip")


def test_the_message_of_a_malformed_row_is_exact(movielens: Path) -> None:
    (movielens / "ratings.dat").write_text(RATINGS + "\n1::1193::5\n")
    with pytest.raises(DataError, match=r"ratings\.dat:5: expected 4 fields separated by '::', got 3: '1::1193::5'"):
        readers.movielens_1m(movielens)
    skipped = readers.movielens_1m(movielens, on_bad="skip")
    assert skipped.skipped == 1 and "ratings.dat:5" in skipped.skipped_first[0] and len(skipped.log) == 3


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "ratings.dat").write_text(""), r"ratings\.dat: no rows"),
        (
            lambda d: (d / "ratings.dat").unlink(),
            r"ratings\.dat: no such file \(found there: movies\.dat, users\.dat\)",
        ),
        (
            lambda d: (d / "movies.dat").write_text(MOVIES + "10::Again::Drama\n"),
            r"movies\.dat:5: item 10 has more than",
        ),
        (lambda d: (d / "users.dat").write_text(USERS + "3::X::1::10::1\n"), r"users\.dat:3: gender 'X' is not one of"),
        (lambda d: (d / "users.dat").write_text("1::F::2::10::1\n"), r"users\.dat:1: age 2 is not one of 1, 18"),
    ],
)
def test_a_broken_folder_is_named(movielens: Path, break_it: Callable[[Path], object], message: str) -> None:
    break_it(movielens)
    with pytest.raises(DataError, match=message):
        readers.movielens_1m(movielens)


def test_table_maps_named_columns(tmp_path: Path) -> None:
    text = 't,shop,i,u,what,score,name\n5,b,x,7,buy,1.5,X\n4,,y,07,pv,2,"Y, the"\n6,a,x,7,pv,3,other\n'
    file = csv(tmp_path / "log.csv", text)
    columns = COLUMNS | {"domain": "shop", "behavior": "what", "rating": "score", "text": "name"}
    source = readers.table(file, columns)
    assert source.user_names == ["07", "7"] and source.log.user.tolist() == [1, 0, 1]  # "07" is not 7
    assert source.item_names == ["x", "y"] and source.items.text == ["X", "Y, the"]
    assert source.log.domain.tolist() == [2, 0, 1] and list(source.domain_names) == ["", "a", "b"]
    assert source.log.behavior.tolist() == [0, 1, 1] and list(source.behavior_names) == ["buy", "pv"]
    assert source.log.rating.tolist() == [1.5, 2, 3] and source.name == "log"
    packed = tmp_path / "log.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert np.array_equal(readers.table(packed, columns).log.time, source.log.time)


def test_table_reads_parquet_folders_and_dates(tmp_path: Path) -> None:
    for part, day in (("a", 1), ("b", 2)):
        frame = pl.DataFrame({"u": [1, 2], "i": [5, 6], "t": [datetime(2020, 1, day), datetime(2020, 1, day, 1)]})
        frame.write_parquet(tmp_path / f"{part}.parquet")
    log = readers.table(tmp_path, COLUMNS).log
    assert log.time.tolist() == [1577836800, 1577840400, 1577923200, 1577926800]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"t": [1, None, 3]}, r"log\.parquet: row 2: time None is not a whole number"),
        ({"t": [1.0, 2.0, 2.5]}, r"log\.parquet: row 3: time 2\.5 is not a whole number"),
        ({"t": [1, 2, 1_600_000_000_000]}, r"log\.parquet: row 3: time 1600000000000 is after 2100 .*time unit"),
        ({"i": ["a", "", None]}, r"row 2: item is empty\n.*row 3: item is empty\n2 malformed"),
        ({"r": [1.0, float("nan"), 3.0]}, r"row 2: rating nan is not finite"),
        ({"l": [0, 1, 2]}, r"row 3: label 2 is not 0 or 1"),
        ({"u": [[1], [2], [3]]}, r"the column of 'user' holds List"),
    ],
)
def test_parquet_faults_are_named_by_row(tmp_path: Path, column: dict, message: str) -> None:
    frame = pl.DataFrame(
        {"u": [1, 2, 3], "i": [1, 2, 3], "t": [1, 2, 3], "r": [1.0, 2.0, 3.0], "l": [0, 1, 1]} | column, strict=False
    )
    frame.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=message):
        readers.table(tmp_path / "log.parquet", COLUMNS | {"rating": "r", "label": "l"})


def test_time_units(tmp_path: Path) -> None:
    file = csv(tmp_path / "log.csv", "u,i,t\n1,1,1600000000123\n")
    assert readers.table(file, COLUMNS, time_unit="ms").log.time.tolist() == [1_600_000_000]
    with pytest.raises(DataError, match="time_unit='h'"):
        readers.table(file, COLUMNS, time_unit="h")  # type: ignore[arg-type]


def test_unknown_columns_fields_and_files(tmp_path: Path) -> None:
    file = csv(tmp_path / "log.csv", "u,i,when\n1,1,1\n")
    with pytest.raises(DataError, match=r"log\.csv: no column 't'; the columns are \['u', 'i', 'when'\]"):
        readers.table(file, COLUMNS)
    with pytest.raises(DataError, match="no field is called 'colour'"):
        readers.table(file, COLUMNS | {"colour": "u"})
    with pytest.raises(DataError, match="field 'time' is not mapped"):
        readers.table(file, {"user": "u", "item": "i"})
    with pytest.raises(DataError, match="appears twice"):
        readers.table(csv(tmp_path / "two.csv", "u,i,t,t\n1,1,1,1\n"), COLUMNS)
    with pytest.raises(DataError, match=r"no rows"):
        readers.table(csv(tmp_path / "head.csv", "u,i,t\n"), COLUMNS)
    with pytest.raises(DataError, match="no such file"):
        readers.table(tmp_path / "absent.csv", COLUMNS)
    with pytest.raises(DataError, match=r"unknown kind of file '\.xls'"):
        readers.table(csv(tmp_path / "log.xls", "x"), COLUMNS)
    with pytest.raises(DataError, match="not a readable Parquet file"):
        readers.table(csv(tmp_path / "log.parquet", "PAR1 no"), COLUMNS)
    with pytest.raises(DataError, match="cannot be read"):
        readers.table(csv(tmp_path / "log.gz", gzip.compress(b"u,i,t\n" + b"1,1,1\n" * 99)[:-9]), COLUMNS)
    with pytest.raises(DataError, match="on_bad='drop'"):
        readers.table(file, COLUMNS, on_bad="drop")  # type: ignore[arg-type]


def test_undecodable_bytes_and_open_quotes_are_malformed_rows(tmp_path: Path) -> None:
    file = csv(tmp_path / "log.csv", b"u,i,t\n1,a,1\n2,b\xff,2\n")
    with pytest.raises(DataError, match=r"log\.csv:3: not UTF-8 text"):
        readers.table(file, COLUMNS)
    quoted = csv(tmp_path / "quoted.csv", 'u,i,t\n1,"a\nb",1\n2,"c,3\n4,d,5\n')
    with pytest.raises(DataError, match=r"quoted\.csv:4: expected 3 fields"):
        readers.table(quoted, COLUMNS)


def test_times_that_go_backwards_in_a_sorted_source(tmp_path: Path) -> None:
    text = "u,i,t\na,1,10\nb,1,5\na,2,11\nb,2,5\na,3,9\nb,3,1\n"
    file = csv(tmp_path / "log.csv", text)
    assert len(readers.table(file, COLUMNS).log) == 6  # not declared sorted: prepare sorts it
    with pytest.raises(DataError, match=r"log\.csv:6: user 'a' goes back in time from 11 \(line 4\) to 9, 2 such rows"):
        readers.table(file, COLUMNS, sorted=True)
    fine = csv(tmp_path / "fine.csv", "u,i,t\na,1,10\nb,1,5\na,2,10\nb,2,6\n")
    assert len(readers.table(fine, COLUMNS, sorted=True).log) == 4
