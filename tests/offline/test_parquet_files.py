"""A Parquet file that is damaged, cut short or none at all is one line, wherever the damage shows."""

import pytest

from tests.offline.samples import scored
from topkd.compose.data.sequences import read_sequences
from topkd.offline import ScoreStore, TeacherIdentity, export_parquet, import_parquet
from topkd.topk.errors import CacheError, DataError

pytest.importorskip("pyarrow")

TEACHER = TeacherIdentity("teacher")


@pytest.fixture
def exported(tmp_path):
    with ScoreStore(tmp_path / "cache", mode="a") as store:
        for seed in range(6):
            store.put(TEACHER, *scored(seed))
    export_parquet(tmp_path / "cache", tmp_path / "out")
    return tmp_path / "out" / "scores.parquet"


def outcome(file, store):
    """How many scores came in, or how the file was refused."""
    try:
        return import_parquet(file, store).records
    except DataError as error:
        return error.what if "\n" not in str(error) else str(error)


def test_damage_anywhere_is_a_data_error_or_shows_only_in_its_own_rows(exported, tmp_path):
    data = exported.read_bytes()
    outcomes = set()
    with ScoreStore(tmp_path / "back", mode="a") as store:
        for at in range(0, len(data), len(data) // 40):
            exported.write_bytes(data[:at] + bytes(byte ^ 0xA5 for byte in data[at : at + 8]) + data[at + 8 :])
            outcomes.add(outcome(exported, store))
    assert "cannot read the Parquet file" in outcomes


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_refused_to_an_import_and_as_data(exported, tmp_path, share):
    data = exported.read_bytes()
    exported.write_bytes(data[: int(share * len(data))])
    with ScoreStore(tmp_path / "back", mode="a") as store:
        assert outcome(exported, store) == "cannot read the Parquet file"
    with pytest.raises(DataError, match="cannot read the Parquet file"):
        list(read_sequences(exported))


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_rows(exported, tmp_path):
    with ScoreStore(tmp_path / "back", mode="a"):
        pass
    with ScoreStore(tmp_path / "back") as store, pytest.raises(CacheError, match="open for reading"):
        import_parquet(exported, store)
