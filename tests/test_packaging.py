"""The sdist and the wheel hold what they should, and what is installed works, with and without the compiled module."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# An editable install finds gfast._C in the repository, also for a copy of the package elsewhere.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""
REFERENCE_ONLY = """
import gfast, torch
from gfast.ops import dispatch
assert gfast.__file__.startswith({folder!r}), gfast.__file__
assert dispatch.select("grad_dot", "auto", "cpu") == "reference"
assert gfast.grad_dot([torch.ones(3)], [torch.full((3,), 2.0)], [0], 1).tolist() == [6.0]
logp = gfast.token_logp(torch.zeros(2, 4), torch.tensor([1, -100]))
assert torch.allclose(logp, torch.tensor([0.25, 1.0]).log())
try:
    gfast.grad_dot([torch.ones(3)], [torch.ones(3)], [0], 1, impl="cpp")
except ValueError as error:
    assert "gfast._C could not be imported" in str(error), error
else:
    raise AssertionError("impl='cpp' must raise without gfast._C")
from gfast import doctor
assert "not available" in doctor.report()
"""
WITH_EXTENSION = """
import gfast, torch
from gfast import _C
from gfast.ops import dispatch
assert _C.__file__.startswith({folder!r}), _C.__file__
assert dispatch.select("grad_dot", "auto", "cpu") == "cpp"
assert gfast.grad_dot([torch.ones(3)], [torch.full((3,), 2.0)], [0], 1).tolist() == [6.0]
from gfast import doctor
assert "in use: " + _C.build_info()["instruction_set"] in doctor.report()
"""


def run_python(code: str, folder: Path, **env: str) -> str:
    """Run code against the package in `folder`, away from the repository."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "-c", NO_EDITABLE + code.replace("{folder!r}", repr(str(folder)))]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def package_sources() -> set[str]:
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "gfast").rglob("*.py") if "kernels" not in p.parts}
    return files | {f"gfast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    for tool in ("setuptools", "wheel"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"building needs {tool}")
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        assert not [m.name for m in tar.getmembers() if m.issym() or m.islnk()]
        tar.extractall(out)
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel that a user's pip builds from the sdist (the CPU part)."""
    if shutil.which("cmake") is None and not (Path(sys.executable).parent / "cmake").exists():
        pytest.skip("building needs cmake")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", out, sdist]
    # Quickly: what is tested is what gets into the wheel, and that it loads.
    quick = "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DGFAST_ISAS=default -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=0"
    env = {**os.environ, "GFAST_CUDA": "0", "MAX_JOBS": "2", "CMAKE_ARGS": quick}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("gfast-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_sdist_can_be_built_from(sdist):
    names = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*") if p.is_file()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources and sources <= names
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "Makefile"} <= names
    assert {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} <= names
    assert package_sources() <= names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


def test_everything_of_the_package_is_built_from_the_sdist(sdist, tmp_path):
    """What a wheel holds beside the extension, which takes minutes to compile."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    result = subprocess.run(command, cwd=sdist, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    built = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "gfast").rglob("*") if p.is_file()}
    assert package_sources() <= built
    assert {p.relative_to(sdist).as_posix() for p in (sdist / "gfast").rglob("*") if p.is_file()} == built


@pytest.mark.slow  # the extension is compiled
def test_wheel_contents(wheel, sdist):
    sources = {p.relative_to(sdist).as_posix() for p in (sdist / "gfast").rglob("*") if p.is_file()}
    assert {f"gfast/kernels/{p.name}" for p in (sdist / "kernels").glob("*.py")} <= sources
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert not [i.filename for i in archive.infolist() if (i.external_attr >> 16) & 0o170000 == 0o120000]
    assert sources <= names
    assert [n for n in names if n.startswith("gfast/_C.") and n.endswith(".so")]
    assert {n.split("/")[0] for n in names} == {"gfast", "gfast-0.1.0.dist-info"}
    assert not [n for n in names if n.endswith(".pyc") or "csrc" in n]


@pytest.mark.slow  # the extension is compiled
def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        read = {n.split("/", 1)[1]: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    metadata = message_from_string(read["METADATA"])
    assert metadata["Name"] == "gfast" and metadata["Version"] == "0.1.0"
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    needs = metadata.get_all("Requires-Dist")
    assert any(n.startswith("torch") for n in needs) and any(n.startswith("transformers") for n in needs)
    assert "gfast = gfast.cli:main" in read["entry_points.txt"]
    assert "licenses/LICENSE" in read
    assert "Root-Is-Purelib: false" in read["WHEEL"]
    import gfast

    assert metadata["Version"] == gfast.__version__


@pytest.mark.slow  # the extension is compiled
def test_installed_wheel_works(installed):
    run_python(WITH_EXTENSION, installed)


@pytest.mark.slow  # the extension is compiled
def test_kernels_import_from_the_package(installed):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    code = "import gfast.kernels.rows as rows; assert rows.__file__.startswith({folder!r}), rows.__file__"
    run_python(code, installed, TRITON_INTERPRET="1")


def test_unknown_instruction_set_is_refused():
    from gfast.ops import dispatch

    if dispatch.extension()[0] is None:
        pytest.skip(dispatch.extension()[1])
    code = """
import torch
from gfast import _C
try:
    _C.build_info()
except ValueError as error:
    assert "GFAST_CPU_ISA='sse9' is not one of default, avx2, avx512" in str(error)
else:
    raise AssertionError
from gfast import doctor
assert "sse9" in doctor.report()
"""
    run_python(code, ROOT, GFAST_CPU_ISA="sse9")


def test_package_without_the_extension_works_on_the_reference(tmp_path):
    shutil.copytree(ROOT / "gfast", tmp_path / "gfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run_python(REFERENCE_ONLY, tmp_path)


def test_import_is_light(tmp_path):
    code = """
import sys, gfast
heavy = {"transformers", "datasets", "pandas", "matplotlib", "gfast._C", "gfast.kernels"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    run_python(code, ROOT)


def test_cmake_configures_with_cuda(tmp_path):
    """A torch without CUDA cannot link the CUDA build, but CMake must accept it."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if shutil.which("nvcc") is None or cmake is None:
        pytest.skip("nvcc or cmake is not installed")
    options = {
        "GFAST_CUDA": "ON",
        "GFAST_INCLUDE": ROOT,
        "GFAST_TORCH_LIB": ROOT,
        "CMAKE_CUDA_COMPILER": shutil.which("nvcc"),
    }
    command = [cmake, "-S", ROOT, "-B", tmp_path, *(f"-D{k}={v}" for k, v in options.items())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_cuda_wish_is_honoured(tmp_path):
    """GFAST_CUDA=1 fails loudly where CUDA cannot be built, and says why; nonsense is refused."""
    import torch

    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    wishes = {"maybe": "GFAST_CUDA='maybe' is not one of auto, 0, 1"}
    if torch.version.cuda is None:
        wishes["1"] = "GFAST_CUDA=1, but torch"
    for wish, message in wishes.items():
        env = {**os.environ, "GFAST_CUDA": wish}
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
        assert result.returncode != 0 and message in result.stderr, result.stdout + result.stderr
