# The cluster image: NVIDIA's container brings torch, CUDA, NCCL, apex, Transformer Engine and mamba-ssm; this adds what is
# ours. Another base is one argument away, but it must bring torch for Python 3.11 or newer:
#   docker build --build-arg BASE_IMAGE=nvcr.io/nvidia/nemo:25.11 -t nemo_cascade .
#   docker run --rm nemo_cascade nemo-cascade check nano
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# bubblewrap keeps generated code inside; git is what software-engineering tasks are made of. Versions are Debian's or Ubuntu's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nemo_cascade
COPY requirements requirements
COPY tools/image_requirements.py tools/
# The base image's torch, CUDA bindings and Transformer Engine stay as NVIDIA built them; what is missing is added at our pins,
# and megatron-core and nemo-toolkit, which our lines are written against, are brought to them.
RUN python3 tools/image_requirements.py requirements/base.txt > /tmp/missing.txt \
    && python3 -m pip install --no-cache-dir --no-deps -r /tmp/missing.txt \
    && rm /tmp/missing.txt

# apex: fused optimizer kernels. NVIDIA's images have it; elsewhere it is built from NVIDIA's repository, because the package of
# that name on the public index is something else.
ARG APEX_REF=25.08
RUN python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('apex') is None)" \
    || python3 -m pip install --no-cache-dir --no-build-isolation "git+https://github.com/NVIDIA/apex@${APEX_REF}"

COPY setup.py pyproject.toml README.md LICENSE ./
COPY conf conf
COPY nemo_cascade nemo_cascade
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation .

ENV TORCHDYNAMO_DISABLE=1
WORKDIR /workspace
# No entry point: NeMo-Run's Docker and Slurm executors start their own command line in the container.
CMD ["nemo-cascade", "--help"]
