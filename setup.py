"""Builds csrc/*.cpp into the extension module engine._csrc, and nothing else; metadata lives in pyproject.toml.

No -march=native: the wheel must run on any machine of its architecture. No fused multiply-add either: the blend order
compares sums of rounded products, and fusing them changes which dataset wins a near tie.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

extension = Pybind11Extension(
    "engine._csrc",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.hpp")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-ffp-contract=off", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(ext_modules=[extension])
