"""Install the library, the scripts as importable modules, and the pocket model: pip install ."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "szt_utils" / "__init__.py").read_text())[1]

setup(
    name="szt-utils",
    version=VERSION,
    description="Safe-Zone Training for textual inversion: learn concepts from images that may be poisoned",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["szt_utils", "szt_utils.*"]),
    py_modules=["textual_inversion_szt", "poison_images", "purify_images", "precompute_masks",
                "diagnose_images", "sensitivity_maps", "evaluate", "export_dataset"],
    package_data={"szt_utils": ["*.html", "*.json", "py.typed"], "szt_utils.pocket": ["weights-0.2/**/*"]},
    install_requires=(ROOT / "requirements.txt").read_text().split(),
    extras_require={"test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.8", "scikit-image", "peft",
                             "opencv-python-headless"],
                    "heic": ["pillow-heif"], "grabcut": ["opencv-python-headless"],
                    "metrics": ["torch-fidelity"], "quantize": ["torchao", "bitsandbytes"]},
)
