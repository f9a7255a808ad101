# infer.serve on a GPU or TPU host, as a user without privileges. See docs/serving.md.
#
#     docker build --build-arg EXTRA=cuda --tag tarsier-serve .      # or EXTRA=tpu
#     docker run --gpus all --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#         --volume tarsier-cache:/home/tarsier/.cache --volume /models:/models:ro --publish 127.0.0.1:8000:8000 \
#         --volume "$PWD/api_key:/run/secrets/api_key:ro" tarsier-serve --model /models/Tarsier2-Recap-7b
FROM python:3.12-slim

ARG EXTRA=cuda

RUN useradd --create-home --uid 10001 tarsier \
    && install --directory --owner tarsier /home/tarsier/.cache
WORKDIR /app
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY tarsier_jax tarsier_jax
COPY infer infer
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve,${EXTRA}]"

USER tarsier
VOLUME /home/tarsier/.cache
EXPOSE 8000
# Only /health is answered without the key. The model is loaded before the server listens.
HEALTHCHECK --interval=30s --timeout=5s --start-period=20m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "infer.serve", "--host", "0.0.0.0", "--api_key_file", "/run/secrets/api_key"]
