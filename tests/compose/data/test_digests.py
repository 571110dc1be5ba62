import pytest

from topkd.compose.data import digests as contents
from topkd.compose.data.digests import describe_rows, digest_contents
from topkd.compose.run.resume import check_same_rows
from topkd.engine.loop.prompts import PromptRow
from topkd.topk.errors import DataError


class Image:
    """Stands for what a dataset decodes a column to: its repr says where it lies in memory."""

    def __init__(self, size=4):
        self.size = size

    def __repr__(self):
        return f"<Image size={self.size} at {id(self):#x}>"


def test_columns_that_are_objects_are_the_same_in_another_process_and_others_are_not():
    notes = [describe_rows([PromptRow([1], [1], columns={"image": image})]) for image in (Image(), Image(), Image(5))]
    assert notes[0] == notes[1] != notes[2]


def test_a_process_of_a_machine_without_the_run_log_goes_on_and_one_with_it_compares():
    note = describe_rows([PromptRow([1], [1])])
    check_same_rows([], note, where="x")
    check_same_rows([{"kind": "event", "prompts": note}], note, where="x")
    with pytest.raises(DataError, match="not those that the run began with"):
        check_same_rows([{"prompts": note}], describe_rows([PromptRow([2], [2])]), where="x")


def test_a_folder_of_many_files_is_read_once_for_all_cells_and_then_what_changed_alone(tmp_path):
    def read():
        before = contents._digest_file.cache_info().misses
        digest = digest_contents(tmp_path)
        return digest, contents._digest_file.cache_info().misses - before

    for number in range(300):
        (tmp_path / f"{number}.json").write_text("{}")
    (first, all_of_it), (again, nothing) = read(), read()
    assert (first, all_of_it, nothing) == (again, 300, 0)
    (tmp_path / "7.json").write_text("{ }")
    changed, one = read()
    assert (changed != first, one) == (True, 1)


def test_what_cannot_be_looked_at_has_no_digest(tmp_path):
    assert digest_contents(tmp_path / "nothing") == ""
    assert digest_contents(tmp_path / ("n" * 300)) == ""
