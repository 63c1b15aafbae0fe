"""The shape of the code: small modules, short argument lists, errors without flags, and a map that is true.

That imports go downwards and in no circle is import-linter's to say (``lint-imports``, run in CI).
"""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("sit/**/*.py"), *ROOT.glob("atconv/**/*.py")])
CODE = [
    *MODULES,
    *(path for part in ("benchmarks", "experiments", "scripts", "tests") for path in ROOT.glob(f"{part}/**/*.py")),
]
TRITON = ROOT / "atconv" / "triton"
COMMANDS = {
    "arguments.py", "cli.py", "compare.py", "eval.py", "flags.py", "page.py", "train.py", "train_classifier.py",
    "train_vae.py",
}  # fmt: skip
"""modules that hold a command line"""
FLAGS_OF_OTHERS = {
    ("sit/demo/session.py", "command"),  # writes a sample.py command
    ("sit/study/schedule.py", "command"),  # writes its own, and accelerate's
    ("sit/utils/errors.py", ""),  # says how arguments become flags,
    ("sit/utils/errors.py", "_flag"),  # and does it
    ("sit/utils/device.py", "process_state"),  # a flag of accelerate's
    ("sit/data/tar.py", "_follow_links"),  # a flag of tar's
}
"""(module, function or, for its docstring, nothing) that may name flags"""
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "CHANGELOG.md"})
"""the changes aside, which name what is gone"""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_module_is_long():
    lengths = {name(path): len(path.read_text().splitlines()) for path in MODULES if TRITON not in path.parents}
    assert {module: length for module, length in lengths.items() if length > 450} == {}


def test_at_most_five_positional_parameters():
    """But where diffusers or timm say what they are: configurations that are registered."""
    found = []
    for path in (path for path in MODULES if TRITON not in path.parents):
        for function in functions(path):
            parameters = [parameter.arg for parameter in [*function.args.posonlyargs, *function.args.args]]
            registered = "register_to_config" in map(ast.unparse, function.decorator_list)
            if len(set(parameters) - {"self", "cls"}) > 5 and not registered:
                found.append(f"{name(path)}:{function.lineno} {function.name}")
    assert found == []


def strings(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.Constant]]:
    """Every string below a node, parts of f-strings and docstrings too, with the innermost function that has it."""
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield inside, child
        yield from strings(child, inside)


def test_the_library_speaks_of_arguments_not_of_flags():
    found = []
    for path in (path for path in MODULES if path.name not in COMMANDS):
        for function, string in strings(ast.parse(path.read_text())):
            if (name(path), function) not in FLAGS_OF_OTHERS:
                flags = re.findall(r"(?<![\w-])--[a-z][a-z-]+", string.value)
                found += [f"{name(path)}:{string.lineno} {flag}" for flag in flags]
    assert found == []


def answers() -> list[tuple[str, str, str]]:
    """The rows of the newcomer's test: question, path, and the name to find there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.findall(r"^\| (Where .+?\?) \| `([\w/.]+)` \| `(\w+)` \|$", text, flags=re.MULTILINE)


def test_the_newcomers_test_has_twelve_questions():
    assert len(answers()) == 12


@pytest.mark.parametrize(("question", "path", "wanted"), answers())
def test_a_newcomers_question_is_answered_where_the_map_says(question, path, wanted):
    defined = re.search(rf"^ *(?:class|def) {wanted}\b|^{wanted}\b.*=", (ROOT / path).read_text(), flags=re.MULTILINE)
    assert defined, f"{path} does not define {wanted}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_that_a_page_names_exist(page):
    text = page.read_text()
    folders = "sit|atconv|tests|docs|benchmarks|experiments|scripts"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.-]*\w|(?:{folders})/)(?=`)", text)
    named += re.findall(r"python (\w+(?:/\w+)*\.py)\b", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert missing + [link for link in links if link and not (page.parent / link).exists()] == []


def test_layout_in_the_docs_is_the_layout():
    """Every package and module at the top of ``sit/`` is in the drawing of docs/architecture.md, and no other."""
    drawing = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    inside = drawing[drawing.index("sit/\n") : drawing.index("atconv/")]
    drawn = {
        word
        for line in inside.splitlines()[1:]
        if line[2:3].strip()
        for word in re.findall(r"(\w+)(?:/|\.py)(?= |$)", line[:37])
    }
    packages = {path.parent.name for path in (ROOT / "sit").glob("*/*.py")}
    modules = {path.stem for path in (ROOT / "sit").glob("*.py")} - {"__init__", "version"}
    assert drawn == packages | modules


def test_names_with_dots_exist():
    """``sit.model.SiT`` and the like, in pages, docstrings and comments."""
    texts = {name(path): path.read_text() for path in [*PAGES, *ROOT.glob("docs/*/README.md"), *CODE]}
    named = {
        (word, where) for where, text in texts.items() for word in re.findall(r"`~?((?:sit|atconv)(?:\.\w+)+)`", text)
    }
    named = {(word, where) for word, where in named if word != "sit.json"}  # a file of checkpoints
    assert [f"{where}: {word}" for word, where in sorted(named) if not resolves(word)] == []


def resolves(word: str) -> bool:
    try:
        pkgutil.resolve_name(word)
    except (ImportError, AttributeError):
        return False
    return True
