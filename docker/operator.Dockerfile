# The operator: python -m distill_operator. No tensor library, no storage client. `make images` builds it.
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
# Libraries look up the user's name and folder.
RUN useradd --uid 65532 --user-group --no-create-home --home-dir /tmp --no-log-init --shell /usr/sbin/nologin nonroot
ENV PATH=/opt/venv/bin:/opt/vpmoe/bin:$PATH PYTHONPATH=/opt/vpmoe HOME=/tmp
# The operator makes requests with the Kubernetes client's connection alone (connection.py): the typed methods and objects are loaded
# on demand, and take 100 MB.
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,source=docker/install.sh,target=/build/install.sh \
    --mount=type=bind,source=docker/operator.lock,target=/build/operator.lock \
    --mount=type=cache,target=/cache \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    sh /build/install.sh /build/operator.lock \
    && for half in kubernetes kubernetes/aio; do \
        rm -r /opt/venv/lib/python3.12/site-packages/$half/client/api /opt/venv/lib/python3.12/site-packages/$half/client/models/__pycache__; \
    done
COPY --from=code /opt/vpmoe /opt/vpmoe
WORKDIR /opt/vpmoe
USER 65532:65532
ARG COMMIT VERSION BASE_NAME BASE_DIGEST
LABEL org.opencontainers.image.title="vpMoE operator" \
      org.opencontainers.image.description="Runs DistillRuns on Kubernetes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT" \
      org.opencontainers.image.base.name="$BASE_NAME" \
      org.opencontainers.image.base.digest="$BASE_DIGEST"
CMD ["python", "-m", "distill_operator", "--help"]
