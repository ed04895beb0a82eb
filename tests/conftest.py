import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--stub", action="store_true", help="only the tests on a stub CUDA runtime (needs gcc; minutes)")


def pytest_configure(config):
    config.addinivalue_line("markers", "stub: runs on the stub CUDA runtime of tests/fakecuda, and only with --stub")


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if ("stub" in item.keywords) != config.getoption("--stub")]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Indices of image folders (images.py) are kept for the session only, those of subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """scikit-learn's handwritten digits as an image folder: train/ with 120 and val/ with 41 images of 32 x 32 pixels."""
    from sklearn.datasets import load_digits
    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for i in range(161):
        folder = root / ("train" if i < 120 else "val") / str(data.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15).astype(np.uint8)).resize((32, 32)).save(folder / f"{i:04}.png")
    return root


@pytest.fixture(scope="session")
def call():
    """Run a script of the repository: call("main_ibot.py", "--flag", value, processes=1) -> CompletedProcess."""
    def call(script, *words, processes=1, check=True, env=None):
        python = [sys.executable]
        if processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        result = subprocess.run([*python, script, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result
    return call


@pytest.fixture
def file_limit():
    """file_limit(bytes): no file may grow beyond; as on a full disk, a write fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for(condition, process, seconds=120):
    """Until `condition()` is true, while the process `process` runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
