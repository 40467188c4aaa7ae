"""What `lrec push` puts on the Hub: which files of a directory, as others should see them, under which card."""

from pathlib import Path

from lrec import assembly, card, checkpoint, export_card, export_record, foreign, record, report

MODEL_FILES = ("config.json", "model.safetensors.index.json", checkpoint.MANIFEST, assembly.REPORT, assembly.LOWRANK)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", checkpoint.ADAPTER_STAMP)
# What tells of the run, and so of this machine.
TELLING = (
    "config.json",
    "adapter_config.json",
    checkpoint.MANIFEST,
    checkpoint.ADAPTER_STAMP,
    assembly.REPORT,
    record.FILE,
    export_record.FILE,
)
EXPORT_FILES = ("config.json", "model.safetensors.index.json", "quantize_config.json", export_record.FILE)


class Parcel:
    """A directory that can be pushed.

    A kind of it has `files()`, what is pushed but the card; `measured()`, what is on record of its weights; `base()`,
    what it was made from or for; and `readme(repo_id, base, measured)`, its card. Making one raises ValueError if files
    are missing or damaged.
    """

    what: str
    ask = "give its Hub id by --base_model OWNER/NAME, so that others find it"
    measure = "run `lrec evaluate --record` with --teacher and a held-out --dataset"

    def __init__(self, directory: Path):
        self.directory = directory

    def there(self, *names: str) -> set[Path]:
        """Those of its files of these names that there are."""
        return {path for path in (self.directory / name for name in names) if path.exists()}

    def content(self, path: Path, base: card.Base) -> bytes:
        """A file of `TELLING` as others should see it: the base by its id, and no folders of this machine."""
        value = checkpoint.without_folders(checkpoint.read_json(path))
        self.name_base(path.name, value, base)
        return checkpoint.json_bytes(value)

    def name_base(self, file: str, value: dict, base: card.Base) -> None:
        """Puts the base's id where a file of this name, whose content is `value`, tells the base."""

    def check_base(self, api, base: card.Base) -> None:
        """Raises ValueError if the base on the Hub is another than this was made for; most stand on their own."""


class Model(Parcel):
    """A packed model's directory."""

    what = "Packed model"

    def __init__(self, directory: Path):
        """Raises ValueError if it holds no packed model, or a damaged one."""
        super().__init__(directory)
        if not (directory / "config.json").exists():
            raise ValueError(f"{directory} has neither adapter_config.json nor config.json: nothing to push")
        self.quantization = report.packed_config(directory)
        checkpoint.verify(directory)

    def files(self) -> list[Path]:
        """What is pushed, but the card."""
        found = {*checkpoint.weight_files(self.directory), *checkpoint.tokenizer_files(self.directory)}
        return sorted(found | self.there(*MODEL_FILES, record.FILE))

    def measured(self) -> list[dict]:
        """What was measured of these weights."""
        return record.rows(self.directory)

    def base(self) -> Path:
        """What it was made from."""
        return Path(self.quantization.get("meta", {}).get("base_model", ""))

    def name_base(self, file: str, value: dict, base: card.Base) -> None:
        """See `Parcel.name_base`."""
        made = {"base_model": base.name, "base_revision": base.revision}
        if file == "config.json":
            value["quantization_config"]["meta"] |= made
        elif file == checkpoint.MANIFEST:
            value |= made

    def readme(self, repo_id: str, base: card.Base, measured: list[dict]) -> str:
        """See `lrec.card`."""
        size = checkpoint.weights_bytes(self.directory)
        return card.packed(
            repo_id, base, checkpoint.without_folders(self.quantization), size, checkpoint.without_folders(measured)
        )


class Adapter(Parcel):
    """An adapter's directory, as `lrec train` or `lrec export --format adapter` writes it."""

    what = "Adapter"
    ask = "push it first, then give its Hub id by --base_model OWNER/NAME"

    def __init__(self, directory: Path):
        """Raises ValueError if files are missing or damaged."""
        super().__init__(directory)
        self.config = foreign.lora_config(directory)
        self.stamp = checkpoint.read_stamp(directory)
        self.meta = {}
        if not self.stamp:
            raise ValueError(
                f"{directory} does not name the packed weights it was made for (no {checkpoint.ADAPTER_STAMP}): push "
                "what `lrec train` or `lrec export --format adapter` wrote"
            )
        checkpoint.open_tensors(directory / "adapter_model.safetensors")

    def files(self) -> list[Path]:
        """What is pushed, but the card."""
        return sorted(self.there(*ADAPTER_FILES, record.FILE) | {*checkpoint.tokenizer_files(self.directory)})

    def measured(self) -> list[dict]:
        """What was measured of these weights on their base."""
        return record.rows(self.directory)

    def base(self) -> Path:
        """The packed model it corrects."""
        return Path(self.config.get("base_model_name_or_path") or "")

    def name_base(self, file: str, value: dict, base: card.Base) -> None:
        """See `Parcel.name_base`."""
        if file == "adapter_config.json":
            value |= {"base_model_name_or_path": base.name, "revision": base.revision}
        elif file == checkpoint.ADAPTER_STAMP:
            value |= {"base_model": base.name}

    def readme(self, repo_id: str, base: card.Base, measured: list[dict]) -> str:
        """See `lrec.card`."""
        meta, stamp, measured = (checkpoint.without_folders(value) for value in (self.meta, self.stamp, measured))
        return card.adapter(repo_id, base, meta, self.config, stamp, checkpoint.weights_bytes(self.directory), measured)

    def check_base(self, api, base: card.Base) -> None:
        """Raises ValueError if the base on the Hub has other packed weights than those the adapter was made for."""
        config = api.hf_hub_download(base.name, "config.json", revision=base.revision)
        self.meta = report.packed_config(Path(config).parent).get("meta", {})
        checkpoint.check_stamp(self.directory, self.meta.get("packed_sha256"))


class Exported(Parcel):
    """An export for other tools, as `lrec export` writes it."""

    what = "Export"
    measure = "evaluate what it was exported from by `lrec evaluate --record` and export it again"

    def __init__(self, directory: Path):
        """Raises ValueError if files are missing or damaged, or it is of a kind that has no repository of its own."""
        super().__init__(directory)
        self.told = export_record.read(directory)
        if self.told["format"] not in export_card.KINDS:
            raise ValueError(
                f"{directory} is a {self.told['format']} export, which has no card of its own; push the adapter it was "
                "made of, or one of " + ", ".join(export_card.KINDS)
            )
        checkpoint.check_files(directory)

    def files(self) -> list[Path]:
        """What is pushed, but the card."""
        found = {*export_record.weight_files(self.directory), *checkpoint.tokenizer_files(self.directory)}
        return sorted(found | self.there(*EXPORT_FILES))

    def measured(self) -> list[dict]:
        """What was measured of the model that was exported."""
        return self.told["evaluation"]

    def base(self) -> Path:
        """What it was made from."""
        return Path(self.told["meta"].get("base_model") or "")

    def name_base(self, file: str, value: dict, base: card.Base) -> None:
        """See `Parcel.name_base`."""
        if file == export_record.FILE:
            value["meta"] |= {"base_model": base.name, "base_revision": base.revision}

    def readme(self, repo_id: str, base: card.Base, measured: list[dict]) -> str:
        """See `lrec.export_card`."""
        size = sum(path.stat().st_size for path in export_record.weight_files(self.directory))
        told, measured = checkpoint.without_folders(self.told), checkpoint.without_folders(measured)
        return export_card.exported(repo_id, base, told, size, measured)


def of(directory: Path) -> Parcel:
    """What a directory holds. Raises ValueError if that is nothing to push, or damaged."""
    if (directory / export_record.FILE).exists():
        return Exported(directory)
    return Adapter(directory) if (directory / "adapter_config.json").exists() else Model(directory)
