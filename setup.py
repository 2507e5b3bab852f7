"""Build the C extension; everything else stands in pyproject.toml."""

import os
import sys
import sysconfig
from pathlib import Path

import numpy
from setuptools import Extension, setup

# Products and sums stay where they are written, so that every instruction set
# gives the same bits; errno and traps are nobody's business here.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Wconversion", "-Wshadow"]
FLAGS += ["-g0"]  # builds take less time; POSENC_CFLAGS=-g brings it back

# As system headers, so that our warnings are about our code.
HEADERS = ["-isystem", numpy.get_include()]
HEADERS += ["-isystem", sysconfig.get_path("include")]

use_openmp = os.environ.get("POSENC_OPENMP", "1") != "0" and sys.platform == "linux"
openmp = ["-fopenmp"] if use_openmp else []
extra = os.environ.get("POSENC_CFLAGS", "").split()  # e.g. -Werror, sanitizers

setup(
    # Objects of an earlier build may come from other settings of the environment.
    # An editable install by path: a folder called posenc beside a script, such as the
    # clone itself, would otherwise be taken for the package.
    options={"build_ext": {"force": True}, "editable_wheel": {"mode": "compat"}},
    ext_modules=[
        Extension(
            "posenc._core",
            sources=sorted(map(str, Path("csrc").glob("*.c"))),
            depends=sorted(map(str, Path("csrc").glob("*.[hi]*"))),
            extra_compile_args=HEADERS + FLAGS + openmp + extra,
            extra_link_args=openmp + extra,
        )
    ],
)
