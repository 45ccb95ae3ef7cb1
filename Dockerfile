# The cluster image: NVIDIA's container brings torch, CUDA, NCCL, apex, Transformer Engine and mamba-ssm; this adds what is
# ours. Another base (an older NeMo container, a CPU image) is one argument away:
#   docker build --build-arg BASE_IMAGE=nvcr.io/nvidia/nemo:25.11 -t nemo_cascade .
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
# The base image's torch, CUDA bindings and Megatron stay as NVIDIA built them; only what is missing is added, at our pins.
RUN python3 tools/image_requirements.py requirements/base.txt > /tmp/missing.txt \
    && python3 -m pip install --no-cache-dir --no-deps -r /tmp/missing.txt \
    && rm /tmp/missing.txt

COPY setup.py pyproject.toml README.md LICENSE ./
COPY conf conf
COPY nemo_cascade nemo_cascade
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation .

ENV TORCHDYNAMO_DISABLE=1
WORKDIR /workspace
ENTRYPOINT ["nemo-cascade"]
CMD ["--help"]
