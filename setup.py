"""Build the C extension; everything else stands in pyproject.toml."""

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


class BuildAtOnce(build_ext):
    """Compile the sources side by side: each instruction set takes its time."""

    def build_extension(self, extension):
        """Build with a compiler that is asked for one source at a time."""
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda s: compile_in_turn([s], **options), sources)
                return [path for paths in made for path in paths]

        self.compiler.compile = compile_at_once
        super().build_extension(extension)


setup(
    cmdclass={"build_ext": BuildAtOnce},
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
