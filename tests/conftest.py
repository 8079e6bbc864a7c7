"""What every test runs under: eight virtual CPU devices, checked annotations, strict JAX.

Warnings are errors (`filterwarnings` in pyproject.toml). This file runs before any test module is
imported, and so before JAX starts its backends.
"""

import gzip
import importlib.metadata
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

# Through the environment, so that the processes which tests start have them too. Compiled programs
# are kept outside the repository, for one user; JAX puts its version and the device in their keys.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"capjax-test-compile-cache-{os.getuid()}"),
)
# Programs here run once or twice. Without LLVM's optimizations, and with XLA's older way of making
# code of a fusion where it still has it, they compile in a quarter of the time; no program above
# them changes.
QUICK = ["--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])

from jaxtyping import install_import_hook  # noqa: E402

# From here on every annotated function of capjax checks its arguments, array shapes included.
install_import_hook("capjax", "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Two programs in flight can take each other's threads and wait in a collective for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# No time limit for one example (a busy machine is no bug), and the same examples on every CI run.
hypothesis.settings.register_profile(
    "capjax", deadline=None, derandomize=os.environ.get("CI") == "true"
)
hypothesis.settings.load_profile("capjax")
flags.FLAGS.mark_as_parsed()  # Grain's workers and Orbax read absl flags, which no app has parsed


# Every compiled program takes some memory maps. Linux grants a process 65,530; with one more, XLA
# crashes in whatever it compiles next.
MANY_MAPS = 20_000


def num_maps() -> int:
    """Memory maps of this process; 0 where that cannot be known."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Lets go of the programs of earlier modules, when there are many."""
    yield
    if num_maps() > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A path for one run's files; the directory does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def fakecap() -> dict:
    """The public demonstration set of caption metrics (tests/fixtures/coco_fakecap.md)."""
    path = Path(__file__).parent / "fixtures" / "coco_fakecap.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.fixture
def require_package() -> Callable[..., str]:
    """`require_package("chromium")` is the path of that Debian package's program.

    Where the program is missing the test is skipped, and fails under CI=true, where `.ci/run`
    has installed what is needed. `program` names it where it is not called as its package.
    """

    def require(package: str, program: str = "") -> str:
        path = shutil.which(program or package)
        if path is not None:
            return path
        reason = f"needs the Debian package {package} (apt-get install {package})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        return pytest.skip(reason)

    return require


@pytest.fixture
def require_module() -> Callable[..., ModuleType]:
    """`require_module("torch")` is that module, which the extra `parity` (or `extra`) brings.

    Where it is missing the test is skipped, and fails under CI=true, as `require_package` does.
    """

    def require(name: str, extra: str = "parity") -> ModuleType:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it warns of while it is imported
                return importlib.import_module(name)
        except ImportError:
            package = name.partition(".")[0]
            reason = f"needs the package {package} (pip install 'capjax[{extra}]')"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            return pytest.skip(reason)

    return require
