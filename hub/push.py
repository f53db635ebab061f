"""
Upload a folder to a repository on the Hub, in one commit.

Only files that differ from the repository's are uploaded. So calling again finishes a push that was interrupted: large
files that arrived are not sent twice, and a commit whose response was lost is recognised by its content. A commit names
its parent; if the branch has moved, the Hub refuses it. Afterwards every hash is compared.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token
from huggingface_hub.hf_api import RepoFile

from ..convert.export.card import HUB_NAME, write_model_card
from ..convert.storage.errors import VerificationError
from ..convert.storage.tensors import CHUNK
from .checks import PublishError, check_before_publish, check_folder
from .files import is_model_file, published_files


MAIN = "main"
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
class Published:
    """The result of a push."""

    repo: str  # OWNER/NAME
    commit: str  # the one that holds the folder
    url: str  # of the repository, or of the pull request
    uploaded: list[str]  # names of files; none if the repository had everything already
    deleted: list[str]
    tag: str | None  # the one that was asked for


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

    def commit(self, revision: str) -> str:
        return self.api.model_info(self.repo, revision=revision).sha

    def exists(self) -> bool:
        """Return whether the repository exists; raises PushError if it does, and is public with `private`."""
        try:
            info = self.api.model_info(self.repo)
        except errors.RepositoryNotFoundError:
            return False
        if self.private and not info.private:
            raise PushError(f"{self.repo}: it is public: make it private in its settings, or leave out --private")
        return True

    def differences(self, local: Mapping[str, tuple[str, str]], revision: str) -> dict[str, str]:
        """Return name -> how a revision differs: files to upload, and of a model, those that the folder has not."""
        tree = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
        remote = {
            each.path: each.lfs.sha256 if each.lfs else each.blob_id for each in tree if isinstance(each, RepoFile)
        }
        wrong = [name for name, hashes in local.items() if remote.get(name) not in hashes]
        found = {name: "differs from the local file" if name in remote else "is missing" for name in wrong}
        return found | {name: "was not deleted" for name in remote if name not in local and is_model_file(name)}


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
    with _friendly_errors(target):
        _check_target(target)
        published = _published_card(target)
    if write_model_card(folder, repo, tag or target.branch, published):
        log("README.md: the folder's text below the mark replaces another text on the Hub")
    if problems := check_before_publish(folder, repo, log=log):
        raise PublishError(str(folder), problems)
    log("all checks before publishing passed")
    return publish(target, folder, log)


@contextmanager
def _friendly_errors(target: Target) -> Iterator[None]:
    """Turn errors of the client into a PushError of one line with the fix, without the token."""
    try:
        yield
    except (PushError, VerificationError):
        raise
    except CLIENT_ERRORS as error:
        text = _explain(error, target)
        for token in (target.api.token, get_token()):
            text = text.replace(token, "(token)") if isinstance(token, str) and token else text
        # Not from the error: a cause could repeat the Hub's answer, and the token with it.
        raise PushError(f"{target.repo}: {TOKENS.sub('(token)', text)}") from None


def _check_target(target: Target) -> None:
    """Raise PushError where options or access do not allow the push, before any work."""
    if not HUB_NAME.fullmatch(target.repo):
        raise PushError(f"{target.repo}: expected the name of a repository, OWNER/NAME")
    if target.create_pr and (target.tag or target.private or target.branch != MAIN):
        what = "--create-pr goes with neither --branch, nor --tag, nor --private: leave these out"
        raise PushError(f"{target.repo}: {what}")
    if target.user.get("auth", {}).get("accessToken", {}).get("role") == "read" and not target.create_pr:
        raise PushError(f"{target.repo}: {HTTP_HINTS[403]}")
    if target.private:
        target.exists()  # raises if it is public


def _published_card(target: Target) -> str:
    """Return README.md as it is on the Hub, empty if there is none."""
    if not target.api.file_exists(target.repo, "README.md", revision=target.branch):
        return ""
    with tempfile.TemporaryDirectory() as scratch:
        path = target.api.hf_hub_download(target.repo, "README.md", revision=target.branch, local_dir=scratch)
        return Path(path).read_text(encoding="utf-8", errors="replace")


def publish(target: Target, folder: Path, log: Callable[[str], None] = lambda line: None) -> Published:
    """Upload a folder without checking it; for push_folder."""
    with _friendly_errors(target):
        _check_target(target)
        files = published_files(folder)
        local = {name: _hash(path) for name, path in files.items()}
        if not local:
            raise PushError(f"{folder}: nothing in it is published: give a folder with a model")
        _prepare(target, local)
        commit, url = target.commit(target.branch), target.url
        changes = target.differences(local, commit)
        if not changes:
            log("the repository has all files already")
        elif target.create_pr and (pull_request := _find_commit(target, local)):
            (commit, url), changes = pull_request, {}
            log(f"{url} has all files already")
        uploads = [name for name in changes if name in files]
        deletions = [name for name in changes if name not in files]
        if changes:
            removed = f"; to delete, since the folder has no such file: {', '.join(deletions)}" if deletions else ""
            log(f"files to upload: {len(uploads)}{removed}")
            additions = [CommitOperationAdd(name, str(files[name])) for name in uploads]
            operations = [*additions, *map(CommitOperationDelete, deletions)]
            commit, url = _commit(target, local, commit, operations, log)
        if wrong := target.differences(local, commit):
            name, how = next(iter(wrong.items()))
            raise VerificationError(f"{target.repo} at {commit}: {name} {how}, by its hash: {RETRY_HINT}")
        if target.tag:
            target.api.create_tag(target.repo, tag=target.tag, revision=commit, exist_ok=True)
        return Published(target.repo, commit, url, uploads, deletions, target.tag)


def _hash(path: Path) -> tuple[str, str]:
    """Return sha256, by which the Hub identifies large files, and git's name of the blob, for the others."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def _prepare(target: Target, local: Mapping[str, tuple[str, str]]) -> None:
    """Create repository and branch if they do not exist; raise PushError if the tag exists on other content."""
    if not target.exists() and not target.create_pr:
        target.api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        target.exists()  # raises if another process created it, public
    if target.branch != MAIN:
        target.api.create_branch(target.repo, branch=target.branch, exist_ok=True)
    tags = [ref.name for ref in target.api.list_repo_refs(target.repo).tags] if target.tag else []
    if target.tag in tags and target.differences(local, target.tag):
        raise PushError(f"{target.repo}: the tag {target.tag} is on other content: choose another --tag")


def _commit(
    target: Target, local: Mapping[str, tuple[str, str]], parent: str, operations: list[Any], log: Callable[[str], None]
) -> tuple[str, str]:
    """Make the commit, or find it if the answer was lost; return it and where to look at it."""
    options = {"revision": target.branch, "create_pr": target.create_pr, "parent_commit": parent}
    options |= {"commit_message": "Upload by sailvit", "commit_description": target.revision_note or ""}
    try:
        made = target.api.create_commit(target.repo, operations, **options)
    except CLIENT_ERRORS:
        with suppress(OSError, errors.HTTPError):  # the first error is the one to report
            if found := _find_commit(target, local):
                log("the Hub's answer was lost; the commit was found by its content")
                return found
        raise
    return made.oid, made.pr_url or target.url


def _find_commit(target: Target, local: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
    """Return commit and address of what has the same content: the branch, or an open pull request of this author."""
    revisions = {target.branch: target.url}
    if target.create_pr:
        options = {"discussion_type": "pull_request", "discussion_status": "open", "author": target.user["name"]}
        numbers = [request.num for request in target.api.get_repo_discussions(target.repo, **options)]
        revisions = {f"refs/pr/{number}": f"{target.url}/discussions/{number}" for number in numbers}
    for revision, url in revisions.items():
        commit = target.commit(revision)
        if not target.differences(local, commit):
            return commit, url
    return None


def _explain(error: BaseException, target: Target) -> str:
    wrappers = (RuntimeError, errors.LocalEntryNotFoundError)
    while (response := getattr(error, "response", None)) is None and isinstance(error, wrappers) and error.__cause__:
        error = error.__cause__
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
