"""The scripts of `lrec completion`, run by the shell where it is here."""

import shutil
import subprocess

import pytest

from lrec import completion, options, registry
from lrec.cli import main
from lrec.verbs import VERBS, parts


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "lrec.bash"
    path.write_text(completion.bash())
    return path


def completed(script, *words):
    """What bash offers for the last of the words."""
    line = " ".join(f"'{word}'" for word in words)
    code = f'source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _lrec; echo "${{COMPREPLY[@]}}"'
    return set(subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_bash_completes_verbs_settings_and_values(script):
    assert completed(script, "lrec", "") == set(VERBS)
    assert completed(script, "lrec", "q") == {"quantize"}
    assert {"--method", "--bits", "--group_size", "--target_bpw"} <= completed(script, "lrec", "quantize", "--")
    assert completed(script, "lrec", "quantize", "--method", "") == set(registry.names("quantizers"))
    assert completed(script, "lrec", "export", "--format", "gg") == {"gguf", "gguf_lora"}
    assert completed(script, "lrec", "train", "--objective", "") == {"kl", "sft"}
    assert completed(script, "lrec", "train", "--max_st") == {"--max_steps"}
    assert completed(script, "lrec", "bench", "") == {"kernels", "step", "generate", "loss", "cache"}
    assert completed(script, "lrec", "completion", "") == set(completion.SHELLS)
    assert completed(script, "lrec", "quantize", "--output_dir", "") == set()  # bash then offers files


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "completion"])
def test_every_setting_of_a_verb_is_offered(verb):
    settings = {name for cls in parts(verb, {}) for name in options.field_types(cls)}
    assert settings <= {flag.name for flag in completion.flags(verb)}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_is_printed(shell, capsys):
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# {shell}: ") and all(verb in out for verb in VERBS)


def test_another_shell_is_refused_with_those_there_are(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "bash, fish, zsh" in capsys.readouterr().err
