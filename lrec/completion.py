"""`lrec completion SHELL`: a script by which bash, zsh or fish completes verbs, settings and their values.

The script holds all words, made from the verbs' dataclasses once, so that no key press waits for an import. Make it
again after an upgrade. Where it goes is told in its first lines.
"""

import dataclasses
import shlex
import typing
from dataclasses import dataclass, field
from typing import Literal

from lrec import options, registry
from lrec.verbs import VERBS, benches, parts

Shell = Literal["bash", "zsh", "fish"]
SHELLS = typing.get_args(Shell)
# Settings whose values are the members of a folder.
MEMBERS = {"method": "quantizers", "format": "export"}

BASH = """# bash: put `source <(lrec completion bash)` into ~/.bashrc; faster: save this as
# ~/.local/share/bash-completion/completions/lrec
_lrec() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" verb="${{COMP_WORDS[1]}}"
    local words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{verbs}"
    else
        case "$verb $before" in
{values}
        *) [[ "$word" == -* ]] && case "$verb" in
{settings}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _lrec lrec"""
ZSH = """# zsh: put `source <(lrec completion zsh)` into ~/.zshrc, behind compinit
autoload -U +X bashcompinit && bashcompinit
"""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """`lrec completion SHELL`: the script that completes."""

    shell: Shell = field(metadata={"help": "bash, zsh or fish (the word after completion)"})

    def script(self) -> str:
        """The script as text."""
        return fish() if self.shell == "fish" else (ZSH if self.shell == "zsh" else "") + bash()


@dataclass(frozen=True)
class Flag:
    """A setting of a verb: its name, the help of it in a line, and its values if they can be listed."""

    name: str
    help: str
    values: tuple[str, ...]


def flags(verb: str) -> list[Flag]:
    """The settings of a verb, under all methods, formats and objectives that it has."""
    variants: list[dict] = [{}]
    if verb in ("quantize", "export"):
        name = "method" if verb == "quantize" else "format"
        variants += [{name: member} for member in registry.names(MEMBERS[name])]
    if verb == "train":
        variants.append({"objective": "sft"})
    found: dict[str, Flag] = {}
    for given in variants:
        for cls in parts(verb, given):
            kinds = options.field_types(cls)
            for f in dataclasses.fields(cls):
                if f.name in kinds and f.name not in found:
                    told = " ".join(str(f.metadata.get("help", "")).split())
                    found[f.name] = Flag(f.name, told, values(f, kinds[f.name]))
    rest = {"config": "YAML file of settings", "json": "print one JSON object", "help": "list the settings"}
    return [*found.values(), *(Flag(name, told, ()) for name, told in rest.items() if name not in found)]


def values(f: dataclasses.Field, kind) -> tuple[str, ...]:
    """The values of a setting that can be listed; none for numbers, texts and paths."""
    if f.name in MEMBERS:
        return registry.names(MEMBERS[f.name])
    listed = [option for option in (kind, *typing.get_args(kind)) if typing.get_origin(option) is Literal]
    named = f.metadata.get("choices") or [value for option in listed for value in typing.get_args(option)]
    return tuple(map(str, named)) or (("true", "false") if kind is bool else ())


def bash() -> str:
    """The script for bash."""
    of_value, of_verb = [], []
    for verb in VERBS:
        told = flags(verb)
        names = " ".join(f"--{flag.name}" for flag in told)
        of_verb.append(f'            {verb}) words="{names}" ;;')
        of_value += [f'        "{verb} --{f.name}") words="{" ".join(f.values)}" ;;' for f in told if f.values]
    of_value.append(f'        "completion completion") words="{" ".join(SHELLS)}" ;;')
    of_value.append(f'        "bench bench") words="{" ".join(what for what in benches() if what.isalpha())}" ;;')
    return BASH.format(verbs=" ".join(VERBS), values="\n".join(of_value), settings="\n".join(of_verb))


def fish() -> str:
    """The script for fish."""
    lines = ["# fish: save this as ~/.config/fish/completions/lrec.fish"]
    for verb, what in VERBS.items():
        lines.append(f"complete -c lrec -n __fish_use_subcommand -f -a {verb} -d {shlex.quote(what)}")
        for flag in flags(verb):
            listed = f" -x -a {shlex.quote(' '.join(flag.values))}" if flag.values else ""
            told = shlex.quote(flag.help[:80])
            lines.append(f"complete -c lrec -n '__fish_seen_subcommand_from {verb}' -l {flag.name}{listed} -d {told}")
    return "\n".join(lines)
