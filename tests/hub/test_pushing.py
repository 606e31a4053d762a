"""Push and load by name, with the real client of the Hub, against a Hub on loopback.

Clients run in processes of their own, each with a cache of its own, because the client reads the Hub's address when it
is imported.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

import hf_vlp
from hf_vlp.hub import FolderError, check_folder, push, save_for_hub, write_card
from hf_vlp.hub.pushing import IGNORED
from tests.hub import tiny
from tests.hub.local_hub import LocalHub
from tests.hub.models import SAVED

WITHOUT = "import sys; sys.modules['hf_vlp'] = None\n"


def client(hub: LocalHub, home: Path, code: str, *arguments: str, token: bool = True, **variables: str) -> Any:
    """The JSON that a client process prints last."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "PYTHONPATH")}
    settings = hub.environment(home) if token else hub.environment(home, token=None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**environment, **settings, "TRANSFORMERS_VERBOSITY": "error", **variables},
        cwd=Path(hf_vlp.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {
        name: save_for_hub(*make(), root / name, repo_id=f"org/{name}")
        for name, make in {"blip2-opt": tiny.blip2, "eva_clip": SAVED["eva_clip"]}.items()
    }


@pytest.fixture(scope="module")
def hub() -> Any:
    with LocalHub() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub: LocalHub, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (folders["blip2-opt"] / "checkpoint-3").mkdir()
    (folders["blip2-opt"] / "checkpoint-3" / "optimizer.pt").write_bytes(b"not for the world")
    (folders["blip2-opt"] / "pytorch_model.bin").write_bytes(b"a pickle")
    return client(
        hub,
        tmp_path_factory.mktemp("pusher"),
        """
        import json, sys
        from transformers import AutoModel, AutoProcessor
        from hf_vlp.hub import PushError, push

        blip2, eva = sys.argv[1:3]
        results = {"first": push(blip2, "org/blip2-opt"), "again": push(blip2, "org/blip2-opt")}
        push(eva, "org/eva", private=True)
        push(eva, "org/eva", revision="v2", message="Second version")
        push(eva, "own-name")
        # The stock way, of a model of an own type.
        AutoModel.from_pretrained(eva).push_to_hub("org/stock")
        AutoProcessor.from_pretrained(eva).push_to_hub("org/stock")

        def error(*arguments, **options):
            try:
                push(*arguments, **options)
            except PushError as error:
                return str(error)

        results["malformed"] = error(blip2, "org/na--me")
        results["too many parts"] = error(blip2, "a/b/c")
        results["forbidden"] = error(blip2, "forbidden/name")
        results["bad token"] = error(blip2, "org/other", token="hf_wrong")
        print(json.dumps(results))
        """,
        str(folders["blip2-opt"]),
        str(folders["eva_clip"]),
    )


@pytest.mark.slow
def test_what_arrives(pushed: dict[str, Any], hub: LocalHub, folders: dict[str, Path]) -> None:
    files = hub.files("org/blip2-opt")
    folder = folders["blip2-opt"]
    expected = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(files) == expected - {"pytorch_model.bin", "checkpoint-3/optimizer.pt"}
    for name, content in files.items():
        assert content == (folder / name).read_bytes()
    assert pushed["first"] == pushed["again"], "nothing had changed: there must be no second commit"
    assert pushed["first"].startswith(f"{hub.endpoint}/org/blip2-opt/commit/")
    large = {
        name for name, (_, lfs) in hub.repositories["org/blip2-opt"].commits[pushed["first"][-40:]].items() if lfs
    }
    assert large == {"model.safetensors"}
    assert (
        "PUT",
        f"/lfs/{hub.repositories['org/blip2-opt'].commits[pushed['first'][-40:]]['model.safetensors'][0]}",
    ) in (hub.requests)


@pytest.mark.slow
def test_private_repositories_branches_and_names(pushed: dict[str, Any], hub: LocalHub) -> None:
    assert hub.repositories["org/eva"].private
    assert not hub.repositories["org/blip2-opt"].private
    assert set(hub.repositories["org/eva"].branches) == {"main", "v2"}
    assert "tester/own-name" in hub.repositories


@pytest.mark.slow
def test_the_stock_push_to_hub_takes_the_code_along(pushed: dict[str, Any], hub: LocalHub) -> None:
    files = hub.files("org/stock")
    assert {"model.safetensors", "modeling_eva_clip.py", "configuration_eva_clip.py", "tokenizer.json"} <= set(files)
    assert "AutoModel" in json.loads(files["config.json"])["auto_map"]


@pytest.mark.slow
def test_refusals(pushed: dict[str, Any]) -> None:
    assert "'org/na--me' is no name for a repository" in pushed["malformed"]
    assert "'a/b/c' is no name for a repository" in pushed["too many parts"]
    assert "refused to write to forbidden/name (403): the token needs the right" in pushed["forbidden"]
    assert "refused to write to org/other (401)" in pushed["bad token"]


@pytest.mark.slow
def test_load_by_name_without_the_package(
    pushed: dict[str, Any], hub: LocalHub, folders: dict[str, Path], tmp_path: Path
) -> None:
    tiny.image("red").save(tmp_path / "photo.png")
    found = client(
        hub,
        tmp_path / "home",
        WITHOUT
        + textwrap.dedent(
            """
            import json
            from PIL import Image
            from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

            picture = Image.open(sys.argv[1])
            results = {}
            model = AutoModelForImageTextToText.from_pretrained("org/blip2-opt")
            results["sum"] = sum(parameter.double().sum().item() for parameter in model.parameters())
            results["model"] = type(AutoModel.from_pretrained("org/blip2-opt")).__name__
            results["processor"] = type(AutoProcessor.from_pretrained("org/blip2-opt")).__name__
            results["caption"] = pipeline("image-to-text", model="org/blip2-opt", trust_remote_code=True)(picture)
            try:
                pipeline("image-to-text", model="org/blip2-opt")
            except ValueError as error:
                results["no flag"] = "trust_remote_code=True" in str(error)
            eva = AutoModel.from_pretrained("org/eva", trust_remote_code=True)
            results["eva"] = [type(eva).__name__, type(eva).__module__.split(".")[0]]
            branch = AutoModel.from_pretrained("org/eva", revision="v2", trust_remote_code=True)
            results["branch"] = type(branch).__name__
            pipe = pipeline("zero-shot-image-classification", model="org/stock", trust_remote_code=True)
            results["labels"] = len(pipe(picture, candidate_labels=["a", "b"]))
            print(json.dumps(results))
            """
        ),
        str(tmp_path / "photo.png"),
    )
    weights = load_file(folders["blip2-opt"] / "model.safetensors")
    assert found["sum"] == pytest.approx(sum(value.double().sum().item() for value in weights.values()), rel=1e-9)
    assert found["model"] == "Blip2Model"
    assert found["processor"] == "Blip2Processor"
    model, processor = tiny.blip2()
    from transformers import pipeline

    expected = pipeline("image-to-text", model=model, processor=processor)(tiny.image("red"))
    assert found["caption"] == expected
    assert found["no flag"] is True
    assert found["eva"] == ["EvaCLIPModel", "transformers_modules"]
    assert found["branch"] == "EvaCLIPModel"
    assert found["labels"] == 2


@pytest.mark.slow
def test_load_by_name_with_the_package(pushed: dict[str, Any], hub: LocalHub, tmp_path: Path) -> None:
    tiny.image("red").save(tmp_path / "photo.png")
    found = client(
        hub,
        tmp_path / "home",
        """
        import json, sys
        import hf_vlp
        from transformers import AutoModel, pipeline
        from hf_vlp.models.catalog import load_class

        results = {"caption": pipeline("image-to-text", model="org/blip2-opt")(sys.argv[1])}
        # The task is the one that the model's page names.
        results["task"] = pipeline(model="org/blip2-opt").task
        results["eva"] = type(AutoModel.from_pretrained("org/eva")).__module__
        results["retrieval"] = load_class("org/eva", "retrieval").__name__
        print(json.dumps(results))
        """,
        str(tmp_path / "photo.png"),
    )
    model, processor = tiny.blip2()
    from transformers import pipeline

    assert found["caption"] == pipeline("image-to-text", model=model, processor=processor)(tiny.image("red"))
    assert found["task"] == "image-to-text"
    assert found["eva"] == "hf_vlp.models.eva_clip.modeling_eva_clip"
    assert found["retrieval"] == "EvaCLIPModel"


@pytest.mark.slow
def test_no_token_no_network_no_right_to_see(
    pushed: dict[str, Any], hub: LocalHub, folders: dict[str, Path], tmp_path: Path
) -> None:
    code = """
        import json, sys
        from transformers import AutoConfig
        from hf_vlp.cli.main import main
        from hf_vlp.hub import PushError, push

        results = {}
        try:
            push(sys.argv[1], "org/name")
        except PushError as error:
            results["push"] = str(error)
        try:
            AutoConfig.from_pretrained("org/eva")
        except OSError as error:
            results["load"] = str(error)
        results["status"] = main(["push", sys.argv[1], "org/name"])
        print(json.dumps(results))
    """
    folder = str(folders["blip2-opt"])
    anonymous = client(hub, tmp_path / "anonymous", code, folder, token=False)
    assert anonymous["push"].startswith("there is no access token: run `hf auth login`")
    assert "org/eva" in anonymous["load"]
    assert anonymous["status"] == 1
    # Port 9 discards what it is sent; nobody listens there.
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    unreachable = client(hub, tmp_path / "unreachable", code, folder, **gone)
    assert unreachable["push"].startswith("the Hub at http://127.0.0.1:9 is not reached: ")
    offline = client(hub, tmp_path / "offline", code, folder, HF_HUB_OFFLINE="1")
    assert "is not reached" in offline["push"]


@pytest.mark.slow
def test_small_files_go_inline_through_the_streamed_upload(folders: dict[str, Path], tmp_path: Path) -> None:
    """With hf_xet the client uploads a folder another way; what the Hub calls regular never gets to hf_xet."""
    with LocalHub(lfs=False) as server:
        code = """
            import json, sys
            from hf_vlp.hub import push
            print(json.dumps(push(sys.argv[1], "org/inline")))
        """
        client(server, tmp_path, code, str(folders["eva_clip"]), HF_HUB_DISABLE_XET="0")
        assert (
            server.files("org/inline")["model.safetensors"] == (folders["eva_clip"] / "model.safetensors").read_bytes()
        )
        assert not [path for _, path in server.requests if path.startswith("/lfs/")]


# Half folders


def test_a_whole_folder(folders: dict[str, Path]) -> None:
    assert check_folder(folders["eva_clip"]) == folders["eva_clip"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"has no config\.json; save the model with"),
        ("model.safetensors", r"lacks the weights model\.safetensors; it is half a model"),
        ("README.md", r"has no README\.md; write a card with `hf-vlp card"),
        ("modeling_eva_clip.py", r"names the code file modeling_eva_clip\.py, which is missing"),
        ("image_text_matching.py", r"names the pipeline file image_text_matching\.py, which is missing"),
    ],
)
def test_half_a_folder(folders: dict[str, Path], tmp_path: Path, missing: str, message: str) -> None:
    import shutil

    folder = tmp_path / "half"
    shutil.copytree(folders["eva_clip"], folder)
    (folder / missing).unlink()
    with pytest.raises(FolderError, match=message):
        check_folder(folder)


def test_cut_off_files(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(folders["eva_clip"], folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for kept in (0, 5, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:kept])
        with pytest.raises(FolderError, match=r"model\.safetensors is cut off or damaged"):
            check_folder(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(whole)
    with pytest.raises(FolderError, match=r"pickles such as pytorch_model\.bin are not pushed"):
        check_folder(folder)
    (folder / "config.json").write_text('{"model_type": "eva')
    with pytest.raises(FolderError, match=r"config\.json is cut off or no JSON"):
        check_folder(folder)
    with pytest.raises(FolderError, match="is no folder"):
        check_folder(tmp_path / "nowhere")


def test_a_missing_shard(tmp_path: Path) -> None:
    model, processor = tiny.blip2()
    folder = save_for_hub(model, processor, tmp_path / "sharded", max_shard_size="60KB")
    assert check_folder(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FolderError, match=f"lacks the weights {shard.name}"):
        check_folder(folder)


def test_the_card_that_arrives_loads_the_repository(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `save_for_hub` writes it where nobody has named a repository yet."""
    folder = tmp_path / "model"
    shutil.copytree(folders["blip2-opt"], folder)
    write_card(folder)
    arrived: list[str] = []

    class Hub:
        endpoint = "nowhere"

        def __init__(self, token: str) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, folder_path: Path, **_: Any) -> Any:
            arrived.append((Path(folder_path) / "README.md").read_text())
            return SimpleNamespace(pr_url=None, commit_url="done")

    monkeypatch.setattr("hf_vlp.hub.pushing.HfApi", Hub)
    assert push(folder, "blip2-shapes", token="t") == "done"
    assert 'from_pretrained("me/blip2-shapes"' in arrived[0]
    assert '"model"' not in arrived[0]
    assert "\n# blip2-shapes\n" in arrived[0]


def test_pickles_are_never_uploaded() -> None:
    assert {"*.bin", "*.pt", "*.pth", "*.pkl"} <= set(IGNORED)
