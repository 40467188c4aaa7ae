"""The shape of the program, held by reading it: which way imports point, how long things are, what is caught."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lrec"
# A module may import from its own floor and from those below it (earlier in this list).
FLOORS = [
    "registry options machine picture documents tensor_file lock processes curves memory_curve progress experts "
    "eight_bits",
    "formats",
    "grid descent kernels statistics",
    "quantizers nn",
    "lora shared_inputs",
    "anatomy cache checkpoint cpu_embeddings embeddings head losses lowrank optimizers teacher text topk ggml foreign "
    "checkpoints",
    "trained lora_bits record card export_card export_record logbook",
    "watch training_progress training_state",
    "integrations conversations pooling",
    "stream load assembly calibration allocation sweep blockwise reconstruct inputs meter forward step ends shapes "
    "rehearsal offload lora_files end_loss rows left_out pass_settings",
    "blocks capture trainer evaluate export report bench memory pass_memory estimate rewrite fold touch_up imports",
    "effort learning",
    "ranks",
    "runs correction parcels hub",
    "finetune apart restore compare_entries",
    "recipe compare sample side_by_side doctor",
    "run_report",
    "task_recipe verbs completion",
    "cli",
    "__main__",
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names.split()}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.Module) -> set[str]:
    """Rooms of lrec that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "lrec":
            found |= {
                alias.name
                for alias in node.names
                if (PACKAGE / alias.name).exists() or (PACKAGE / f"{alias.name}.py").exists()
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lrec."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lrec.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_keeps_the_rules(path):
    tree = ast.parse(path.read_text())
    if room(path) != "__init__":
        assert room(path) in FLOOR, f"{path} is in no floor of this test"
        upwards = {name for name in imported(tree) if FLOOR[name] > FLOOR[room(path)]}
        assert not upwards, f"{path} imports upwards: {upwards}"
    assert path.read_text().count("\n") <= 300, f"{path} is too long to be read in a sitting"
    longest = 120 if "kernels" in path.parts else 60
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= longest, f"{path}:{node.lineno} {node.name} is too long"
            # What runs on a GPU takes its pointers and numbers one by one.
            if not any(ast.unparse(by).startswith("triton.jit") for by in node.decorator_list):
                assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, f"{path}:{node.lineno} {node.name}"
        if isinstance(node, ast.ExceptHandler):
            names = [node.type] if not isinstance(node.type, ast.Tuple) else node.type.elts
            broad = {getattr(name, "id", None) for name in names} & {None, "Exception", "BaseException"}
            dotted = all(isinstance(name, ast.Attribute) for name in names if not hasattr(name, "id"))
            assert not broad or (broad == {None} and dotted and node.type), f"{path}:{node.lineno} broad except"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"


def test_every_recipe_is_short_and_says_what_it_measured():
    recipes = sorted((ROOT / "recipes").rglob("*.py"))
    assert recipes
    for path in recipes:
        text = path.read_text()
        assert text.count("\n") <= 40, f"{path} is longer than 40 lines"
        assert "Measured" in (ast.get_docstring(ast.parse(text)) or ""), f"{path} does not say what it measured"
