"""From a saved folder to the Hub."""

import json
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from hf_vlp.hub.card import name_repository

# The base of what the client's HTTP library raises, under whichever name the client imports that library.
_TransportError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

# Never part of a repository: pickles, trainer state, what an interrupted run left.
IGNORED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "checkpoint-*/*", ".*.partial-*/*", "runs/*", "*.tmp"]


class FolderError(ValueError):
    """A folder is not what it must be to be pushed; the message says what is missing and how to get it."""


class PushError(RuntimeError):
    """The Hub could not be written to; the message says why and what to do."""


def check_folder(folder: str | Path) -> Path:
    """The folder, if it is a whole model: config, all the weights its index names, each readable, and a card.

    Raises:
        FolderError: it is not.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder; give one that `save_for_hub` wrote")
    if not (folder / "config.json").is_file():
        raise FolderError(f"{folder} has no config.json; save the model with `hf_vlp.hub.save_for_hub`")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise FolderError(f"{folder / 'config.json'} is cut off or no JSON ({error}); save the model again") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            hint = f" (pickles such as {pickles[0]} are not pushed)" if pickles else ""
            raise FolderError(f"{folder} lacks the weights {name}{hint}; it is half a model: save it again")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise FolderError(f"{folder / name} is cut off or damaged ({error}); save the model again") from error
    if not (folder / "README.md").is_file():
        raise FolderError(f"{folder} has no README.md; write a card with `hf-vlp card {folder}`")
    for info in [*config.get("custom_pipelines", {}).values()]:
        file = info["impl"].split(".")[0] + ".py"
        if not (folder / file).is_file():
            raise FolderError(f"{folder}: config.json names the pipeline file {file}, which is missing; save it again")
    for reference in config.get("auto_map", {}).values():
        file = str(reference).split(".")[0] + ".py"
        if "--" not in file and not (folder / file).is_file():
            raise FolderError(f"{folder}: config.json names the code file {file}, which is missing; save it again")
    return folder


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> str:
    """Uploads a saved folder; makes the repository if there is none.

    A card whose snippets load the folder's own name is made to load the repository, see `name_repository`.

    Args:
        folder: a folder that `save_for_hub` wrote.
        repo_id: `"name"` or `"organisation/name"`.
        private: whether a new repository is private; the organisation's default where None.
        token: access token; where None the one of `hf auth login` or of `HF_TOKEN`.
        revision: branch; made if missing.
        create_pr: open a pull request instead of committing.
        message: of the commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        FolderError: the folder is no whole model.
        PushError: the name is malformed, there is no token, it has no right to write, or the Hub is not reached.
    """
    folder = check_folder(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} is no name for a repository: {error}") from error
    token = token or get_token()
    if not token:
        raise PushError("there is no access token: run `hf auth login`, set HF_TOKEN, or pass token=")
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        name_repository(folder, repo_id)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            revision=revision,
            create_pr=create_pr,
            commit_message=message or f"Upload {folder.resolve().name}",
            ignore_patterns=list(IGNORED),
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise PushError(
                f"the Hub refused to write to {repo_id} ({status}): the token needs the right to write there"
            ) from error
        raise PushError(f"the Hub answered {status} for {repo_id}: {error}") from error
    except (_TransportError, OfflineModeIsEnabled, OSError) as error:
        raise PushError(f"the Hub at {api.endpoint} is not reached: {error}") from error
    return commit.pr_url or commit.commit_url
