"""Packaging: `pip install .` gives the package, its configuration files and the command `nemo-cascade`."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DIRECT = (  # what our own lines import; everything else in requirements/base.txt is what these ask for
    "einops fastapi httpx jinja2 jsonschema_rs leptonai math-verify megatron-core nemo_run nemo-toolkit numpy "
    "omegaconf psutil py3langid pyyaml rapidfuzz rich safetensors syllapy tensorboard tokenizers transformers "
    "unidiff uvicorn"
).split()


def pinned(file: str) -> dict[str, str]:
    """`name==version` lines of a requirements file by normalised name, so that a version is written down once."""
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    pins = [line for line in lines if "==" in line and not line.startswith("#")]
    return {normal(line.split("==")[0]): line for line in pins}


def normal(name: str) -> str:
    """The registry's spelling of a distribution name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_extra(pin: str) -> str:
    """NeMo's core classes are an extra of its distribution."""
    return pin.replace("nemo-toolkit==", "nemo-toolkit[core]==")


BASE = pinned("base.txt")
TRACKERS = pinned("trackers.txt")
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "nemo_cascade" / "__init__.py").read_text()).group(1)

setup(
    name="nemo_cascade",
    version=VERSION,
    description="Nemotron-Cascade 2, end to end: SFT, cascaded RL and multi-domain on-policy distillation",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["nemo_cascade", "nemo_cascade.*"]), "nemo_cascade.conf"],
    # The configuration lives at the top of the repository, where people look for it; installed, inside the package.
    package_dir={"nemo_cascade.conf": "conf"},
    package_data={
        "nemo_cascade": [
            *("models/nano/**/*", "models/*.c", "models/*.h", "data/*.jinja", "reward/office_tables/*.csv"),
            *("cascade/*.html", "cascade/*.css", "cascade/*.js"),
        ],
        "nemo_cascade.conf": ["**/*.yaml", "*.md"],
    },
    install_requires=["torch>=2.6", *(with_extra(BASE[normal(name)]) for name in DIRECT)],
    extras_require={
        # On NVIDIA's containers these are there already; building them elsewhere takes an hour and a CUDA toolkit.
        "gpu": ["transformer-engine[pytorch]==2.11.*", "mamba-ssm>=2.2.6", "causal-conv1d>=1.5.3"],
        # The wheel lives in NVIDIA's container and index: its own process, its own torch.
        "trtllm": ["tensorrt-llm>=1.3.0rc21"],
        "mlflow": [TRACKERS["mlflow-skinny"]],
        "dev": [line for file in ("trackers.txt", "dev.txt") for line in pinned(file).values()],
    },
    entry_points={"console_scripts": ["nemo-cascade=nemo_cascade.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
