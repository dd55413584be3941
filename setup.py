"""Builds gfast._C with CMake and Ninja; everything else about the package is in pyproject.toml.

GFAST_EXTENSION=0 leaves it out: the package then is pure Python, and its Triton kernels and plain PyTorch serve all.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def toolkit() -> Path | None:
    """The first CUDA toolkit that has both a compiler and headers (a bare nvcc on PATH is not enough)."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    for home in [Path(h) for h in homes + ["/usr/local/cuda"] if h]:
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def choose_cuda() -> tuple[Path | None, str]:
    """(toolkit or None, why): CUDA needs torch's CUDA build and a toolkit of the same major version."""
    import torch

    wish = os.environ.get("GFAST_CUDA", "auto").lower()
    if wish not in ("auto", "0", "1"):
        sys.exit(f"gfast: GFAST_CUDA={wish!r} is not one of auto, 0, 1")
    home, reason = toolkit(), ""
    if wish == "0":
        return None, "switched off by GFAST_CUDA=0"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif home is None:
        reason = "no CUDA toolkit with nvcc and headers was found (set CUDA_HOME)"
    else:
        text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release (\d+)\.(\d+)", text)
        release = ".".join(found.groups()) if found else "unknown"
        if release.split(".")[0] == torch.version.cuda.split(".")[0]:
            return home, f"torch has CUDA {torch.version.cuda}, toolkit {release} at {home}"
        reason = f"torch has CUDA {torch.version.cuda} but the toolkit at {home} is {release}: the majors must match"
    if wish == "1":
        sys.exit(f"gfast: GFAST_CUDA=1, but {reason}")
    return None, reason


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / ext.name
        cuda, reason = choose_cuda()
        print(f"gfast: building {'with' if cuda else 'without'} CUDA ({reason})", flush=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "GFAST_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "GFAST_INCLUDE": ";".join([*include_paths(), sysconfig.get_paths()["include"]]),
            "GFAST_TORCH_LIB": ";".join(library_paths()),
            "GFAST_TORCH_VERSION": torch.__version__,
            "GFAST_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "GFAST_CUDA": "ON" if cuda else "OFF",
            "GFAST_CUDA_REASON": reason,
        }
        if cuda:
            options["CMAKE_CUDA_COMPILER"] = cuda / "bin/nvcc"
            options["GFAST_CUDA_HOME"] = cuda
        env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        cmake = shutil.which("cmake", path=env["PATH"]) or sys.exit("gfast: no cmake; pip install cmake ninja")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        configure = [cmake, "-S", ROOT, "-B", work, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run([*map(str, configure)], check=True, env=env)
        subprocess.run([cmake, "--build", str(work), "--parallel", jobs], check=True, env=env)


if os.environ.get("GFAST_EXTENSION", "1") not in ("0", "1"):
    sys.exit(f"gfast: GFAST_EXTENSION={os.environ['GFAST_EXTENSION']!r} is not one of 0, 1")

setup(
    ext_modules=[] if os.environ.get("GFAST_EXTENSION") == "0" else [Extension("gfast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=find_namespace_packages(include=["gfast", "gfast.*"]),
)
