# Every daemon with torch and CUDA 13.0 (driver 580 or newer): `serve`, `workers`. From the root of
# the repository:
#   docker build -f deploy/images/worker.Dockerfile -t lockstep-worker .
# For a build that can be repeated, give the base by digest, as for the coordinator's image.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY constraints/cuda.txt constraints/cuda.txt
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY tpcomm tpcomm
COPY worker worker
COPY coordinator coordinator
COPY lockstep lockstep
COPY bench bench
RUN python -m venv /opt/lockstep \
    && /opt/lockstep/bin/pip install --no-cache-dir --constraint constraints/cuda.txt setuptools \
    && /opt/lockstep/bin/pip install --no-cache-dir --constraint constraints/cuda.txt \
        --no-build-isolation .

FROM ${PYTHON_IMAGE}
# Triton compiles the launchers of its kernels with the system's compiler. Their versions are those
# of the base image's Debian release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/lockstep /opt/lockstep
# Which of the host's GPU features the container toolkit passes in.
ENV PATH=/opt/lockstep/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 50051 9851
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=360s --retries=6 \
    CMD ["lockstep", "health", "--service", "liveness"]
ENTRYPOINT ["lockstep"]
CMD ["serve"]
