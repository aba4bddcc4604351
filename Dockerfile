# text2img as an image: one run of the job, then exit. How to build and run it: docs/container.md
#
# Any image with Python 3.11 or newer and pip will do as a base. CUDA's libraries come with PyTorch's own
# wheel and the driver comes from the host (--gpus all), so a slim Python is enough on a GPU machine too.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# For signatures that are drawn right to left, joined or with combining marks: libfribidi. For --compile on a
# GPU, whose small starting pieces are C: a compiler. A base without apt may do without both. The versions
# are as wide as Debian's and Ubuntu's releases of these years.
RUN if command -v apt-get >/dev/null; then \
        apt-get update && apt-get install --yes --no-install-recommends \
            "gcc=4:1*" "libc6-dev=2.*" "libfribidi0=1.*" \
        && rm -rf /var/lib/apt/lists/*; \
    fi

# A number, not a name, so that Kubernetes' runAsNonRoot can tell that it is not root. The two folders are
# open to all, as /tmp is, so that `docker run --user "$(id -u)"` works as well.
RUN groupadd --gid 10001 text2img \
    && useradd --no-log-init --uid 10001 --gid 10001 --no-create-home --home-dir /cache text2img \
    && install --directory --mode=1777 --owner=10001 --group=10001 /cache /work

# The dependencies: gigabytes that change seldom, in a layer of their own. pip compiles them.
# For a small image without CUDA name PyTorch's own index of CPU builds: --build-arg PIP_EXTRA_INDEX_URL=URL
ARG PIP_EXTRA_INDEX_URL=""
COPY requirements.txt /app/requirements.txt
RUN PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore \
    python -m pip install --no-cache-dir --requirement /app/requirements.txt

# A model for runs that are not to download one: a hub id, taken as diffusers itself would take it, and
# safetensors alone (pickles can run code). Before the source, so that a change there does not fetch it again.
# A gated model needs a token, which stays out of the image: --secret id=hf_token,src=FILE
ARG BAKE_MODEL=""
ARG BAKE_REVISION=""
ARG BAKE_VARIANT=""
ARG HF_ENDPOINT
RUN --mount=type=secret,id=hf_token \
    if [ -n "${BAKE_MODEL}" ]; then \
        if [ -r /run/secrets/hf_token ]; then HF_TOKEN="$(cat /run/secrets/hf_token)" && export HF_TOKEN; fi \
        && HF_HOME=/tmp/hub python -c "import os, shutil; from diffusers import DiffusionPipeline; \
model, revision, variant = (os.environ['BAKE_' + name] or None for name in ('MODEL', 'REVISION', 'VARIANT')); \
folder = DiffusionPipeline.download(model, revision=revision, variant=variant, use_safetensors=True); \
shutil.copytree(folder, '/models/' + model)" \
        && rm -rf /tmp/*; \
    fi

# The source, owned by root: the job cannot change itself. Its bytecode is compiled here, because the user
# may not write it later, and is checked by content, so that a builder may set the files' times as it likes.
COPY LICENSE main.py /app/
COPY text2img /app/text2img
RUN find /app -not -perm -o=r -exec chmod a+rX {} + \
    && python -m compileall -q --invalidation-mode checked-hash /app

# Without a GPU a run fails at once instead of crawling on the CPU unnoticed; `-e DEVICE=cpu` is the way out,
# and `demo` takes what is there. MODEL_ID is empty, which counts as not given, unless a model was baked in.
# HOME and USER stand here for users whose number no /etc/passwd knows.
ENV DEVICE=cuda \
    MODEL_ID=${BAKE_MODEL:+/models/${BAKE_MODEL}} \
    HF_HOME=/cache/huggingface \
    COMPILE_CACHE=/cache/compile \
    LORA_CACHE=/cache/loras \
    MODEL_CACHE=/cache/models \
    HOME=/cache \
    USER=text2img \
    PYTHONUNBUFFERED=1

ARG VERSION=0.2.0
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="text2img" \
      org.opencontainers.image.description="Prompts from a database, pictures by diffusers, into a bucket" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="MIT"

# Downloaded models outlive the container: -v text2img-cache:/cache
VOLUME /cache
# Where relative paths lead, such as the demo's pictures: -v "$PWD:/work" brings them out.
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["python", "/app/main.py"]
