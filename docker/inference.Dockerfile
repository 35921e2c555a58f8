# Models in vLLM: python -m jobs.rescore, jobs.teacher, jobs.sampler, jobs.evaluate, vllm serve; and jobs.train of a TeacherForced stage,
# whose teachers (jobs.forced_teacher) are in vLLM beside the ranks. `make images` builds it.
# VARIANT: cuda, or cpu for clusters without GPUs.
ARG BASE
# hadolint ignore=DL3006
FROM ${BASE} AS tools
# The registry's settings and certificates are secrets of the build: no layer has them.
RUN --mount=type=bind,source=docker/tools.lock,target=/tools.lock \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    python3.12 -m venv /opt/tools \
    && PIP_CERT=/etc/ssl/certs/ca-certificates.crt /opt/tools/bin/pip install --no-cache-dir --require-hashes -r /tools.lock

FROM tools AS code
COPY pyproject.toml README.md LICENSE /source/
COPY vpmoe /source/vpmoe
COPY jobs /source/jobs
COPY operator /source/operator
# The code's own folder, with its metadata: vLLM finds the student by its entry point. Bytecode is checked against nothing when it is
# loaded: the files do not change, and equal code gives equal bytecode.
RUN /opt/tools/bin/uv venv --quiet --python /usr/local/bin/python3.12 /opt/venv \
    && /opt/tools/bin/uv build --quiet --offline --wheel --no-build-isolation --python /opt/tools --out-dir /wheel /source \
    && /opt/tools/bin/uv pip install --quiet --offline --no-deps --python /opt/venv --target /opt/vpmoe /wheel/*.whl \
    && python3.12 -m compileall -q --invalidation-mode unchecked-hash /opt/vpmoe
ARG COMMIT
RUN echo "$COMMIT" >/opt/vpmoe/commit && grep --quiet --line-regexp --extended-regexp '[0-9a-f]{40}([0-9a-f]{24})?' /opt/vpmoe/commit

# hadolint ignore=DL3006
FROM ${BASE}
# Triton compiles the launchers of its kernels when they are first used. Versions are the base image's release.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 65532 --user-group --no-create-home --home-dir /tmp --no-log-init --shell /usr/sbin/nologin nonroot
ENV PATH=/opt/venv/bin:/opt/vpmoe/bin:$PATH PYTHONPATH=/opt/vpmoe HOME=/tmp
# What trainer and inference have in common, torch above all, is one layer of both.
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,source=docker/install.sh,target=/build/install.sh \
    --mount=type=bind,source=docker/shared.lock,target=/build/shared.lock \
    --mount=type=cache,target=/cache \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    sh /build/install.sh /build/shared.lock
# vLLM for CPUs is linked with it.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
ARG VARIANT=cuda
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,source=docker/install.sh,target=/build/install.sh \
    --mount=type=bind,source=docker/inference-cuda.lock,target=/build/inference-cuda.lock \
    --mount=type=bind,source=docker/inference-cpu.lock,target=/build/inference-cpu.lock \
    --mount=type=cache,target=/cache \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    sh /build/install.sh "/build/inference-$VARIANT.lock"
# See trainer.Dockerfile.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=code /opt/vpmoe /opt/vpmoe
WORKDIR /opt/vpmoe
USER 65532:65532
ARG COMMIT VERSION BASE_NAME BASE_DIGEST
LABEL org.opencontainers.image.title="vpMoE inference" \
      org.opencontainers.image.description="Teacher, sampler and evaluation of vpMoE in vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT" \
      org.opencontainers.image.base.name="$BASE_NAME" \
      org.opencontainers.image.base.digest="$BASE_DIGEST"
