# LatentKV for a CPU. Keys are needed, because a container listens to other machines:
#   docker build -t latentkv .
#   docker run --rm -p 127.0.0.1:8000:8000 -e LATENTKV_API_KEYS=change-me latentkv
#   docker run --rm -p 127.0.0.1:8000:8000 -e LATENTKV_API_KEYS=change-me -v "$PWD/model:/model:ro" latentkv serve /model --host 0.0.0.0
#   docker run --rm latentkv generate "It was a dark night"

FROM python:3.12-slim-trixie AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/latentkv
ENV PATH=/opt/latentkv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first and alone, from the index of its CPU builds: this layer stays as it is when the code changes.
RUN pip install --index-url https://download.pytorch.org/whl/cpu "torch>=2.13,<2.14"
WORKDIR /src
COPY . .
RUN pip install . && latentkv doctor

FROM python:3.12-slim-trixie
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 latentkv
COPY --from=build /opt/latentkv /opt/latentkv
ENV PATH=/opt/latentkv/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/latentkv
# Models that are fetched (.cache/huggingface) and packed weights (.cache/latentkv) are kept where a volume is mounted.
RUN mkdir .cache
VOLUME /home/latentkv/.cache
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["latentkv"]
CMD ["serve", "--host", "0.0.0.0"]
