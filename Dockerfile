# cabochon serve in a container:  docker build -t cabochon . && docker run --rm -p 8000:8000 cabochon
# Arguments after the image's name go to `cabochon serve`; those of vllm/vllm-openai work as they are.
# For NVIDIA GPUs build with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 and run with --gpus all.
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends build-essential cmake && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/cabochon
ENV PATH=/opt/cabochon/bin:$PATH
RUN pip install --no-cache-dir --index-url ${TORCH_INDEX} torch
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir '.[server]'

FROM python:3.12-slim
# g++ is for kernels that torch or Triton may compile on first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home cabochon
COPY --from=build /opt/cabochon /opt/cabochon
ENV PATH=/opt/cabochon/bin:$PATH
USER cabochon
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=5m \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=3)"
ENTRYPOINT ["cabochon", "serve", "--host", "0.0.0.0"]
