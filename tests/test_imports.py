"""Who imports whom, read from the source; and what stays out of a process that need not have it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("loss", "models", "training", "server")
ALLOWED = {
    "loss": {"loss"},
    "models": {"models"},
    "training": {"training", "models", "loss"},
    "server": {"server", "models"},
}
ENGINE_SEAM = {"server/engine.py", "server/steering.py"}


def modules_imported(source: str) -> set[str]:
    """Returns the full dotted names of everything that a source imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages_imported(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in modules_imported(path.read_text())}


def packages_run(path: Path) -> set[str]:
    """Returns the packages that a file imports for more than its annotations."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return {name.partition(".")[0] for name in modules_imported(ast.unparse(tree))}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def everything_shipped() -> Iterator[Path]:
    yield from sorted(ROOT.glob("*.py"))
    yield from sources(*PACKAGES, "examples", "benchmarks", "docs", "docker")


def test_reader_sees_imports_at_any_depth() -> None:
    source = "import a.b\nfrom c import d as e\ndef f():\n    if True:\n        import g\n"
    assert modules_imported(source) == {"a.b", "c.d", "g"}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_what_the_design_allows(package: str) -> None:
    files = list(sources(package))
    assert files
    for path in files:
        ours = packages_imported(path) & {*PACKAGES, "rheostat", "tests", "examples"}
        assert ours <= ALLOWED[package], path.relative_to(ROOT)


def test_loss_imports_torch_and_the_standard_library_only() -> None:
    known = sys.stdlib_module_names | {"torch", "loss"}
    foreign = {path.name: packages_imported(path) - known for path in sources("loss")}
    # torch for GPUs brings Triton along; this module is imported where there is one.
    assert foreign.pop("softmax_kernels.py") == {"triton"}
    assert not any(foreign.values()), foreign


def test_server_is_imported_by_the_command_line_only() -> None:
    importers = {
        path.relative_to(ROOT).parts[0]
        for path in everything_shipped()
        # They measure the server's own functions.
        if not path.is_relative_to(ROOT / "benchmarks") and "server" in packages_imported(path)
    }
    assert importers <= {"server", "rheostat.py"}
    assert "rheostat.py" in importers


def test_vllm_is_imported_by_the_engine_seam_only() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in everything_shipped()
        if "vllm" in packages_run(path)
    }
    # They measure with vLLM's own load, and vLLM itself. Nothing that serves depends on them.
    measuring = {path for path in importers if path.startswith("benchmarks/")}
    assert importers - measuring == ENGINE_SEAM
    annotated = {
        path.relative_to(ROOT).parent.as_posix()
        for path in everything_shipped()
        if "vllm" in packages_imported(path) - packages_run(path)
    }
    assert annotated <= {"server/generation", "server/workers"}


def test_vllm_is_imported_by_tests_of_the_engine_seam_only() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in sources("tests")
        if "vllm" in packages_imported(path)
    }
    mirrored = {f"tests/server/test_{Path(module).name}" for module in ENGINE_SEAM}
    mirrored |= {"tests/server/steered_rows.py"}
    # They hold our reading of vLLM's rules to vLLM itself.
    mirrored |= {"tests/server/apis/test_responses.py", "tests/server/rendering.py"}
    # The first says when vLLM has mended what server/engine.py works around.
    mirrored |= {"tests/server/test_sampler.py", "tests/server/test_grammar_meter.py"}
    assert {path for path in importers if not path.startswith("tests/e2e/")} <= mirrored


LIGHT = (
    "models",
    "models.manifest",
    "models.errors",
    "models.controls",
    "models.checkpoint",
    "models.tokens",
    "models.calibration",
    "models.solver",
    "server",
    "server.settings",
    "server.dials.protocol",
    "server.apis.chat",
    "server.apis.shaping",
    "server.context",
    "server.web.middleware",
    "server.web.routes",
    "server.dials.board",
    "server.dials.calibrations",
    "server.dials.reports",
    "server.web.bodies",
    "server.web.score",
    "server.telemetry.recorder",
    "server.generation.prompts",
    "server.flags",
    "server.generation.call",
    "server.generation.passes",
    "server.workers.config",
    "server.workers.handshake",
    "server.dials.floors",
    "server.policies.credentials",
    "server.policies.source",
    "server.policies.file",
    "server.policies.book",
    "server.policies.loading",
    "server.policies.reloading",
    "server.telemetry.trace",
    "server.commands",
    "training.category_commands",
    "training.commands",
    "training.evaluation_command",
    "rheostat",
)


def test_light_modules_pull_in_neither_torch_nor_vllm() -> None:
    # One process: each module after the last, so the first that is heavy is named.
    program = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} pulls in {sorted(heavy)}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
