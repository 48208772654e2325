# Two images of one source: `api` (API server, ingest, migrations; no torch) and `worker` (models). Neither runs as root.
#   docker build --target api --tag basic-api:0.1.0 .
#   docker build --target worker --tag basic-worker:0.1.0 .
# Packages come before our code, so that a change of code keeps their layers: torch and CUDA take 5 GB.
#
# A newer base image: its digest is what `docker buildx imagetools inspect python:3.11.13-slim-bookworm` prints.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1
FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN groupadd --gid 10001 basic \
    && useradd --uid 10001 --gid basic --create-home --home-dir /var/lib/basic basic
WORKDIR /opt/basic

FROM base AS api
# Each wheel must have a hash that the file names: `make lock` writes it.
COPY requirements/api.txt requirements/
RUN pip install --require-hashes --only-binary :all: --requirement requirements/api.txt
COPY pyproject.toml setup.py README.md LICENSE ./
COPY basic_batch basic_batch
COPY jobs jobs
COPY storage storage
COPY migrations migrations
COPY worker worker
RUN pip install --no-deps --no-build-isolation .
USER 10001:10001
ENV BASIC_DATA_DIR=/var/lib/basic BASIC_LOG_FORMAT=json
CMD ["basic", "api"]

FROM base AS worker
# gcc compiles the CPU kernels for the processor it runs on, and Triton's launchers where there is a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/worker.txt requirements/
RUN pip install --require-hashes --only-binary :all: --requirement requirements/worker.txt
COPY pyproject.toml setup.py README.md LICENSE ./
COPY basic_batch basic_batch
COPY jobs jobs
COPY storage storage
COPY migrations migrations
COPY worker worker
RUN pip install --no-deps --no-build-isolation .
USER 10001:10001
ENV BASIC_DATA_DIR=/var/lib/basic BASIC_CACHE_DIR=/var/lib/basic/cache HF_HOME=/var/lib/basic/hub BASIC_LOG_FORMAT=json
CMD ["basic", "worker"]
