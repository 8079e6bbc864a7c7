"""The repository itself: rooms, safety, no traces of a machine, a README that tells the truth."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest

from capjax import cli
from capjax.commands import settings

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob("capjax/**/*.py"), *ROOT.glob("tools/**/*.py")])
README = (ROOT / "README.md").read_text()
PICKLES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
UNSAFE = {
    *("eval", "exec", "os.system", "os.popen", "subprocess.getoutput"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "pd.read_pickle"),
}
UNPACKING = {"extract", "extractall", "unpack_archive"}  # to paths that the archive names
# Registries are the installers' business. Spelt in halves, so that this file does not match.
HOSTS = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "npmjs" + ".",
    "debian" + ".org",
    "conda" + ".io",
]
MACHINE_PATHS = re.compile(r"(?<![\w.])/(root|home/\w+|work|Users/\w+|tmp/\w+)/")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(nodes) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def all_imports(path: Path) -> set[str]:
    return imports(ast.walk(tree_of(path)))


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked_text() -> dict[str, str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    texts = {}
    for name in filter(None, listed.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in data:
            texts[name] = data.decode(errors="replace")
    return texts


def unsafe_calls(tree: ast.Module) -> list[int]:
    """Lines that could run code hidden in data, or write where an archive says."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        pickles = [
            keyword
            for keyword in node.keywords
            if keyword.arg == "allow_pickle"
            and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
        ]
        is_plain = any(
            keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
            for keyword in node.keywords
        )
        in_a_shell = any(
            keyword.arg == "shell" and ast.unparse(keyword.value) != "False"
            for keyword in node.keywords
        )
        if (
            called in UNSAFE
            or called.rpartition(".")[2] in UNPACKING
            or (called == "torch.load" and not is_plain)
            or pickles
            or in_a_shell
        ):
            lines.append(node.lineno)
    return lines


def test_data_never_runs_code():
    for path in CODE:
        assert not roots(all_imports(path)) & PICKLES, name_of(path)
        assert not unsafe_calls(tree_of(path)), name_of(path)


def test_the_check_above_sees_what_it_should():
    assert roots(imports(ast.walk(ast.parse("def f():\n    from pickle import loads")))) & PICKLES
    for line in (
        "np.load(f, allow_pickle=True)",
        "torch.load(f, weights_only=w)",
        "eval(x)",
        "g(allow_pickle=p)",
        "exec(compile(x, y, z))",
        "os.system(x)",
        "yaml.load(f, Loader=yaml.Loader)",
        "subprocess.run(x, shell=True)",
        "tarfile.open(f).extractall(d)",
        "zipfile.ZipFile(f).extract(m)",
    ):
        assert unsafe_calls(ast.parse(line)) == [1]
    assert not unsafe_calls(ast.parse("np.load(f, allow_pickle=False); ast.literal_eval(x)"))
    assert not unsafe_calls(ast.parse("torch.load(f, weights_only=True)"))
    assert not unsafe_calls(ast.parse("subprocess.run([x]); yaml.safe_load(f); re.compile(x)"))


def test_only_these_modules_can_reach_a_network():
    """SECURITY.md says when they do. `etils` opens a workdir or a checkpoint that is a URL."""
    network = {"aiohttp", "fsspec", "http", "requests", "socket", "ssl", "starlette", "uvicorn"}
    network |= {"huggingface_hub", "httpx", "tensorflow_datasets", "wandb", "urllib.request"}
    found = {
        name_of(path)
        for path in ROOT.glob("capjax/**/*.py")
        if (names := all_imports(path)) and (roots(names) | names) & network
    }
    assert found == {
        "capjax/commands/serve.py",
        "capjax/data/boost_endpoint.py",
        "capjax/data/readers/tfds_source.py",
        "capjax/data/urls.py",
        "capjax/serving/app.py",
        "capjax/serving/upload.py",
        "capjax/training/meeting.py",
        "capjax/training/metrics.py",
        "capjax/training/peers.py",
        "capjax/training/workdir.py",  # the name of this machine
    }


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/reliability.md"])
def test_every_test_that_a_promise_names_exists(page):
    promises = re.findall(
        r"`(tests/\S+\.py)(?: -k (?:\"([^\"`]+)\"|([\w.]+)))?`", (ROOT / page).read_text()
    )
    assert len(promises) > 5
    for name, several, single in promises:
        tests = re.findall(r"^def (test_\w+)", (ROOT / name).read_text(), re.MULTILINE)
        for word in (several or single).split(" or ") if several or single else ["test_"]:
            assert any(word in test for test in tests), f"{page}: {name} -k {word}"


def test_only_commands_know_the_config_and_only_models_know_nnx():
    for path in ROOT.glob("capjax/**/*.py"):
        room = path.relative_to(ROOT / "capjax").parts[0]
        names = all_imports(path)
        assert room == "commands" or "ml_collections" not in roots(names), name_of(path)
        assert room == "models" or not any(n.startswith("flax.nnx") for n in names), name_of(path)
        assert not roots(names) & {"tensorflow", "torch", "clu"}, name_of(path)


def test_files_are_one_idea_and_named_for_it():
    for path in CODE:
        assert path.stem not in ("utils", "util", "common", "base", "helpers"), name_of(path)
        lines = path.read_text().count("\n")
        assert lines <= 400 or "tools" in path.parts, f"{name_of(path)} is too long for one idea"
        assert ast.get_docstring(tree_of(path)) or not tree_of(path).body, (
            f"{name_of(path)} does not say what it is"
        )


def test_the_repository_names_no_machine_and_no_registry():
    for name, text in tracked_text().items():
        for number, line in enumerate(text.splitlines(), 1):
            assert not MACHINE_PATHS.search(line), f"{name}:{number}: {line.strip()}"
            assert not any(host in line for host in HOSTS), f"{name}:{number}: {line.strip()}"


def test_the_check_above_sees_what_it_should_too():
    for path in ("/root", "/home/ann", "cd /work", '"/tmp/v1'):
        assert MACHINE_PATHS.search(f"{path}/x"), path
    for path in ("/usr/bin/chromium", "a/work", "runs/root", ""):
        assert not MACHINE_PATHS.search(f"{path}/x"), path


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_readme_fits_on_two_screens():
    assert README.count("\n") <= 110


def test_every_command_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    shell = [block.replace("\\\n", " ") for block in blocks("sh")]  # lines that go on
    lines = [line.split("#")[0].split() for block in shell for line in block.splitlines()]
    lines += [code.split() for code in re.findall(r"`((?:capjax|make) [^`]+)`", README)]
    checked = 0
    for words in filter(None, lines):
        program, *rest = words
        if program == "make":
            assert re.search(rf"^{rest[0]}:|^\.PHONY:.*\b{rest[0]}\b", makefile, re.MULTILINE), rest
        elif program == "capjax" and rest[0] in cli.COMMANDS:
            module = importlib.import_module(f"capjax.commands.{rest[0]}")
            args = cli.parse(rest[0], module, rest[1:])
            if getattr(args, "config", None):
                settings.load_config(args.config, args.overrides)
        else:
            assert words == ["capjax", "--help"], words
        checked += 1
    assert checked >= 6


def test_every_file_and_every_python_block_in_the_readme_is_real():
    for block in blocks("python"):
        compile(block, "README.md", "exec")
    names = re.findall(r"`((?:capjax|configs|docs|tools|tests)/[^`]*)`|\]\(([^)#:]+)\)", README)
    assert names
    for name in filter(None, (inline or link for inline, link in names)):
        assert (ROOT / name).exists(), name


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == importlib.import_module("capjax").__version__


def test_both_stacks_are_pinned_and_hold_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[\[<>=]", text)[0].lower().replace("_", "-") for text in wanted}
    for path in ROOT.glob("constraints/py*.txt"):
        pins = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), path
        pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
        assert names <= pinned, names - pinned
        assert not pinned & {"torch", "tensorflow"}


def test_the_wheel_carries_the_package_its_data_and_the_configs(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"capjax/configs/{name}.py" for name in settings.shipped_configs()} <= names
    tracked = {name for name in tracked_text() if name.startswith("capjax/")}
    assert tracked <= names
    assert not any(name.startswith(("tests", "tools", "configs")) for name in names)
    # From the wheel alone, without the checkout: its configs are found inside the package.
    found = subprocess.run(
        [sys.executable, "-m", "capjax.cli", "config", "list"],
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [line.split()[0] for line in found.splitlines()] == list(settings.shipped_configs())


@pytest.mark.parametrize("python", ["missing-python", "false"])
def test_an_unfit_python_is_named_in_one_line(python, tmp_path):
    result = subprocess.run(
        ["sh", str(ROOT / "tools" / "environment.sh"), "core"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": python},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"PYTHON={python} is not Python >= 3.11" in result.stderr
