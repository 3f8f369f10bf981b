# The coordinator alone, without torch. From the root of the repository:
#   docker build -f deploy/images/coordinator.Dockerfile -t lockstep-coordinator .
# For a build that can be repeated to the bit, give the base by digest:
#   --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY deploy/images/coordinator.requirements.txt ./
RUN python -m venv /opt/lockstep \
    && /opt/lockstep/bin/pip install --no-cache-dir --no-deps --require-hashes --only-binary=:all: \
        -r coordinator.requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY tpcomm tpcomm
COPY worker worker
COPY coordinator coordinator
COPY lockstep lockstep
COPY bench bench
RUN /opt/lockstep/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && /opt/lockstep/bin/pip uninstall --yes setuptools pip

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/lockstep /opt/lockstep
ENV PATH=/opt/lockstep/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
USER 10001:10001
EXPOSE 50051 9851
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=6 \
    CMD ["lockstep", "health", "--service", "liveness"]
ENTRYPOINT ["lockstep"]
CMD ["coordinator"]
