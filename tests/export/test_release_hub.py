"""What would go to the Hub, and what is sent: with an API that only notes what it is asked."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError
from students import Shipped, save_student

from senseflow.export import __main__ as export
from senseflow.export import hub

LICENSE = ("--base_model", "me/teacher", "--license", "mit")


class Api:
    """Takes the place of HfApi."""

    calls: list[tuple[str, dict[str, object]]]
    private = True
    fails = False

    def create_repo(self, repo_id: str, **said: object) -> None:
        self.calls.append(("create", {"repo_id": repo_id, **said}))

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **said: object) -> SimpleNamespace:
        if self.fails:
            raise HfHubHTTPError(
                "413 Payload\nToo Large", response=SimpleNamespace(headers={}, request=None)
            )
        self.calls.append(("upload", said))
        return SimpleNamespace(commit_url="https://huggingface.co/me/x/commit/1")


@pytest.fixture
def api(monkeypatch) -> type[Api]:
    kind = type("Fresh", (Api,), {"calls": []})
    monkeypatch.setattr(hub, "HfApi", kind)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_none")
    return kind


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Shipped:
    return save_student("flux", tmp_path_factory.mktemp("flux") / "step_0000020")


def error_of(capsys, status: int) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and lines[-1].startswith("error: ")
    return lines[-1]


def test_nothing_is_sent_unless_asked_for(shipped, api, tmp_path):
    assert shipped.export(tmp_path / "a") == 0
    assert shipped.export(tmp_path / "b", "--push_to_hub", "me/x", "--dry_run", *LICENSE) == 0
    assert api.calls == [] and (tmp_path / "b" / "README.md").is_file()


def test_a_dry_run_lists_names_and_sizes_without_a_token(shipped, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    caplog.set_level("INFO", logger="senseflow")
    out = tmp_path / "out"
    assert shipped.export(out, "--push_to_hub", "me/x", "--dry_run", *LICENSE) == 0
    said = caplog.messages[-1].splitlines()
    assert (
        said[0].startswith("4 files, ") and "would go to private me/x; nothing was sent" in said[0]
    )
    files = {line.split()[-1]: line.split()[:2] for line in said[1:]}
    assert files.keys() == {f.name for f in out.iterdir()}
    size = (out / "config.json").stat().st_size
    assert files["config.json"] == [f"{size}", "B"]


def test_it_is_sent_to_a_private_repository(shipped, api, tmp_path):
    out = tmp_path / "out"
    assert shipped.export(out, "--push_to_hub", "me/x", *LICENSE) == 0
    (first, made), (second, sent) = api.calls
    assert (first, made["repo_id"], made["private"]) == ("create", "me/x", True)
    assert (second, sent["repo_id"], sent["folder_path"]) == ("upload", "me/x", out)
    assert 'from_pretrained("me/x"' in (out / "README.md").read_text()


def test_a_public_one_must_be_asked_for(shipped, api, tmp_path, capsys):
    """Also when it is there already, and public."""
    out, push = tmp_path / "out", ("--push_to_hub", "me/x")
    api.private = False
    assert "me/x is there and public: say --public" in error_of(
        capsys, shipped.export(out, *push, *LICENSE)
    )
    assert [name for name, _ in api.calls] == ["create"]
    assert export.main(["--output", str(out), *push, "--public"]) == 0
    assert api.calls[1][1]["private"] is False and api.calls[-1][0] == "upload"


def test_what_is_there_is_sent_again(shipped, api, tmp_path, capsys):
    """After an upload that failed; but not any folder."""
    out, push = tmp_path / "out", ("--push_to_hub", "me/x")
    api.fails = True
    said = error_of(capsys, shipped.export(out, *push, *LICENSE))
    assert "413 Payload Too Large" in said and f"send it by --output {out}" in said
    api.fails = False
    assert export.main(["--output", str(out), *push]) == 0 and api.calls[-1][0] == "upload"
    for flag in (["--steps", "2"], ["--form", "pipeline"], ["--ema"], ["--name", "X"]):
        said = error_of(capsys, export.main(["--output", str(out), *push, *flag]))
        assert f"{flag[0]} is of a folder that is written, and {out} is sent as it is" in said
    (tmp_path / "other").mkdir()
    status = export.main(["--output", str(tmp_path / "other"), *push])
    assert "is no exported student" in error_of(capsys, status)


@pytest.mark.parametrize("repo", ["x", "me/x/y", "me/--x", "me/ x"])
def test_a_repositorys_name(repo, shipped, api, tmp_path, capsys):
    error_of(capsys, shipped.export(tmp_path / "out", "--push_to_hub", repo, *LICENSE))
    assert not (tmp_path / "out").exists() and not api.calls


def test_before_any_work(shipped, api, tmp_path, capsys, monkeypatch):
    """No token; a teacher whose licence is not known."""
    out = tmp_path / "out"
    said = error_of(capsys, shipped.export(out, "--push_to_hub", "me/x"))
    assert "say its --base_model and --license" in said
    monkeypatch.setattr(hub, "get_token", lambda: None)
    said = error_of(capsys, shipped.export(out, "--push_to_hub", "me/x", *LICENSE))
    assert "no token" in said and "hf auth login" in said
    assert not out.exists() and not api.calls


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (23_802_816_640, "23.8 GB")]
)
def test_sizes(size, said):
    assert hub.said_size(size) == said
