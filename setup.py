"""Finds the packages: each top-level folder is shipped as attnzoo.<folder>. See pyproject.toml."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("experiments", "layers", "pallas_kernels", "zoo")

packages = []
for folder in FOLDERS:
  inside = find_namespace_packages(folder, exclude=["*__pycache__*"])
  packages += [f"attnzoo.{folder}", *(f"attnzoo.{folder}.{name}" for name in inside)]
setup(packages=packages, package_dir={f"attnzoo.{folder}": folder for folder in FOLDERS})
