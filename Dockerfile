# Two images of one source: `api` (API server, ingest, migrations; no torch) and `worker` (models). Neither runs as root.
#   docker build --target api --tag basic-api .
#   docker build --target worker --tag basic-worker .
FROM python:3.11.13-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN groupadd --gid 10001 basic \
    && useradd --uid 10001 --gid basic --create-home --home-dir /var/lib/basic basic
WORKDIR /opt/basic
COPY constraints.txt ./

FROM base AS api
COPY pyproject.toml setup.py README.md LICENSE ./
COPY basic_batch basic_batch
COPY jobs jobs
COPY storage storage
COPY migrations migrations
COPY worker worker
RUN pip install --constraint constraints.txt ".[api,otel,postgres]"
USER 10001:10001
ENV BASIC_DATA_DIR=/var/lib/basic BASIC_LOG_FORMAT=json
CMD ["basic", "api"]

FROM base AS worker
# gcc compiles the CPU kernels for the processor it runs on, and Triton's launchers where there is a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml setup.py README.md LICENSE ./
COPY basic_batch basic_batch
COPY jobs jobs
COPY storage storage
COPY migrations migrations
COPY worker worker
RUN pip install --constraint constraints.txt ".[otel,postgres,worker]"
USER 10001:10001
ENV BASIC_DATA_DIR=/var/lib/basic BASIC_CACHE_DIR=/var/lib/basic/cache HF_HOME=/var/lib/basic/hub BASIC_LOG_FORMAT=json
CMD ["basic", "worker"]
