# syntax=docker/dockerfile:1
# ComfyUI alone, as a base for docker/api.dockerfile and for images with custom nodes and models.
# The defaults below are the one place where versions are pinned: docker/build reads them from here.

ARG TORCH_VERSION=2.8.0
ARG CUDA_VERSION=12.8
# runtime, or devel: with the CUDA toolkit, which some custom nodes compile against; much larger.
ARG VARIANT=runtime

# hadolint ignore=DL3006
FROM pytorch/pytorch:${TORCH_VERSION}-cuda${CUDA_VERSION}-cudnn9-${VARIANT} AS comfyui

ARG COMFYUI_VERSION=0.3.64
# The commit of that version. A tag can be moved, a commit cannot; docker/build passes v<version> for other versions.
ARG COMFYUI_REF=637221995f7424a561bd825de3e61ea117dfe1e3
ARG COMFYUI_REPOSITORY=https://github.com/Comfy-Org/ComfyUI.git
ARG COMFY_CLI_VERSION=1.23.0

# The utilities that comfyui-api's images have, and what OpenCV needs of the system.
# No versions: Ubuntu's archive keeps only the newest of each, so that a pinned one would stop building.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
 && apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates curl git libgl1 libglib2.0-0 unzip wget

# A number and not only a name, as Kubernetes' runAsNonRoot looks at numbers; high, so that it is nobody's on the host.
RUN groupadd --gid 10001 comfy \
 && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash comfy

WORKDIR /opt/ComfyUI
RUN git init --quiet . \
 && git remote add origin "$COMFYUI_REPOSITORY" \
 && git fetch --quiet --depth 1 origin "$COMFYUI_REF" \
 && git -c advice.detachedHead=false checkout --quiet FETCH_HEAD \
 && { grep --quiet --fixed-strings "__version__ = \"$COMFYUI_VERSION\"" comfyui_version.py \
      || { echo "COMFYUI_REF $COMFYUI_REF is not ComfyUI $COMFYUI_VERSION" >&2; exit 1; }; }

# The image's own PyTorch is a constraint, so that no requirement replaces it by another build.
RUN --mount=type=cache,target=/root/.cache/pip \
    for package in torch torchvision torchaudio; do \
        python -c 'import sys, importlib.metadata as m; print(sys.argv[1], m.version(sys.argv[1]), sep="==")' "$package" \
            || exit 1; \
    done > /opt/torch-constraints.txt \
 && python -m pip install --constraint /opt/torch-constraints.txt \
        --requirement requirements.txt requests "comfy-cli==${COMFY_CLI_VERSION}" \
 && python -c 'import torch, torchaudio, torchvision'

# What ComfyUI writes at run time is the user's; its code and its Python stay root's.
RUN mkdir -p input output temp user models custom_nodes \
 && chown -R 10001:10001 input output temp user models custom_nodes

ENV COMFY_HOME=/opt/ComfyUI \
    PYTHONUNBUFFERED=1

LABEL org.opencontainers.image.title="ComfyUI" \
      org.opencontainers.image.version="${COMFYUI_VERSION}" \
      org.opencontainers.image.revision="${COMFYUI_REF}" \
      org.opencontainers.image.licenses="GPL-3.0-only"

USER 10001:10001
# No EXPOSE: ComfyUI has no access control. It listens on loopback, and comfyd is what is reached from outside.
CMD ["python", "main.py", "--listen", "127.0.0.1", "--port", "8188", "--disable-auto-launch"]
