"""
Upload a folder to a repository on the Hub, in one commit.

Only files that differ from the repository's are uploaded. So calling again finishes a push that was interrupted: large
files that arrived are not sent twice, and a commit whose response was lost is recognised by its content. A commit names
its parent; if the branch has moved, the Hub refuses it. Afterwards every hash is compared.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token
from huggingface_hub.hf_api import ModelInfo, RepoFile

from ..convert.export.card import write_model_card
from ..convert.storage.errors import VerificationError
from ..convert.storage.tensors import CHUNK
from .checks import PublishError, check_before_publish, check_folder
from .files import is_model_file, published_files


MAIN = "main"
COMMIT_TITLE = "Upload by sailvit"
TOKENS = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]+")
CLIENT_ERRORS = (OSError, ValueError, RuntimeError, errors.HTTPError)
RETRY_HINT = "run the same command again: what has arrived is not sent twice"
HTTP_HINTS = {
    401: "the Hub does not accept the token: `hf auth login` with one that may write",
    403: "the token may not write there: take one with write access, a name of your own, or --create-pr",
    409: f"another change is being made there: {RETRY_HINT}",
    412: f"it was changed meanwhile: {RETRY_HINT}",
    413: "a file is too large for the Hub: convert with a smaller --max-shard-size",
    429: f"too many requests: wait some minutes, then {RETRY_HINT}",
}


class PushError(ValueError):
    """A push that failed, wholly or in part; the message says what to do."""


@dataclass(frozen=True)
class LocalFile:
    """A file to publish: the Hub identifies large files by sha256, the others by git's name of the blob."""

    path: Path
    sha256: str
    blob: str

    @classmethod
    def read(cls, path: Path) -> "LocalFile":
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                sha256.update(chunk)
                blob.update(chunk)
        return cls(path, sha256.hexdigest(), blob.hexdigest())

    def equals(self, remote: RepoFile) -> bool:
        return remote.lfs.sha256 == self.sha256 if remote.lfs else remote.blob_id == self.blob


@dataclass(frozen=True)
class Published:
    """
    The result of a push.

    Attributes:
        repo: OWNER/NAME.
        commit: The one that holds the folder.
        url: Of the repository, or of the pull request.
        uploaded, deleted: Names of files; none if the repository had everything already.
        tag: The one that was asked for.
    """

    repo: str
    commit: str
    url: str
    uploaded: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    tag: str | None = None


@dataclass(frozen=True)
class Target:
    """Where and how a folder is published; options as of push_folder."""

    api: HfApi
    repo: str
    branch: str = MAIN
    create_pr: bool = False
    private: bool = False
    tag: str | None = None
    revision_note: str | None = None

    @cached_property
    def user(self) -> dict[str, Any]:
        """The owner of the token, and what it allows."""
        return self.api.whoami()

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo}"

    def files(self, revision: str) -> dict[str, RepoFile]:
        tree = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def head(self) -> str:
        return self.api.model_info(self.repo, revision=self.branch).sha

    def info(self) -> ModelInfo | None:
        """
        Return the repository; None if there is none.

        Raises:
            PushError: It is public and should be private.
        """
        try:
            info = self.api.model_info(self.repo)
        except errors.RepositoryNotFoundError:
            return None
        if self.private and not info.private:
            raise PushError(f"{self.repo}: it is public: make it private in its settings, or leave out --private")
        return info


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    tag: str | None = None,
    revision_note: str | None = None,
    api: HfApi | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Published:
    """
    Write the model card of a folder, check the folder, and publish it.

    Args:
        folder: With a model; its README.md is rewritten above the mark.
        repo: OWNER/NAME; created if it does not exist.
        private: Whether the repository is created as private; one that exists must not be public.
        create_pr: Whether to open a pull request, on a repository that exists.
        branch: Created from main if it does not exist; main if not given.
        tag: Put on the commit; the card pins it.
        revision_note: Description of the commit, below its title.
        api: The client, with an endpoint and a token; huggingface_hub's own settings if not given.
        log: Called with each progress message.

    Raises:
        CheckpointError: There is no such folder, or a file of it is broken.
        PushError: The Hub cannot be reached or refuses. Calling again continues from there.
        PublishError: The folder does not pass the checks.
        VerificationError: The files in the commit differ from the local ones.
    """
    folder = Path(folder)
    check_folder(folder)
    target = Target(api or HfApi(), repo, branch or MAIN, create_pr, private, tag, revision_note)
    check_target(target)
    if write_model_card(folder, repo, tag or target.branch, _published_card(target)):
        log("README.md: the folder's text below the mark replaces another text on the Hub")
    if problems := check_before_publish(folder, repo, log=log):
        raise PublishError(str(folder), problems)
    log("all checks before publishing passed")
    return publish(target, folder, log)


def _friendly_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors of the client into a PushError of one line that says what to do, without the token."""

    @wraps(function)
    def wrapped(target: Target, *arguments: Any) -> Any:
        try:
            return function(target, *arguments)
        except (PushError, VerificationError):
            raise
        except CLIENT_ERRORS as error:
            text = _explain(error, target)
            for token in (target.api.token, get_token()):
                text = text.replace(token, "(token)") if isinstance(token, str) and token else text
            # Not from the error: a cause could repeat the Hub's answer, and the token with it.
            raise PushError(f"{target.repo}: {TOKENS.sub('(token)', text)}") from None

    return wrapped


@_friendly_errors
def check_target(target: Target) -> None:
    """
    Check options and access, before any work.

    Raises:
        PushError: Options exclude each other, not logged in, the token only reads, or the repository is public
            and should be private.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", target.repo):
        raise PushError(f"{target.repo}: expected the name of a repository, OWNER/NAME")
    if target.create_pr and (target.tag or target.private or target.branch != MAIN):
        raise PushError(
            f"{target.repo}: --create-pr goes with neither --branch, nor --tag, nor --private: leave these out"
        )
    if target.user.get("auth", {}).get("accessToken", {}).get("role") == "read" and not target.create_pr:
        raise PushError(f"{target.repo}: {HTTP_HINTS[403]}")
    if target.private:
        target.info()


@_friendly_errors
def _published_card(target: Target) -> str:
    """Return README.md as it is on the Hub, empty if there is none."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = target.api.hf_hub_download(target.repo, "README.md", revision=target.head(), local_dir=scratch)
            return Path(path).read_text(encoding="utf-8", errors="replace")
    except (errors.GatedRepoError, errors.LocalEntryNotFoundError):  # subclasses of those below
        raise
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
        return ""


@_friendly_errors
def publish(target: Target, folder: Path, log: Callable[[str], None] = lambda line: None) -> Published:
    """Upload a folder without checking it; for push_folder."""
    check_target(target)
    local = {name: LocalFile.read(path) for name, path in published_files(folder).items()}
    if not local:
        raise PushError(f"{folder}: nothing in it is published: give a folder with a model")
    _prepare(target, local)
    commit, url = target.head(), target.url
    uploads, deletions = differences(local, target.files(commit))
    if not uploads and not deletions:
        log("the repository has all files already")
    elif target.create_pr and (pull_request := _find_pull_request(target, local)):
        log(f"{pull_request[1]} has all files already")
        (commit, url), uploads, deletions = pull_request, [], []
    else:
        removed = f"; to delete, since the folder has no such file: {', '.join(deletions)}" if deletions else ""
        log(f"files to upload: {len(uploads)}{removed}")
        commit, url = _commit(target, local, commit, (uploads, deletions), log)
    _compare(local, target.files(commit), f"{target.repo} at {commit}")
    if target.tag:
        target.api.create_tag(target.repo, tag=target.tag, revision=commit, exist_ok=True)
    return Published(target.repo, commit, url, uploads, deletions, target.tag)


def _prepare(target: Target, local: Mapping[str, LocalFile]) -> None:
    """
    Create repository and branch if they do not exist.

    Raises:
        PushError: The tag exists on other content.
    """
    if target.info() is None and not target.create_pr:
        target.api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        target.info()
    if target.branch != MAIN:
        target.api.create_branch(target.repo, branch=target.branch, exist_ok=True)
    tags = [ref.name for ref in target.api.list_repo_refs(target.repo).tags] if target.tag else []
    if target.tag in tags and any(differences(local, target.files(target.tag))):
        raise PushError(f"{target.repo}: the tag {target.tag} is on other content: choose another --tag")


def differences(local: Mapping[str, LocalFile], remote: Mapping[str, RepoFile]) -> tuple[list[str], list[str]]:
    """Return what to upload, and files of a model in the repository that the folder no longer has."""
    uploads = [name for name, file in local.items() if name not in remote or not file.equals(remote[name])]
    return uploads, [name for name in remote if name not in local and is_model_file(name)]


def _compare(local: Mapping[str, LocalFile], remote: Mapping[str, RepoFile], location: str) -> None:
    uploads, deletions = differences(local, remote)
    if wrong := [*uploads, *deletions]:
        message = "is missing" if wrong[0] not in remote else "differs from the local file"
        raise VerificationError(f"{location}: {wrong[0]} {message}, by its hash: {RETRY_HINT}")


def _commit(
    target: Target,
    local: Mapping[str, LocalFile],
    parent: str,
    changes: tuple[list[str], list[str]],
    log: Callable[[str], None],
) -> tuple[str, str]:
    """Make the commit, or find it if the answer was lost; return it and where to look at it."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(local[name].path)) for name in changes[0]
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in changes[1]]
    options = {"revision": target.branch, "create_pr": target.create_pr, "parent_commit": parent}
    options |= {"commit_message": COMMIT_TITLE, "commit_description": target.revision_note or ""}
    try:
        made = target.api.create_commit(target.repo, operations, **options)
    except CLIENT_ERRORS:
        if (found := _find_unacknowledged_commit(target, local, parent)) is None:
            raise
        log("the Hub's answer was lost; the commit was found by its content")
        return found
    return made.oid, made.pr_url or target.url


def _find_unacknowledged_commit(target: Target, local: Mapping[str, LocalFile], parent: str) -> tuple[str, str] | None:
    try:
        if target.create_pr:
            return _find_pull_request(target, local)
        head = target.head()
        if head != parent and not any(differences(local, target.files(head))):
            return head, target.url
    except (OSError, errors.HTTPError):  # the first error is the one to report
        return None
    return None


def _find_pull_request(target: Target, local: Mapping[str, LocalFile]) -> tuple[str, str] | None:
    """Return commit and address of an open pull request of the same author with the same content."""
    options = {"discussion_type": "pull_request", "discussion_status": "open", "author": target.user["name"]}
    for request in target.api.get_repo_discussions(target.repo, **options):
        ref = f"refs/pr/{request.num}"
        if not any(differences(local, target.files(ref))):
            return target.api.model_info(target.repo, revision=ref).sha, f"{target.url}/discussions/{request.num}"
    return None


def _explain(error: BaseException, target: Target) -> str:
    wrappers = (RuntimeError, errors.LocalEntryNotFoundError)
    while getattr(error, "response", None) is None and isinstance(error, wrappers) and error.__cause__:
        error = error.__cause__
    response = getattr(error, "response", None)
    status, headers = getattr(response, "status_code", None), getattr(response, "headers", {})
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "not logged in: `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub is not asked, because HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no branch {target.branch!r}: push to main first"
    if isinstance(error, errors.RepositoryNotFoundError) and (status == 404 or "X-Error-Code" in headers):
        return "no such repository, or one that the token may not see: correct the name, or take another token"
    if status in HTTP_HINTS:
        return HTTP_HINTS[status]
    if status is not None and status >= 500:
        return f"the Hub has a fault ({status}): wait some minutes, then {RETRY_HINT}"
    text = " ".join(str(getattr(error, "server_message", None) or error or type(error).__name__).split())[:300]
    if status is not None:
        return f"the Hub refuses it ({status}): {text}"
    return text if isinstance(error, ValueError) else f"the connection broke ({text}): {RETRY_HINT}"
