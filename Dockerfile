# Everything of the project for a GPU node, or any machine with containers:
#
#   docker build --build-arg COMMIT="$(git rev-parse HEAD)" -t immunity .
#   docker run --rm immunity --help
#
# Of CUDA, the base holds what lets containers see the GPU, and refuses a driver that is too old for 13.0;
# torch's wheels bring the libraries. Any Debian or Ubuntu with Python 3.11 to 3.13 will do.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE_IMAGE}

# g++ and Python's headers: Triton and torch.compile build what they launch. tini hands SIGTERM on
# to Python, which the kernel would not let end as process 1. make installs the packages.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ make python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/immunity/.venv/bin:$PATH
WORKDIR /opt/immunity

# The packages of the lock, by the Makefile's own rule; cu126: PyTorch for GPUs of 2017, as V100
ARG TORCH=""
COPY Makefile requirements.lock ./
RUN UV_NO_CACHE=1 make PYTHON=python3 TORCH="$TORCH" .venv/.packages

# Editable: presets, notebooks and pretrained weights are found beside the library. CIFAR, where it
# is downloaded, goes to the mounted folder
COPY . .
RUN ln -s /results/data data \
    && UV_NO_CACHE=1 make .venv/.installed \
    && python -m compileall -q immunity_lib study \
    && find . ! -perm -a=r -exec chmod a+rX {} +

ARG COMMIT=""
ENV IMMUNITY_COMMIT=$COMMIT \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

LABEL org.opencontainers.image.title="Immunity" \
    org.opencontainers.image.description="A reproducible companion to arXiv 2402.18787" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.revision="$COMMIT"

USER 1000:1000
EXPOSE 8888
ENTRYPOINT ["tini", "--", "/opt/immunity/container/entry.sh"]
CMD ["reproduce"]
