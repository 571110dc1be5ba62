"""Which folders a new run may have: what is not a run's own stays as it lies."""

import pytest

from topkd.compose.run.folder import prepare_folder
from topkd.topk.errors import ConfigError, DataError

STARTED = '{"kind": "event", "event": "start"}\n'


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (
            '{"kind": "train", "loss": 1.0}\n',
            ConfigError,
            r"that are not a run's .*: got metrics.jsonl, notes",
        ),
        (STARTED + '{"kind": "train", "loss": 1.0}\n', ConfigError, "holds files that are not a run's"),
        ('{"kind": ["train"]}\n', ConfigError, "holds files that are not a run's"),
        ("step,loss", ConfigError, "holds files that are not a run's"),
        ('{"loss": 1.0}\n', DataError, "the file is not a run log"),
        ("", ConfigError, "holds files that are not a run's"),
    ],
)
def test_a_run_log_of_another_program_is_not_taken_for_a_run_that_took_no_step(tmp_path, lines, error, message):
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(error, match=message):
        prepare_folder(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_a_run_that_took_no_step_makes_room(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(STARTED)
    prepare_folder(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "metrics.jsonl").write_text(STARTED[:9])  # killed while it wrote its first line
    (tmp_path / "config.json").write_text('{"rollout": {}, "learner": {}, "objective": {}}')
    prepare_folder(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_took_a_step_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(STARTED + '{"kind": "step", "step": 1}\n')
    with pytest.raises(ConfigError, match="already holds a run"):
        prepare_folder(tmp_path)


def test_a_name_that_no_folder_can_have_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"the output folder cannot be read .*too long"):
        prepare_folder(tmp_path / ("a" * 300))


def test_a_name_of_bytes_that_are_no_text_is_refused_before_any_weight_is_lost(tmp_path):
    with pytest.raises(ConfigError, match="the output folder's name is not UTF-8"):
        prepare_folder(tmp_path / "run\udcff")
    assert not list(tmp_path.iterdir())
