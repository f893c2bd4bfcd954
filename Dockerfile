# Four images from one file:
#   api          lorry api, lorry migrate: no torch
#   worker       lorry worker, lorry engine on an NVIDIA GPU; CUDA comes with torch, the driver from the host
#   cpu          the same without a GPU
#   tensorboard  looks at the runs' TensorBoard files
# docker compose builds what it needs; by hand: docker build --target worker -t lorry-worker .
#
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL are pip's, for those who have a package index of their own. `cpu` needs the
# second: PyTorch's index of CPU wheels, whose address is on PyTorch's page "Get started" (pip, CPU).

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# --- what every image is made from ---------------------------------------------------------------------------------

FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 lorry \
    && useradd --uid 10001 --gid lorry --create-home lorry \
    && install -d -o lorry -g lorry /data /hub
ENV PATH=/opt/lorry/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORRY_DATA_DIR=/data \
    HF_HOME=/hub
WORKDIR /home/lorry

# --- environments: each lock whole -------------------------------------------------------------------------------------

FROM ${PYTHON_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY worker worker
COPY migrations migrations
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheel .
RUN python -m venv /opt/lorry

FROM build AS build-api
COPY locks/api.txt locks/s3.txt locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/lorry/bin/pip install --no-deps --only-binary :all: -r locks/api.txt -r locks/s3.txt \
    && /opt/lorry/bin/pip install --no-deps /wheel/*.whl

FROM build AS build-worker
COPY scripts/gguf-tools scripts/
COPY locks/gpu.txt locks/s3.txt locks/gguf.txt locks/gguf-converter.txt locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/lorry/bin/pip install --no-deps --only-binary :all: -r locks/gpu.txt -r locks/s3.txt \
    && scripts/gguf-tools /opt/lorry/bin/python \
    && /opt/lorry/bin/pip install --no-deps /wheel/*.whl

FROM build AS build-cpu
COPY scripts/gguf-tools scripts/
COPY locks/cpu.txt locks/s3.txt locks/gguf.txt locks/gguf-converter.txt locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/lorry/bin/pip install --no-deps --only-binary :all: -r locks/cpu.txt -r locks/s3.txt \
    && { /opt/lorry/bin/python -c 'import torch' \
         || { echo "PyPI's torch is built for CUDA: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels" >&2; exit 1; }; } \
    && scripts/gguf-tools /opt/lorry/bin/python \
    && /opt/lorry/bin/pip install --no-deps /wheel/*.whl

FROM build AS build-tensorboard
COPY locks/tensorboard.txt locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/lorry/bin/pip install --no-deps --only-binary :all: -r locks/tensorboard.txt

# --- images ----------------------------------------------------------------------------------------------------------

FROM runtime AS api
COPY --from=build-api /opt/lorry /opt/lorry
USER 10001:10001
EXPOSE 8321
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s CMD ["python", "-m", "service.healthcheck", "api"]
CMD ["lorry", "api"]

FROM runtime AS tensorboard
COPY --from=build-tensorboard /opt/lorry /opt/lorry
USER 10001:10001
EXPOSE 6006
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:6006/', timeout=8)"]
CMD ["tensorboard", "--logdir", "/data/jobs", "--host", "0.0.0.0", "--port", "6006"]

# Triton compiles a small C file when its first kernel runs, so there is a compiler; bitsandbytes and Unsloth need none.
FROM runtime AS compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

FROM compiler AS cpu
COPY --from=build-cpu /opt/lorry /opt/lorry
USER 10001:10001
EXPOSE 8322
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s CMD ["python", "-m", "service.healthcheck", "worker"]
CMD ["lorry", "worker"]

FROM compiler AS worker
COPY --from=build-worker /opt/lorry /opt/lorry
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 8322
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s CMD ["python", "-m", "service.healthcheck", "worker"]
CMD ["lorry", "worker"]
