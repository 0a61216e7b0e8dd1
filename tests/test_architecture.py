"""The rules of the house, held over every file by reading its syntax: who imports whom, where torch may come in, sizes, room cards."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
ROOMS = ("ftcore", "cluster", "pipelines", "serving")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
TORCH_BOUND = {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "safetensors.torch"}

# Importer -> what it may import of the rooms, of ray and of torch. `None` = any module of that room.
MAY: dict[str, dict[str, set[str] | None]] = {
    "ftcore": {"ftcore": None},
    "cluster": {"cluster": None, "ftcore": {"ftcore.errors", "ftcore.section", "ftcore.recipe", "ftcore.memory"}},
    "pipelines": {"ftcore": None, "cluster": None, "pipelines": None},
    "serving": {"ftcore": None, "cluster": None, "serving": None},
}
RAY: dict[str, tuple[str, ...]] = {  # which parts of ray; "" is ray's core
    "ftcore": (),
    "cluster": ("", "util", "exceptions", "job_submission", "runtime_context", "cluster_utils"),
    "pipelines": ("", "data", "train", "tune", "exceptions", "util"),
    "serving": ("", "serve", "exceptions"),
}
TORCH = {"ftcore"}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    late: bool
    """Inside a function."""
    typing: bool
    """Under `if TYPE_CHECKING`."""
    function: str = ""


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    source: str
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_empty(self) -> bool:
        return not self.source.strip()

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(REPO)}:{line}"


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for room in ROOMS:
        for path in sorted((REPO / room).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
            name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
            found.append(Module(name, path, tree, source, tuple(imports_of(tree))))
    return tuple(found)


def imports_of(node: ast.AST, function: str = "", typing: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, bool(function), typing, function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            names = [child.module or "", *(f"{child.module}.{alias.name}" for alias in child.names)]
            yield from (Import(name, child.lineno, bool(function), typing, function) for name in names)
        else:
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            yield from imports_of(child, function or inside, typing or guarded)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def defines_section(module: Module) -> bool:
    bases = {"Section", "Choice", "Method", "Stage", "Backend", "Engine", "Lora"}
    classes = (node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef))
    return any(isinstance(base, ast.Name) and base.id in bases for node in classes for base in node.bases)


def refuse(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_peft_and_bitsandbytes_come_in_through_one_door() -> None:
    doors = {
        module.at(seen.line) for module in modules() for seen in module.imports if seen.module.split(".")[0] in ("peft", "bitsandbytes")
    }
    assert {door.split(":")[0] for door in doors} == {"ftcore/lean_imports.py"}, doors


def test_rooms_import_only_the_rooms_they_may() -> None:
    problems, known = [], {module.name for module in modules()}
    for module in modules():
        for found in module.imports:
            room = found.module.split(".")[0]
            if room not in ROOMS or found.module not in known:
                continue
            allowed = MAY[module.room].get(room, set())
            if allowed is not None and found.module != room and not any(is_in(found.module, name) for name in allowed):
                problems.append(f"{module.at(found.line)} {module.room} may not import {found.module}")
    refuse(problems)


def test_each_room_imports_only_its_part_of_ray() -> None:
    problems = []
    for module in modules():
        for found in module.imports:
            if not is_in(found.module, "ray"):
                continue
            part = found.module.partition(".")[2].partition(".")[0]
            if not RAY[module.room] or (part in RAY_PARTS and part not in RAY[module.room]):
                problems.append(f"{module.at(found.line)} {module.room} may not import {found.module}")
    refuse(problems)


RAY_PARTS = {
    "data",
    "train",
    "tune",
    "serve",
    "util",
    "exceptions",
    "job_submission",
    "runtime_context",
    "cluster_utils",
    "air",
    "rllib",
    "llm",
}


def test_only_the_library_imports_torch() -> None:
    refuse(
        [
            f"{module.at(found.line)} {module.room} may not import {found.module}; ask ftcore"
            for module in modules()
            for found in module.imports
            if module.room not in TORCH and not found.typing and any(is_in(found.module, name) for name in TORCH_BOUND)
        ]
    )


def test_modules_that_define_a_section_import_torch_only_inside_functions() -> None:
    refuse(
        [
            f"{module.at(found.line)} {found.module} is imported at the top of a module that defines a Section"
            for module in modules()
            if defines_section(module)
            for found in module.imports
            if not found.late and not found.typing and any(is_in(found.module, name) for name in TORCH_BOUND | {"ray"})
        ]
    )


# Where a late import of our own is right all the same, and why.
LATE: dict[str, str] = {
    "ftcore.adapter_commands": "`adapters list` and `show` answer without torch",
    "serving.app": "the driver and the ingress load no torch: only engine replicas do",
    "serving.commands": "`--help` and wrong settings are answered without ray and torch",
    "pipelines.prepare": "a cache hit starts at once, without what building needs",
    "ftcore.evals.compare_command": "without a judge it answers without torch",
    "ftcore.evals.panel": "peft is loaded only where likelihoods are weighed",
    "pipelines.build": "small data is prepared without ray",
    "pipelines.evaluating": "small sets are judged without ray",
    "pipelines.invariants": "`doctor` answers without torch",
    "pipelines.fit": "the driver launches workers before it loads what only they and the report need",
    "ftcore.quantisation": "recipes and settings are read without torch",
    "ftcore.storage": "local folders do not pay for fsspec",
    "ftcore.remote": "s3fs is loaded for s3:// alone",
    "pipelines.hosting": "the driver and the trials' own actors load no torch: only hosts do",
    "pipelines.work": "the driver and Ray Train's workers only pass the work on, without torch",
    "pipelines.room": "what cannot fit is refused before ray is loaded",
    "pipelines.runs": "the first step does not wait for what publishing needs",
}


def test_our_own_modules_are_imported_at_the_top() -> None:
    """A late import is a cycle in disguise. Modules that define a Section may, to stay free of torch; so may the `main` of a script in
    pipelines/, so that a wrong recipe is refused before torch and ray are loaded."""
    refuse(
        [
            f"{module.at(found.line)} imports {found.module} inside a function"
            for module in modules()
            if not defines_section(module) and module.name not in LATE
            for found in module.imports
            if found.late and found.module.split(".")[0] in ROOMS and not (module.room == "pipelines" and found.function == "main")
        ]
    )


def module_edges(module: Module) -> set[str]:
    """Modules that importing this one runs; `from package import module` needs the module, not what the package's own file does."""
    known = {other.name for other in modules()}
    wanted = [found for found in module.imports if found.module in known and not found.late and not found.typing]
    narrowed = {(found.line, found.module.rsplit(".", 1)[0]) for found in wanted}
    return {found.module for found in wanted if (found.line, found.module) not in narrowed} - {module.name}


def test_there_is_no_import_cycle() -> None:
    graph = {module.name: module_edges(module) for module in modules()}
    done: set[str] = set()

    def cycle(name: str, trail: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in trail:
            return (*trail[trail.index(name) :], name)
        if name in done:
            return None
        found = next((c for c in (cycle(other, (*trail, name)) for other in sorted(graph[name])) if c), None)
        done.add(name)
        return found

    cycles = [found for found in (cycle(name, ()) for name in sorted(graph)) if found]
    refuse([" -> ".join(found) for found in cycles])


def test_imports_are_absolute() -> None:
    refuse(
        [
            module.at(node.lineno)
            for module in modules()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ImportFrom) and node.level > 0
        ]
    )


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    paths = [*(module.path for module in modules()), *(REPO / "tests").rglob("*.py"), *(REPO / "benchmarks").rglob("*.py")]
    refuse([str(path.relative_to(REPO)) for path in paths if BANNED_NAMES & {path.stem, *path.relative_to(REPO).parts[:-1]}])


def test_no_file_is_longer_than_400_lines() -> None:
    paths = [*(module.path for module in modules()), *(REPO / "tests").rglob("*.py"), *(REPO / "benchmarks").rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    refuse([f"{path.relative_to(REPO)}: {length} lines" for path, length in lengths.items() if length > MAX_FILE_LINES])


def test_no_function_is_longer_than_a_screen() -> None:
    refuse(
        [
            f"{module.at(node.lineno)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
            for module in modules()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno is not None
            and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
        ]
    )


def test_every_module_opens_with_its_room_card() -> None:
    refuse(
        [
            f"{module.path.relative_to(REPO)} lacks {', '.join(missing)} in its docstring"
            for module in modules()
            if not module.is_empty and module.path.name != "__init__.py"
            if (missing := [word for word in ("In:", "Out:", "Runs in:") if word not in (ast.get_docstring(module.tree) or "")])
        ]
    )


def test_every_function_is_annotated() -> None:
    problems = []
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if bare or node.returns is None:
                    problems.append(f"{module.at(node.lineno)} {node.name}({', '.join(bare)})")
    refuse(problems)


def test_no_error_is_swallowed_silently() -> None:
    refuse(
        [
            module.at(node.lineno)
            for module in modules()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ExceptHandler) and (node.type is None or all(isinstance(line, ast.Pass) for line in node.body))
        ]
    )


def test_nothing_is_pickled_to_disk() -> None:
    refuse(
        [
            f"{module.at(node.lineno)} {ast.unparse(node)[:60]}"
            for module in modules()
            for node in ast.walk(module.tree)
            if (isinstance(node, ast.Import) and any(alias.name in ("pickle", "cloudpickle", "dill", "joblib") for alias in node.names))
            or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.save", "torch.load", "pickle.load", "pickle.loads"))
        ]
    )


def test_reading_a_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: a\nmodel: {path: b}\ndata: {sources: c.jsonl}\nmethod: lora\nstage: sft\n")
    heavy = ("torch", "ray", "transformers", "peft", "deepspeed", "bitsandbytes", "accelerate", "safetensors", "pyarrow", "pandas")
    code = (
        f"import sys; from ftcore.recipe import load_recipe; load_recipe({str(recipe)!r}); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_whole_library_imports_without_ray() -> None:
    elsewhere = {"ftcore.vllm_engine", "ftcore.vllm_requests"}  # imported where vLLM is: an environment of its own
    names = [module.name for module in modules() if module.room == "ftcore" and not module.is_empty and module.name not in elsewhere]
    code = f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\nprint('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.stdout.strip().splitlines()[-1:], done.returncode) == (["False"], 0), done.stderr[-2000:]
