"""The GPU of the tests: one device, kernels compiled into a folder of the session; without a GPU every test is skipped.

With --require-gpu a missing GPU and any skipped test are failures; with --receipt a full and clean run is recorded.
"""

import os
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests import harness by name

from fault_rows import rows_of  # noqa: E402
from harness import Arrays  # noqa: E402
from mutant_runs import started  # noqa: E402
from receipt import Recorder  # noqa: E402

from apr import driver  # noqa: E402
from apr.buffers import WORKSPACE  # noqa: E402
from apr.device import Device  # noqa: E402
from apr.gemm import Gemm  # noqa: E402

PROBLEMS = driver.cuda_problems(driver.probe())


def pytest_addoption(parser):
    """The options of `make test-gpu`."""
    parser.addoption("--require-gpu", action="store_true", help="a missing GPU, or a skipped test, is a failure")
    parser.addoption("--receipt", type=Path, help="where to record a full run in which everything passed")
    parser.addoption("--falsify-receipt", type=Path, help="where to record the outcomes of the falsifiers")


def pytest_configure(config):
    """Count from the start."""
    strict = config.getoption("--require-gpu", default=False)
    if strict and PROBLEMS:
        pytest.exit(f"--require-gpu: {'; '.join(PROBLEMS)}", returncode=1)
    recorder = Recorder(config.getoption("--receipt", default=None), facts, complete, strict, rows_of=rows_of)
    config.pluginmanager.register(recorder, "gpu receipt")


def pytest_collection_modifyitems(items):
    """Tests that need the GPU for themselves come first, the mutants' outcomes last: their runs go on beside the rest.

    Without a GPU the tests of this folder are skipped, each with the reason.
    """
    items.sort(key=lambda item: of_mutants(item) - (item.get_closest_marker("alone") is not None))
    if PROBLEMS:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="; ".join(PROBLEMS)))


def of_mutants(item) -> bool:
    """Whether a test is of the mutants."""
    return item.path == HERE / "test_mutants.py"


@pytest.fixture(scope="session")
def copies(request):
    """Copies of the checkout, with a run under way for every mutant."""
    with started(request, "gpu") as copies:
        yield copies


@pytest.fixture(autouse=True)
def mutants_beside(request):
    """The runs of the mutants begin with the first test that can bear them, where their outcomes are asked for."""
    if of_mutants(request.session.items[-1]) and request.node.get_closest_marker("alone") is None:
        request.getfixturevalue("copies")


def facts() -> dict[str, str]:
    """What the receipt says of the machine."""
    found = driver.probe()
    nvrtc = ".".join(map(str, driver.import_cupy().cuda.nvrtc.getVersion()))
    return {"device": found.devices[0].name, "driver": found.driver_version, "cuda": nvrtc,
            "cupy": " ".join(driver.cupy_distributions().values()), "python": platform.python_version()}


def complete(session) -> bool:
    """Whether the session ran every test file of this folder, and none of them in part."""
    return (not any("::" in argument for argument in session.config.args)
            and {item.path for item in session.items} >= set(HERE.glob("test_*.py")))


@pytest.fixture(scope="session")
def dev(tmp_path_factory) -> Device:
    """The first GPU. Kernels are kept in a folder of this session, or of APR_CACHE_DIR where the mutants share one."""
    return Device(0, None if os.environ.get("APR_CACHE_DIR") else tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def thawed(request):
    """A trainer freezes the device's kernels; the next test may ask for others."""
    if "dev" in request.fixturenames:
        request.getfixturevalue("dev").cache.frozen = False


@pytest.fixture(scope="session")
def gemm(dev) -> Gemm:
    """Matrix products with the library's own choices, or the shipped table's."""
    return Gemm(dev, dev.empty((WORKSPACE,), "u8"))


@pytest.fixture(params=["f32", "bf16"])
def arrays(dev, request):
    """Guarded arrays in each storage type; what surrounds them, and what is only read, is checked at the end."""
    made = Arrays(dev, request.param)
    yield made
    made.check()


@pytest.fixture
def f32(dev):
    """Guarded arrays in float32 only."""
    made = Arrays(dev, "f32")
    yield made
    made.check()


@pytest.fixture
def bf16(dev):
    """Guarded arrays in bf16 only."""
    made = Arrays(dev, "bf16")
    yield made
    made.check()


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every run."""
    return np.random.default_rng(20261121)
