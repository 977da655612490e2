# CPU image (default):
#   docker build -t cosmos_posttrain .
# GPU image, on NVIDIA's PyTorch image, whose torch, transformer-engine and apex stay as they are:
#   docker build -t cosmos_posttrain:gpu --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3 .
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

# EXTRAS: extras of pyproject.toml, such as "video2world,wandb".
# TORCH_INDEX_URL: package index for torch alone, used only where the base image has none.
ARG EXTRAS=""
ARG TORCH_INDEX_URL=""

# torch.compile, which megatron-core's fused functions use, calls a C++ compiler at run time.
RUN command -v g++ > /dev/null \
    || (apt-get update && apt-get install --yes --no-install-recommends g++ make \
        && rm -rf /var/lib/apt/lists/*)

WORKDIR /workspace/cosmos_posttrain
COPY . .
RUN PIP_NO_CACHE_DIR=1 scripts/install.sh

CMD ["python", "-m", "cosmos_posttrain.doctor"]
