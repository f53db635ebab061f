"""
A folder to a repository on the Hub, in one commit.

Only what differs from the repository is uploaded, so that a push which was cut off is finished by calling it again:
large files that had arrived are not sent twice, and a commit whose answer was lost is found by its content. A commit
names the one that it follows; if another came between, the Hub refuses it. Afterwards every hash is compared.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors
from huggingface_hub.hf_api import RepoFile

from ..convert.export.card import write_model_card
from ..convert.storage.errors import VerificationError
from ..convert.storage.tensors import CHUNK
from .checks import PublishError, check_before_publish, check_folder
from .files import is_model_file, published_files


MAIN = "main"
TITLE = "Upload by sailvit"
TOKENS = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]+")
RETRY_HINT = "run the same command again: what has arrived is not sent twice"
PUBLIC = "{repo}: it is public: make it private in its settings, or leave out --private"
# What to do about an answer of the Hub.
HTTP_HINTS = {
    401: "the Hub does not accept the token: `hf auth login` with one that may write",
    403: "the token may not write there: take one with write access, a name of your own, or --create-pr",
    409: f"another change is being made there: {RETRY_HINT}",
    412: f"it was changed meanwhile: {RETRY_HINT}",
    413: "the Hub finds a file too large: convert with a smaller --max-shard-size",
    429: f"too many requests: wait some minutes, then {RETRY_HINT}",
}


class PushError(ValueError):
    """A push that did not happen, or not wholly; the message says what to do."""


@dataclass(frozen=True)
class LocalFile:
    """
    A file to be published.

    Attributes:
        path: Where it is.
        sha256: Of its content; what the Hub knows a large file by.
        blob: git's name of it; what the Hub knows any other file by.
    """

    path: Path
    sha256: str
    blob: str

    def equals(self, remote: RepoFile) -> bool:
        return remote.lfs.sha256 == self.sha256 if remote.lfs else remote.blob_id == self.blob


@dataclass(frozen=True)
class Published:
    """
    What a push did.

    Attributes:
        repo: OWNER/NAME.
        commit: That holds the folder.
        url: Of the repository, or of the pull request.
        uploaded, deleted: Names of files; none if the repository had everything already.
        tag: That was asked for.
    """

    repo: str
    commit: str
    url: str
    uploaded: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    tag: str | None = None


@dataclass(frozen=True)
class Target:
    """
    Where to: see push_folder.

    Attributes:
        api: The client.
        repo: OWNER/NAME.
        branch: To commit to, or from which a pull request starts.
        author: Who the token belongs to.
    """

    api: HfApi
    repo: str
    branch: str = MAIN
    create_pr: bool = False
    private: bool = False
    tag: str | None = None
    note: str | None = None
    author: str = ""

    def files(self, revision: str) -> dict[str, RepoFile]:
        tree = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def head(self) -> str:
        return self.api.model_info(self.repo, revision=self.branch).sha


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
    Writes the folder's card, has it pass the gate, and publishes it.

    Args:
        folder: With a model; its README.md is written anew above the mark.
        repo: OWNER/NAME; made if it is not there.
        private: Whether the repository is to be private; it must not be public already.
        create_pr: Whether a pull request is opened, on a repository that is there.
        branch: Made from main if it is not there; main if not given.
        tag: Put on the commit; the card pins it.
        revision_note: Text below the first line of the commit's message.
        api: The client, with an endpoint and a token; huggingface_hub's own settings if not given.
        log: Called with each progress message.

    Raises:
        CheckpointError: There is no such folder, or a file of it is broken.
        PushError: The Hub cannot be reached, or does not take it. Calling again goes on from there.
        GateError: The folder must not be published.
        VerificationError: What the Hub holds after the commit is not what lies here.
    """
    folder = Path(folder)
    check_folder(folder)
    target = find_target(api or HfApi(), repo, branch, create_pr, private, tag, revision_note)
    with _told(target):
        published = _published_card(target)
    if write_model_card(folder, repo, tag or target.branch, published):
        log("README.md: this folder's text below the mark takes the place of another on the Hub")
    if problems := check_before_publish(folder, repo, log=log):
        raise PublishError(str(folder), problems)
    log("the gate is passed")
    return publish(target, folder, log)


def publish(target: Target, folder: Path, log: Callable[[str], None] = lambda line: None) -> Published:
    """The last step of push_folder: a folder as it is. Nothing outside asks for it without the gate."""
    with _told(target):
        return _publish(target, folder, log)


def find_target(
    api: HfApi,
    repo: str,
    branch: str | None = None,
    create_pr: bool = False,
    private: bool = False,
    tag: str | None = None,
    revision_note: str | None = None,
) -> Target:
    """
    Takes what push_folder takes.

    Raises:
        PushError: What was asked for does not go together, or nobody is logged in.
    """
    branch = branch or MAIN
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise PushError(f"{repo}: no name of a repository: OWNER/NAME is wanted")
    if create_pr and (tag or private or branch != MAIN):
        raise PushError(f"{repo}: --create-pr goes with neither --branch, nor --tag, nor --private: leave these out")
    unnamed = Target(api, repo, branch, create_pr, private, tag, revision_note)
    with _told(unnamed):
        author = _who_may_write(unnamed)
    return replace(unnamed, author=author)


def _who_may_write(target: Target) -> str:
    """
    Who the token belongs to. What would be refused after all the work is refused before it.

    Raises:
        PushError: The token only reads, or the repository is public and should be private.
    """
    who = target.api.whoami()
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read" and not target.create_pr:
        raise PushError(f"{target.repo}: {HTTP_HINTS[403]}")
    if target.private:
        try:
            is_private = target.api.model_info(target.repo).private
        except errors.RepositoryNotFoundError:
            is_private = True
        if not is_private:
            raise PushError(PUBLIC.format(repo=target.repo))
    return who["name"]


def _published_card(target: Target) -> str:
    """README.md as it is on the Hub; nothing if it is not there."""
    try:
        head = target.head()
        with tempfile.TemporaryDirectory() as scratch:
            path = target.api.hf_hub_download(target.repo, "README.md", revision=head, local_dir=scratch)
            return Path(path).read_text(encoding="utf-8", errors="replace")
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.GatedRepoError | errors.LocalEntryNotFoundError):
            raise
        return ""


def _publish(target: Target, folder: Path, log: Callable[[str], None]) -> Published:
    local = {name: _hashed(path) for name, path in published_files(folder).items()}
    if not local:
        raise PushError(f"{folder}: nothing in it is published: give a folder with a model")
    _prepare(target)
    has_tag = _has_tag(target, local)
    head = target.head()
    uploads, deletions = differences(local, target.files(head))
    url = f"{target.api.endpoint}/{target.repo}"
    if not uploads and not deletions:
        log("the repository has all of it already")
        commit = head
    elif target.create_pr and (found := _find_pull_request(target, local)):
        log(f"{found[1]} holds all of it already")
        (commit, url), uploads, deletions = found, [], []
    else:
        gone = f"; to take away, as the folder has none such: {', '.join(deletions)}" if deletions else ""
        log(f"files to upload: {len(uploads)}{gone}")
        commit, url = _commit(target, local, head, uploads, deletions, log)
    compare(local, target.files(commit), target.repo, commit)
    if target.tag and not has_tag:
        target.api.create_tag(target.repo, tag=target.tag, revision=commit, exist_ok=True)
    return Published(target.repo, commit, url, uploads, deletions, target.tag)


def _hashed(path: Path) -> LocalFile:
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            blob.update(chunk)
    return LocalFile(path, sha256.hexdigest(), blob.hexdigest())


def differences(local: Mapping[str, LocalFile], remote: Mapping[str, RepoFile]) -> tuple[list[str], list[str]]:
    """What has to be uploaded; and what of a model lies there that the folder no longer has."""
    uploads = [name for name, file in local.items() if name not in remote or not file.equals(remote[name])]
    return uploads, [name for name in remote if name not in local and is_model_file(name)]


def compare(local: Mapping[str, LocalFile], remote: Mapping[str, RepoFile], repo: str, commit: str) -> None:
    """
    Raises:
        VerificationError: A file of the commit is not what lies here.
    """
    uploads, deletions = differences(local, remote)
    if wrong := [*uploads, *deletions]:
        what = "is not there" if wrong[0] not in remote else "is not what lies here"
        raise VerificationError(f"{repo} at {commit}: {wrong[0]} {what}, by its hash: {RETRY_HINT} to mend it")


def _prepare(target: Target) -> None:
    """Repository and branch, made if need be."""
    try:
        info = target.api.model_info(target.repo)
    except errors.RepositoryNotFoundError:
        if target.create_pr:
            raise
        target.api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        info = target.api.model_info(target.repo)
    if target.private and not info.private:
        raise PushError(PUBLIC.format(repo=target.repo))
    if target.branch != MAIN:
        target.api.create_branch(target.repo, branch=target.branch, exist_ok=True)


def _has_tag(target: Target, local: Mapping[str, LocalFile]) -> bool:
    """
    Raises:
        PushError: The tag is there, and on something else.
    """
    tags = [ref.name for ref in target.api.list_repo_refs(target.repo).tags] if target.tag else []
    if target.tag not in tags:
        return False
    if any(differences(local, target.files(target.tag))):
        raise PushError(f"{target.repo}: the tag {target.tag} is on other content: choose another --tag")
    return True


def _commit(
    target: Target,
    local: Mapping[str, LocalFile],
    head: str,
    uploads: list[str],
    deletions: list[str],
    log: Callable[[str], None],
) -> tuple[str, str]:
    """The commit that holds the folder, made or found; and an address to look at it."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(local[name].path)) for name in uploads
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in deletions]
    options = {"revision": target.branch, "create_pr": target.create_pr, "parent_commit": head}
    try:
        made = target.api.create_commit(
            target.repo, operations, commit_message=TITLE, commit_description=target.note or "", **options
        )
    except (OSError, ValueError, RuntimeError, errors.HTTPError):
        if (found := _find_unacknowledged_commit(target, local, head)) is None:
            raise
        log("the Hub's answer was lost; the commit was found by its content")
        return found
    return made.oid, made.pr_url or f"{target.api.endpoint}/{target.repo}"


def _find_unacknowledged_commit(target: Target, local: Mapping[str, LocalFile], before: str) -> tuple[str, str] | None:
    """A commit that was made, though the client got no answer."""
    try:
        if target.create_pr:
            return _find_pull_request(target, local)
        head = target.head()
        if head != before and not any(differences(local, target.files(head))):
            return head, f"{target.api.endpoint}/{target.repo}"
    except (OSError, errors.HTTPError):  # the first error is the one to tell
        return None
    return None


def _find_pull_request(target: Target, local: Mapping[str, LocalFile]) -> tuple[str, str] | None:
    """An open pull request of the same author with the same content."""
    kind = {"discussion_type": "pull_request", "discussion_status": "open"}
    for request in target.api.get_repo_discussions(target.repo, author=target.author, **kind):
        ref = f"refs/pr/{request.num}"
        if not any(differences(local, target.files(ref))):
            commit = target.api.model_info(target.repo, revision=ref).sha
            return commit, f"{target.api.endpoint}/{target.repo}/discussions/{request.num}"
    return None


@contextmanager
def _told(target: Target) -> Iterator[None]:
    """Turns what the client raises into one line that says what to do, without the token."""
    try:
        yield
    except (PushError, VerificationError):
        raise
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        # A cause could repeat what the Hub said, and the token with it.
        raise PushError(f"{target.repo}: {_without_token(_explain(error, target), target.api)}") from None


def _explain(error: BaseException, target: Target) -> str:
    wrappers = (RuntimeError, errors.LocalEntryNotFoundError)
    while getattr(error, "response", None) is None and isinstance(error, wrappers) and error.__cause__:
        error = error.__cause__
    response = getattr(error, "response", None)
    status, headers = getattr(response, "status_code", None), getattr(response, "headers", {})
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "nobody is logged in: `hf auth login`, or set HF_TOKEN"
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
    said = " ".join(str(getattr(error, "server_message", None) or error or type(error).__name__).split())[:300]
    if status is not None:
        return f"the Hub refuses it ({status}): {said}"
    return said if isinstance(error, ValueError) else f"the connection broke ({said}): {RETRY_HINT}"


def _without_token(text: str, api: HfApi) -> str:
    from huggingface_hub import get_token

    for token in (api.token, get_token()):
        if isinstance(token, str) and token:
            text = text.replace(token, "(token)")
    return TOKENS.sub("(token)", text)
