# A GPU runner: build, prove and publish. The CUDA libraries come with torch; the host needs a driver and the NVIDIA
# container toolkit. docs/how-to/release-from-ci.md has the command.
FROM python:3.11-slim-trixie

# bubblewrap confines the loaders, gcc compiles Triton's launchers, git-lfs serves git remotes. Debian removes a version
# from its mirrors as soon as it has a newer one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap gcc git git-lfs libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/gptq-packager
COPY locks/build.txt locks/build.txt
RUN pip install --no-cache-dir --require-hashes --only-binary=:all: -r locks/build.txt
COPY LICENSE README.md pyproject.toml ./
COPY packager packager
COPY templates templates
COPY recipes/recipe.schema.json recipes/recipe.schema.json
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation .

# hadolint ignore=DL3059
RUN useradd --create-home --uid 1000 builder
USER 1000
WORKDIR /work
ENTRYPOINT ["packager"]
