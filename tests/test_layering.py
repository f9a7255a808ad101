"""Imports point one way: programs, then the code of their package, then the library. There is no cycle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Per package, the packages that it imports besides itself. Imports inside functions count.
ALLOWED = {
    "tarsier_jax": set(),
    "convert": {"tarsier_jax"},
    "infer": {"tarsier_jax"},
    "eval": {"infer", "tarsier_jax"},
    "train": {"eval", "infer", "tarsier_jax"},
    "configs": {"train"},
    "benchmarks": {"convert", "eval", "infer", "train", "configs", "tarsier_jax"},
}
MICRO = "train.micro"
# Modules of training that compare answers with references, which a run imports only if its configuration says so.
SCORING = {"train.pairs", "train.benchmark"}


def modules() -> dict[str, Path]:
    files = [path for package in ALLOWED for path in (ROOT / package).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = modules()


def imports(name: str, nodes: list[ast.AST]) -> set[str]:
    """The modules of this project that `nodes` of the module `name` import."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            # `from package import module` imports the module; any other name is part of `package`.
            names.update(
                module if (module := f"{node.module}.{alias.name}") in MODULES else str(node.module)
                for alias in node.names
            )
    return {each for each in names if each in MODULES}


def all_imports() -> dict[str, set[str]]:
    return {name: imports(name, list(ast.walk(ast.parse(path.read_text())))) for name, path in MODULES.items()}


IMPORTS = all_imports()


def package_of(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_downward(package: str) -> None:
    upward = [
        (name, target)
        for name, targets in IMPORTS.items()
        for target in targets
        if package_of(name) == package and package_of(target) not in {package, *ALLOWED[package]}
    ]
    assert upward == []


def in_micro(name: str) -> bool:
    return name == MICRO or name.startswith(f"{MICRO}.")


def test_training_does_not_depend_on_the_moving_shapes() -> None:
    """Only `train.micro` and `SCORING` import evaluation, and no module but those of `train.micro` imports it."""
    core = [name for name in IMPORTS if package_of(name) == "train" and not in_micro(name)]
    wrong = {
        (name, target)
        for name in core
        for target in IMPORTS[name]
        if in_micro(target)
        or (package_of(target) == "eval" and name not in SCORING)
        or target.startswith("eval.shapes")
    }
    assert wrong == set()


def packages_of(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))} & MODULES.keys()


def loads(name: str) -> set[str]:
    """The modules that the imports of `name` load: also the packages of a module, unless they contain `name`."""
    targets = IMPORTS[name]
    return targets | set().union(*map(packages_of, targets)) - packages_of(name) - {name}


def test_modules_have_no_import_cycle() -> None:
    """Imports inside functions count, since they fail at another time only."""
    state: dict[str, bool] = {}  # False while the imports of a module are visited

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name, True), " -> ".join((*path[path.index(name) :], name))
        if name not in state:
            state[name] = False
            for target in sorted(loads(name)):
                visit(target, (*path, name))
            state[name] = True

    for name in sorted(MODULES):
        visit(name, ())


def is_program(name: str) -> bool:
    return name.endswith("__main__") or '\nif __name__ == "__main__"' in MODULES[name].read_text()


def test_libraries_do_not_import_programs() -> None:
    """A module that is run with `python -m` is imported by other programs only."""
    wrong = [
        (name, target)
        for name, targets in IMPORTS.items()
        for target in targets
        if is_program(target) and not is_program(name)
    ]
    assert wrong == []
