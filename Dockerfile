# One GPU: docker build -t sit-atconv . && docker run --rm --gpus all --ipc=host -v "$PWD:/work" sit-atconv sit-train
# PyTorch's wheels bring CUDA; the machine needs NVIDIA's driver and container toolkit.
FROM python:3.12-slim
# torch.compile and Triton build with a compiler
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY sit sit/
COPY atconv atconv/
RUN pip install --no-cache-dir ".[demo]"
WORKDIR /work
CMD ["sit-train", "--help"]
