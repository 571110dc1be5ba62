"""A server that cannot start says why in one line: before it loads where that can be known, after it where not."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.serve.apps import client, complete, make_app, random_ids
from topkd.serve import ServeConfig, run
from topkd.serve.__main__ import run_server_process
from topkd.serve.model import loading
from topkd.topk.errors import ConfigError


def _without_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights, file, metadata={"format": "pt"})


def _of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def _cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def _without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _as_a_run(folder: Path) -> None:
    shutil.copytree(folder, folder / "student")
    (folder / "config.json").write_text('{"steps": 12}')


def _with_half_a_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_without_a_tensor, r"the model cannot be loaded .*no weights for \S+ \(1 in all\)"),
        (_of_another_size, r"the model cannot be loaded .*of shape \(\d+, \d+\) where config.json says"),
        (_cut_off, "the model cannot be loaded .*SafetensorError"),
        (_without_a_tokenizer, "the tokenizer cannot be loaded .*no token but special ones"),
        (_without_a_config, "the folder holds no model"),
        (_as_a_run, r"the folder holds no model .*; did you mean \S+/m/student\?"),
        (_with_half_a_config, "cannot be loaded .*not a valid JSON"),
    ],
)
def test_a_folder_that_is_not_a_whole_model_is_refused_with_what_is_wrong(
    models: Path, tmp_path: Path, harm: Callable[[Path], None], words: str, capfd: pytest.CaptureFixture[str]
):
    shutil.copytree(models / "policy", tmp_path / "m")
    harm(tmp_path / "m")
    with pytest.raises(ConfigError, match=words) as caught:
        run.serve(ServeConfig(model=str(tmp_path / "m"), port=0, device="cpu"))
    assert f"model={tmp_path / 'm'}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "one line, and it is the caller's to print"


@pytest.mark.parametrize("harm", [_without_a_tensor, _cut_off])
async def test_a_reload_from_a_checkpoint_with_a_hole_changes_nothing(
    models: Path, tmp_path: Path, harm: Callable[[Path], None]
):
    shutil.copytree(models / "updated", tmp_path / "m")
    harm(tmp_path / "m")
    app, prompt = make_app(models / "policy"), random_ids(12)
    before = await complete(app, prompt, prompt_logprobs=2)
    async with client(app) as http:
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "m")}}
        assert (await http.post("/collective_rpc", json=rpc)).status_code == 500
    after = await complete(app, prompt, prompt_logprobs=2)
    assert after[0]["prompt_logprobs"] == before[0]["prompt_logprobs"]
    app.state.served.engine.stop()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no/such/folder", "no such folder (model=no/such/folder)"),
        ("./none", "no such folder (model=./none)"),
        (__file__, "the model path is a file"),
        ("runs/nope", "no such folder (model=runs/nope)"),
        ("surely-not-there", "no such folder, nor such an id in the local Hugging Face cache"),
        ("a--b..c", "no such folder"),
    ],
)
def test_what_is_no_folder_is_refused_before_anything_is_loaded_or_the_internet_asked(
    model: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("nobody else is to be asked"))
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("nothing is to be loaded"))
    with pytest.raises(ConfigError) as caught:
        run.serve(ServeConfig(model=model, port=0, device="cpu"))
    assert words in str(caught.value)
    assert ("download" in str(caught.value)) == (model == "surely-not-there" or model == "a--b..c")


def test_an_id_in_the_local_cache_goes_on_to_be_loaded(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123"
    shutil.copytree(models / "policy", snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    reached: list[ServeConfig] = []

    def stop(config: ServeConfig) -> object:
        reached.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr(loading, "load_model", stop)
    with pytest.raises(ConfigError, match="far enough"):
        run.serve(ServeConfig(model="some/model", port=0, device="cpu"))
    assert [config.model for config in reached] == ["some/model"]


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(_: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(ConfigError, match=r"cannot be read \(model=.*Permission denied"):
        run.serve(ServeConfig(model=str(tmp_path), port=0))


def test_a_port_that_is_taken_while_the_model_loads_is_the_same_one_line(models: Path, monkeypatch: pytest.MonkeyPatch):
    """Two that were started at once both bind the port, and only one may listen."""
    other = run.listen("127.0.0.1", 0)
    port = other.getsockname()[1]

    def slow(config: ServeConfig) -> object:
        other.listen()
        return load(config)

    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", slow)
    with other, pytest.raises(ConfigError, match=rf"cannot listen \(127.0.0.1:{port}\).*another --port"):
        run.serve(ServeConfig(model=str(models / "policy"), port=port, device="cpu"))


@pytest.mark.parametrize("host", ["a..b", "http://127.0.0.1", "192.0.2.1", "x" * 300])
def test_a_host_that_is_not_this_machine_is_blamed_on_the_host(host: str):
    with pytest.raises(ConfigError, match=r"cannot listen .*--host takes an address"):
        run.listen(host, 0)


def test_a_key_that_was_named_and_is_not_set_starts_no_open_server(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    assert run_server_process([str(models / "policy"), "--port", "0", "--api-key-env", "NOT_SET_ANYWHERE"]) == 2
    assert capsys.readouterr().err == (
        "topkd serve: the environment variable NOT_SET_ANYWHERE (--api-key-env) is not set\n"
    )


def test_ctrl_c_while_the_model_loads_is_one_line(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(_: ServeConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_model", interrupted)
    assert run_server_process([str(models / "policy"), "--port", "0"]) == 130
    assert capsys.readouterr().err == "topkd serve: stopped\n"


def test_an_empty_name_is_refused_and_not_taken_for_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_server_process([str(tmp_path), "--served-model-name", ""]) == 2
    assert "served_model_name" in capsys.readouterr().err
