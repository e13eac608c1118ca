# syntax=docker/dockerfile:1
# Add comfyd to your own ComfyUI image: the one-file program of a release, no Python needed.
# Its ComfyUI is in /opt/ComfyUI; if it is elsewhere, set COMFY_HOME. Runs as whatever user your image runs as.
FROM your-registry/your-comfyui:1.0

ARG COMFYD_VERSION=0.1.0
# Of the release's SHA256SUMS; the build stops if the download is another file.
ARG COMFYD_SHA256
# https://github.com/<owner>/<repository>/releases
ARG COMFYD_RELEASES
# hadolint sees no address in a variable.
# hadolint ignore=DL3020
ADD --checksum=sha256:${COMFYD_SHA256} --chmod=0755 \
    ${COMFYD_RELEASES}/download/v${COMFYD_VERSION}/comfyd-linux-x86_64 /usr/local/bin/comfyd

# How many seconds your ComfyUI may take to load its nodes, until it has failed.
ENV STARTUP_CHECK_MAX_TRIES=300
EXPOSE 3000
HEALTHCHECK --start-period=360s CMD ["comfyd", "healthcheck"]
CMD ["comfyd"]
