# Worldline on NVIDIA GPUs; see docs/install.md.
# The wheel of torch brings the CUDA libraries: an image of CUDA would hold them twice.
FROM python:3.12-slim

# Triton builds the launchers of its kernels with it at the first run
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# the version that the GPU tests run with; pyproject.toml allows any from 2.11
ARG TORCH=2.11.0
RUN pip install --no-cache-dir "torch==$TORCH"

COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir /source && rm -rf /source

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["worldline"]
CMD ["doctor"]
