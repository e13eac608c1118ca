# syntax=docker/dockerfile:1
# comfyd on top of any image with ComfyUI in /opt/ComfyUI and Python 3.11 to 3.13 on PATH. Built from the repository's
# root: docker build -f docker/api.dockerfile --build-arg BASE_IMAGE=<yours> .

# docker/build passes the tag of the base that belongs to it.
ARG BASE_IMAGE=comfyd:comfy0.3.64-torch2.8.0-cuda12.8-runtime

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build
# Root, for what the next stage copies; this one is not what runs.
# hadolint ignore=DL3002
USER 0
WORKDIR /src
COPY requirements/build.txt requirements/runtime.txt requirements/
# comfyd's Python packages live apart from ComfyUI's, so that neither can change the other's.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/comfyd-build \
 && /opt/comfyd-build/bin/python -m pip install --require-hashes --requirement requirements/build.txt \
 && python3 -m venv /opt/comfyd \
 && /opt/comfyd-build/bin/python -m pip wheel --require-hashes --no-build-isolation --no-deps --wheel-dir /opt/wheels \
    --requirement requirements/runtime.txt \
 && /opt/comfyd/bin/python -m pip install --no-deps --no-index /opt/wheels/*.whl
COPY LICENSE NOTICE README.md pyproject.toml ./
COPY comfyd comfyd
RUN /opt/comfyd-build/bin/python -m hatchling build -t wheel -d dist \
 && /opt/comfyd/bin/python -m pip install --no-deps --no-index dist/*.whl \
 && /opt/comfyd/bin/python -m pip uninstall --yes pip \
 && /opt/comfyd/bin/comfyd --version

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS api
USER 0
COPY --from=build /opt/comfyd /opt/comfyd
# A link and not a PATH entry: comfyd starts ComfyUI with the first python3 on PATH, and that has to stay ComfyUI's.
# The user is there already in images of docker/comfyui.dockerfile.
RUN ln -s /opt/comfyd/bin/comfyd /usr/local/bin/comfyd \
 && { getent passwd 10001 > /dev/null \
      || { groupadd --gid 10001 comfy && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash comfy; }; } \
 && mkdir -p /var/lib/comfyd /workflows \
 && chown 10001:10001 /var/lib/comfyd

# BASE is empty as this is no ai-dock image. ComfyUI may take five minutes to load its nodes, until it has failed.
ENV BASE="" \
    COMFY_HOME=/opt/ComfyUI \
    PORT=3000 \
    STARTUP_CHECK_INTERVAL_S=1 \
    STARTUP_CHECK_MAX_TRIES=300 \
    STATE_DIR=/var/lib/comfyd

ARG API_VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="comfyd" \
      org.opencontainers.image.description="The daemon that turns ComfyUI into a production API" \
      org.opencontainers.image.version="${API_VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="MIT AND GPL-3.0-only"

WORKDIR /opt/ComfyUI
USER 10001:10001
EXPOSE 3000
# Docker's own grace is 10 s: stop with --stop-timeout 45, or what is in flight has less than DRAIN_TIMEOUT_S.
STOPSIGNAL SIGTERM
# The start period covers the start-up budget above and a warm-up.
HEALTHCHECK --interval=10s --timeout=5s --start-period=360s --retries=3 CMD ["comfyd", "healthcheck"]
# comfyd reaps what ComfyUI's nodes leave behind, so PID 1 needs no tini; `docker run --init` does no harm either.
CMD ["comfyd"]
