"""`lrec push`: a packed model, an adapter or an export to the Hugging Face Hub, in one commit.

All that can be refused is refused before the first byte goes: damaged files, a base that only this machine has, quality
that nobody measured or that is poor. The files go first and then one commit makes them appear together, so that a push
that is killed leaves a repository in which nothing loads, and the same command goes on: what the Hub has is not sent
twice. The directory is only read. (`upload_folder` would commit large folders in parts.)
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lrec import card, parcels, text
from lrec.options import setting

# Beyond this the Hub refuses a file.
MAX_FILE_BYTES = 50 * 10**9
CARRIED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True, kw_only=True)
class Push:
    """`lrec push DIRECTORY`: a packed model, an adapter or an export on the Hub, with its card."""

    directory: str = field(metadata={"help": "packed model, adapter or export; it is only read"})
    repo_id: str = field(metadata={"help": "OWNER/NAME on the Hub"})
    private: bool = setting(False, "only you see the repository; of one that exists this stays as it is")
    base_model: str | None = setting(None, "Hub id of what it was made from (none: as it was fetched)")
    base_revision: str | None = setting(None, "the base's revision (none: as it was fetched, else the newest)")
    license: str | None = setting(None, "licence (none: that of the base, as its card on the Hub tells)")
    readme: str | None = setting(None, "a README.md of your own in the place of the card made from the run")
    max_kl: float = setting(1.0, "refuse a model whose KL to full precision, in nats a token, is above this")
    max_perplexity: float = setting(100.0, "the same of perplexity, if no KL was measured")
    replace: bool = setting(False, "put it in the place of what the repository holds; its history keeps that")
    force: bool = setting(False, "push without an evaluation on record, or with a poor one")
    dry_run: bool = setting(False, "only check the directory and show the card; nothing is sent")

    def run(self) -> dict:
        """Pushes and tells where; see the head of this file. Raises ValueError for what is refused, and if the Hub
        cannot be reached or refuses."""
        directory = Path(self.directory)
        if not text.HUB_MODEL.fullmatch(self.repo_id):
            raise ValueError(
                f"--repo_id {self.repo_id!r} is not OWNER/NAME: give your account and a name for the repository"
            )
        parts = parcels.of(directory)
        files = parts.files()
        check_sizes(files)
        measured = parts.measured()
        self.check_quality(parts, measured)
        base = self.base_of(parts)
        about = {
            "repo_id": self.repo_id,
            "base_model": base.name,
            "files": len(files) + 1,
            "total_bytes": sum(path.stat().st_size for path in files),
            "left_out": ", ".join(sorted(p.name for p in directory.iterdir() if p not in files)) or "nothing",
        }
        if self.dry_run:
            return about | {"card": self.readme_of(parts, base, measured)}
        with one_line(directory):
            return about | self.send(parts, base, files, measured)

    def check_quality(self, parts: parcels.Parcel, measured: list[dict]) -> None:
        """Raises ValueError, unless forced, for weights that nobody measured, or that measured poorly."""
        if self.force:
            return
        if not measured:
            raise ValueError(
                f"no evaluation of these weights is on record in {self.directory}: {parts.measure}, or push without "
                "by --force"
            )
        for row in measured:
            name, most = ("kl", self.max_kl) if "kl" in row else ("perplexity", self.max_perplexity)
            if not row[name] <= most:
                raise ValueError(
                    f"{name} on {row['dataset']} is {row[name]:.4g}, above --max_{name} {most:g}: give it more bits, "
                    "correct it with an adapter, or push it all the same by --force (a base that is to carry an "
                    "adapter, say)"
                )

    def base_of(self, parts: parcels.Parcel) -> card.Base:
        """The base's Hub id and revision as given or as it was fetched. Raises ValueError if it is a local folder."""
        name, revision = text.origin(parts.base())
        if self.base_model is not None:
            name, revision = self.base_model, None
        if not text.HUB_MODEL.fullmatch(name) or (self.base_model is None and Path(name).exists()):
            raise ValueError(f"the base is {name!r}, which only this machine has: {parts.ask}")
        licence = {"license": self.license} if self.license else {}
        return card.Base(name=name, revision=self.base_revision or revision, carried=licence)

    def readme_of(self, parts: parcels.Parcel, base: card.Base, measured: list[dict]) -> str:
        """The README.md to push."""
        return Path(self.readme).read_text() if self.readme else parts.readme(self.repo_id, base, measured)

    def send(self, parts: parcels.Parcel, base: card.Base, files: list[Path], measured: list[dict]) -> dict:
        """Asks the Hub about the base, makes the repository and commits; the commit's address."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
        from huggingface_hub.errors import LocalTokenNotFoundError

        api = HfApi(library_name="lrec")
        if get_token() is None:
            raise LocalTokenNotFoundError("no Hub token: run `hf auth login`, or set HF_TOKEN")
        base = looked_up(api, base)
        parts.check_base(api, base)
        api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
        old = set(api.list_repo_files(self.repo_id)) - {".gitattributes", "README.md"}
        if old and not self.replace:
            raise ValueError(f"{self.repo_id} holds {len(old)} files already; --replace puts these in their place")
        names = {path.name for path in files}
        operations = [
            CommitOperationAdd(path.name, parts.content(path, base) if path.name in parcels.TELLING else path)
            for path in files
        ]
        operations.append(CommitOperationAdd("README.md", self.readme_of(parts, base, measured).encode()))
        operations += [CommitOperationDelete(n) for n in sorted(old - names) if n.endswith(".safetensors")]
        done = api.create_commit(self.repo_id, operations, commit_message=f"{parts.what}, by lrec")
        licence = base.carried.get("license", "not told by the base: give --license")
        return {"url": f"{api.endpoint}/{self.repo_id}", "commit": done.oid, "license": licence}


def looked_up(api, base: card.Base) -> card.Base:
    """The base with its revision and what its card on the Hub tells of licence and languages.

    Raises ValueError if the Hub has none of that name.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(base.name, revision=base.revision)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hub shows you no {base.name}, which this was made from: give its id by --base_model OWNER/NAME"
        ) from error
    told = info.card_data.to_dict() if info.card_data else {}
    # A licence that was given stands alone.
    kept = ("language",) if base.carried else CARRIED
    carried = {key: told[key] for key in kept if told.get(key)}
    return card.Base(name=base.name, revision=base.revision or info.sha, carried=carried | base.carried)


def check_sizes(files: list[Path]) -> None:
    """Raises ValueError for files that are empty or that the Hub would refuse."""
    wrong = [f"{p.name} has {n} bytes" for p in files if not 0 < (n := p.stat().st_size) <= MAX_FILE_BYTES]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; the Hub takes files of up to {MAX_FILE_BYTES // 10**9} GB")


@contextlib.contextmanager
def one_line(directory: Path) -> Iterator[None]:
    """Turns what goes wrong on the way to the Hub into a ValueError of one line."""
    from huggingface_hub.errors import HTTPError  # that of the HTTP client this version is built on

    try:
        yield
    # What carries files raises RuntimeError.
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ValueError(
            f"not pushed: {reason.rstrip('.')}. {directory} is as it was; the same command goes on where this stopped"
        ) from error
