"""Build the C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer and run the tests that reach it.

``tools/sanitize.py [pytest arguments]``; without a path the tests listed in ``TESTS``. Needs g++ or clang++ (``$CXX``),
CMake and Ninja. The build lies in ``build/sanitize``; the installed one stays as it is.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
SANITIZERS = "-fsanitize=address,undefined"
TESTS = ["tests/ops", "tests/sparse", "tests/serialization", "tests/io/test_lzf.py", "tests/io/test_pcd.py"]
_EXTENSION = "PC3D_SANITIZED_EXTENSION"


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print((__doc__ or "").strip())
        return 0
    if not any(Path(argument.split("::")[0]).exists() for argument in arguments):
        arguments = [*TESTS, *arguments]
    # Python's output is captured, the sanitizers' reports are not.
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", *arguments]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONMALLOC": "malloc"}
    environment |= {
        _EXTENSION: str(build()),
        # The C++ runtime too: without it the sanitizer cannot intercept the exceptions that bindings throw.
        "LD_PRELOAD": " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    return subprocess.call([*pytest, "-p", "tools.sanitize", "-o", "timeout=0"], cwd=ROOT, env=environment)


def build() -> Path:
    """The extension with the sanitizers compiled in."""
    nanobind = subprocess.check_output([sys.executable, "-m", "nanobind", "--cmake_dir"], text=True).strip()
    flags = f"{SANITIZERS} -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    settings = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "CMAKE_CXX_FLAGS": flags,
        "CMAKE_MODULE_LINKER_FLAGS": SANITIZERS,
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind,
    }
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.check_call(["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *definitions])
    subprocess.check_call(["cmake", "--build", BUILD])
    return next(BUILD.glob("_C*.so"))


def runtime(name: str) -> str:
    """Path of one of the compiler's own libraries."""
    return subprocess.check_output([os.environ.get("CXX", "c++"), f"-print-file-name={name}"], text=True).strip()


def _use_sanitized_extension(path: str) -> None:
    import pc3d  # loads torch first, whose OpenMP runtime the extension shares

    spec = importlib.util.spec_from_file_location("pc3d._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["pc3d._C"] = module
    print(f"pc3d {pc3d.__version__} with {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
elif _EXTENSION in os.environ:  # loaded as a pytest plugin
    _use_sanitized_extension(os.environ[_EXTENSION])
